"""The switcher network: rows, thresholds, budgets, gradients, and models for which it cannot be built."""

from __future__ import annotations

import copy
import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

pytestmark = pytest.mark.host("torch_pruning")
pytest.importorskip("torch_pruning")

from switch_models import IMAGES, ROWS, Flat, perceptron, switcher_for  # noqa: E402

from nns_plugin.errors import (  # noqa: E402
    NNSError,
    PruningError,
    SwitchError,
)
from nns_plugin.switcher.network import AllOffWarning, SwitcherNetwork  # noqa: E402
from nns_plugin.switcher.row_network import RowNetwork, SwitcherArchitecture  # noqa: E402
from nns_plugin.switcher.scaling_factors import ScalingFactors, fold  # noqa: E402
from nns_plugin.switcher.switches import UnswitchedWarning, find_switches  # noqa: E402


@given(
    seed=st.integers(0, 200),
    scale=st.sampled_from([0.0, 1e-8, 1.0, 1e4]),
    form=st.sampled_from(["competing", "literal"]),
)
def test_factors_are_finite_and_not_negative(seed: int, scale: float, form: Any) -> None:
    model = Flat()
    switcher = switcher_for(model, IMAGES, form=form)
    generator = torch.Generator().manual_seed(seed)
    weights = {name: scale * torch.randn(v.shape, generator=generator) for name, v in model.named_parameters()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", AllOffWarning)
        factors = switcher(weights)
    assert list(factors) == [switch.name for switch in switcher.switches]
    for switch in switcher.switches:
        values = factors[switch.name]
        assert values.shape == (switch.size,)
        assert bool((values.isfinite() & (values >= 0)).all())
        assert bool((values > 0).any())
        if form == "competing" and scale >= 1:
            assert math.isclose(float(values.detach().mean()), 1.0, rel_tol=1e-3)


@pytest.mark.parametrize("form", ["competing", "literal"])
@pytest.mark.parametrize(("make", "inputs"), [(perceptron, ROWS), (Flat, IMAGES)])
def test_gradients_reach_every_parameter_of_the_switcher_and_every_weight_it_reads(
    form: Any, make: Any, inputs: Tensor
) -> None:
    reached: dict[str, bool] = {}
    for seed in range(5):  # a ReLU may be off for one seed
        torch.manual_seed(seed)
        model = make()
        switcher = SwitcherNetwork(model, inputs, form=form, architecture=SwitcherArchitecture(4, 2, 8), budget=None)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", AllOffWarning)
            factors = switcher(model)
        loss = sum((values * torch.randn_like(values)).sum() for values in factors.values())
        loss.backward()
        for part in (switcher, model):
            for name, value in part.named_parameters():
                key = f"{type(part).__name__} {name}"
                reached[key] = reached.get(key, False) or (value.grad is not None and bool(value.grad.any()))
        assert switcher.reads <= {name for name, value in model.named_parameters() if value.grad is not None}
    missing = [key for key, there in reached.items() if not there and (key.startswith("Switcher") or "weight" in key)]
    heads = {"Sequential 4.weight"} - {f"Sequential {name}" for name in switcher.reads}
    assert [key for key in missing if key not in heads and "norm" not in key] == []


def test_factors_depend_on_the_weights_of_their_rows() -> None:
    """A switcher for chosen layers reads only the weights of those layers."""
    model = perceptron()
    switcher = switcher_for(model, ROWS, layers=["4"])
    assert [switch.name for switch in switcher.switches] == ["2"]
    assert switcher.reads == {"4.weight"}
    before = switcher(model)["2"]
    with torch.no_grad():
        model[0].weight.add_(1)
    assert torch.equal(switcher(model)["2"], before)
    with torch.no_grad():
        model[4].weight[:, 2].mul_(5)
    assert not torch.equal(switcher(model)["2"], before)


@pytest.mark.parametrize(("height", "width"), [(1, 1), (2, 9), (13, 3), (37, 50), (64, 32)])
def test_sizes_that_are_not_powers_of_two(height: int, width: int) -> None:
    for normed in (True, False):
        network = RowNetwork(2, height, width, SwitcherArchitecture(3, 4), normed)
        assert network(torch.randn(2, height, width)).shape == (2, height)


@pytest.mark.parametrize("form", ["competing", "literal"])
def test_all_off_keeps_the_strongest(form: Any) -> None:
    model = perceptron()
    switcher = switcher_for(model, ROWS, form=form)
    assert switcher.connected is not None
    source = switcher.connected.head.bias if form == "literal" else switcher.thresholds
    on, off = (8.0, -8.0) if form == "literal" else (-50.0, 50.0)
    with torch.no_grad():
        source.fill_(on)
        strongest = {name: int(values.argmax()) for name, values in switcher(model).items()}
        source.fill_(off)
    with pytest.warns(AllOffWarning) as caught:
        factors = switcher(model)
    names = [str(warning.message).split("'")[1] for warning in caught]
    assert sorted(names) == ["0", "2", "inputs of 0"]
    assert "are 0; the strongest one is kept" in str(caught[0].message)
    for name, values in factors.items():
        assert values.nonzero().flatten().tolist() == [strongest[name]]
        assert float(values.sum().detach()) == 1.0
    factors["0"].sum().backward()
    assert source.grad is not None
    assert bool(source.grad.any())  # it can come back


def test_a_single_unit_is_on_without_a_warning() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 1), nn.ReLU(), nn.Linear(1, 3))
    assert switcher_for(model, ROWS)(model)["0"].tolist() == [1.0]


