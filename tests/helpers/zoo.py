"""The zoo: one model for each topology, with its example inputs and its unit groups, written by hand."""

from __future__ import annotations

import random
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from zoo_models import (
    Branches,
    Chunk,
    Concat,
    ConvNorm,
    Depthwise,
    FlattenConcat,
    Frozen,
    FusedAttention,
    Glu,
    GroupedConv,
    Mlp,
    MultiHead,
    Normed,
    Recurrent,
    Residual,
    Shared,
    Shuffle,
    Transposed,
    Twice,
    UnboundAttention,
)

from nns_plugin.units import Port, UnitGroup

# On models this small, a second thread only waits; where cores are shared, for twenty times as long.
torch.set_num_threads(1)

# A port by hand: the module's name, and for each unit the positions that it owns there.
Ports = dict[str, list[list[int]]]


def fresh_arguments() -> dict[str, dict[object, object]]:
    """Of a torch-pruning pruner: its default arguments are dictionaries that all pruners share."""
    return {"in_channel_groups": {}, "out_channel_groups": {}, "num_heads": {}, "channel_groups": {}}


@dataclass(frozen=True)
class Expected:
    """A unit group by hand: what writes and what reads each unit."""

    producers: Ports
    consumers: Ports


@dataclass(frozen=True)
class Case:
    """A model with its groups.

    Attributes:
        make: Builds the model.
        inputs: Example inputs.
        groups: The groups by name; a group that cannot be used is absent.
        warns: The warnings about groups that are left out, as patterns.
        inexact: Groups whose removal changes more than zeroing their rows and columns does (norms, scaled attention).
    """

    make: Callable[[], nn.Module]
    inputs: Callable[[int], object]
    groups: dict[str, Expected]
    warns: tuple[str, ...] = ()
    inexact: tuple[str, ...] = ()


def one_each(count: int, start: int = 0) -> list[list[int]]:
    """Every unit owns one position."""
    return [[start + unit] for unit in range(count)]


def blocks(count: int, length: int, start: int = 0) -> list[list[int]]:
    """Every unit owns a run of positions, as behind a flatten."""
    return [list(range(start + unit * length, start + (unit + 1) * length)) for unit in range(count)]


def strided(count: int, repeats: int, start: int = 0) -> list[list[int]]:
    """Unit u owns u, u + count, u + 2 count, ...: equal offsets in several groups."""
    return [[start + unit + count * repeat for repeat in range(repeats)] for unit in range(count)]


def image(channels: int, size: int = 4) -> Callable[[int], Tensor]:
    return lambda count: torch.randn(count, channels, size, size)


def vector(features: int) -> Callable[[int], Tensor]:
    return lambda count: torch.randn(count, features)


def sequence(features: int, length: int = 7) -> Callable[[int], Tensor]:
    return lambda count: torch.randn(count, length, features)


MLP_GROUPS = {
    "fc1": Expected({"fc1": one_each(8)}, {"fc2": one_each(8)}),
    "fc2": Expected({"fc2": one_each(5)}, {"head": one_each(5)}),
}

