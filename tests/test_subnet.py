"""Subnets: the small model and the masked parent compute the same, and are what the parent's weights say."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import nn

pytestmark = pytest.mark.host("torch_pruning")
tp = pytest.importorskip("torch_pruning")

from nns_plugin import Subnet  # noqa: E402
from nns_plugin.adapters.surgery import TorchPruningSurgery  # noqa: E402
from nns_plugin.cutting import carry_out, prepare  # noqa: E402
from nns_plugin.errors import PruningError, StaleStatisticsError, SubnetError  # noqa: E402
from nns_plugin.fingerprint import digest, fingerprint  # noqa: E402
from nns_plugin.observe import calibrate  # noqa: E402
from nns_plugin.subnet import InexactMaskWarning, Provenance  # noqa: E402
from nns_plugin.surgery import Compensation  # noqa: E402


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


def cut_of(parent: nn.Module, inputs: Any, count: int, seed: int = 0, **options: Any) -> Any:
    """A cut that keeps random units of every group; at least one goes where there are two."""
    generator = torch.Generator().manual_seed(seed)
    settings: dict[str, Any] = {"labels": None, "head": "keep", "gram": False, **options}
    loader = settings.pop("loader")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        prepared = prepare(
            parent, inputs, loader, [str(i) for i in range(count)], surgeon=TorchPruningSurgery, **settings
        )
        kept = {
            group.name: torch.randperm(group.size, generator=generator)[: max(1, group.size // 2)].sort().values
            for group in prepared.groups
        }
        scores = {name: torch.rand(group.size).double() for name, group in zip(kept, prepared.groups, strict=True)}
        return carry_out(
            prepared, kept, Compensation("none", reestimate=False), loader, surgeon=TorchPruningSurgery, scores=scores
        )


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
            cut = cut_of(parent, case.inputs(2), 3, loader=loader)
        except PruningError:  # a case without usable groups
            assert not case.groups
            continue
        subnet = Subnet.of(cut, ["0", "1", "2"], provenance(parent))
        small = quietly(subnet.materialise, lambda case=case, parent=parent: copy.deepcopy(parent))
        snapshot = zoo.Snapshot(parent)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            masked = subnet.mask(parent)
        snapshot.check()
        inexact = [entry for entry in caught if entry.category is InexactMaskWarning]
        inputs = case.inputs(4)
        left, right = outputs_of(small, inputs), outputs_of(masked, inputs)
        assert torch.allclose(left, outputs_of(cut.model.eval(), inputs), atol=1e-6), name
        if not case.inexact:
            assert not inexact, name
            assert torch.allclose(left, right, rtol=1e-5, atol=1e-5), name
            checked += 1
        for parameter, wide in masked.named_parameters():
            assert wide.shape == dict(parent.named_parameters())[parameter].shape, f"{name}: {parameter}"
            small_count = dict(small.named_parameters())[parameter].numel()
            assert int((wide != 0).sum()) <= small_count, f"{name}: {parameter}"
    assert checked >= 12


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.second = nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.norm(self.first(x)).relu())


def test_groups_that_pass_a_layer_norm_are_exempt_and_named() -> None:
    parent = Normed().eval()
    loader = [(torch.randn(6, 4), torch.arange(6) % 3)]
    subnet = Subnet.of(cut_of(parent, torch.randn(2, 4), 3, loader=loader), ["0", "1", "2"], provenance(parent))
    with pytest.warns(InexactMaskWarning, match="differs from the small one at first"):
        subnet.mask(parent)


class HalfHead(nn.Module):
    """A batch norm, a head without a bias, and weights of half precision."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.head = nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 3, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(self.first(x)).relu())


