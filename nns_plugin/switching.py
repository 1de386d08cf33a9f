"""Train a network and its switcher in turns, with the same loss."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from tqdm.auto import tqdm

from nns_plugin.errors import CheckpointError, PruningError, TrainingError
from nns_plugin.forward import device_of, tensors_of, to_device
from nns_plugin.preserve import preserved_modes
from nns_plugin.scales import Counts, Scales, fold, switch_off
from nns_plugin.switcher_network import SwitcherNetwork
from nns_plugin.training_state import TrainingState

__all__ = ["Epoch", "Scales", "Switched", "SwitcherNetwork", "fold", "switch_off", "train_switched"]

Loss = Callable[[Any, Any], Tensor]


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
        scales: Its factors for the model as it is now.
        epochs: What each epoch led to.
    """

    switcher: SwitcherNetwork
    scales: Scales
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
        ramp: Epochs in which the switcher's budget rises from 0; half of all by default, so that it has to be given
            where training goes on with more epochs. Only what comes after them counts for ``patience`` and as best.
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
    turns = _Turns(
        model, switcher, loss, optimizer, switcher_optimizer, amp, task_steps, gather, switcher_steps, second_term
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
                if switcher.budget is not None:
                    switcher.progress.fill_(min(1.0, len(done) / ramp) if ramp else 1.0)
                value = turns.epoch(loader, alternate, bar)
                scales = turns.scales()
                judged = None if validation is None else turns.judge(validation, scales)
                removed = switcher.removed(scales)
                done.append(Epoch(len(done) + 1, value, judged, scales.counts(), removed))
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
    return Switched(switcher, turns.scales(), tuple(done))


def _check_optimizer(
    name: str, optimizer: torch.optim.Optimizer, whose: str, parameters: Sequence[nn.Parameter]
) -> None:
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    if not any(id(parameter) in held for parameter in parameters):
        raise PruningError(f"{name} holds none of the {len(parameters)} parameters of {whose} that are to be trained")


class _Turns:
    """Steps of the network and of its switcher."""

    def __init__(
        self,
        model: nn.Module,
        switcher: SwitcherNetwork,
        loss: Loss,
        optimizer: torch.optim.Optimizer,
        switcher_optimizer: torch.optim.Optimizer | None,
        amp: torch.dtype | None,
        task_steps: int,
        gather: bool,
        switcher_steps: int,
        second_term: float,
    ) -> None:
        self.gather = gather
        self.second_term = second_term
        self.model, self.switcher, self.loss = model, switcher, loss
        self.optimizer, self.switcher_optimizer = optimizer, switcher_optimizer
        self.amp, self.task_steps, self.switcher_steps = amp, task_steps, switcher_steps
        self.device = device_of(model)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=amp is torch.float16)
        self._given: dict[str, Tensor] = {}
        self._scales: Scales | None = None
        self._factors = Scales((), {})
        self._sums: dict[str, Tensor] = {}
        self._steps = 0
        self._stepped = False

    def epoch(self, loader: Iterable[Any], alternate: bool, bar: tqdm[Any]) -> float:
        """One pass over the data; the mean loss."""
        total, count, step = 0.0, 0, 0
        length = _length(loader)
        for number, (inputs, targets, size) in enumerate(_batches(loader, self.device), 1):
            if not alternate:
                value = self._learn(inputs, targets)
            else:
                if step == 0:
                    for _ in range(self.switcher_steps):
                        self._learn(inputs, targets)
                    self._begin()
                step = 0 if number == length or step + 1 == self.task_steps else step + 1
                value = self._train(inputs, targets, closing=step == 0)
            total, count = total + value * size, count + size
            bar.set_postfix(loss=f"{total / count:.4f}", refresh=False)
        if not count:
            raise TrainingError("the loader yields nothing; it must yield in each epoch")
        if step:  # the data ended without saying so
            self._step_switcher(self._through_switcher()[1])
            self._update()
        return total / count

    def scales(self) -> Scales:
        """Factors for the network as it is."""
        with torch.no_grad():
            found: Scales = self.switcher(self.model)
        return found.detach()

    def judge(self, loader: Iterable[Any], scales: Scales) -> float:
        """Mean loss in evaluation mode."""
        total, count = 0.0, 0
        with preserved_modes(self.model), torch.no_grad():
            self.model.eval()
            weights = scales.parameters_of(self.model)
            for inputs, targets, size in _batches(loader, self.device):
                total, count = total + float(self._loss(weights, inputs, targets)) * size, count + size
        if not count or not math.isfinite(total):
            raise TrainingError(f"the validation loss over {count} inputs is {total}; expected a finite one over some")
        return total / count

    def _learn(self, inputs: Any, targets: Any) -> float:
        """A step of the switcher."""
        assert self.switcher_optimizer is not None
        frozen = {name: value.detach() for name, value in self.model.named_parameters()}
        weights = {**frozen, **self.switcher(frozen).parameters_of(self.model, frozen)}
        learned = self._learned()
        loss, value = self._finite_loss(weights, inputs, targets)
        found = torch.autograd.grad(self.scaler.scale(loss), learned, allow_unused=True)
        self._step(self.switcher_optimizer, learned, found)
        self._update()
        return value

    def _begin(self) -> None:
        """Factors for the next steps of the network."""
        self._given = {
            name: value.detach().clone().requires_grad_(value.requires_grad)
            for name, value in self.model.named_parameters()
            if name in self.switcher.reads
        }
        self._scales = self.switcher(self._given)
        leaves = {name: values.detach().requires_grad_() for name, values in self._scales.items()}
        self._factors = Scales(self.switcher.switches, leaves)
        self._sums = {name: torch.zeros_like(values) for name, values in self._factors.items()}
        self._steps = 0

    def _train(self, inputs: Any, targets: Any, closing: bool) -> float:
        """A step of the network."""
        trained = {name: value for name, value in self.model.named_parameters() if value.requires_grad}
        weights = self._factors.parameters_of(self.model)
        loss, value = self._finite_loss(weights, inputs, targets)
        wanted = [*trained.values(), *self._factors.values()]
        found = torch.autograd.grad(self.scaler.scale(loss), wanted, allow_unused=True)
        gradients = dict(zip(trained, found[: len(trained)], strict=True))
        scale = self.scaler.get_scale()
        finite = all(bool(g.isfinite().all()) for g in found[len(trained) :] if g is not None)
        for name, gradient in zip(self._factors, found[len(trained) :], strict=True):
            if gradient is not None and finite:  # a step that overflows is none
                self._sums[name] += gradient / scale
        self._steps += finite
        own: list[Tensor | None] = []
        if closing:
            second, own = self._through_switcher()
            limit = self._limit(gradients, second)
            for name, gradient in second.items():
                there, more = gradients[name], limit * scale * gradient
                gradients[name] = more if there is None else there + more
        self._step(self.optimizer, list(trained.values()), list(gradients.values()))
        if closing:
            self._step_switcher(own)
        self._update()
        return value

    def _update(self) -> None:
        """Adapt the scale of gradients, after all steps that used it."""
        if self._stepped:
            self.scaler.update()
            self._stepped = False

    def _step_switcher(self, own: Sequence[Tensor | None]) -> None:
        """A step of the switcher out of the gradients of a turn."""
        if self.gather and self.switcher_optimizer is not None and self._steps:
            share = self.scaler.get_scale() / self._steps
            scaled = [None if gradient is None else gradient * share for gradient in own]
            self._step(self.switcher_optimizer, self._learned(), scaled)

    def _limit(self, own: Mapping[str, Tensor | None], second: Mapping[str, Tensor]) -> float:
        """What keeps the second term from being longer than it may be, beside gradients that are scaled."""
        norms = [
            math.sqrt(sum(float(found.double().square().sum()) for found in side if found is not None))
            for side in ([own.get(name) for name in second], second.values())
        ]
        norms[0] /= self.scaler.get_scale()
        return min(1.0, self.second_term * norms[0] / norms[1]) if norms[1] > 0 else 1.0

    def _through_switcher(self) -> tuple[dict[str, Tensor], list[Tensor | None]]:
        """What the sums of the factors' gradients are for the weights that the switcher reads, and for its own."""
        assert self._scales is not None
        sums = [(values, self._sums[name]) for name, values in self._scales.items() if values.requires_grad]
        given = {name: value for name, value in self._given.items() if value.requires_grad and self.second_term}
        learned = self._learned() if self.gather else []
        if not sums or not (given or learned):
            return {}, [None] * len(learned)
        outputs, weighted = zip(*sums, strict=True)
        found = torch.autograd.grad(outputs, [*given.values(), *learned], weighted, allow_unused=True)
        second = {name: value for name, value in zip(given, found[: len(given)], strict=True) if value is not None}
        return second, list(found[len(given) :])

    def _learned(self) -> list[Tensor]:
        return [parameter for parameter in self.switcher.parameters() if parameter.requires_grad]

    def _finite_loss(self, weights: Mapping[str, Tensor], inputs: Any, targets: Any) -> tuple[Tensor, float]:
        loss = self._loss(weights, inputs, targets)
        if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.requires_grad:
            found = f"{list(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
            raise TrainingError(f"the loss is a {found}; expected one number as a tensor that depends on the outputs")
        value = float(loss.detach())
        if not math.isfinite(value):
            raise TrainingError(
                f"the loss is {value}; expected a finite one: lower the learning rate, or look for inputs that are not "
                "finite; the weights are those before this step"
            )
        return loss, value

    def _loss(self, weights: Mapping[str, Tensor], inputs: Any, targets: Any) -> Tensor:
        with torch.autocast(self.device.type, self.amp, enabled=self.amp is not None):
            args, kwargs = ((), inputs) if isinstance(inputs, Mapping) else (inputs, {})
            args = args if isinstance(args, (tuple, list)) else (args,)
            return self.loss(functional_call(self.model, dict(weights), tuple(args), dict(kwargs)), targets)

    def _step(
        self, optimizer: torch.optim.Optimizer, parameters: Sequence[Tensor], found: Sequence[Tensor | None]
    ) -> None:
        for group in optimizer.param_groups:  # what is frozen, or not the model's, has no gradient here
            for parameter in group["params"]:
                parameter.grad = None
        for parameter, gradient in zip(parameters, found, strict=True):
            # Not shared: optimizers and scalers work on gradients in place.
            parameter.grad = None if gradient is None else gradient.clone()
        if any(gradient is not None for gradient in found):
            self.scaler.step(optimizer)
            self._stepped = True


def _length(loader: Iterable[Any]) -> int | None:
    """Number of batches; ``None`` if the loader does not know."""
    try:
        return len(loader)  # type: ignore[arg-type]
    except (TypeError, NotImplementedError):
        return None


def _batches(loader: Iterable[Any], device: torch.device) -> Iterator[tuple[Any, Any, int]]:
    """Inputs, targets and number of inputs."""
    for number, item in enumerate(loader):
        if not isinstance(item, (tuple, list)) or len(item) != 2:
            raise TrainingError(
                f"batch {number} of the loader is a {type(item).__name__}; expected a pair of inputs and targets"
            )
        inputs, targets = to_device(item[0], device), to_device(item[1], device)
        tensors = tensors_of(inputs)
        if not tensors or not tensors[0].dim():
            raise TrainingError(
                f"the inputs of batch {number} are a {type(item[0]).__name__} without tensors that have a batch axis"
            )
        yield inputs, targets, len(tensors[0])


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