CASES = {
    "mlp": Case(Mlp, vector(6), MLP_GROUPS),
    "frozen": Case(Frozen, vector(6), MLP_GROUPS),
    "conv_norm": Case(
        ConvNorm,
        image(1),
        {
            "conv1": Expected({"conv1": one_each(4)}, {"conv2": one_each(4)}),
            "conv2": Expected({"conv2": one_each(6)}, {"head": blocks(6, 4)}),
        },
    ),
    "grouped": Case(
        GroupedConv,
        image(2),
        {
            "first": Expected({"first": strided(4, 2)}, {"grouped": strided(4, 2)}),
            "grouped": Expected({"grouped": strided(6, 2)}, {"last": strided(6, 2)}),
            "last": Expected({"last": one_each(6)}, {"head": one_each(6)}),
        },
    ),
    "depthwise": Case(
        Depthwise,
        image(2),
        {
            "first": Expected({"first": one_each(6)}, {"point": one_each(6)}),
            "point": Expected({"point": one_each(5)}, {"head": one_each(5)}),
        },
    ),
    "residual": Case(
        Residual,
        image(2),
        {
            "stem": Expected(
                {"stem": one_each(6), "outer": one_each(6)},
                {"inner": one_each(6), "side": one_each(6), "head": one_each(6)},
            ),
            "inner": Expected({"inner": one_each(4)}, {"outer": one_each(4)}),
            "side": Expected({"side": one_each(3)}, {"head": one_each(3, 6)}),
        },
    ),
    "concat": Case(
        Concat,
        image(2),
        {
            "left": Expected({"left": one_each(3)}, {"join": one_each(3)}),
            "right": Expected({"right": one_each(4)}, {"join": one_each(4, 3)}),
            "join": Expected({"join": one_each(5)}, {"head": one_each(5)}),
        },
    ),
    "twice": Case(
        Twice,
        vector(4),
        {
            "first": Expected({"first": one_each(5)}, {"second": strided(5, 2)}),
            "second": Expected({"second": one_each(6)}, {"head": one_each(6)}),
        },
    ),
    "transposed": Case(
        Transposed,
        image(2),
        {
            "first": Expected({"first": one_each(5)}, {"up": one_each(5)}),
            "up": Expected({"up": one_each(4)}, {"last": one_each(4)}),
            "last": Expected({"last": one_each(3)}, {"head": one_each(3)}),
        },
    ),
    "recurrent": Case(
        Recurrent,
        sequence(4),
        {"first": Expected({"first": one_each(6)}, {"lstm": one_each(6)})},
        warns=("group of 'lstm': torch-pruning cannot remove hidden units of an LSTM",),
    ),
    "glu": Case(
        Glu,
        vector(4),
        {"second": Expected({"second": one_each(5)}, {"head": one_each(5)})},
        warns=("group of 'first': .*'second': positions 0..7 are out of range, the axis has 4",),
    ),
    "shuffle": Case(
        Shuffle,
        image(2),
        {"second": Expected({"second": one_each(4)}, {"head": one_each(4)})},
        warns=("group of 'first': .*'second': positions 0..7 are out of range, the axis has 2",),
    ),
    "flatten_concat": Case(
        FlattenConcat,
        lambda count: (torch.randn(count, 2, 2, 2), torch.randn(count, 4)),
        {"join": Expected({"join": one_each(6)}, {"head": one_each(6)})},
        warns=("group of '(conv|vector)': .* positions must be distinct",),
    ),
    "group_norm": Case(
        Normed,
        image(2),
        {
            "first": Expected({"first": strided(4, 2)}, {"second": strided(4, 2)}),
            "second": Expected({"second": one_each(4)}, {"head": one_each(4)}),
        },
        inexact=("first",),
    ),
    "chunk": Case(
        Chunk,
        image(2),
        {
            "first": Expected({"first": strided(4, 2)}, {"low": one_each(4), "high": one_each(4)}),
            "low": Expected({"low": one_each(3)}, {"head": one_each(3)}),
            "high": Expected({"high": one_each(2)}, {"head": one_each(2, 3)}),
        },
    ),
    "fused_attention": Case(
        FusedAttention,
        sequence(4),
        {
            "embed": Expected({"embed": one_each(6)}, {"qkv": one_each(6)}),
            "qkv": Expected({"qkv": strided(4, 3)}, {"proj": one_each(4)}),
            "proj": Expected({"proj": one_each(6)}, {"head": one_each(6)}),
        },
    ),
    "unbound_attention": Case(
        UnboundAttention,
        sequence(4),
        {
            "embed": Expected({"embed": one_each(6)}, {"qkv": one_each(6)}),
            "qkv": Expected({"qkv": strided(4, 3)}, {"proj": one_each(4)}),
            "proj": Expected({"proj": one_each(6)}, {"head": one_each(6)}),
        },
    ),
    "multi_head": Case(
        MultiHead,
        sequence(4),
        {
            "embed": Expected({"embed": strided(4, 2), "attention": strided(4, 2)}, {}),
            "hidden": Expected({"hidden": one_each(5)}, {"head": one_each(5)}),
        },
        inexact=("embed",),
    ),
    "shared": Case(
        Shared,
        image(2),
        {
            "left": Expected({"both": one_each(3), "left": one_each(3)}, {"head": one_each(3)}),
            "right": Expected({"both": one_each(4, 3), "right": one_each(4)}, {"head": one_each(4, 3)}),
        },
    ),
    "branches": Case(
        Branches,
        image(2),
        {
            "left": Expected(
                {
                    "left": [[0], [1], [2], [], [], [], []],
                    "right": [[], [], [], [0], [1], [2], [3]],
                    "both": one_each(7),
                },
                {"head": one_each(7)},
            )
        },
    ),
}


