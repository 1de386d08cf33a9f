"""BN recalibration: new running statistics after removal, since the old ones describe the model before it."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.optim.swa_utils import update_bn

from nns_plugin.models.batches import batches
from nns_plugin.models.inputs import run_model
from nns_plugin.models.layers import is_batch_norm
from nns_plugin.models.preserve import in_evaluation


def recalibrate_batch_norms(model: nn.Module, loader: Iterable[Any], progress: bool = False) -> None:
    """Recompute the running mean and variance of every batch norm with ``torch.optim.swa_utils.update_bn``.

    Only the batch norms run in training mode, so that dropout does not disturb the estimate. Nothing else about the
    model changes.

    Args:
        model: The model.
        loader: Yields ``(inputs, labels)`` or ``inputs``, as for :func:`nns_plugin.calibrate`.
        progress: Whether to show a progress bar.

    Raises:
        CalibrationError: If the loader yields no inputs; the statistics are left as they are.
    """
    if not any(is_batch_norm(module) for module in model.modules()):
        return
    rest = batches(loader, model, title="recalibrating batch norms", progress=progress)
    first = next(rest)  # before update_bn resets the statistics
    with in_evaluation(model), torch.no_grad():
        # update_bn takes the first part of a list.
        update_bn(([batch.inputs] for batch in itertools.chain([first], rest)), _OnlyBatchNorms(model))


class _OnlyBatchNorms(nn.Module):
    """Puts only the batch norms of a model into training mode, and passes it inputs of any structure."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def train(self, mode: bool = True) -> _OnlyBatchNorms:
        self.training = mode
        for module in self.model.modules():
            if is_batch_norm(module):
                module.training = mode
        return self

    def forward(self, inputs: Any) -> Any:
        return run_model(self.model, inputs)
