"""Train a network and its switcher in turns, with the same loss."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from nns_plugin.errors import CheckpointError, PruningError
from nns_plugin.models.preserve import preserved_modes
from nns_plugin.switcher.checkpoint import TrainingState
from nns_plugin.switcher.network import SwitcherNetwork
from nns_plugin.switcher.scaling_factors import Counts, ScalingFactors
from nns_plugin.switcher.turns import Loss, Turns


@dataclass(frozen=True)
class Epoch:
    """What an epoch led to.

    Attributes:
        number: From 1 on.
        loss: Mean over the training data, during training.
        validation: Mean over the validation data; ``None`` without such.
        counts: How many factors of each switch prune, weaken and strengthen.
        removed: Share of the weights of linear and convolutional layers that the factors at 0 remove.
    """

    number: int
    loss: float
    validation: float | None
    counts: Mapping[str, Counts]
    removed: float

    @property
    def judged(self) -> float:
        """The loss that decides when to stop."""
        return self.loss if self.validation is None else self.validation


@dataclass(frozen=True, eq=False)
class Switched:
    """What training led to.

    Attributes:
        switcher: Trained.
        factors: Its factors for the model as it is now.
        epochs: What each epoch led to.
    """

    switcher: SwitcherNetwork
    factors: ScalingFactors
    epochs: tuple[Epoch, ...]


def train_switched(
    model: nn.Module,
    loader: Iterable[Any],
    loss: Loss,
    switcher: SwitcherNetwork,
    *,
    optimizer: torch.optim.Optimizer,
    switcher_optimizer: torch.optim.Optimizer | None = None,
    schedulers: Sequence[torch.optim.lr_scheduler.LRScheduler] = (),
    epochs: int,
    alternate: bool = True,
    task_steps: int = 20,
    gather: bool = True,
    switcher_steps: int = 1,
    ramp: int | None = None,
    second_term: float = 1.0,
    validation: Iterable[Any] | None = None,
    patience: int | None = 5,
    amp: torch.dtype | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    callbacks: Sequence[Callable[[Epoch], object]] = (),
    progress: bool = False,
) -> Switched:
    """Train a network under the factors of its switcher, and the switcher, in turns and with the same loss.

    In a turn the factors stand still. The network takes ``task_steps`` steps, with the switcher's parameters frozen,
    and the gradients of the factors are summed. Then the switcher takes a step, with the network's weights frozen, out
    of their mean: it learns from all batches of the turn, and needs no forward of the network. The gradient that
    reaches the weights through the switcher (the second term of eq. 6) is linear in the gradient of the factors as
    well, so that it goes back in the same pass, for the whole turn, and is part of the network's last step. The end of
    an epoch ends the turn; there, a loader that does not know its length leaves the second term out.

    With ``gather=False`` a turn begins with ``switcher_steps`` steps of the switcher on the first batch, as in the
    source; with one step each, an infinite ``second_term`` and no gathering, this is Algorithm 1 with eq. 5 and 6.

    The factors act on the columns with which units are read, through ``torch.func.functional_call``: nothing is hooked
    into the model.

    Args:
        model: Trained in place: its weights and buffers change, and nothing else. In the separate mode nothing does.
        loader: Yields ``(inputs, targets)`` anew in each epoch.
        loss: A number out of the model's outputs and the targets.
        switcher: Built for this model; trained in place.
        optimizer: Of the model's parameters.
        switcher_optimizer: Of the switcher's parameters; Adam with a rate of 1e-3 by default.
        schedulers: Stepped after each epoch.
        epochs: Most epochs.
        alternate: Whether to train both. Otherwise the model stays as it is, evaluates, and the switcher alone learns,
            a step for each batch.
        task_steps: Of the network in a turn.
        gather: Whether the switcher learns from the gradients that the network's steps give anyway.
        switcher_steps: Of the switcher in a turn, if it does not.
        ramp: Epochs in which the switcher's budget rises from 0, turn by turn (epoch by epoch, if the loader does not
            know its length); half of all by default, so that it has to be given where training goes on with more
            epochs. Only what comes after them counts for ``patience`` and as best.
        second_term: Most length of the gradient that reaches the weights through the switcher, relative to their own
            gradient in that step: unlimited it makes training diverge, since factors jump with small weights.
            ``math.inf`` is eq. 6 as it stands, 0 leaves the term out.
        validation: Yields ``(inputs, targets)``; its mean loss, in evaluation mode, decides when to stop instead of the
            training loss, and both networks end as they were when it was lowest.
        patience: Stop after so many epochs in which the loss has not fallen; ``None`` for never.
        amp: ``torch.float16`` or ``torch.bfloat16`` for mixed precision of the model; the switcher stays as it is.
        checkpoint: File that is written after every epoch; if it is there, training goes on from it, on the CPU to the
            same result bit for bit. Loaders must draw from the random numbers of torch, NumPy or ``random``, or from a
            ``generator`` of their own or of their samplers.
        callbacks: Called after each epoch, and after the checkpoint; training stops if one gives something true.
        progress: Whether to show a progress bar.

    Raises:
        PruningError: If an option is out of range.
        TrainingError: If the loss is no number or not finite, or the loader yields nothing or something else.
        CheckpointError: If the checkpoint is damaged or belongs to another training; it is left as it is.

    Source:
        Han et al., "Mining the Knowledge of Weights for Optimizing Neural Network Structures", Algorithm 1 and eq. 6.
    """
    for name, count in (("epochs", epochs), ("task_steps", task_steps), ("patience", patience)):
        if count is not None and count < 1:
            raise PruningError(f"{name} is {count}; expected at least 1")
    if switcher_steps < 0 or not second_term >= 0:
        raise PruningError(
            f"switcher_steps is {switcher_steps} and second_term {second_term}; expected at least 0 of both"
        )
    if amp not in (None, torch.float16, torch.bfloat16):
        raise PruningError(f"amp is {amp}; expected torch.float16, torch.bfloat16 or None")
    if not isinstance(loader, Iterable):
        raise PruningError(f"the loader is a {type(loader).__name__}; expected something that yields batches")
    if switcher_optimizer is optimizer:
        raise PruningError("optimizer and switcher_optimizer are one and the same; give each network its own")
    if isinstance(optimizer, torch.optim.LBFGS) or isinstance(switcher_optimizer, torch.optim.LBFGS):
        raise PruningError("LBFGS evaluates a closure several times a step; expected an optimizer that does not")
    if amp is torch.float16 and any(value.dtype is torch.float16 for value in model.parameters()):
        raise PruningError("the model's weights are float16; mixed precision wants them in float32")
    if any(isinstance(given, Iterator) for given in (loader, validation)):
        raise PruningError("a loader is an iterator, which yields once; pass something that yields anew in each epoch")
    ramp = (0 if switcher.budget is None else epochs // 2) if ramp is None else ramp
    if not 0 <= ramp < epochs:
        raise PruningError(f"ramp is {ramp} of {epochs} epochs; expected fewer, so that the budget is reached")
    learned = [parameter for parameter in switcher.parameters() if parameter.requires_grad]
    if switcher_optimizer is None and learned:
        switcher_optimizer = torch.optim.Adam(learned, 1e-3)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if alternate:
        _check_optimizer("optimizer", optimizer, "the model", trained)
    if learned and switcher_optimizer is not None:
        _check_optimizer("switcher_optimizer", switcher_optimizer, "the switcher", learned)
    elif not alternate:
        raise PruningError("all parameters of the switcher are frozen, and the model is not trained: nothing would be")
    gather, switcher_steps = gather and bool(learned), switcher_steps if learned and not gather else 0
    turns = Turns(
        model,
        switcher,
        loss,
        optimizer,
        switcher_optimizer,
        task_steps=task_steps,
        gather=gather,
        switcher_steps=switcher_steps,
        ramp=ramp,
        second_term=second_term,
        amp=amp,
    )
    optimizers = [optimizer, *([] if switcher_optimizer is None else [switcher_optimizer])]
    options = {
        "ramp": ramp,
        "task_steps": task_steps,
        "gather": gather,
        "switcher_steps": switcher_steps,
        "second_term": str(float(second_term)),
        "alternate": alternate,
        "amp": str(amp),
        "budget": switcher.budget,
        "validation": validation is not None,
    }
    others = [*optimizers, *schedulers, turns.scaler]
    state = TrainingState({"model": model, "switcher": switcher}, others, [loader, validation], options)
    path = None if checkpoint is None else Path(checkpoint)
    if path is not None and not path.parent.is_dir():
        raise CheckpointError(f"there is no folder {str(path.parent)!r} for the checkpoint; choose one that exists")
    done: list[Epoch] = []
    best: dict[str, Tensor] | None = None
    with _as_found(model, switcher, optimizers, alternate), torch.enable_grad():
        if path is not None and path.exists():
            told, best = state.load(path)
            done = _epochs(told)
        bar = tqdm(total=epochs, initial=len(done), desc="switched training", disable=not progress, leave=False)
        with bar:
            while len(done) < epochs and not _over(done[ramp:], patience):
                value = turns.epoch(len(done), loader, alternate, bar)
                factors = turns.factors()
                judged = None if validation is None else turns.judge(validation, factors)
                removed = switcher.removed(factors)
                done.append(Epoch(len(done) + 1, value, judged, factors.counts(), removed))
                for scheduler in schedulers:
                    if isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
                        scheduler.step(done[-1].judged)
                    else:
                        scheduler.step()
                if judged is not None and len(done) > ramp and judged <= min(e.judged for e in done[ramp:]):
                    best = state.weights()
                if path is not None:
                    state.save(path, [asdict(epoch) for epoch in done], best)
                bar.update()
                bar.set_postfix(loss=f"{value:.4f}", removed=f"{removed:.1%}")
                answers = [callback(done[-1]) for callback in callbacks]
                if any(answers):
                    break
        if best is not None:
            state.restore(best)
    return Switched(switcher, turns.factors(), tuple(done))


def _check_optimizer(
    name: str, optimizer: torch.optim.Optimizer, whose: str, parameters: Sequence[nn.Parameter]
) -> None:
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    if not any(id(parameter) in held for parameter in parameters):
        raise PruningError(f"{name} holds none of the {len(parameters)} parameters of {whose} that are to be trained")


@contextmanager
def _as_found(
    model: nn.Module, switcher: nn.Module, optimizers: Sequence[torch.optim.Optimizer], alternate: bool
) -> Iterator[None]:
    """Modes and gradients come back on leaving, and after an exception how far the budget was.

    Within, the model trains, or evaluates if it is to stay.
    """
    held = [parameter for optimizer in optimizers for group in optimizer.param_groups for parameter in group["params"]]
    gradients = [(parameter, parameter.grad) for parameter in (*model.parameters(), *switcher.parameters(), *held)]
    progress = [(value, value.clone()) for name, value in switcher.named_buffers() if name == "progress"]
    try:
        with preserved_modes(model, switcher):
            if not alternate:
                model.eval()
            elif not model.training:
                model.train()
            yield
    except BaseException:
        for value, before in progress:
            value.copy_(before)
        raise
    finally:
        for parameter, gradient in gradients:
            parameter.grad = gradient


def _over(done: Sequence[Epoch], patience: int | None) -> bool:
    """Whether the loss has not fallen for as many epochs."""
    if patience is None or len(done) <= patience:
        return False
    judged = [epoch.judged for epoch in done]
    return min(judged[-patience:]) >= min(judged[:-patience])


def _epochs(told: Sequence[Mapping[str, Any]]) -> list[Epoch]:
    return [
        Epoch(**{**epoch, "counts": {name: Counts(**counts) for name, counts in epoch["counts"].items()}})
        for epoch in told
    ]