class Sums(nn.Module):
    """Replaces a row network: computes the sum of each row."""

    def __init__(self, size: tuple[int, int]) -> None:
        super().__init__()
        self.size = size

    def forward(self, image: Tensor) -> Tensor:
        return image.sum(2)


def test_each_unit_gets_the_output_of_its_own_rows() -> None:
    """With row networks that sum: columns of linear layers, and reduced filters."""
    torch.manual_seed(2)
    model = Flat()
    switcher = switcher_for(model, IMAGES, form="literal")
    assert switcher.connected is not None
    switcher.connected = Sums(switcher.connected.size)  # type: ignore[assignment]
    switcher.convolutional = Sums((0, 0))  # type: ignore[assignment]
    for layer in switcher.reduce:
        nn.init.ones_(layer.weight)
        nn.init.zeros_(layer.bias)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", AllOffWarning)
        factors = switcher(model)
    sums = {
        "first": 8 * model.first.weight.sum((1, 2, 3)),
        "second": 8 * model.second.weight.sum((1, 2, 3)),
        "wide": model.head.weight.sum(0),
        "inputs of wide": model.wide.weight.sum(0),
    }
    for name, expected in sums.items():
        assert bool((expected > 0).any())
        assert torch.allclose(factors[name], expected.relu(), rtol=1e-4, atol=1e-6), name


def test_a_unit_with_several_consumers_gets_their_mean() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.left, self.right = nn.Linear(6, 4), nn.Linear(4, 3), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            x = torch.relu(self.body(x))
            return torch.cat([self.left(x), self.right(x)], 1)

    torch.manual_seed(0)
    model = Twice()
    switcher = switcher_for(model, ROWS, layers=["left", "right"], form="literal")
    assert switcher.connected is not None
    switcher.connected = Sums(switcher.connected.size)  # type: ignore[assignment]
    expected = (model.left.weight.sum(0) + model.right.weight.sum(0)) / 2
    assert bool((expected > 0).any())
    assert torch.allclose(switcher(model)["body"], expected.relu(), atol=1e-6)
    with pytest.warns(UnswitchedWarning, match="the units of body get no factor"), pytest.raises(PruningError):
        find_switches(model, ROWS, ["left"])


def test_a_budget_starts_with_nearly_all_on() -> None:
    model = Flat()
    switcher = switcher_for(model, IMAGES, budget=0.75)
    switcher.progress.fill_(0.0)
    with torch.no_grad():
        assert switcher.removed(switcher(model)) < 0.05
    with pytest.raises(PruningError, match=r"budget is 0.750 .* only 0.397 can be removed"):
        switcher_for(model, IMAGES, layers=["head"], budget=0.75)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_networks_of_other_types(dtype: torch.dtype) -> None:
    model = perceptron().to(dtype)
    factors = switcher_for(model, ROWS.to(dtype))(model)
    assert all(values.dtype == torch.float32 for values in factors.values())
    assert all(value.dtype == dtype for value in factors.parameters_of(model).values())


