"""Subnets: the small model and the masked parent compute the same, and are what the parent's weights say."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

pytestmark = pytest.mark.host("torch_pruning")
tp = pytest.importorskip("torch_pruning")

from nns_plugin import Subnet  # noqa: E402
from nns_plugin.adapters.torch_pruning.backend import TorchPruningBackend  # noqa: E402
from nns_plugin.errors import LabelError, PruningError, StaleStatisticsError, SubnetError  # noqa: E402
from nns_plugin.labels import LabelSet  # noqa: E402
from nns_plugin.models.fingerprint import digest, fingerprint  # noqa: E402
from nns_plugin.statistics.calibration import calibrate  # noqa: E402
from nns_plugin.subnets.extraction import Choice, Preparation  # noqa: E402
from nns_plugin.subnets.head import fit_other  # noqa: E402
from nns_plugin.subnets.provenance import Provenance  # noqa: E402
from nns_plugin.subnets.steps import PLAIN, carry_out, prepare  # noqa: E402
from nns_plugin.subnets.subnet import InexactMaskWarning  # noqa: E402


def provenance(parent: nn.Module, head: str = "keep", **changes: Any) -> Provenance:
    known = {"parent": digest(fingerprint(parent)), "versions": {"torch": "2"}, "criterion": "semantic", "options": {}}
    return Provenance(**{**known, "selection": {"ratio": 0.5}, "compensation": {}, "head": head, **changes})


def randomised(model: nn.Module) -> nn.Module:
    """Norms with statistics and factors that matter."""
    generator = torch.Generator().manual_seed(3)
    for value in model.state_dict().values():
        if value.is_floating_point():
            value.copy_(torch.rand(value.shape, generator=generator) + 0.1 * torch.sign(value))
    return model.eval()


def extracted_from(parent: nn.Module, inputs: Any, count: int, seed: int = 0, **options: Any) -> Any:
    """An extraction that keeps random units of every group; at least one goes where there are two."""
    generator = torch.Generator().manual_seed(seed)
    settings: dict[str, Any] = {"labels": None, "names": [str(i) for i in range(count)], "statistics": None, **options}
    loader, statistics = settings.pop("loader"), settings.pop("statistics")
    labels = LabelSet.of(settings.pop("names"), settings.pop("labels"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        prepared = prepare(parent, inputs, loader, labels, Preparation(**settings), statistics=statistics)
        kept = {
            group.name: torch.randperm(group.size, generator=generator)[: max(1, group.size // 2)].sort().values
            for group in prepared.groups
        }
        scores = {name: torch.rand(group.size).double() for name, group in zip(kept, prepared.groups, strict=True)}
        return carry_out(prepared, Choice(kept, scores), PLAIN, loader)


def quietly(function: Any, *arguments: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return function(*arguments)


def outputs_of(model: nn.Module, inputs: Any) -> torch.Tensor:
    with torch.no_grad():
        if isinstance(inputs, dict):
            found: torch.Tensor = model(**inputs)
        else:
            found = model(*inputs) if isinstance(inputs, tuple) else model(inputs)
    return found


def test_the_small_model_is_the_masked_parent_on_every_topology(zoo: Any) -> None:
    checked = 0
    for name, case in zoo.CASES.items():
        torch.manual_seed(0)
        parent = case.make().eval()
        loader = zoo.labelled(name, 8)
        try:
            extractions = [extracted_from(parent, case.inputs(2), 3, seed, loader=loader) for seed in range(3)]
        except PruningError:  # a case without usable groups
            assert not case.groups
            continue
        named: set[str] = set()
        for extraction in extractions:
            subnet = Subnet.of(extraction, provenance(parent))
            small = quietly(subnet.materialise, lambda case=case, parent=parent: copy.deepcopy(parent))
            snapshot = zoo.Snapshot(parent)
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                masked = subnet.mask(parent)
            snapshot.check()
            told = [str(entry.message) for entry in caught if entry.category is InexactMaskWarning]
            named |= {part for text in told for part in text.split("small one at ")[1].split(":")[0].split(", ")}
            inputs = case.inputs(4)
            left, right = outputs_of(small, inputs), outputs_of(masked, inputs)
            assert torch.allclose(left, outputs_of(extraction.model.eval(), inputs), atol=1e-6), name
            assert told or torch.allclose(left, right, rtol=1e-5, atol=1e-5), name
            for parameter, wide in masked.named_parameters():
                assert wide.shape == dict(parent.named_parameters())[parameter].shape, f"{name}: {parameter}"
                small_count = dict(small.named_parameters())[parameter].numel()
                assert int((wide != 0).sum()) <= small_count, f"{name}: {parameter}"
        assert named == set(case.inexact) & set(subnet.kept), name
        checked += not named
    assert checked >= 12


class Mixing(nn.Module):
    """Something that sees all units at once between two layers, and a layer before that."""

    def __init__(self, mix: Callable[[torch.Tensor], torch.Tensor] | nn.Module) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 3)
        self.mix = mix

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.mix(self.second(self.first(x).relu())).relu())


@pytest.mark.parametrize(
    "mix",
    [
        nn.LayerNorm(6),
        lambda x: x - x.mean(1, keepdim=True),
        lambda x: nn.functional.layer_norm(x, x.shape[1:]),
        lambda x: x.softmax(1),
    ],
)
def test_groups_that_see_who_is_missing_are_exempt_and_named(mix: Any) -> None:
    torch.manual_seed(0)
    parent = Mixing(mix).eval()
    loader = [(torch.randn(6, 4), torch.arange(6) % 3)]
    subnet = Subnet.of(extracted_from(parent, torch.randn(2, 4), 3, loader=loader), provenance(parent))
    assert set(subnet.kept) == {"first", "second"}
    with pytest.warns(InexactMaskWarning, match="differs from the small one at second:"):
        subnet.mask(parent)


class Tied(nn.Module):
    """Two layers with one weight, narrowed apart by removal."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 6)
        self.head = nn.Linear(6, 3)
        self.third.weight = self.second.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.third(self.second(self.first(x).relu()).relu()).relu())


