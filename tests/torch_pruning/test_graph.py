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

from nns_plugin.errors import GroupError
from nns_plugin.units import check_group

pytestmark = pytest.mark.host("torch_pruning")
pytest.importorskip("torch_pruning")

import zoo  # noqa: E402
from recorded import groups_of, recorded  # noqa: E402

from nns_plugin.adapters.torch_pruning.graph import build_graph  # noqa: E402
from nns_plugin.adapters.torch_pruning.groups import (  # noqa: E402
    UncheckedGroupsWarning,
    UnusableGroupWarning,
    graph_groups,
    output_layers,
    resolve_layers,
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


class Free(nn.Module):
    """A model from a forward and layers."""

    def __init__(self, run: Callable[..., Any], **layers: nn.Module) -> None:
        super().__init__()
        self.run = run
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, *inputs: Any, **named: Any) -> Any:
        return self.run(self, *inputs, **named)


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


@pytest.mark.parametrize(
    "finish",
    [
        lambda x: x,
        lambda x: torch.log_softmax(x, 1),
        lambda x: x.flatten(1),
        lambda x: x.transpose(1, 2),
        lambda x: (x, x.mean()),
        lambda x: {"out": [x]},
        lambda x: F.normalize(x, dim=1),
        lambda x: x[:, :, 0],
    ],
)
def test_the_models_outputs_are_no_units(finish: Callable[[Tensor], Any]) -> None:
    model = Free(lambda m, x: finish(m.head(torch.relu(m.a(x)))), a=nn.Conv1d(2, 4, 1), head=nn.Conv1d(4, 3, 1))
    graph = build_graph(model, torch.randn(2, 2, 5))
    assert [group.name for group in graph_groups(graph)] == ["a"]
    assert output_layers(graph) == ("head",)


def test_several_outputs() -> None:
    model = Free(
        lambda m, x: (lambda y: {"one": m.one(y), "two": m.two(y)})(torch.relu(m.a(x))),
        a=nn.Linear(4, 6),
        one=nn.Linear(6, 3),
        two=nn.Linear(6, 2),
    )
    graph = build_graph(model, torch.randn(2, 4))
    (group,) = graph_groups(graph)
    assert zoo.by_hand(group) == zoo.Expected({"a": zoo.one_each(6)}, {"one": zoo.one_each(6), "two": zoo.one_each(6)})
    assert sorted(output_layers(graph)) == ["one", "two"]


def test_embeddings_whose_product_is_the_output_are_left_out_by_name() -> None:
    model = Free(lambda m, x, y: m.a(x) @ m.b(y).T, a=nn.Linear(4, 6), b=nn.Linear(5, 6))
    with pytest.warns(UnusableGroupWarning, match="left out: group of '(a|b)': .* out of range"):
        assert unit_groups(model, (torch.randn(4, 4), torch.randn(4, 5))) == ()


def test_ignored_layers_keep_their_outputs() -> None:
    model = zoo.CASES["residual"].make()
    inputs = torch.randn(2, 2, 4, 4)
    assert [group.name for group in unit_groups(model, inputs, ["inner"])] == ["stem", "side"]
    assert [group.name for group in unit_groups(model, inputs, [model.outer])] == ["inner", "side"], (
        "one of its producers"
    )
    assert [group.name for group in unit_groups(model, inputs, [model.head])] == ["stem", "inner", "side"]
    assert unit_groups(model, inputs, [model]) == ()
    nested = nn.Sequential(nn.Sequential(nn.Linear(6, 5), nn.ReLU()), nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3))
    assert [group.name for group in unit_groups(nested, torch.randn(2, 6), ["0"])] == ["1"], "everything inside it"


@pytest.mark.parametrize("layer", ["fc9", nn.Linear(1, 1), nn.Linear, None, 3, ""])
def test_ignored_layers_that_are_not_there(layer: Any) -> None:
    model = zoo.Mlp()
    before = zoo.Snapshot(model)
    if layer == "":
        assert resolve_layers(model, [layer]) == list(model.modules())
        return
    with pytest.raises(GroupError, match="ignored layer .* is not in the model; .* such as fc1, fc2, head"):
        unit_groups(model, torch.randn(2, 6), [layer])
    before.check(rng=False)


