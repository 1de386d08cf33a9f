"""Turns of a network and its switcher: their steps, and how the gradient of the factors reaches both."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from tqdm.auto import tqdm

from nns_plugin.errors import TrainingError
from nns_plugin.models.batches import batch_count
from nns_plugin.models.inputs import device_of, tensors_of, to_device
from nns_plugin.models.preserve import preserved_modes
from nns_plugin.switcher.network import SwitcherNetwork
from nns_plugin.switcher.options import SwitchedTrainingOptions
from nns_plugin.switcher.scaling_factors import ScalingFactors

Loss = Callable[[Any, Any], Tensor]


class Turns:
    """The steps of a network and of its switcher.

    Args:
        model: Trained in place.
        switcher: Trained in place.
        loss: Computes a scalar from the model's outputs and the targets.
        optimizer: Holds the model's parameters.
        switcher_optimizer: Holds the switcher's parameters; ``None`` if all of them are frozen.
        options: How to train.
    """

    def __init__(
        self,
        model: nn.Module,
        switcher: SwitcherNetwork,
        loss: Loss,
        optimizer: torch.optim.Optimizer,
        switcher_optimizer: torch.optim.Optimizer | None,
        options: SwitchedTrainingOptions,
    ) -> None:
        self.model, self.switcher, self.loss = model, switcher, loss
        self.optimizer, self.switcher_optimizer = optimizer, switcher_optimizer
        self.options, self.device = options, device_of(model)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=options.amp is torch.float16)
        # The factors of a turn: computed from copies of the weights, and as leaves under which the network trains.
        self._weights: dict[str, Tensor] = {}
        self._connected: ScalingFactors | None = None
        self._leaves = ScalingFactors((), {})
        self._sums: dict[str, Tensor] = {}
        self._steps = 0
        self._stepped = False

    def epoch(self, done: int, loader: Iterable[Any], bar: tqdm[Any]) -> float:
        """Train on one pass over the data, after ``done`` epochs; return the mean loss."""
        total, count, step = 0.0, 0, 0
        length = batch_count(loader)
        for number, (inputs, targets, size) in enumerate(_batches(loader, self.device), 1):
            if step == 0:
                self._raise_budget(done + (min(1.0, (number - 1) / length) if length else 0.0))
            if not self.options.alternate:
                value = self._learn(inputs, targets)
            else:
                if step == 0:
                    for _ in range(self.options.switcher_steps):
                        self._learn(inputs, targets)
                    self._begin()
                step = 0 if number == length or step + 1 == self.options.task_steps else step + 1
                value = self._train(inputs, targets, closing=step == 0)
            total, count = total + value * size, count + size
            bar.set_postfix(loss=f"{total / count:.4f}", refresh=False)
        if not count:
            raise TrainingError("the loader yields nothing; it must yield batches in every epoch")
        if step:  # a loader of unknown length ended within a turn
            self._step_switcher(self._through_switcher()[1])
            self._update()
        return total / count

    def factors(self) -> ScalingFactors:
        """Return the scaling factors for the network in its current state."""
        with torch.no_grad():
            found: ScalingFactors = self.switcher(self.model)
        return found.detach()

    def validate(self, loader: Iterable[Any], factors: ScalingFactors) -> float:
        """Return the mean loss in evaluation mode."""
        total, count = 0.0, 0
        with preserved_modes(self.model), torch.no_grad():
            self.model.eval()
            weights = factors.parameters_of(self.model)
            for inputs, targets, size in _batches(loader, self.device):
                total, count = total + float(self._loss(weights, inputs, targets)) * size, count + size
        if not count or not math.isfinite(total):
            raise TrainingError(
                f"the validation loss over {count} inputs is {total}; expected at least one input, and a finite loss"
            )
        return total / count

    def _raise_budget(self, epochs: float) -> None:
        """Raise the budget to its value after this (fractional) number of epochs."""
        ramp = self.options.ramp_epochs
        if self.switcher.budget is not None:
            self.switcher.progress.fill_(min(1.0, epochs / ramp) if ramp else 1.0)

    def _learn(self, inputs: Any, targets: Any) -> float:
        """Take one step of the switcher on a batch; return the loss."""
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
        """Begin a turn: compute the factors for the next steps of the network."""
        self._weights = {
            name: value.detach().clone().requires_grad_(value.requires_grad)
            for name, value in self.model.named_parameters()
            if name in self.switcher.reads
        }
        self._connected = self.switcher(self._weights)
        leaves = {name: values.detach().requires_grad_() for name, values in self._connected.items()}
        self._leaves = ScalingFactors(self.switcher.switches, leaves)
        self._sums = {name: torch.zeros_like(values) for name, values in self._leaves.items()}
        self._steps = 0

    def _train(self, inputs: Any, targets: Any, closing: bool) -> float:
        """Take one step of the network on a batch; return the loss."""
        trained = {name: value for name, value in self.model.named_parameters() if value.requires_grad}
        weights = self._leaves.parameters_of(self.model)
        loss, value = self._finite_loss(weights, inputs, targets)
        wanted = [*trained.values(), *self._leaves.values()]
        found = torch.autograd.grad(self.scaler.scale(loss), wanted, allow_unused=True)
        gradients = dict(zip(trained, found[: len(trained)], strict=True))
        scale = self.scaler.get_scale()
        finite = all(bool(g.isfinite().all()) for g in found[len(trained) :] if g is not None)
        for name, gradient in zip(self._leaves, found[len(trained) :], strict=True):
            if gradient is not None and finite:  # the scaler skips a step that overflows
                self._sums[name] += gradient / scale
        self._steps += finite
        own: list[Tensor | None] = []
        if closing:
            second, own = self._through_switcher()
            limit = self._limit(gradients, second)
            for name, gradient in second.items():
                first, second_term = gradients[name], limit * scale * gradient
                gradients[name] = second_term if first is None else first + second_term
        self._step(self.optimizer, list(trained.values()), list(gradients.values()))
        if closing:
            self._step_switcher(own)
        self._update()
        return value

    def _update(self) -> None:
        """Adapt the gradient scale once all steps that use it are done."""
        if self._stepped:
            self.scaler.update()
            self._stepped = False

    def _step_switcher(self, own: Sequence[Tensor | None]) -> None:
        """Take one step of the switcher along the mean gradient of a turn."""
        if self.options.gather_gradients and self.switcher_optimizer is not None and self._steps:
            share = self.scaler.get_scale() / self._steps
            scaled = [None if gradient is None else gradient * share for gradient in own]
            self._step(self.switcher_optimizer, self._learned(), scaled)

    def _limit(self, own: Mapping[str, Tensor | None], second: Mapping[str, Tensor]) -> float:
        """Return the factor that limits the norm of the second term; the network's own gradients are scaled."""
        norms = [
            math.sqrt(sum(float(found.double().square().sum()) for found in side if found is not None))
            for side in ([own.get(name) for name in second], second.values())
        ]
        norms[0] /= self.scaler.get_scale()
        return min(1.0, self.options.max_second_term * norms[0] / norms[1]) if norms[1] > 0 else 1.0

    def _through_switcher(self) -> tuple[dict[str, Tensor], list[Tensor | None]]:
        """Propagate the summed gradients of the factors to the weights that the switcher reads and its parameters."""
        assert self._connected is not None
        limit = self.options.max_second_term
        sums = [(values, self._sums[name]) for name, values in self._connected.items() if values.requires_grad]
        read = {name: value for name, value in self._weights.items() if value.requires_grad and limit}
        learned = self._learned() if self.options.gather_gradients else []
        if not sums or not (read or learned):
            return {}, [None] * len(learned)
        outputs, weighted = zip(*sums, strict=True)
        found = torch.autograd.grad(outputs, [*read.values(), *learned], weighted, allow_unused=True)
        second = {name: value for name, value in zip(read, found[: len(read)], strict=True) if value is not None}
        return second, list(found[len(read) :])

    def _learned(self) -> list[Tensor]:
        return [parameter for parameter in self.switcher.parameters() if parameter.requires_grad]

    def _finite_loss(self, weights: Mapping[str, Tensor], inputs: Any, targets: Any) -> tuple[Tensor, float]:
        loss = self._loss(weights, inputs, targets)
        if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.requires_grad:
            found = f"{list(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
            raise TrainingError(f"the loss is a {found}; expected a scalar tensor that depends on the outputs")
        value = float(loss.detach())
        if not math.isfinite(value):
            raise TrainingError(
                f"the loss is {value}; expected a finite loss: lower the learning rate or check the inputs for "
                "values that are not finite; the weights are those from before this step"
            )
        return loss, value

    def _loss(self, weights: Mapping[str, Tensor], inputs: Any, targets: Any) -> Tensor:
        with torch.autocast(self.device.type, self.options.amp, enabled=self.options.amp is not None):
            args, kwargs = ((), inputs) if isinstance(inputs, Mapping) else (inputs, {})
            args = args if isinstance(args, (tuple, list)) else (args,)
            return self.loss(functional_call(self.model, dict(weights), tuple(args), dict(kwargs)), targets)

    def _step(
        self, optimizer: torch.optim.Optimizer, parameters: Sequence[Tensor], found: Sequence[Tensor | None]
    ) -> None:
        for group in optimizer.param_groups:  # frozen parameters and those of other models get no gradient
            for parameter in group["params"]:
                parameter.grad = None
        for parameter, gradient in zip(parameters, found, strict=True):
            # A copy: optimizers and scalers change gradients in place.
            parameter.grad = None if gradient is None else gradient.clone()
        if any(gradient is not None for gradient in found):
            self.scaler.step(optimizer)
            self._stepped = True


def _batches(loader: Iterable[Any], device: torch.device) -> Iterator[tuple[Any, Any, int]]:
    """Yield inputs, targets and the number of inputs of each batch."""
    for number, item in enumerate(loader):
        if not isinstance(item, (tuple, list)) or len(item) != 2:
            raise TrainingError(
                f"batch {number} of the loader is a {type(item).__name__}; expected a pair of inputs and targets"
            )
        inputs, targets = to_device(item[0], device), to_device(item[1], device)
        tensors = tensors_of(inputs)
        if not tensors or not tensors[0].dim():
            raise TrainingError(
                f"the inputs of batch {number} are a {type(item[0]).__name__}; expected tensors with a batch axis"
            )
        yield inputs, targets, len(tensors[0])
