"""Refit: layer-wise reconstruction of a pruned model, one consumer after the other."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from nns_plugin.compensation.gram import RegressionSums
from nns_plugin.models.activations import capture_call, only_summed
from nns_plugin.models.batches import batches
from nns_plugin.models.layers import (
    broadcast_to_activation,
    channel_axis,
    has_bias,
    output_matrix,
    set_unfolded_weight,
    unfolded_input,
    unfolded_weight,
)

WEAK = 1e-3  # a batch norm counts as switching a channel off if its factor is below this share of the median factor


@dataclass(frozen=True, eq=False)
class Refitting:
    """Layer-wise reconstruction: consumer by consumer, a pruned model learns to repeat the dense one.

    Both models are in evaluation mode. A consumer is solved by least squares from the inputs that it has in the pruned
    model, so it absorbs its own loss and the error of all layers before it.

    Attributes:
        dense: The dense model, whose outputs are the targets.
        model: The pruned model; its consumers are changed in place.
        loader: Re-iterable; yields ``(inputs, labels)`` or ``inputs``.
        ridge: Pull towards the weights before, relative to the inputs' energy.
    """

    dense: nn.Module
    model: nn.Module
    loader: Iterable[Any]
    ridge: float

    def refit(self, name: str, norm: str | None, kept: Tensor | None) -> None:
        """Give one consumer the weights with which it best repeats the dense model's outputs.

        If only a sum reads its output, or that of the batch norm behind it (the sum with the skip connection of a
        residual block), the target is the sum, so that the layer also corrects the error of the other summand. The
        batch norm behind it gets the dense model's statistics back, because those are what the layer now produces.

        Args:
            name: Name of a linear or convolutional layer. The layers before it should be final.
            norm: The batch norm that alone reads its output, if there is one.
            kept: ``[k]`` int64, the outputs of the dense layer that it still has; ``None`` for all.

        Raises:
            CalibrationError: If the loader is empty.
        """
        module = self.model.get_submodule(name)
        weights = unfolded_weight(module)
        prior = torch.cat([weights, torch.zeros(*weights.shape[:2], 1, dtype=torch.float64)], 2)
        if has_bias(module):
            prior[:, :, -1] = cast(Tensor, module.bias).detach().double().cpu().reshape(weights.shape[:2])
        kept = torch.arange(weights.shape[0] * weights.shape[1]) if kept is None else kept
        scale = torch.ones(kept.numel(), dtype=torch.float64)
        if norm is not None:
            own, whole = self.model.get_submodule(norm), self.dense.get_submodule(norm)
            prior = _in_terms_of(prior, own, whole, kept)
            scale = _factor(own)
        sums = self._sums(name, norm or name, kept, scale)
        solution = sums.solve(prior, has_bias(module) or norm is not None, self.ridge)
        set_unfolded_weight(module, solution[:, :, :-1])
        constant = solution[:, :, -1].flatten()
        if has_bias(module):
            bias = cast(Tensor, module.bias)
            bias.copy_(constant)
        elif norm is not None:
            running_mean = cast(Tensor, own.running_mean)
            running_mean.sub_(constant.to(running_mean))

    def _sums(self, name: str, last: str, kept: Tensor, scale: Tensor) -> RegressionSums:
        """Sums of a consumer's inputs in the pruned model, and of its targets, over the loader."""
        module = self.model.get_submodule(name)
        groups, outputs, depth = unfolded_weight(module).shape
        axis = channel_axis(module)
        sums = RegressionSums.empty(groups, depth, outputs)
        added: str | None = None
        # A channel that the norm switches off, or nearly so, cannot correct the other summand.
        weak = scale.abs() <= WEAK * scale.abs().median()
        share = torch.where(weak, 0.0, 1 / scale)
        for place, batch in enumerate(batches(self.loader, self.model)):
            if place == 0 and only_summed(self.dense, last, batch.inputs):
                added = last
            dense = capture_call(self.dense, name, batch.inputs, added)
            found = capture_call(self.model, name, batch.inputs, added)
            rows = kept.to(dense.output.device)
            target = dense.output.index_select(axis, rows)
            if dense.addend is not None and found.addend is not None:
                gap = dense.addend.index_select(axis, rows) - found.addend
                target = target + gap * broadcast_to_activation(module, share.to(gap), gap.dim())
            sums.add(unfolded_input(module, found.inputs), output_matrix(module, target))
        return sums


def _in_terms_of(weights: Tensor, own: nn.Module, whole: nn.Module, kept: Tensor) -> Tensor:
    """Give a norm the dense model's statistics, and return the weights with which it computes the same as before."""
    variance, mean = cast(Tensor, own.running_var), cast(Tensor, own.running_mean)
    dense_variance = cast(Tensor, whole.running_var)[kept.to(variance.device)]
    dense_mean = cast(Tensor, whole.running_mean)[kept.to(variance.device)]
    eps = cast(float, own.eps)
    ratio = ((dense_variance.double() + eps) / (variance.double() + eps)).sqrt()
    shift = dense_mean.double() - mean.double() * ratio
    variance.copy_(dense_variance)
    mean.copy_(dense_mean)
    result = weights * ratio.cpu().reshape(*weights.shape[:2], 1)
    result[:, :, -1] += shift.cpu().reshape(weights.shape[:2])
    return result


def _factor(norm: nn.Module) -> Tensor:
    """The factor of each channel in a batch norm in evaluation mode, ``[O]`` float64."""
    variance = cast(Tensor, norm.running_var).double()
    factor = 1 / (variance + cast(float, norm.eps)).sqrt()
    gain = cast("Tensor | None", norm.weight)
    return (factor if gain is None else factor * gain.detach().double()).cpu()
