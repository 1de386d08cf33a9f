"""Unit groups of a zoo of topologies, against expectations written by hand."""

from __future__ import annotations

import gc
import re
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nns_plugin.units import check_group

pytestmark = pytest.mark.host("torch_pruning")
pytest.importorskip("torch_pruning")

import zoo  # noqa: E402
from free_models import Free  # noqa: E402
from recorded import recorded  # noqa: E402

from nns_plugin.adapters.torch_pruning.graph import build_graph  # noqa: E402
from nns_plugin.adapters.torch_pruning.groups import (  # noqa: E402
    UncheckedGroupsWarning,
    UnusableGroupWarning,
    graph_groups,
    unit_groups,
)
from nns_plugin.adapters.torch_pruning.unit_removal import remove_units  # noqa: E402


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("name", zoo.CASES)
def test_groups_are_those_written_by_hand(name: str, batch: int) -> None:
    """Also with one example input, which torch-pruning would take apart."""
    case = zoo.CASES[name]
    model = case.make()
    found, left_out = recorded(lambda: unit_groups(model, case.inputs(batch)))
    order = [module for module, _ in model.named_modules()]
    assert [group.name for group in found] == sorted(case.groups, key=order.index)
    for group in found:
        check_group(group)
        assert zoo.by_hand(group) == case.groups[group.name], group.name
    assert len(left_out) == len(case.warns), left_out
    for message, pattern in zip(left_out, case.warns, strict=True):
        assert re.search(f"left out: {pattern}", message), message


def test_a_graph_remembers_its_groups_until_units_are_removed() -> None:
    case = zoo.CASES["mlp"]
    graph = build_graph(case.make(), case.inputs(2))
    known = weakref.ref(graph.get_all_groups([], [nn.Linear])[0])
    assert graph.get_all_groups([], [nn.Linear])[0] is known()
    remove_units(graph, graph_groups(graph)[0], torch.tensor([0]))
    graph.get_all_groups([], [nn.Linear])
    gc.collect()
    assert known() is None


# --- what torch-pruning gets wrong, in silence or loudly --------------------------------------------------------------


def pooled(x: Tensor) -> Tensor:
    return torch.relu(x).mean((2, 3))


def shuffle_channels(x: Tensor) -> Tensor:
    n, c, h, w = x.shape
    return x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)


def conv(inputs: int, outputs: int) -> nn.Module:
    return nn.Conv2d(inputs, outputs, 1)


def swapped(m: Any, x: Tensor) -> Tensor:
    first, second = m.a(x).split([4, 4], 1)
    return m.head(torch.cat([pooled(m.low(first)), pooled(m.high(second))], 1))


