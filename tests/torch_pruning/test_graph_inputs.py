"""Unit groups: outputs, ignored layers, kinds of example inputs, and a model that is left as it was."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nns_plugin.errors import GroupError

pytestmark = pytest.mark.host("torch_pruning")
pytest.importorskip("torch_pruning")

import zoo  # noqa: E402
from free_models import Free  # noqa: E402
from recorded import groups_of  # noqa: E402

from nns_plugin.adapters.torch_pruning.graph import build_graph  # noqa: E402
from nns_plugin.adapters.torch_pruning.groups import (  # noqa: E402
    UnusableGroupWarning,
    graph_groups,
    output_layers,
    resolve_layers,
    unit_groups,
)
from nns_plugin.adapters.torch_pruning.unit_removal import remove_units  # noqa: E402


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
