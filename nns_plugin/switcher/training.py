"""Train a network and its switcher in turns, with the same loss."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from tqdm.auto import tqdm

from nns_plugin.errors import CheckpointError, PruningError
from nns_plugin.models.preserve import preserved_modes
from nns_plugin.switcher.checkpoint import TrainingState
from nns_plugin.switcher.network import SwitcherNetwork
from nns_plugin.switcher.options import SwitchedTrainingOptions
from nns_plugin.switcher.scaling_factors import Counts, ScalingFactors
from nns_plugin.switcher.turns import Loss, Turns


@dataclass(frozen=True)
class Epoch:
    """The results of one epoch.

    Attributes:
        number: Counted from 1.
        loss: Mean over the training data, during training.
        validation: Mean loss over the validation data; ``None`` without validation data.
        counts: How many factors of each switch prune, weaken and strengthen.
        removed: Share of the weights of linear and convolutional layers that the factors at 0 remove.
    """

    number: int
    loss: float
    validation: float | None
    counts: Mapping[str, Counts]
    removed: float

    @property
    def monitored(self) -> float:
        """The loss that decides when to stop."""
        return self.loss if self.validation is None else self.validation


@dataclass(frozen=True, eq=False)
class Switched:
    """The result of switched training.

    Attributes:
        switcher: The trained switcher.
        factors: Its scaling factors for the model in its final state.
        epochs: The results of each epoch.
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
    optimizer: Optimizer,
    switcher_optimizer: Optimizer | None = None,
    validation: Iterable[Any] | None = None,
    options: SwitchedTrainingOptions,
) -> Switched:
    """Train a network under the scaling factors of its switcher, and the switcher, in turns and with the same loss.

    The factors are fixed during a turn. The network takes ``task_steps`` steps, with the switcher's parameters frozen,
    and the gradients of the factors are summed. Then the switcher takes one step along their mean, with the network's
    weights frozen: it learns from all batches of the turn and needs no forward pass of the network. The gradient that
    reaches the weights through the switcher (the second term of eq. 6) is also linear in the gradient of the factors,
    so it is computed in the same backward pass for the whole turn and added to the network's last step. The end of an
    epoch ends the turn; if the loader does not know its length, the second term of that last turn is dropped.

    With ``gather_gradients=False``, a turn begins with ``switcher_steps`` steps of the switcher on the first batch, as
    in the paper; with one step each and ``max_second_term=math.inf``, this is Algorithm 1 with eq. 5 and 6.

    The factors scale the weight columns that read each unit, through ``torch.func.functional_call``: no hook is
    registered on the model.

    Args:
        model: Trained in place: only its weights and buffers change. Separate training does not change it at all.
        loader: Re-iterable, once per epoch; yields ``(inputs, targets)``.
        loss: Computes a scalar from the model's outputs and the targets.
        switcher: Built for this model; trained in place.
        optimizer: Holds the model's parameters.
        switcher_optimizer: Holds the switcher's parameters; Adam with learning rate 1e-3 by default.
        validation: Yields ``(inputs, targets)``; its mean loss in evaluation mode, instead of the training loss,
            decides when to stop, and both networks end with the weights for which it was lowest.
        options: How to train.

    Raises:
        PruningError: If a loader or an optimizer is unsuitable.
        TrainingError: If the loss is not a finite scalar, or the loader yields nothing or something else.
        CheckpointError: If the checkpoint is damaged or belongs to another training; it is not changed.

    Source:
        Han et al., "Mining the Knowledge of Weights for Optimizing Neural Network Structures", Algorithm 1 and eq. 6.
    """
    _check(model, loader, validation, options)
    learned = [parameter for parameter in switcher.parameters() if parameter.requires_grad]
    if switcher_optimizer is None and learned:
        switcher_optimizer = torch.optim.Adam(learned, 1e-3)
    _check_optimizers(model, learned, optimizer, switcher_optimizer, options.alternate)
    ramp = options.ramp_epochs
    if ramp is None:
        ramp = 0 if switcher.budget is None else options.epochs // 2
    gather = options.gather_gradients and bool(learned)
    steps = options.switcher_steps if learned and not gather else 0
    options = replace(options, ramp_epochs=ramp, gather_gradients=gather, switcher_steps=steps)
    turns = Turns(model, switcher, loss, optimizer, switcher_optimizer, options)
    optimizers = [optimizer, *([] if switcher_optimizer is None else [switcher_optimizer])]
    state = TrainingState(
        {"model": model, "switcher": switcher},
        [*optimizers, *options.schedulers, turns.scaler],
        [loader, validation],
        {**_fixed(options), "budget": switcher.budget, "validation": validation is not None},
    )
    with _restored(model, switcher, optimizers, options.alternate), torch.enable_grad():
        done = _run(turns, state, loader, validation, options, ramp)
    return Switched(switcher, turns.factors(), tuple(done))


