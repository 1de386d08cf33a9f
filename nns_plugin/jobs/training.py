"""Trains a classifier, for the default job and for fine-tuning."""

from __future__ import annotations

from collections.abc import Iterable, Sized
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from nns_plugin.errors import CalibrationError, LabelError, RecipeError
from nns_plugin.models.batches import batches
from nns_plugin.models.inputs import run_model


def train_classifier(
    model: nn.Module,
    loader: Iterable[Any],
    *,
    epochs: int,
    learning_rate: float,
    weight_decay: float,
    target_of_label: Tensor | None = None,
    title: str = "training",
    progress: bool = False,
) -> None:
    """Train with cross-entropy, AdamW and a one-cycle schedule, and leave the model in evaluation mode.

    Args:
        model: Returns logits ``[N, outputs]``.
        loader: Yields ``(inputs, labels)``; iterated once per epoch.
        epochs: Number of epochs.
        learning_rate: Highest learning rate of the cycle.
        weight_decay: Weight decay of AdamW.
        target_of_label: ``[L]`` int64, the output for each label, or -1 to ignore its inputs; by default the
            label itself.
        title: Title of the progress bar.
        progress: Whether to show it.

    Raises:
        CalibrationError: If the loader yields no labelled inputs.
        LabelError: If a label is out of range.
        RecipeError: If the loss is no longer finite.
    """
    steps = epochs * (len(loader) if isinstance(loader, Sized) else sum(1 for _ in loader))
    optimizer = torch.optim.AdamW(model.parameters(), learning_rate, weight_decay=weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps + 1)
    model.train()
    with tqdm(total=steps, desc=title, disable=not progress, leave=False) as bar:
        for _ in range(epochs):
            for batch in batches(loader, model, name="training loader"):
                if batch.labels is None:
                    raise CalibrationError(
                        "the training loader yields inputs without labels; expected (inputs, labels)"
                    )
                targets = (
                    batch.labels if target_of_label is None else _targets(batch.labels, target_of_label, batch.number)
                )
                logits = run_model(model, batch.inputs)
                targets = targets.to(logits.device)
                loss = nn.functional.cross_entropy(logits, targets, ignore_index=-1)
                if not bool((targets >= 0).any()):
                    loss = logits.sum() * 0  # no label of the set in this batch
                if not bool(torch.isfinite(loss)):
                    raise RecipeError(f"{title}: the loss is {loss.item()}; lower the learning rate")
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                bar.update()
                bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    optimizer.zero_grad()
    model.eval()


def _targets(labels: Tensor, target_of_label: Tensor, number: int) -> Tensor:
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= target_of_label.numel():
        raise LabelError(
            f"batch {number} of the training loader has labels {low}..{high}; expected 0..{target_of_label.numel() - 1}"
        )
    return target_of_label[labels]
