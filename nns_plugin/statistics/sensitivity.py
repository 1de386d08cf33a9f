"""Sensitivity: how strongly a model's outputs react to the outputs of its layers; needs gradients, but no labels."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from nns_plugin.errors import CalibrationError
from nns_plugin.models.batches import batches
from nns_plugin.models.hooks import Hook, hooked
from nns_plugin.models.inputs import run_model, tensors_of
from nns_plugin.models.layers import by_channel, is_linear_or_convolution
from nns_plugin.models.preserve import preserved
from nns_plugin.units import UnitGroup


def output_sensitivity(
    model: nn.Module, loader: Iterable[Any], groups: Sequence[UnitGroup], *, probes: int = 4, progress: bool = False
) -> dict[str, Tensor]:
    """Mean squared gradient of a model's outputs with respect to each output channel of the groups' consumers.

    ``s[o] = E[sum_k (d y_k / d z_o)^2]`` over inputs and positions of a consumer's output z, with random signs v:
    ``E_v[(d (v . y) / d z_o)^2]`` is the same. A small error e of z moves the outputs y by about ``s |e|^2``.

    Args:
        model: The model; runs in evaluation mode and is left exactly as it was, gradients included.
        loader: Yields ``(inputs, labels)`` or ``inputs``, as for :func:`nns_plugin.calibrate`.
        groups: Whose consumers are measured.
        probes: Number of random sign vectors a batch.
        progress: Whether to show a progress bar.

    Returns:
        ``[O]`` float64 by name of the consumer, for the linear and convolutional ones that run.

    Raises:
        CalibrationError: If the loader yields no inputs, or no output of the model has a gradient.
    """
    names = dict.fromkeys(port.name for group in groups for port in group.consumers)
    consumers = {name: model.get_submodule(name) for name in names}
    consumers = {name: module for name, module in consumers.items() if is_linear_or_convolution(module)}
    if not consumers:
        return {}
    sums: dict[str, Tensor] = {}
    elements: dict[str, int] = {}
    generator = torch.Generator().manual_seed(0)
    with preserved(model), torch.inference_mode(False), torch.enable_grad():
        model.eval()
        for batch in batches(loader, model, title="measuring sensitivity", progress=progress):
            reached, scores = _forward(model, consumers, batch.inputs)
            for _ in range(probes):
                signs = [torch.randint(0, 2, score.shape, generator=generator) * 2 - 1 for score in scores]
                total = torch.stack(
                    [(score * sign.to(score)).sum() for score, sign in zip(scores, signs, strict=True)]
                ).sum()
                gradients = torch.autograd.grad(total, list(reached.values()), retain_graph=True, allow_unused=True)
                for (name, output), gradient in zip(reached.items(), gradients, strict=True):
                    gradient = torch.zeros_like(output) if gradient is None else gradient
                    squares = by_channel(consumers[name], gradient.square().double()).sum(1).cpu()
                    sums[name] = sums.get(name, 0.0) + squares
                    elements[name] = elements.get(name, 0) + output.numel() // squares.numel()
    return {name: value / elements[name] for name, value in sums.items()}


def _forward(
    model: nn.Module, consumers: Mapping[str, nn.Module], inputs: Any
) -> tuple[dict[str, Tensor], list[Tensor]]:
    """The consumers' outputs and the model's floating-point outputs, with gradients even in a frozen model."""
    reached: dict[str, Tensor] = {}

    def keep(name: str, x: Any, output: Tensor) -> Tensor:
        reached[name] = output if output.requires_grad else output.detach().requires_grad_()
        return reached[name].clone()  # what follows may work in place

    hooks: list[Hook] = [(module, "output", partial(keep, name)) for name, module in consumers.items()]
    with hooked(*hooks):
        outputs = run_model(model, inputs)
    scores = [score for score in tensors_of(outputs) if score.requires_grad]
    if not scores:
        raise CalibrationError("no output of the model has a gradient; sensitivity cannot be measured")
    return reached, scores