ELSEWHERE = "does not read its units where torch-pruning says"
WRONG: dict[str, tuple[Callable[[], nn.Module], Callable[[], Any], str]] = {
    "channel shuffle": (
        lambda: Free(
            lambda m, x: m.head(pooled(m.b(shuffle_channels(torch.relu(m.a(x)))))),
            a=conv(2, 8),
            b=conv(8, 4),
            head=nn.Linear(4, 3),
        ),
        lambda: torch.randn(3, 2, 4, 4),
        f"'a': 'b' {ELSEWHERE}",
    ),
    "padded channels": (
        lambda: Free(
            lambda m, x: m.head(pooled(m.b(F.pad(torch.relu(m.a(x)), (0, 0, 0, 0, 2, 2))))),
            a=conv(2, 4),
            b=conv(8, 4),
            head=nn.Linear(4, 3),
        ),
        lambda: torch.randn(3, 2, 4, 4),
        f"'a': 'b' {ELSEWHERE}",
    ),
    "concatenation with the input": (
        lambda: Free(
            lambda m, x: m.head(pooled(m.b(torch.cat([x, torch.relu(m.a(x))], 1)))),
            a=conv(2, 4),
            b=conv(6, 4),
            head=nn.Linear(4, 3),
        ),
        lambda: torch.randn(3, 2, 4, 4),
        f"'a': 'b' {ELSEWHERE}",
    ),
    "concatenation with a constant": (
        lambda: Free(
            lambda m, x: m.head(pooled(m.b(torch.cat([torch.ones(len(x), 5, 4, 4), torch.relu(m.a(x))], 1)))),
            a=conv(2, 4),
            b=conv(9, 4),
            head=nn.Linear(4, 3),
        ),
        lambda: torch.randn(3, 2, 4, 4),
        f"'a': 'b' {ELSEWHERE}",
    ),
    "concatenation over dimension 2 of sequences": (
        lambda: Free(
            lambda m, x: m.head(torch.relu(m.join(torch.cat([torch.relu(m.a(x)), torch.relu(m.b(x))], 2))).mean(1)),
            a=nn.Linear(4, 4),
            b=nn.Linear(4, 4),
            join=nn.Linear(8, 6),
            head=nn.Linear(6, 3),
        ),
        lambda: torch.randn(3, 7, 4),
        f"'(a|b)': 'join' {ELSEWHERE}",
    ),
    "sum with the input": (
        lambda: Free(
            lambda m, x: m.head(pooled(m.b(torch.relu(m.a(x)) + x))), a=conv(4, 4), b=conv(4, 5), head=nn.Linear(5, 3)
        ),
        lambda: torch.randn(3, 4, 4, 4),
        "'a': 'b' reads the model's input at the same positions",
    ),
    "sizes of a split": (
        lambda: Free(swapped, a=conv(2, 8), low=conv(4, 3), high=conv(4, 2), head=nn.Linear(5, 3)),
        lambda: torch.randn(3, 2, 4, 4),
        r"'a': it is split into fixed sizes \[4, 4\]",
    ),
    "slices": (
        lambda: Free(
            lambda m, x: (lambda y: m.head(pooled(m.low(y[:, :3])) + pooled(m.high(y[:, 3:]))))(torch.relu(m.a(x))),
            a=conv(2, 8),
            low=conv(3, 2),
            high=conv(5, 2),
            head=nn.Linear(2, 3),
        ),
        lambda: torch.randn(3, 2, 4, 4),
        "'a': it is sliced at fixed positions, which removal would not change",
    ),
    "one gate for all units": (
        lambda: Free(
            lambda m, x: m.head(torch.relu(m.a(x)) * torch.sigmoid(m.gate(x))),
            a=nn.Linear(4, 6),
            gate=nn.Linear(4, 1),
            head=nn.Linear(6, 3),
        ),
        lambda: torch.randn(3, 4),
        "group of '(a|gate)'",
    ),
    "an unread half": (
        lambda: Free(lambda m, x: m.head(torch.relu(m.a(x).chunk(2, 1)[1])), a=nn.Linear(4, 8), head=nn.Linear(4, 3)),
        lambda: torch.randn(3, 4),
        "'a'",
    ),
    "a parameter as a matrix": (
        lambda: Free(
            lambda m, x: m.head(torch.relu(m.a(x)) @ m.b.weight.T),
            a=nn.Linear(4, 6),
            b=nn.Linear(6, 5),
            head=nn.Linear(5, 3),
        ),
        lambda: torch.randn(3, 4),
        "group of 'a'",
    ),
    "a recurrence that torch-pruning does not know": (
        lambda: Free(
            lambda m, x: m.head(m.gru(torch.relu(m.a(x)))[0].mean(1)),
            a=nn.Linear(4, 6),
            gru=nn.GRU(6, 5, batch_first=True),
            head=nn.Linear(5, 3),
        ),
        lambda: torch.randn(3, 7, 4),
        "'a': torch-pruning cannot follow its units: IndexError",
    ),
    "the last hidden state of an LSTM": (
        lambda: Free(
            lambda m, x: m.head(m.lstm(torch.relu(m.a(x)))[1][0][-1]),
            a=nn.Linear(4, 6),
            lstm=nn.LSTM(6, 6, batch_first=True),
            head=nn.Linear(6, 3),
        ),
        lambda: torch.randn(3, 7, 4),
        f"'a': 'head' {ELSEWHERE}",
    ),
    "a depthwise convolution of the input": (
        lambda: Free(lambda m, x: m.head(pooled(m.d(x))), d=nn.Conv2d(2, 2, 3, groups=2), head=nn.Linear(2, 3)),
        lambda: torch.randn(3, 2, 4, 4),
        "'d': no layer writes its units; they are inputs of the model",
    ),
    "an output that is read as well": (
        lambda: Free(
            lambda m, x: (lambda y: (m.head(y), y))(torch.relu(m.a(x))), a=nn.Linear(4, 6), head=nn.Linear(6, 3)
        ),
        lambda: torch.randn(3, 4),
        "'a': its units are an output of the model and read inside it",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_cannot_be_followed_is_left_out_by_name(name: str) -> None:
    make, inputs, pattern = WRONG[name]
    torch.manual_seed(1)
    model = make().eval()
    with pytest.warns(UnusableGroupWarning, match=f"left out: .*{pattern}"):
        found = unit_groups(model, inputs())
    assert not {"a", "d", "gate"} & {group.name for group in found} - ({"a"} if "'b'" in pattern[:3] else set())


def mixed(norm: Callable[[Tensor], Tensor]) -> nn.Module:
    return Free(lambda m, x: m.head(torch.relu(norm(m.a(x)))), a=nn.Linear(4, 16), head=nn.Linear(16, 3))


class RmsNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(16))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * self.gain


@pytest.mark.parametrize("batch", [1, 2, 8])
@pytest.mark.parametrize("norm", ["layer", "rms", "by hand", "normalize", "softmax", "none"])
def test_mixing_of_units_is_no_reason_to_leave_them_out(norm: str, batch: int) -> None:
    """Norms over units make every unit depend on every other, and units behind the ReLU may never be active."""
    by_name: dict[str, Callable[[Tensor], Tensor]] = {
        "layer": nn.LayerNorm(16),
        "rms": nn.RMSNorm(16),
        "by hand": RmsNorm(),
        "normalize": F.normalize,
        "softmax": lambda x: torch.softmax(x, -1),
        "none": lambda x: x,
    }
    for seed in range(5):
        torch.manual_seed(seed)
        (group,) = unit_groups(mixed(by_name[norm]), torch.randn(batch, 4))
        assert zoo.by_hand(group) == zoo.Expected({"a": zoo.one_each(16)}, {"head": zoo.one_each(16)})


def test_a_norm_over_a_concatenation_mixes_groups() -> None:
    model = Free(
        lambda m, x: m.head(torch.relu(m.norm(torch.cat([m.a(x), m.b(x)], 1)))),
        a=nn.Linear(4, 3),
        b=nn.Linear(4, 5),
        norm=nn.LayerNorm(8),
        head=nn.Linear(8, 3),
    )
    found = {group.name: zoo.by_hand(group).consumers for group in unit_groups(model, torch.randn(4, 4))}
    assert found == {"a": {"head": zoo.one_each(3)}, "b": {"head": zoo.one_each(5, 3)}}


def test_packed_sequences() -> None:
    def run(m: Any, x: Tensor) -> Tensor:
        packed = nn.utils.rnn.pack_padded_sequence(torch.relu(m.a(x)), torch.tensor([3, 2]), batch_first=True)
        out, _ = nn.utils.rnn.pad_packed_sequence(m.lstm(packed)[0], batch_first=True)
        return m.head(torch.relu(m.b(out)).mean(1))

    layers = {
        "a": nn.Linear(4, 6),
        "lstm": nn.LSTM(6, 5, batch_first=True),
        "b": nn.Linear(5, 7),
        "head": nn.Linear(7, 3),
    }
    found, _ = recorded(lambda: unit_groups(Free(run, **layers), torch.randn(2, 3, 4)))
    assert zoo.by_hand(found[-1]) == zoo.Expected({"b": zoo.one_each(7)}, {"head": zoo.one_each(7)})


def test_operations_in_place() -> None:
    model = Free(
        lambda m, x: m.head(F.relu_(m.b(F.relu_(m.a(x)))).mean((2, 3))),
        a=conv(2, 8),
        b=conv(8, 4),
        head=nn.Linear(4, 3),
    )
    assert [group.name for group in unit_groups(model, torch.randn(2, 2, 4, 4))] == ["a", "b"]


def test_what_gradients_cannot_check_is_said() -> None:
    def overwrites(m: Any, x: Tensor) -> Tensor:
        y = torch.relu(m.a(x))
        y.add_(m.b(y))
        return m.head(y.mean((2, 3)))

    model = Free(overwrites, a=conv(2, 8), b=conv(8, 8), head=nn.Linear(8, 3))
    with pytest.warns(
        UncheckedGroupsWarning, match="could not check where units are read, so torch-pruning is trusted"
    ):
        (group,) = unit_groups(model, torch.randn(2, 2, 4, 4))
    assert group.size == 8


# --- outputs, ignored layers, inputs ---------------------------------------------------------------------------------