@pytest.mark.parametrize("head", ["keep", "closed", "open"])
@pytest.mark.parametrize("gram", [False, True])
def test_every_head_survives_the_round_trip(head: str, gram: bool, tmp_path: Any) -> None:
    parent = randomised(HalfHead())
    generator = torch.Generator().manual_seed(0)
    loader = [(torch.randn(30, 4, generator=generator), torch.arange(30) % 3) for _ in range(3)]
    cut = cut_of(parent, torch.randn(2, 4), 3, labels=[0, 2], head=head, gram=gram, loader=loader)
    subnet = Subnet.of(cut, ["a", "b", "c"], provenance(parent, head))
    again = Subnet.load(subnet.save(tmp_path / "subnet.safetensors"))
    assert again.output_names == {"keep": ("a", "b", "c"), "closed": ("a", "c"), "open": ("a", "c", "other")}[head]
    assert again.provenance == subnet.provenance
    assert (again.labels, again.outputs, again.head_layer) == (subnet.labels, subnet.outputs, subnet.head_layer)
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
    small, masked = again.materialise(HalfHead), again.mask(parent)
    assert torch.allclose(outputs_of(small, inputs), outputs_of(masked, inputs), rtol=1e-5, atol=1e-5)
    assert torch.allclose(outputs_of(small, inputs), outputs_of(cut.model.eval(), inputs), atol=1e-6)
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
    cut = cut_of(parent, case.inputs(2), 3, loader=zoo.labelled("residual", 8))
    subnet = Subnet.of(cut, ["0", "1", "2"], provenance(parent))
    history = subnet.pruning_history(parent)
    fresh = case.make().eval()
    graph = tp.DependencyGraph().build_dependency(fresh, case.inputs(2))
    graph.load_pruning_history(history)
    fresh.load_state_dict(dict(subnet.weights))
    inputs = case.inputs(4)
    small = subnet.materialise(case.make)
    assert torch.allclose(outputs_of(fresh.eval(), inputs), outputs_of(small, inputs), atol=1e-6)


def test_a_model_that_is_not_the_parent_is_refused() -> None:
    parent = randomised(HalfHead())
    loader = [(torch.randn(6, 4), torch.arange(6) % 3)]
    cut = cut_of(parent, torch.randn(2, 4), 3, labels=[0, 2], head="closed", loader=loader)
    subnet = Subnet.of(cut, ["a", "b", "c"], provenance(parent))
    other = copy.deepcopy(parent)
    with torch.no_grad():
        other.first.weight[0, 0] += 1
    with pytest.raises(SubnetError, match="pass the parent as it was when the subnet was cut"):
        subnet.mask(other)

    def wider() -> nn.Module:
        model = HalfHead()
        model.first, model.norm, model.head = nn.Linear(4, 9), nn.BatchNorm1d(9), nn.Linear(9, 3, bias=False)
        return model

    with pytest.raises(SubnetError, match="group 'first' has 8 units; this one has 9"):
        subnet.materialise(wider)

    def longer() -> nn.Module:
        return nn.Sequential(HalfHead(), nn.Softmax(1))

    with pytest.raises(SubnetError, match="no head 'head'"):
        subnet.materialise(longer)

    def headed() -> nn.Module:
        model = HalfHead()
        model.first = nn.Linear(5, 8)
        return model

    with pytest.raises(Exception, match=r"4 and 5x8|first.weight|traced"):
        subnet.materialise(headed)
    with pytest.raises(SubnetError, match="returned a int; expected a torch module"):
        subnet.materialise(lambda: 3)  # type: ignore[arg-type, return-value]


def test_statistics_of_the_parent_are_used_and_others_refused() -> None:
    parent = randomised(HalfHead())
    loader = [(torch.randn(30, 4), torch.arange(30) % 3)]
    groups = TorchPruningSurgery(copy.deepcopy(parent), torch.randn(2, 4)).groups()
    statistics = calibrate(parent, loader, groups)
    cut = cut_of(parent, torch.randn(2, 4), 3, labels=[0, 1], head="closed", loader=None, statistics=statistics)
    assert cut.outputs == (0, 1)
    with pytest.raises(StaleStatisticsError, match="have no Gram matrix of what 'head' reads"):
        cut_of(parent, torch.randn(2, 4), 3, loader=None, statistics=statistics, gram=True)
    with torch.no_grad():
        parent.first.bias += 1
    with pytest.raises(StaleStatisticsError, match="'first.bias' has other values"):
        cut_of(parent, torch.randn(2, 4), 3, loader=None, statistics=statistics)
    with pytest.raises(PruningError, match="neither statistics nor a loader"):
        cut_of(parent, torch.randn(2, 4), 3, loader=None)
    with pytest.raises(PruningError, match="head 'open' is fitted on labelled inputs"):
        cut_of(parent, torch.randn(2, 4), 3, loader=None, labels=[0], head="open", gram=True)
    with pytest.raises(PruningError, match="head is 'round'"):
        cut_of(parent, torch.randn(2, 4), 3, loader=loader, head="round")