def test_filters_of_tied_convolutions_are_not_read() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Conv1d(2, 4, 3), nn.Conv1d(2, 4, 3), nn.Conv1d(4, 3, 1)
            self.b.weight = self.a.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.c(torch.relu(self.a(x) + self.b(x))).mean(2)

    torch.manual_seed(0)
    x = torch.randn(2, 2, 8)
    with (
        pytest.warns(UnswitchedWarning, match="no layer that writes or reads them"),
        pytest.raises(PruningError, match="nothing to scale"),
    ):
        SwitcherNetwork(Tied(), x, budget=None)


def test_a_budget_is_met() -> None:
    for model, inputs in ((perceptron(), ROWS), (Flat(), IMAGES)):
        for budget in (0.3, 0.7, 0.9):
            switcher = switcher_for(model, inputs, budget=budget)
            assert switcher.removed(switcher(model)) >= budget


def test_higher_thresholds_prune_more() -> None:
    model = perceptron()
    switcher = switcher_for(model, ROWS)
    assert switcher.thresholds is not None
    counts = []
    for threshold in (-1.0, 0.0, 1.0):
        with torch.no_grad():
            switcher.thresholds.fill_(threshold)
        counts.append(switcher(model).counts()["inputs of 0"].pruned)
    assert counts == sorted(counts)
    assert counts[0] < counts[-1]


def test_invalid_options_weights_and_factors() -> None:
    model = perceptron()
    for options, message in (
        ({"form": "other"}, "form is 'other'"),
        ({"budget": 1.0}, "budget is 1.0"),
        ({"depth": 0}, "channels, depth and width are 2, 0"),
        ({"budget": 0.5, "form": "literal"}, "form is 'literal'"),
        ({"channels": 0}, "channels, depth and width are 0"),
        ({"layers": ["9"]}, "the inputs of 9 cannot be scaled"),
        ({"layers": ["1"]}, "the inputs of 1 cannot be scaled"),
        ({"layers": []}, "there is nothing to scale"),
    ):
        with pytest.raises(PruningError, match=message):
            switcher_for(model, ROWS, **options)
    switcher = switcher_for(model, ROWS)
    with pytest.raises(SwitchError, match=r"'0.weight' is \[9, 6\]; the switcher was built for \[7, 6\]"):
        switcher({**dict(model.named_parameters()), "0.weight": torch.ones(9, 6)})
    with pytest.raises(SwitchError, match="'2.weight' is missing"):
        switcher(nn.Sequential(nn.Linear(6, 7)))
    factors = switcher(model).detach()
    with pytest.raises(SwitchError, match="the model has no layer"):
        fold(nn.Sequential(nn.Linear(6, 7)), factors)
    for width in (5, 8):
        other = nn.Sequential(nn.Linear(width, 7), nn.ReLU(), nn.Linear(7, 5), nn.ReLU(), nn.Linear(5, 3))
        with pytest.raises(SwitchError, match=f"'0' reads {width} positions, and the factors are for 6; they belong"):
            fold(other, factors)
    for wrong, message in (
        ({"0": torch.ones(7), "2": torch.ones(5)}, r"'inputs of 0' has \[0\] factors; expected \[6\]"),
        ({**factors, "2": -torch.ones(5)}, "negative or not finite"),
        ({**factors, "2": torch.full((5,), torch.nan)}, "negative or not finite"),
    ):
        with pytest.raises(SwitchError, match=message):
            ScalingFactors(factors.switches, wrong)


def test_the_switcher_survives_a_file_and_a_copy(tmp_path: Path) -> None:
    from safetensors.torch import load_model, save_model

    model = Flat()
    switcher = switcher_for(model, IMAGES)
    factors = copy.deepcopy(switcher)(model)
    assert all(torch.equal(values, switcher(model)[name]) for name, values in factors.items())
    save_model(switcher, str(tmp_path / "switcher.safetensors"))
    torch.manual_seed(123)
    other = SwitcherNetwork(model, IMAGES, architecture=SwitcherArchitecture(2, 2, 8), budget=None)
    load_model(other, str(tmp_path / "switcher.safetensors"))
    assert all(torch.equal(values, other(model)[name]) for name, values in factors.items())
    assert issubclass(SwitchError, NNSError)