def test_a_shared_weight_is_masked_for_each_layer() -> None:
    torch.manual_seed(0)
    parent = Tied().eval()
    loader = [(torch.randn(6, 4), torch.arange(6) % 3)]
    subnet = Subnet.of(extracted_from(parent, torch.randn(2, 4), 3, loader=loader), provenance(parent))
    inputs = torch.randn(5, 4)
    with warnings.catch_warnings():
        warnings.simplefilter("error", InexactMaskWarning)
        masked = subnet.mask(parent)
    assert torch.allclose(outputs_of(subnet.materialise(Tied), inputs), outputs_of(masked, inputs), atol=1e-5)
    assert parent.third.weight is parent.second.weight


def test_a_model_that_is_in_use_is_left_as_it_is(zoo: Any) -> None:
    parent = randomised(NormHead())
    loader = [(torch.randn(6, 4), torch.arange(6) % 3)]
    extraction = extracted_from(parent, torch.randn(2, 4), 3, labels=[0, 2], head="closed", loader=loader)
    subnet = Subnet.of(extraction, provenance(parent))
    snapshot = zoo.Snapshot(parent)
    small = subnet.materialise(lambda: parent)
    snapshot.check()
    assert small.head.weight.shape == (2, 4)


class Odd(nn.Module):
    """A classifier whose outputs are not the rows of its head."""

    def __init__(self, ending: Callable[[nn.Module, torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(4, 8), nn.Linear(8, 3)
        self.ending = ending

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.ending(self.head, self.first(x).relu())


@pytest.mark.parametrize(
    "ending",
    [
        lambda head, z: head(z).flip(1),
        lambda head, z: -head(z),
        lambda head, z: head(-0.1 * z) + head(z),
        lambda head, z: head(z) * torch.tensor([1.0, 2.0, 3.0]),
    ],
)
def test_a_head_whose_rows_are_not_the_outputs_is_not_shrunk(ending: Any) -> None:
    loader = [(torch.randn(9, 4), torch.arange(9) % 3)]
    with pytest.raises(PruningError, match="the model's outputs are not those of its head 'head'"):
        extracted_from(Odd(ending).eval(), torch.randn(2, 4), 3, labels=[0, 2], head="closed", loader=loader)


@pytest.mark.parametrize("ending", [torch.softmax, torch.log_softmax, lambda x, _: x.sigmoid()])
def test_a_head_behind_a_softmax_or_sigmoid_is_shrunk(ending: Any) -> None:
    loader = [(torch.randn(9, 4), torch.arange(9) % 3)]
    model = Odd(lambda head, z: ending(head(z), 1)).eval()
    extraction = extracted_from(model, torch.randn(2, 4), 3, labels=[0, 2], head="closed", loader=loader)
    assert extraction.labels.outputs == (0, 2)


@pytest.mark.parametrize("gram", [False, True])
def test_other_is_fitted_to_what_the_features_have_become(gram: bool) -> None:
    """Against a fit of our own on the small model's features."""
    parent = randomised(NormHead())
    generator = torch.Generator().manual_seed(0)
    inputs, labels = torch.randn(90, 4, generator=generator), torch.arange(90) % 3
    loader = [(inputs, labels)]
    extraction = extracted_from(parent, inputs[:2], 3, labels=[0, 2], head="open", gram=gram, loader=loader)
    with torch.no_grad():
        features = extraction.model.norm(extraction.model.first(inputs)).relu()
        kept = features @ extraction.model.head.weight[:2].T + extraction.model.head.bias[:2]
        row, shift = extraction.model.head.weight[2].double(), float(extraction.model.head.bias[2])
    weight, bias = fit_other(features, kept, labels == 1)
    assert torch.allclose(row, weight, atol=1e-4)
    assert shift == pytest.approx(bias, abs=1e-4)


def test_a_label_called_other_needs_another_head() -> None:
    parent = randomised(NormHead())
    loader = [(torch.randn(9, 4), torch.arange(9) % 3)]
    labels = LabelSet.of(["other", "b", "c"], [0])
    with pytest.raises(LabelError, match="a kept label is called 'other'"):
        prepare(parent, torch.randn(2, 4), loader, labels, Preparation("open"))
    assert prepare(parent, torch.randn(2, 4), loader, labels, Preparation("closed")).labels.outputs == (0,)


class Remembering(nn.Sequential):
    """A state that is no tensor."""

    def get_extra_state(self) -> dict[str, int]:
        return {"steps": 3}

    def set_extra_state(self, state: dict[str, int]) -> None:
        self.steps = state["steps"]


def test_a_state_that_is_no_tensor_is_told() -> None:
    model = Remembering(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)).eval()
    extraction = extracted_from(model, torch.randn(2, 4), 3, loader=[(torch.randn(6, 4), torch.arange(6) % 3)])
    with pytest.raises(SubnetError, match="_extra_state, which is not a tensor"):
        Subnet.of(extraction, provenance(model))


class NormHead(nn.Module):
    """A batch norm, and a head without a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.head = nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 3, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(self.first(x)).relu())


@pytest.mark.parametrize("head", ["keep", "closed", "open"])
@pytest.mark.parametrize("gram", [False, True])
def test_every_head_survives_the_round_trip(head: str, gram: bool, tmp_path: Any) -> None:
    parent = randomised(NormHead())
    generator = torch.Generator().manual_seed(0)
    loader = [(torch.randn(30, 4, generator=generator), torch.arange(30) % 3) for _ in range(3)]
    extraction = extracted_from(
        parent, torch.randn(2, 4), 3, labels=[0, 2], names=["a", "b", "c"], head=head, gram=gram, loader=loader
    )
    subnet = Subnet.of(extraction, provenance(parent, head))
    again = Subnet.load(subnet.save(tmp_path / "subnet.safetensors"))
    assert again.output_names == {"keep": ("a", "b", "c"), "closed": ("a", "c"), "open": ("a", "c", "other")}[head]
    assert again.provenance == subnet.provenance
    assert (again.labels, again.head_layer) == (subnet.labels, subnet.head_layer)
    assert again.inputs == subnet.inputs
    assert {name: value.tolist() for name, value in again.kept.items()} == {
        name: value.tolist() for name, value in subnet.kept.items()
    }
    assert all(torch.equal(again.scores[name], value) for name, value in subnet.scores.items())
    assert again.weights.keys() == subnet.weights.keys()
    for name, value in subnet.weights.items():
        assert again.weights[name].dtype == value.dtype
        assert torch.equal(again.weights[name], value)
    inputs = torch.randn(5, 4)
    small, masked = again.materialise(NormHead), again.mask(parent)
    assert torch.allclose(outputs_of(small, inputs), outputs_of(masked, inputs), rtol=1e-5, atol=1e-5)
    assert torch.allclose(outputs_of(small, inputs), outputs_of(extraction.model.eval(), inputs), atol=1e-6)
    kept = again.kept["first"]
    if head == "closed":
        expected = parent.head.weight[[0, 2]][:, kept]
        assert torch.equal(small.head.weight, expected)
        assert torch.equal(masked.head.weight[:, kept], expected)
    gone = torch.tensor([unit for unit in range(8) if unit not in kept.tolist()])
    assert not bool(masked.head.weight[:, gone].any())
    assert not bool(masked.first.weight[gone].any())


def test_torch_pruning_rebuilds_the_small_model_from_the_history(zoo: Any) -> None:
    """Its own replay, on the factory's model, gives layers of the same shapes, and the weights fit them."""
    torch.manual_seed(0)
    case = zoo.CASES["residual"]
    parent = case.make().eval()
    extraction = extracted_from(parent, case.inputs(2), 3, loader=zoo.labelled("residual", 8))
    subnet = Subnet.of(extraction, provenance(parent))
    history = subnet.pruning_history(parent)
    fresh = case.make().eval()
    graph = tp.DependencyGraph().build_dependency(fresh, case.inputs(2))
    graph.load_pruning_history(history)
    fresh.load_state_dict(dict(subnet.weights))
    inputs = case.inputs(4)
    small = subnet.materialise(case.make)
    assert torch.allclose(outputs_of(fresh.eval(), inputs), outputs_of(small, inputs), atol=1e-6)


def test_a_model_that_is_not_the_parent_is_refused() -> None:
    parent = randomised(NormHead())
    loader = [(torch.randn(6, 4), torch.arange(6) % 3)]
    extraction = extracted_from(parent, torch.randn(2, 4), 3, labels=[0, 2], head="closed", loader=loader)
    subnet = Subnet.of(extraction, provenance(parent))
    other = copy.deepcopy(parent)
    with torch.no_grad():
        other.first.weight[0, 0] += 1
    with pytest.raises(SubnetError, match="pass the parent as it was when the subnet was extracted"):
        subnet.mask(other)

    def wider() -> nn.Module:
        model = NormHead()
        model.first, model.norm, model.head = nn.Linear(4, 9), nn.BatchNorm1d(9), nn.Linear(9, 3, bias=False)
        return model

    with pytest.raises(SubnetError, match="group 'first' has 8 units; this one has 9"):
        subnet.materialise(wider)

    def longer() -> nn.Module:
        return nn.Sequential(NormHead(), nn.Softmax(1))

    with pytest.raises(SubnetError, match="no such head 'head'"):
        subnet.materialise(longer)

    def headed() -> nn.Module:
        model = NormHead()
        model.first = nn.Linear(5, 8)
        return model

    with pytest.raises(Exception, match=r"4 and 5x8|first.weight|traced"):
        subnet.materialise(headed)
    with pytest.raises(SubnetError, match="returned a int; expected a torch module"):
        subnet.materialise(lambda: 3)  # type: ignore[arg-type, return-value]


def test_statistics_of_the_parent_are_used_and_others_refused() -> None:
    parent = randomised(NormHead())
    loader = [(torch.randn(30, 4), torch.arange(30) % 3)]
    groups = TorchPruningBackend(copy.deepcopy(parent), torch.randn(2, 4)).groups()
    statistics = calibrate(parent, loader, groups)
    extraction = extracted_from(
        parent, torch.randn(2, 4), 3, labels=[0, 1], head="closed", loader=None, statistics=statistics
    )
    assert extraction.labels.outputs == (0, 1)
    with pytest.raises(StaleStatisticsError, match="have no Gram matrix of what 'head' reads"):
        extracted_from(parent, torch.randn(2, 4), 3, loader=None, statistics=statistics, gram=True)
    with torch.no_grad():
        parent.first.bias += 1
    with pytest.raises(StaleStatisticsError, match="'first.bias' has other values"):
        extracted_from(parent, torch.randn(2, 4), 3, loader=None, statistics=statistics)
    with pytest.raises(PruningError, match="neither statistics nor a loader"):
        extracted_from(parent, torch.randn(2, 4), 3, loader=None)
    with pytest.raises(PruningError, match="head 'open' is fitted on labelled inputs"):
        extracted_from(parent, torch.randn(2, 4), 3, loader=None, labels=[0], head="open", gram=True)
    with pytest.raises(PruningError, match="head is 'round'"):
        extracted_from(parent, torch.randn(2, 4), 3, loader=loader, head="round")