def unit_group(name: str, expected: Expected) -> UnitGroup:
    """The unit group that a hand-written expectation describes."""

    def ports(by_name: Ports) -> tuple[Port, ...]:
        made = []
        for module, units in by_name.items():
            pairs = sorted((position, unit) for unit, positions in enumerate(units) for position in positions)
            index, unit = zip(*pairs, strict=True)
            made.append(Port(module, torch.tensor(index), torch.tensor(unit)))
        return tuple(made)

    size = len(next(iter(expected.producers.values())))
    return UnitGroup(name, size, ports(expected.producers), ports(expected.consumers))


def groups_of(case: str) -> tuple[UnitGroup, ...]:
    """The unit groups of a case, written by hand: nothing of torch-pruning in them."""
    return tuple(unit_group(name, expected) for name, expected in CASES[case].groups.items())


def by_hand(group: UnitGroup) -> Expected:
    """A unit group in the form of an expectation."""

    def ports(found: tuple[Port, ...]) -> Ports:
        return {
            port.name: [sorted(port.index[port.unit == unit].tolist()) for unit in range(group.size)] for port in found
        }

    return Expected(ports(group.producers), ports(group.consumers))


def labelled(case: str, count: int, labels: int = 3, batch: int = 4) -> list[tuple[object, Tensor]]:
    """A loader of labelled batches for a case; every label occurs."""
    made = []
    for start in range(0, count, batch):
        size = min(batch, count - start)
        made.append((CASES[case].inputs(size), (torch.arange(size) + start) % labels))
    return made


HOOKS = tuple(name for name in vars(nn.Module()) if "_hooks" in name)


class Snapshot:
    """Everything of a model, and of the random number generators, that must come back as it was."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.modules = list(model.modules())
        self.training = [module.training for module in self.modules]
        self.attributes = [dict(vars(module)) for module in self.modules]
        self.hooks = [{name: dict(vars(module).get(name) or {}) for name in HOOKS} for module in self.modules]
        self.parameters = [
            (name, value, value.detach().clone(), value.requires_grad, value.grad, deepcopy(value.grad))
            for name, value in model.named_parameters(remove_duplicate=False)
        ]
        self.buffers = [
            (module, name, value, None if value is None else value.clone())
            for module in self.modules
            for name, value in module._buffers.items()
        ]
        self.buffer_names = [list(module._buffers) for module in self.modules]
        self.rng = self._rng()

    @staticmethod
    def _rng() -> tuple[object, ...]:
        numpy_state = np.random.get_state()
        return (random.getstate(), numpy_state[1].tobytes(), numpy_state[2], torch.get_rng_state().numpy().tobytes())

    def check(self, rng: bool = True) -> None:
        """Assert that nothing has changed."""
        assert list(self.model.modules()) == self.modules
        assert [module.training for module in self.modules] == self.training, "training flags"
        for module, attributes, hooks, names in zip(
            self.modules, self.attributes, self.hooks, self.buffer_names, strict=True
        ):
            assert {name: dict(vars(module).get(name) or {}) for name in HOOKS} == hooks, f"hooks of {module}"
            assert vars(module).keys() == attributes.keys(), f"attributes of {module}"
            for name, value in attributes.items():
                assert vars(module)[name] is value or vars(module)[name] == value, f"{name} of {module}"
            assert list(module._buffers) == names, f"buffers of {module}"
        named = list(self.model.named_parameters(remove_duplicate=False))
        assert [name for name, _ in named] == [known[0] for known in self.parameters]
        for (name, value), (_, same, content, trainable, grad, grad_content) in zip(
            named, self.parameters, strict=True
        ):
            assert value is same, f"identity of {name}"
            assert torch.equal(value, content), f"values of {name}"
            assert value.requires_grad is trainable, f"requires_grad of {name}"
            assert value.grad is grad, f"grad of {name}"
            assert grad is None or torch.equal(value.grad, grad_content), f"values of the grad of {name}"
        for module, name, value, content in self.buffers:
            assert module._buffers[name] is value, f"identity of buffer {name}"
            assert value is None or np.array_equal(value, content, equal_nan=True), f"buffer {name}"
        if rng:
            assert self._rng() == self.rng, "random number generators"
