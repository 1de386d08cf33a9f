"""Options of switched training."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.optim.lr_scheduler import LRScheduler

from nns_plugin.errors import PruningError


@dataclass(frozen=True)
class SwitchedTrainingOptions:
    """How :func:`~nns_plugin.switcher.training.train_switched` trains.

    Attributes:
        epochs: Maximum number of epochs.
        alternate: Whether to train both networks in turns. Otherwise (separate training) the model stays unchanged and
            in evaluation mode, and only the switcher learns, one step per batch.
        task_steps: Steps of the network in a turn.
        gather_gradients: Whether the switcher learns from the gradients of the factors that the network's steps
            produce anyway.
        switcher_steps: Steps of the switcher in a turn if it does not gather gradients.
        ramp_epochs: Epochs over which the switcher's budget rises from 0, turn by turn (epoch by epoch if the loader
            does not know its length). By default half of ``epochs``, so pass it explicitly to resume with more epochs.
            Only epochs after the ramp count for ``patience`` and for the best weights.
        max_second_term: Maximum norm of the gradient that reaches the weights through the switcher, relative to their
            own gradient in that step. Unlimited, it makes training diverge, because small weights make the factors
            jump. ``math.inf`` is eq. 6 as published; 0 drops the term.
        patience: Stop after this many epochs without a lower loss; ``None`` for never.
        amp: ``torch.float16`` or ``torch.bfloat16`` for mixed precision of the model; the switcher is not affected.
        schedulers: Learning-rate schedulers, stepped after each epoch.
        callbacks: Called after each epoch, when the checkpoint is written; training stops if one returns a true value.
        checkpoint: File that is written after every epoch; if it exists, training resumes from it, on the CPU with
            bit-identical results. Loaders must draw from the random numbers of torch, NumPy or ``random``, or from a
            ``generator`` of their own or of their samplers.
        progress: Whether to show a progress bar.

    Raises:
        PruningError: If an option is out of range.
    """

    epochs: int
    alternate: bool = True
    task_steps: int = 20
    gather_gradients: bool = True
    switcher_steps: int = 1
    ramp_epochs: int | None = None
    max_second_term: float = 1.0
    patience: int | None = 5
    amp: torch.dtype | None = None
    schedulers: Sequence[LRScheduler] = ()
    callbacks: Sequence[Callable[[Any], object]] = ()
    checkpoint: str | os.PathLike[str] | None = None
    progress: bool = False

    def __post_init__(self) -> None:
        for name in ("epochs", "task_steps", "patience"):
            count = getattr(self, name)
            if count is not None and count < 1:
                raise PruningError(f"{name} is {count}; expected at least 1")
        for name in ("switcher_steps", "max_second_term"):
            value = getattr(self, name)
            if not value >= 0:
                raise PruningError(f"{name} is {value}; expected at least 0")
        if self.ramp_epochs is not None and not 0 <= self.ramp_epochs < self.epochs:
            raise PruningError(
                f"ramp_epochs is {self.ramp_epochs} of {self.epochs} epochs; expected fewer, so that the budget is "
                "reached"
            )
        if self.amp not in (None, torch.float16, torch.bfloat16):
            raise PruningError(f"amp is {self.amp}; expected torch.float16, torch.bfloat16 or None")