def test_names_of_ignored_layers_come_in_a_list() -> None:
    """A text is a sequence of letters."""
    with pytest.raises(GroupError, match="ignored_layers is 'fc1'; it must be a list"):
        unit_groups(zoo.Mlp(), torch.randn(2, 6), "fc1")
    with pytest.raises(GroupError, match="ignored_layers is Linear.*; it must be a list"):
        unit_groups(zoo.Mlp(), torch.randn(2, 6), nn.Linear(6, 8))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (torch.randn(2, 7), r"shape \[2, 7\]: RuntimeError: mat1 and mat2 shapes cannot be multiplied"),
        ((torch.randn(2, 6), torch.randn(2, 6)), r"shape \[2, 6\], \[2, 6\]: TypeError"),
        ({"y": torch.randn(2, 6)}, r"shape \[2, 6\]: TypeError.*'y'"),
        (None, "shape NoneType: "),
        ("x", "shape str: "),
    ],
)
def test_example_inputs_that_do_not_fit(inputs: Any, message: str) -> None:
    model = zoo.Mlp()
    before = zoo.Snapshot(model)
    with pytest.raises(GroupError, match=f"the model cannot be traced on example inputs of {message}"):
        unit_groups(model, inputs)
    before.check()


@pytest.mark.parametrize("kind", ["tensor", "tuple", "list", "dict"])
def test_forms_of_example_inputs(kind: str) -> None:
    x = torch.randn(2, 6)
    inputs = {"tensor": x, "tuple": (x,), "list": [x], "dict": {"x": x}}[kind]
    assert [group.name for group in unit_groups(zoo.Mlp(), inputs)] == ["fc1", "fc2"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", ["conv_norm", "residual", "group_norm", "fused_attention"])
def test_other_precisions(name: str, dtype: torch.dtype) -> None:
    case = zoo.CASES[name]
    found = groups_of(case.make().to(dtype), case.inputs(2).to(dtype))
    assert {group.name: zoo.by_hand(group) for group in found} == case.groups


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("name", ["conv_norm", "residual", "shared", "fused_attention", "multi_head"])
def test_on_a_gpu(name: str) -> None:
    """Groups and their positions stay on the CPU; example inputs may lie there too."""
    case = zoo.CASES[name]
    model = case.make().cuda()
    found = groups_of(model, case.inputs(2))
    assert {group.name: zoo.by_hand(group) for group in found} == case.groups
    remove_units(build_graph(model, case.inputs(2)), found[0], torch.tensor([0]))
    assert model(case.inputs(2).cuda()).shape == (2, 3)


def test_a_batch_is_not_taken_for_several_inputs() -> None:
    """torch-pruning by itself calls model(*inputs), and this model would take both rows as arguments."""

    def run(m: Any, x: Tensor, extra: Tensor | None = None) -> Tensor:
        x = x if extra is None else torch.cat([x, extra], -1)
        return m.head(torch.relu(m.a(x)) if extra is None else x)

    model = Free(run, a=nn.Linear(4, 8), head=nn.Linear(8, 3))
    assert [group.name for group in unit_groups(model, torch.randn(2, 4))] == ["a"]


def test_a_model_where_nothing_can_be_pruned() -> None:
    assert unit_groups(nn.Linear(4, 3), torch.randn(2, 4)) == ()
    assert unit_groups(nn.Flatten(), torch.randn(2, 4, requires_grad=True)) == ()
    with pytest.raises(GroupError, match="no output of the model has a gradient"):
        unit_groups(Free(lambda m, x: m.a(x).argmax(1), a=nn.Linear(4, 3)), torch.randn(2, 4))


# --- the model is left as it was -------------------------------------------------------------------------------------


class Failing(zoo.Residual):
    fails = True

    def forward(self, x: Tensor) -> Tensor:
        stream = torch.relu(self.stem(x)) + torch.rand(1)
        if self.fails:
            raise RuntimeError("in the middle")
        return self.head(torch.cat([stream.mean((2, 3)), self.side(stream).mean((2, 3))], 1))


@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_left_as_it_was(fails: bool) -> None:
    model = Failing()
    model.fails = fails
    model.train()
    model.inner.eval()
    model.stem.requires_grad_(False)
    model.head.weight.grad = torch.ones_like(model.head.weight)
    model.side.register_forward_hook(lambda *_: None)
    inputs = torch.randn(2, 2, 4, 4)
    before = zoo.Snapshot(model)
    if fails:
        with pytest.raises(GroupError, match="RuntimeError: in the middle"):
            unit_groups(model, inputs)
    else:
        unit_groups(model, inputs)
    before.check()


def test_batch_norms_are_left_as_they_were() -> None:
    model = zoo.ConvNorm().train()
    before = zoo.Snapshot(model)
    with torch.no_grad():
        unit_groups(model, torch.randn(2, 1, 4, 4))
    with torch.inference_mode():
        unit_groups(model, torch.randn(2, 1, 4, 4))
    before.check(rng=False)
