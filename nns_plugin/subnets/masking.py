"""A small model's weights in their places in the wide one, zeros elsewhere."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from nns_plugin.backends import TracedModel
from nns_plugin.errors import SubnetError
from nns_plugin.units import UnitGroup


def untied(model: nn.Module) -> nn.Module:
    """Give each name of a shared parameter a parameter of its own, in place: removal narrows each by itself."""
    seen = set()
    for module in model.modules():
        for name, value in list(module._parameters.items()):
            if value is not None and id(value) in seen:
                setattr(module, name, nn.Parameter(value.detach().clone(), value.requires_grad))
            seen.add(id(value))
    return model


def origins(traced: TracedModel, groups: Sequence[UnitGroup], kept: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """For each weight of the small model the flat positions of its values in the wide one.

    All values of the traced model are numbered before the backend removes the units, so that whatever kinds of layers
    there are, the remaining values are their positions. The traced model is consumed.
    """
    model = traced.model.to("cpu", torch.float64)  # after tracing: a type may choose other operations
    with torch.no_grad():
        for value in model.state_dict().values():
            if value.is_floating_point():
                value.copy_(torch.arange(value.numel(), dtype=value.dtype).reshape(value.shape))
    traced.keep(groups, kept)
    return {name: value.round().long() for name, value in model.state_dict().items() if value.is_floating_point()}


def scatter(model: nn.Module, weights: Mapping[str, Tensor], places: Mapping[str, Tensor]) -> None:
    """Write the weights of a small model to their places, and zeros elsewhere into parameters, in place.

    Raises:
        SubnetError: If the weights do not fit the model.
    """
    parameters = {name for name, _ in model.named_parameters()}
    state = model.state_dict()
    if state.keys() != weights.keys():
        wrong = sorted(state.keys() ^ weights.keys())
        raise SubnetError(f"the subnet does not fit the parent: {', '.join(wrong[:3])} is in one of them only")
    with torch.no_grad():
        for name, value in state.items():
            small, place = weights[name].to(value), places.get(name)
            if small.shape == value.shape and place is None:
                value.copy_(small)
                continue
            if place is None or place.shape != small.shape:
                raise SubnetError(
                    f"the subnet does not fit the parent: {name!r} is {list(small.shape)} in the subnet and "
                    f"{None if place is None else list(place.shape)} in the parent narrowed to it"
                )
            wide = torch.zeros_like(value) if name in parameters else value.clone()
            wide.reshape(-1)[place.to(value.device).flatten()] = small.flatten()
            value.copy_(wide)
