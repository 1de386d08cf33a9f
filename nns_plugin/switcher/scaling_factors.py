"""Scaling factors: what a switcher computes for each unit, in memory and in files, and folding them into weights."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from nns_plugin.errors import SwitchError
from nns_plugin.files import read_safetensors, write_safetensors
from nns_plugin.models.layers import axis_length, broadcast_to_weight, weight_key, weight_of
from nns_plugin.models.preserve import copied
from nns_plugin.switcher.switches import Switch
from nns_plugin.units import Port

FORMAT = "nns-plugin scaling factors 1"


@dataclass(frozen=True)
class Counts:
    """How many factors of a switch prune (0), weaken (below 1) and strengthen (1 and above)."""

    pruned: int
    weakened: int
    strengthened: int


class ScalingFactors(Mapping[str, Tensor]):
    """Scaling factors ``[size]`` of each switch, by the switch's name.

    Args:
        switches: What gets the factors.
        factors: The factors of each switch, finite and not negative.

    Raises:
        SwitchError: If factors are missing, negative, not finite, or of the wrong length.
    """

    def __init__(self, switches: Sequence[Switch], factors: Mapping[str, Tensor]) -> None:
        self.switches = tuple(switches)
        self._factors = {switch.name: factors.get(switch.name, torch.zeros(0)) for switch in self.switches}
        for switch in self.switches:
            values = self._factors[switch.name]
            if values.shape != (switch.size,):
                raise SwitchError(f"{switch.name!r} has {list(values.shape)} factors; expected [{switch.size}]")
            if not bool((values.detach().isfinite() & (values.detach() >= 0)).all()):
                raise SwitchError(
                    f"the factors of {switch.name!r} are negative or not finite; expected finite numbers of at least 0"
                )

    def __getitem__(self, name: str) -> Tensor:
        return self._factors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._factors)

    def __len__(self) -> int:
        return len(self._factors)

    def detach(self) -> ScalingFactors:
        """Return the same factors without their autograd graph."""
        return ScalingFactors(self.switches, {name: values.detach() for name, values in self.items()})

    def counts(self) -> dict[str, Counts]:
        """Count the pruned, weakened and strengthened units, by name of the switch."""
        return {
            name: Counts(int((values == 0).sum()), int(((values > 0) & (values < 1)).sum()), int((values >= 1).sum()))
            for name, values in self.items()
        }

    def parameters_of(self, model: nn.Module, weights: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """Return a model's weights with scaled columns, by name, for ``torch.func.functional_call``.

        Args:
            model: Not changed.
            weights: By name of the parameter, to be scaled instead of the model's own.

        Raises:
            SwitchError: If the factors belong to another model.
        """
        found: dict[str, Tensor] = {}
        for name, factors in self._by_layer(model).items():
            module = model.get_submodule(name)
            key = weight_key(name)
            weight = weight_of(module) if weights is None else weights[key]
            found[key] = weight * broadcast_to_weight(module, factors, "in", weight.shape)
        return found

    def _by_layer(self, model: nn.Module) -> dict[str, Tensor]:
        """Return the factor of every in-position of each layer; where several switches act on one, their product."""
        found: dict[str, Tensor] = {}
        for switch in self.switches:
            for place, port in enumerate(switch.consumers):
                if port.name not in found:
                    found[port.name] = self._ones(model, port, *switch.positions[place : place + 1])
                values = self[switch.name].to(found[port.name])
                index, unit = port.index.to(values.device), port.unit.to(values.device)
                found[port.name] = found[port.name].index_copy(0, index, found[port.name][index] * values[unit])
        return found

    @staticmethod
    def _ones(model: nn.Module, port: Port, expected: int | None = None) -> Tensor:
        try:
            weight = weight_of(model.get_submodule(port.name))
            length = axis_length(model.get_submodule(port.name), "in", port.name)
        except AttributeError as error:
            raise SwitchError(f"the model has no layer {port.name!r}; the factors belong to another model") from error
        needed = int(port.index.max()) + 1
        if length < needed or expected not in (None, length):
            raise SwitchError(
                f"{port.name!r} reads {length} positions, and the factors are for {expected or needed}; they belong "
                "to another model, or to this one before units were removed"
            )
        return torch.ones(length, dtype=weight.dtype, device=weight.device)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write to a safetensors file, atomically."""
        tensors = {f"factors {place}": self[switch.name].detach().cpu() for place, switch in enumerate(self.switches)}
        described = []
        for place, switch in enumerate(self.switches):
            sides: dict[str, list[str]] = {"consumers": [], "producers": []}
            for side, ports in (("consumers", switch.consumers), ("producers", switch.producers)):
                for number, port in enumerate(ports):
                    sides[side].append(port.name)
                    tensors[f"{side} {place} {number} index"] = port.index
                    tensors[f"{side} {place} {number} unit"] = port.unit
            described.append({"name": switch.name, "size": switch.size, "positions": switch.positions, **sides})
        write_safetensors(Path(path), FORMAT, SwitchError, {"nns": json.dumps(described)}, tensors)
        return Path(path)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> ScalingFactors:
        """Read a file that :meth:`save` wrote.

        Raises:
            SwitchError: If the file is missing or damaged.
        """
        return read_safetensors(Path(path), FORMAT, SwitchError, _decoded)


def _decoded(metadata: Mapping[str, str], tensors: dict[str, Tensor]) -> ScalingFactors:
    switches = []
    factors = {}
    for place, described in enumerate(json.loads(metadata["nns"])):
        ports = {
            side: tuple(
                Port(name, tensors[f"{side} {place} {number} index"], tensors[f"{side} {place} {number} unit"])
                for number, name in enumerate(described[side])
            )
            for side in ("consumers", "producers")
        }
        positions = tuple(map(int, described["positions"]))
        name, size = str(described["name"]), int(described["size"])
        switches.append(Switch(name, size, ports["consumers"], ports["producers"], positions))
        factors[switches[-1].name] = tensors[f"factors {place}"]
    return ScalingFactors(switches, factors)


def fold(model: nn.Module, factors: ScalingFactors) -> nn.Module:
    """Multiply the factors into the weights of a copy, which then computes what the model computes under them.

    Args:
        model: Not changed.
        factors: Its scaling factors.

    Raises:
        SwitchError: If the factors belong to another model.
    """
    folded = copied(model)
    with torch.no_grad():
        for name, value in factors.parameters_of(folded).items():
            folded.get_parameter(name).copy_(value)
    return folded
