"""Ports and unit groups: which are rejected, and how positions are renumbered when units are removed."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nns_plugin.errors import GroupError, NNSError
from nns_plugin.units import Port, UnitGroup, check_group, check_port, narrow_groups


def port(name: str, index: list[int], unit: list[int] | None = None) -> Port:
    return Port(name, torch.tensor(index), torch.tensor(list(range(len(index))) if unit is None else unit))


def owned(port: Port, size: int) -> list[list[int]]:
    """Positions by unit, as plain numbers."""
    return [
        sorted(p for p, u in zip(port.index.tolist(), port.unit.tolist(), strict=True) if u == k) for k in range(size)
    ]


GOOD = port("fc", [4, 2, 0, 5], [0, 1, 0, 1])


def test_a_good_port_passes() -> None:
    check_port(GOOD, 2, 6)
    check_port(GOOD, 2)


def test_positions_of_units_are_ascending() -> None:
    assert GOOD.positions(torch.tensor([0])).tolist() == [0, 4]
    assert GOOD.positions(torch.tensor([1, 0])).tolist() == [0, 2, 4, 5]
    assert GOOD.positions(torch.tensor([], dtype=torch.int64)).tolist() == []


@pytest.mark.parametrize(
    ("bad", "size", "axis", "message"),
    [
        (port("fc", [0, 1, 6], [0, 1, 2]), 3, 6, r"'fc': positions 0\.\.6 are out of range, the axis has 6"),
        (port("fc", [-1, 0], [0, 1]), 2, None, r"'fc': positions -1\.\.0 are out of range"),
        (port("fc", [0, 1, 1, 2], [0, 0, 1, 1]), 2, 6, "'fc': some position is listed twice"),
        (port("fc", [0, 1], [0, 2]), 2, 6, r"'fc': units 0\.\.2 are out of range, the group has 2"),
        (port("fc", [0, 1], [-1, 0]), 2, 6, r"'fc': units -1\.\.0 are out of range"),
        (port("fc", [0, 1, 2], [0, 0, 1]), 2, 6, "'fc': units own between 1 and 2 positions"),
        (
            Port("fc", torch.tensor([], dtype=torch.int64), torch.tensor([], dtype=torch.int64)),
            2,
            6,
            "'fc' has no positions",
        ),
        (
            Port("fc", torch.tensor([0, 1]), torch.tensor([0])),
            2,
            6,
            "'fc': index and unit must be int64 vectors of one length",
        ),
        (Port("fc", torch.tensor([0.0, 1.0]), torch.tensor([0, 1])), 2, 6, "'fc': index and unit must be int64"),
        (
            Port("fc", torch.tensor([[0, 1]]), torch.tensor([[0, 1]])),
            2,
            6,
            "'fc': index and unit must be int64 vectors",
        ),
        (
            Port("fc", torch.tensor([0, 1], dtype=torch.int32), torch.tensor([0, 1])),
            2,
            6,
            "'fc': index and unit must be int64",
        ),
    ],
)
def test_malformed_ports_are_refused(bad: Port, size: int, axis: int | None, message: str) -> None:
    with pytest.raises(GroupError, match=message):
        check_port(bad, size, axis)


def test_a_port_may_leave_units_to_another_port() -> None:
    """The two halves of a chunk: complete together, though not alone."""
    low, high = port("low", [0, 1], [0, 1]), port("high", [0, 1], [2, 3])
    check_group(UnitGroup("conv", 4, (port("conv", [0, 1, 2, 3]),), (low, high)))


@pytest.mark.parametrize(
    ("group", "message"),
    [
        (UnitGroup("conv", 0, (port("conv", [0]),), ()), "'conv' has 0 units and 1 producers"),
        (UnitGroup("conv", 1, (), (port("fc", [0]),)), "'conv' has 1 units and 0 producers"),
        (
            UnitGroup("conv", 3, (port("conv", [0, 1, 2]),), (port("fc", [0, 1]),)),
            "'conv': only 2 of its 3 units are read by fc",
        ),
        (UnitGroup("conv", 3, (port("conv", [0, 1]),), ()), "'conv': only 2 of its 3 units are written by conv"),
        (UnitGroup("conv", 1, (port("conv", [0, 0], [0, 0]),), ()), "'conv': some position is listed twice"),
    ],
)
def test_malformed_groups_are_refused(group: UnitGroup, message: str) -> None:
    with pytest.raises(GroupError, match=message) as caught:
        check_group(group)
    assert isinstance(caught.value, NNSError)
    assert isinstance(caught.value, ValueError)


def test_two_groups_cannot_name_the_same_position_of_one_layer_twice() -> None:
    """The same role of one module in two ports of a group must not own a position twice."""
    twice = UnitGroup("conv", 2, (port("conv", [0, 1]),), (port("fc", [0, 1]), port("fc", [1, 2])))
    with pytest.raises(GroupError, match="'conv'.*'fc'.*twice"):
        check_group(twice)


def test_units_are_observed_where_they_are_read_else_where_they_are_written() -> None:
    producer, consumer = port("conv", [0, 1]), port("fc", [0, 1])
    read = UnitGroup("conv", 2, (producer,), (consumer,))
    assert (read.side, read.ports) == ("in", (consumer,))
    unread = UnitGroup("conv", 2, (producer,), ())
    assert (unread.side, unread.ports) == ("out", (producer,))


def test_narrow_by_hand() -> None:
    group = UnitGroup("conv", 3, (port("conv", [0, 1, 2]),), (port("fc", [0, 1, 2, 3, 4, 5], [0, 0, 1, 1, 2, 2]),))
    narrowed = group.narrow(torch.tensor([0, 2]))
    assert narrowed.size == 2
    assert owned(narrowed.producers[0], 2) == [[0], [1]]
    assert owned(narrowed.consumers[0], 2) == [[0, 1], [2, 3]]
    assert (group.size, owned(group.consumers[0], 3)) == (3, [[0, 1], [2, 3], [4, 5]]), "the group itself stays"


def test_several_groups_on_one_consumer_move_together() -> None:
    """cat[left, right]: what leaves on the left moves the right."""
    left = UnitGroup("left", 3, (port("left", [0, 1, 2]),), (port("join", [0, 1, 2]),))
    right = UnitGroup("right", 4, (port("right", [0, 1, 2, 3]),), (port("join", [3, 4, 5, 6]),))
    kept = {"left": torch.tensor([2]), "right": torch.tensor([0, 3])}
    new_left, new_right = narrow_groups([left, right], kept)
    assert owned(new_left.consumers[0], 1) == [[0]]
    assert owned(new_right.consumers[0], 2) == [[1], [2]]
    assert owned(new_right.producers[0], 2) == [[0], [1]]
    only_left, untouched = narrow_groups([left, right], {"left": torch.tensor([1])})
    assert owned(only_left.consumers[0], 1) == [[0]]
    assert owned(untouched.consumers[0], 4) == [[1], [2], [3], [4]]
    assert owned(untouched.producers[0], 4) == [[0], [1], [2], [3]]
    assert untouched.size == 4


def test_in_and_out_axis_of_one_module_are_renumbered_apart() -> None:
    """A layer that reads and writes the same group, as in a recurrence over one Linear."""
    loop = UnitGroup("a", 3, (port("a", [0, 1, 2]), port("b", [2, 1, 0])), (port("b", [0, 1, 2]),))
    (narrowed,) = narrow_groups([loop], {"a": torch.tensor([1, 2])})
    assert owned(narrowed.producers[1], 2) == [[1], [0]]
    assert owned(narrowed.consumers[0], 2) == [[0], [1]]


@st.composite
def models(draw: st.DrawFn) -> tuple[list[UnitGroup], dict[str, torch.Tensor]]:
    """Groups that interleave at random on one consumer, and kept units of some of them."""
    sizes = draw(st.lists(st.integers(1, 5), min_size=1, max_size=4))
    spread = draw(st.integers(1, 3))
    owners = [(number, unit) for number, size in enumerate(sizes) for unit in range(size) for _ in range(spread)]
    order = draw(st.permutations(owners))
    groups, kept = [], {}
    for number, size in enumerate(sizes):
        index = [place for place, (owner, _) in enumerate(order) if owner == number]
        unit = [order[place][1] for place in index]
        groups.append(
            UnitGroup(f"g{number}", size, (port(f"g{number}", list(range(size))),), (port("join", index, unit),))
        )
        if draw(st.booleans()):
            units = draw(st.sets(st.integers(0, size - 1), min_size=1))
            kept[f"g{number}"] = torch.tensor(sorted(units))
    return groups, kept


@given(models())
def test_narrowing_equals_deleting_from_the_axis(drawn: tuple[list[UnitGroup], dict[str, torch.Tensor]]) -> None:
    """Reference: a list of (group, unit) for every position, from which entries are deleted."""
    groups, kept = drawn
    axis: dict[int, tuple[str, int]] = {}
    for group in groups:
        for place, unit in zip(group.consumers[0].index.tolist(), group.consumers[0].unit.tolist(), strict=True):
            axis[place] = (group.name, unit)
    stays = [
        (name, kept[name].tolist().index(unit) if name in kept else unit)
        for _, (name, unit) in sorted(axis.items())
        if name not in kept or unit in kept[name].tolist()
    ]
    for group in narrow_groups(groups, kept):
        check_group(group)
        expected = {place: unit for place, (name, unit) in enumerate(stays) if name == group.name}
        consumer = group.consumers[0]
        assert dict(zip(consumer.index.tolist(), consumer.unit.tolist(), strict=True)) == expected


@given(models())
def test_narrowing_twice_equals_narrowing_once(drawn: tuple[list[UnitGroup], dict[str, torch.Tensor]]) -> None:
    groups, kept = drawn
    group = groups[0]
    once = kept.get(group.name, torch.arange(group.size))
    both = narrow_groups(narrow_groups(groups, {group.name: once}), {group.name: torch.tensor([0])})
    direct = narrow_groups(groups, {group.name: once[:1]})
    for left, right in zip(both, direct, strict=True):
        assert left.size == right.size
        assert owned(left.consumers[0], left.size) == owned(right.consumers[0], right.size)
