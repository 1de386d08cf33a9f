"""Scaling factors: against activations multiplied by hand, folded, removed, counted, and in files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import functional_call

pytestmark = pytest.mark.host("torch_pruning")
pytest.importorskip("torch_pruning")

from switch_models import IMAGES, ROWS, Flat, perceptron, random_factors, scaled_by_hooks  # noqa: E402

from nns_plugin.criteria import Switcher, UnscoredGroupWarning, score  # noqa: E402
from nns_plugin.errors import (  # noqa: E402
    CriterionError,
    PruningError,
    SwitchError,
)
from nns_plugin.models.inputs import run_model  # noqa: E402
from nns_plugin.models.preserve import copied  # noqa: E402
from nns_plugin.switcher.removal import switch_off  # noqa: E402
from nns_plugin.switcher.scaling_factors import Counts, ScalingFactors, fold  # noqa: E402
from nns_plugin.switcher.selected import Selected, selected  # noqa: E402
from nns_plugin.switcher.switches import UnswitchedWarning, find_switches  # noqa: E402
from nns_plugin.switcher.weight_count import WeightCount  # noqa: E402

TOPOLOGIES = ["mlp", "conv_norm", "grouped", "depthwise", "residual", "concat", "transposed"]


@pytest.mark.parametrize("case", TOPOLOGIES)
def test_factors_act_where_units_are_read_and_fold_and_remove_exactly(zoo: Any, case: str) -> None:
    """Multiplied activations, scaled columns, folded weights and the small model compute the same function."""
    made = zoo.CASES[case]
    torch.manual_seed(0)
    model, inputs = made.make().eval(), made.inputs(4)
    factors = random_factors(find_switches(model, inputs), 1)
    expected = scaled_by_hooks(model, factors, inputs)
    with torch.no_grad():
        called = functional_call(model, factors.parameters_of(model), inputs)
    folded = run_model(fold(model, factors).eval(), inputs)
    assert torch.allclose(called, expected, atol=1e-5)
    assert torch.allclose(folded, expected, atol=1e-5)
    small = switch_off(model, factors, inputs)
    assert torch.allclose(run_model(small.model, inputs), expected, atol=1e-5)
    for name, kept in small.kept.items():
        assert torch.equal(kept, factors[name].nonzero().flatten()), name
    assert small.kept
    count = sum(value.numel() for value in small.model.parameters())
    assert count < sum(value.numel() for value in model.parameters())


def test_input_features_and_flattened_positions_also_get_factors() -> None:
    model = Flat().eval()
    switches = {switch.name: switch for switch in find_switches(model, IMAGES)}
    assert {name: switch.size for name, switch in switches.items()} == {
        "first": 4, "second": 5, "wide": 6, "inputs of wide": 20,
    }  # fmt: skip
    plain = {switch.name: switch.size for switch in find_switches(perceptron(), ROWS)}
    assert plain == {"0": 7, "2": 5, "inputs of 0": 6}
    assert [switch.name for switch in find_switches(model, IMAGES, ["head"])] == ["wide"]
    assert [switch.name for switch in find_switches(perceptron(), ROWS, ["0", "4"])] == ["2", "inputs of 0"]


def test_units_and_positions_at_0_are_removed(tmp_path: Path) -> None:
    torch.manual_seed(1)
    model = Flat().eval()
    factors = random_factors(find_switches(model, IMAGES), 2)
    small = switch_off(model, factors, IMAGES)
    network: Any = small.model
    channels = int((factors["second"] > 0).sum())
    positions = (factors["inputs of wide"].reshape(5, 4) > 0)[factors["second"] > 0]
    if bool((~positions.any(1)).any()):  # a channel of which no position is read is also removed
        pytest.fail("choose another seed")
    assert network.first.out_channels == int((factors["first"] > 0).sum())
    assert network.second.out_channels == channels
    assert isinstance(network.wide, Selected)
    assert small.inputs["wide"].tolist() == positions.flatten().nonzero().flatten().tolist()
    assert network.wide.layer.in_features == int(positions.sum())
    assert network.wide.layer.out_features == network.head.in_features == int((factors["wide"] > 0).sum())
    x = torch.randn(5, 2, 7, 7)
    with torch.no_grad():
        assert torch.allclose(network(x), fold(model, factors)(x), atol=1e-5)


def test_a_selection_is_exported_with_the_model(tmp_path: Path) -> None:
    pytest.importorskip("onnx")
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    from nns_plugin.adapters.onnxruntime import export

    model = perceptron().eval()
    factors = random_factors(find_switches(model, ROWS), 5)
    small = switch_off(model, factors, ROWS)
    assert isinstance(small.model[0], Selected)
    session = onnxruntime.InferenceSession(export(small.model, ROWS, tmp_path / "small.onnx"))
    assert session.get_inputs()[0].shape[1] == 6  # the inputs of the original model
    found = session.run(None, {session.get_inputs()[0].name: ROWS.numpy()})[0]
    assert np.allclose(found, scaled_by_hooks(model, factors, ROWS).numpy(), atol=1e-5)


def test_selected_layers() -> None:
    layer = nn.Linear(4, 2, bias=False).requires_grad_(False)
    layer.weight[:, [0, 3]] = 0
    narrow, left = selected(layer.eval(), [""])
    assert isinstance(narrow, Selected)
    assert left[""].tolist() == [1, 2]
    assert not narrow.layer.weight.requires_grad
    assert narrow.layer.bias is None
    x = torch.randn(3, 5, 4)
    assert torch.allclose(narrow(x), layer(x), atol=1e-6)
    assert layer.weight.shape == (2, 4)
    empty, left = selected(nn.Sequential(nn.Linear(3, 1)), ["0"])
    assert left == {}
    assert isinstance(empty[0], nn.Linear)
    nothing = nn.Linear(3, 1)
    nn.init.zeros_(nothing.weight)
    assert selected(nothing, [""])[1][""].tolist() == [0]


def weights_between(on: Mapping[str, Tensor]) -> int:
    """Of ``Flat``, by hand."""
    first, second, wide = (int(on[name].sum()) for name in ("first", "second", "wide"))
    positions = int((on["inputs of wide"].reshape(5, 4) & on["second"][:, None]).sum())
    return 2 * first * 9 + first * second * 4 + positions * wide + wide * 3


@given(seed=st.integers(0, 100), share=st.floats(0.1, 0.95), budget=st.floats(0.05, 0.9))
def test_weights_are_counted_and_a_budget_is_just_met(seed: int, share: float, budget: float) -> None:
    model = Flat()
    switches = find_switches(model, IMAGES)
    count = WeightCount(model, switches)
    generator = torch.Generator().manual_seed(seed)
    on = {switch.name: torch.rand(switch.size, generator=generator) > share for switch in switches}
    assert count.total == 2 * 4 * 9 + 4 * 5 * 4 + 20 * 6 + 18
    assert count.left(on) == weights_between(on)
    levels = {switch.name: torch.randn(switch.size, generator=generator).double() for switch in switches}

    def left(offset: float) -> int:
        return weights_between({n: (v > offset) | (v == v.max()) for n, v in levels.items()})

    offset = count.offset(levels, budget)
    possible = sorted(float(value) for values in levels.values() for value in values if value > 0)
    enough = [value for value in [0.0, *possible] if 1 - left(value) / count.total >= budget]
    assert offset == (enough[0] if enough else possible[-1])


def test_grouped_and_transposed_weights_are_counted(zoo: Any) -> None:
    for case in ("grouped", "depthwise", "transposed", "residual", "concat"):
        made = zoo.CASES[case]
        torch.manual_seed(0)
        model, inputs = made.make().eval(), made.inputs(2)
        switches = find_switches(model, inputs)
        factors = random_factors(switches, 3, off=0.3)
        small = switch_off(model, factors, inputs).model
        layers = [m for m in small.modules() if isinstance(m, (nn.Linear, nn.modules.conv._ConvNd))]
        counted = WeightCount(model, switches).left({name: values > 0 for name, values in factors.items()})
        assert counted == sum(layer.weight.numel() for layer in layers), case


def test_zeros_as_examples_do_not_mislead() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(6, 6, bias=False), nn.ReLU(), nn.Linear(6, 6, bias=False), nn.ReLU(), nn.Linear(6, 3)
    )
    names = [switch.name for switch in find_switches(model, torch.zeros(2, 6))]
    assert names == ["0", "2", "inputs of 0"]
    assert names == [switch.name for switch in find_switches(model, (torch.zeros(2, 6),))]


def test_counts_and_files(tmp_path: Path) -> None:
    model = Flat()
    factors = random_factors(find_switches(model, IMAGES), 9)
    for name, values in factors.items():
        array = values.numpy()
        expected = Counts(int((array == 0).sum()), int(((array > 0) & (array < 1)).sum()), int((array >= 1).sum()))
        assert factors.counts()[name] == expected
    again = ScalingFactors.load(factors.save(tmp_path / "factors.safetensors"))
    assert list(again) == list(factors)
    assert all(torch.equal(again[name], factors[name]) for name in factors)
    assert torch.equal(fold(model, again).head.weight, fold(model, factors).head.weight)
    (tmp_path / "cut").write_bytes((tmp_path / "factors.safetensors").read_bytes()[:-9])
    for name in ("cut", "none"):
        with pytest.raises(SwitchError):
            ScalingFactors.load(tmp_path / name)


def test_tied_and_unread_units_get_no_factor(zoo: Any) -> None:
    model = perceptron()
    tied = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 3))
    tied[2].weight = tied[0].weight
    with pytest.warns(UnswitchedWarning, match="the units of 0 get no factor"):
        names = [switch.name for switch in find_switches(tied, ROWS)]
    assert "0" not in names
    with pytest.raises(PruningError, match="neither tied nor masked"):
        find_switches(tied, ROWS, ["2"])
    nn.utils.prune.l1_unstructured(model[2], "weight", 0.5)
    with pytest.raises(PruningError, match="neither tied nor masked"):
        find_switches(model, ROWS, ["2"])


def test_the_criterion_and_its_importance(zoo: Any) -> None:
    tp = pytest.importorskip("torch_pruning")
    from nns_plugin.adapters.torch_pruning import SwitcherImportance
    from nns_plugin.adapters.torch_pruning.groups import unit_groups

    model = perceptron().eval()
    factors = random_factors(find_switches(model, ROWS), 8, off=0.3)
    groups = {group.name: group for group in unit_groups(model, ROWS)}
    for name in ("0", "2"):
        found = score(Switcher(factors), groups[name])
        assert found is not None
        assert np.allclose(found.numpy(), factors[name].numpy())
    counts = {"0": 4, "2": 3}  # what torch-pruning keeps of 7 and of 5 at a ratio of 0.4
    kept = {name: factors[name].topk(count).indices.sort().values for name, count in counts.items()}
    assert all(float(factors[name].sort(descending=True).values[count - 1]) > 0 for name, count in counts.items())
    start = copied(model)
    pruner = tp.BasePruner(
        model, ROWS, SwitcherImportance(factors), pruning_ratio=0.4, ignored_layers=[model[4]], **zoo.fresh_arguments()
    )
    pruner.step()
    assert torch.equal(model[2].weight, start[2].weight[kept["2"]][:, kept["0"]])
    with pytest.raises(CriterionError, match="7 factors for group '0', which has"):
        score(Switcher(factors), unit_groups(model, ROWS)[0])
    with pytest.warns(UnscoredGroupWarning):
        assert score(Switcher(ScalingFactors((), {})), groups["0"]) is None