def _run(
    turns: Turns,
    state: TrainingState,
    loader: Iterable[Any],
    validation: Iterable[Any] | None,
    options: SwitchedTrainingOptions,
    ramp: int,
) -> list[Epoch]:
    """Train from the checkpoint, or from the start, to the end; the best weights are restored."""
    path = None if options.checkpoint is None else Path(options.checkpoint)
    done: list[Epoch] = []
    best: dict[str, Tensor] | None = None
    if path is not None and path.exists():
        history, best = state.load(path)
        done = _epochs(history)
    total = options.epochs
    with tqdm(
        total=total, initial=len(done), desc="switched training", disable=not options.progress, leave=False
    ) as bar:
        while len(done) < total and not _stalled(done[ramp:], options.patience):
            value = turns.epoch(len(done), loader, bar)
            factors = turns.factors()
            validated = None if validation is None else turns.validate(validation, factors)
            done.append(Epoch(len(done) + 1, value, validated, factors.counts(), turns.switcher.removed(factors)))
            for scheduler in options.schedulers:
                if isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
                    scheduler.step(done[-1].monitored)
                else:
                    scheduler.step()
            after = [epoch.monitored for epoch in done[ramp:]]
            if validated is not None and after and validated <= min(after):
                best = state.weights()
            if path is not None:
                state.save(path, [asdict(epoch) for epoch in done], best)
            bar.update()
            bar.set_postfix(loss=f"{value:.4f}", removed=f"{done[-1].removed:.1%}")
            answers = [callback(done[-1]) for callback in options.callbacks]
            if any(answers):
                break
    if best is not None:
        state.restore(best)
    return done


def _check(
    model: nn.Module, loader: Iterable[Any], validation: Iterable[Any] | None, options: SwitchedTrainingOptions
) -> None:
    if not isinstance(loader, Iterable):
        raise PruningError(f"the loader is a {type(loader).__name__}; expected an iterable of batches")
    if any(isinstance(given, Iterator) for given in (loader, validation)):
        raise PruningError(
            "a loader is an iterator, which can be read only once; pass an iterable that can be read in every epoch"
        )
    if options.amp is torch.float16 and any(value.dtype is torch.float16 for value in model.parameters()):
        raise PruningError("the model's weights are float16; mixed precision needs them in float32")
    if options.checkpoint is not None and not Path(options.checkpoint).parent.is_dir():
        folder = str(Path(options.checkpoint).parent)
        raise CheckpointError(f"there is no folder {folder!r} for the checkpoint; choose an existing one")


def _check_optimizers(
    model: nn.Module,
    learned: Sequence[nn.Parameter],
    optimizer: Optimizer,
    switcher_optimizer: Optimizer | None,
    alternate: bool,
) -> None:
    if switcher_optimizer is optimizer:
        raise PruningError("optimizer and switcher_optimizer are the same object; give each network its own")
    if any(isinstance(given, torch.optim.LBFGS) for given in (optimizer, switcher_optimizer)):
        raise PruningError("LBFGS evaluates a closure several times per step; use another optimizer")
    if alternate:
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        _check_holds("optimizer", optimizer, "the model", trained)
    if learned and switcher_optimizer is not None:
        _check_holds("switcher_optimizer", switcher_optimizer, "the switcher", learned)
    elif not alternate:
        raise PruningError(
            "all parameters of the switcher are frozen and alternate is False, so nothing would be trained"
        )


def _check_holds(name: str, optimizer: Optimizer, whose: str, parameters: Sequence[nn.Parameter]) -> None:
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    if not any(id(parameter) in held for parameter in parameters):
        raise PruningError(f"{name} holds none of the {len(parameters)} trainable parameters of {whose}")


def _fixed(options: SwitchedTrainingOptions) -> dict[str, Any]:
    """Return the options that must be the same when training resumes, as JSON types."""
    names = ("ramp_epochs", "task_steps", "gather_gradients", "switcher_steps", "alternate")
    found = {name: getattr(options, name) for name in names}
    return {**found, "max_second_term": str(float(options.max_second_term)), "amp": str(options.amp)}


@contextmanager
def _restored(
    model: nn.Module, switcher: nn.Module, optimizers: Sequence[Optimizer], alternate: bool
) -> Iterator[None]:
    """Restore modes and gradients on leaving, and the progress of the budget after an exception.

    Within, the model is in training mode, or in evaluation mode if it is not trained.
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


def _stalled(done: Sequence[Epoch], patience: int | None) -> bool:
    """Whether the monitored loss has not fallen for ``patience`` epochs."""
    if patience is None or len(done) <= patience:
        return False
    losses = [epoch.monitored for epoch in done]
    return min(losses[-patience:]) >= min(losses[:-patience])


def _epochs(history: Sequence[Mapping[str, Any]]) -> list[Epoch]:
    return [
        Epoch(**{**epoch, "counts": {name: Counts(**counts) for name, counts in epoch["counts"].items()}})
        for epoch in history
    ]
