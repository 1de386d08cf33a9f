"""Prediction: run a model over a whole loader; the one file of this room that needs torch."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from nns_plugin.errors import CalibrationError
from nns_plugin.models.batches import batches
from nns_plugin.models.inputs import run_model
from nns_plugin.models.preserve import preserved


def predict(
    model: nn.Module, loader: Iterable[Any], progress: bool = False, expected_labels: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Logits and labels of all inputs of a loader; the model is left as it was.

    Args:
        model: Returns logits.
        loader: Yields ``(inputs, labels)``.
        progress: Whether to show a progress bar.
        expected_labels: Labels that the loader yielded before. It must yield them again in the same order, or two
            models cannot be compared on it.

    Returns:
        ``[N, outputs]`` float32 logits and ``[N]`` int64 labels, on the CPU.

    Raises:
        CalibrationError: If the loader yields no labelled inputs or other labels than expected, or if the model does
            not return finite ``[N, outputs]``.
    """
    logits, labels = [], []
    with preserved(model), torch.no_grad():
        model.eval()
        for batch in batches(loader, model, name="test loader", title="evaluating", progress=progress):
            if batch.labels is None:
                raise CalibrationError("the test loader yields inputs alone; expected (inputs, labels)")
            output = run_model(model, batch.inputs)
            if not isinstance(output, Tensor) or output.dim() != 2 or output.shape[0] != batch.size:
                raise CalibrationError(f"the model must return a tensor of shape [{batch.size}, outputs]")
            logits.append(output.float().cpu())
            labels.append(batch.labels.cpu())
    joined = torch.cat(logits)
    if not bool(torch.isfinite(joined).all()):
        raise CalibrationError("the model returns outputs that are not finite on the test data")
    truth = torch.cat(labels)
    if expected_labels is not None and not torch.equal(truth, expected_labels):
        raise CalibrationError(
            "the loader yields its inputs in another order, or other inputs, each time: models cannot be compared on "
            "them; pass a loader that does not shuffle"
        )
    return joined, truth
