"""Group mixing: least squares on the inputs that each consumer has after every removal, group after group."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from nns_plugin.compensation.gram import RegressionSums
from nns_plugin.compensation.least_squares import RIDGE
from nns_plugin.compensation.plans import add_shift, exceeds
from nns_plugin.models.activations import capture_call
from nns_plugin.models.batches import batches
from nns_plugin.models.layers import (
    Layout,
    broadcast_to_activation,
    channel_axis,
    channel_groups,
    consumer_matrices,
    has_bias,
    input_matrix,
    kernel_share,
    padded_positions,
    set_consumer_matrices,
)


@dataclass(frozen=True, eq=False)
class GroupMixing:
    """A dense model and the copy that is being narrowed, both in evaluation mode.

    Attributes:
        dense: The dense model, whose channels are replaced.
        model: The narrowed model; its consumers are changed in place.
        loader: Re-iterable; yields ``(inputs, labels)`` or ``inputs``.
        shifts: By name of each consumer that was mixed before, the shift ``[O]`` of the dense model's outputs.
    """

    dense: nn.Module
    model: nn.Module
    loader: Iterable[Any]
    shifts: dict[str, Tensor] = field(default_factory=dict)

    def mix(self, name: str, whole: Layout, narrow: Layout, norm: nn.Module | None, kept: Tensor | None) -> None:
        """Let a consumer read the best linear replacement of its input in the dense model.

        ``x_dense ~ M x + m`` by least squares over the loader, with x the consumer's input as it is now; then
        ``W = W_dense M``, and ``W_dense m`` goes into the bias or the batch norm. Where a kernel spans several
        positions, this need not be best for the outputs: if the consumer's present weights err less, they stay.

        Args:
            name: Name of the consumer.
            whole: Layout of its input in the dense model.
            narrow: Layout of its input in the narrowed model.
            norm: The batch norm that alone reads its output, if there is one.
            kept: ``[k]`` int64, the outputs of the dense layer that it still has; ``None`` for all.
        """
        module, original = self.model.get_submodule(name), self.dense.get_submodule(name)
        weights = consumer_matrices(original, whole)
        before = consumer_matrices(module, narrow)
        if weights is None or before is None or channel_groups(module) != channel_groups(original):
            return
        sums = self._sums(name, whole, narrow)
        constant = has_bias(module) or norm is not None
        mix = sums.solve(torch.zeros_like(sums.cross), constant, RIDGE)
        outputs = sum(matrix.shape[0] for matrix in weights)
        kept = torch.arange(outputs) if kept is None else kept
        taken = torch.cat([matrix @ part[:, :-1] for matrix, part in zip(weights, mix, strict=True)])[kept]
        shift = torch.cat([(matrix @ part[:, -1]).sum(1) for matrix, part in zip(weights, mix, strict=True)])
        shift *= kernel_share(module)
        step = (shift - self.shifts.get(name, torch.zeros_like(shift)))[kept]
        set_consumer_matrices(module, list(taken.chunk(len(before))))
        if before[0].shape[1] > 1 and exceeds(self._errors(name, kept, before, narrow, step)):
            set_consumer_matrices(module, before)
            return
        add_shift(module, norm, step)
        self.shifts[name] = shift

    def _sums(self, name: str, whole: Layout, narrow: Layout) -> RegressionSums:
        """Sums of the consumer's present input with the dense model's, by channel."""
        module = self.model.get_submodule(name)
        groups = channel_groups(module)
        sums = RegressionSums.empty(groups, narrow.slot.numel() // groups, whole.slot.numel() // groups)
        for batch in batches(self.loader, self.model):
            dense, found = (capture_call(model, name, batch.inputs).inputs for model in (self.dense, self.model))
            sums.add(input_matrix(module, narrow, found), input_matrix(module, whole, dense))
            sums.inner[:, -1, -1] += found.shape[0] * padded_positions(module, found.shape[2:])
        return sums

    def _errors(self, name: str, kept: Tensor, before: list[Tensor], layout: Layout, step: Tensor) -> Tensor:
        """Squared errors ``[2]`` of the consumer's outputs: with its new weights, and with those before."""
        module = self.model.get_submodule(name)
        after = consumer_matrices(module, layout) or []
        axis = channel_axis(module)
        errors = torch.zeros(2, dtype=torch.float64)
        for batch in batches(self.loader, self.model):
            output = capture_call(self.dense, name, batch.inputs).output
            target = output.index_select(axis, kept.to(output.device))
            reached = capture_call(self.model, name, batch.inputs).inputs
            rises = (torch.zeros_like(step), step)
            for place, (matrices, rise) in enumerate(zip((before, after), rises, strict=True)):
                set_consumer_matrices(module, matrices)  # the new weights come last and stay
                output = module(reached) + broadcast_to_activation(module, rise.to(target), target.dim())
                errors[1 - place] += float((output - target).double().square().sum())
        return errors
