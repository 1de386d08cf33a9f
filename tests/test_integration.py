"""Integration: the union of subnets is what an extraction for all their labels gives."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

pytestmark = pytest.mark.host("torch_pruning")
pytest.importorskip("torch_pruning")
pytest.importorskip("pydantic", reason="the extra cli is not installed")

from nns_plugin import Statistics, Subnet, calibrate, integrate  # noqa: E402
from nns_plugin.adapters.dependency_graph import unit_groups  # noqa: E402
from nns_plugin.errors import NNSError, PruningError, SubnetError  # noqa: E402
from nns_plugin.integration import within_budget  # noqa: E402
from nns_plugin.jobs.extraction import extract_subnet  # noqa: E402

LABELS = 10


class Net(nn.Module):
    """Two groups side by side in a concatenation, a third one behind."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(12, 16), nn.Linear(12, 8)
        self.join, self.head = nn.Linear(24, 20), nn.Linear(20, LABELS)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        both = torch.cat([self.left(x).relu(), self.right(x).relu()], 1)
        return self.head(self.join(both).relu())


@functools.cache
def setting() -> tuple[Net, torch.Tensor, tuple[tuple[torch.Tensor, torch.Tensor], ...], Statistics]:
    torch.manual_seed(0)
    parent = Net().eval()
    centres = torch.randn(LABELS, 12)
    with torch.no_grad():  # on the right unit 0 is dead, and the others answer to one label each: three have none
        parent.right.weight.copy_(torch.cat([torch.zeros(1, 12), centres[:7]]))
        parent.right.bias.copy_(-0.8 * parent.right.weight.square().sum(1))
    labels = torch.arange(400) % LABELS
    inputs = centres[labels] + 0.3 * torch.randn(400, 12)
    loader = tuple(zip(inputs.split(100), labels.split(100), strict=True))
    groups = unit_groups(parent, inputs[:2])
    return parent, inputs, loader, calibrate(parent, loader, groups, labels=LABELS, gram=True)


def subnet_of(labels: list[int] | None, **options: Any) -> Subnet:
    parent, inputs, loader, statistics = setting()
    return extract_subnet(parent, inputs[:2], loader, labels=labels, statistics=statistics, **options)


def check_equal(left: Subnet, right: Subnet) -> None:
    assert {name: units.tolist() for name, units in left.kept.items()} == {
        name: units.tolist() for name, units in right.kept.items()
    }
    assert (left.labels, left.outputs) == (right.labels, right.outputs)
    assert left.weights.keys() == right.weights.keys()
    for name, value in right.weights.items():
        assert torch.equal(left.weights[name], value), name


@settings(max_examples=12)
@given(zeta=st.floats(0, 1))
def test_all_single_label_subnets_are_the_subnet_of_all_labels(zeta: float) -> None:
    """At any zeta, a group where one label has no unit that reaches it included."""
    parent, _, loader, statistics = setting()
    singles = [subnet_of([label], zeta=zeta, head="closed") for label in range(LABELS)]
    whole = subnet_of(list(range(LABELS)), zeta=zeta, head="closed")
    check_equal(integrate(singles, parent, statistics, loader=loader), whole)
    check_equal(integrate(singles[::-1], parent, statistics, loader=loader), whole)


def test_the_property_is_no_truism() -> None:
    """The union of the kept sets alone is another set: labels keep their best unit of a group that says little."""
    singles = [subnet_of([label], zeta=0.6, head="closed") for label in range(LABELS)]
    whole = subnet_of(list(range(LABELS)), zeta=0.6, head="closed")
    union = {
        name: sorted(set(itertools.chain(*(subnet.kept[name].tolist() for subnet in singles)))) for name in whole.kept
    }
    assert any(union[name] != whole.kept[name].tolist() for name in union)


@pytest.mark.parametrize("head", ["keep", "closed", "open"])
@pytest.mark.parametrize("compensation", ["none", "mean", "least_squares", "refit"])
def test_pairs_with_every_head_and_compensation(head: Any, compensation: Any) -> None:
    parent, _, loader, statistics = setting()
    options = {"zeta": 0.5, "head": head, "compensation": compensation}
    parts = [subnet_of([1, 4], **options), subnet_of([4, 7], **options)]
    check_equal(integrate(parts, parent, statistics, loader=loader), subnet_of([1, 4, 7], **options))


def test_without_statistics_they_are_collected() -> None:
    parent, _, loader, statistics = setting()
    parts = [subnet_of([label], zeta=0.5, compensation="least_squares") for label in (1, 4)]
    check_equal(integrate(parts, parent, loader=loader), integrate(parts, parent, statistics, loader=loader))


def test_ratios_unite_too() -> None:
    parent, _, loader, statistics = setting()
    parts = [subnet_of([label], ratio=0.7) for label in (2, 5)]
    united = integrate(parts, parent, statistics, loader=loader)
    for name, units in united.kept.items():
        assert set(units.tolist()) == set(parts[0].kept[name].tolist()) | set(parts[1].kept[name].tolist())
    assert united.labels == (2, 5)
    assert united.provenance.selection == {"ratio": 0.7}


def test_a_budget_drops_the_least_needed_units() -> None:
    parent, _, loader, statistics = setting()
    parts = [subnet_of([label], ratio=0.5) for label in (2, 5, 6)]
    united = integrate(parts, parent, statistics, loader=loader, budget=12)
    assert sum(units.numel() for units in united.kept.values()) == 12
    everything = subnet_of([2, 5, 6], ratio=0.0)
    scores = {
        (name, unit): float(everything.scores[name][unit])
        for name in united.kept
        for unit in range(everything.sizes[name])
    }
    kept = {(name, unit) for name, units in united.kept.items() for unit in units.tolist()}
    union = {(name, unit) for part in parts for name, units in part.kept.items() for unit in units.tolist()}
    best = {max((key for key in union if key[0] == name), key=scores.__getitem__) for name in united.kept}
    dropped = union - kept
    assert best <= kept <= union
    assert max(scores[key] for key in dropped) <= min(scores[key] for key in kept - best)
    assert united.provenance.selection == {"ratio": 0.5, "budget": 12}


def test_a_budget_by_hand() -> None:
    kept = {"a": torch.tensor([0, 2, 3]), "b": torch.tensor([1, 4])}
    scores = {"a": torch.tensor([0.9, 0.0, 0.8, 0.7]), "b": torch.tensor([0.0, 0.1, 0.0, 0.0, 0.2])}
    assert {name: units.tolist() for name, units in within_budget(kept, scores, 3).items()} == {"a": [0, 2], "b": [4]}
    assert {name: units.tolist() for name, units in within_budget(kept, scores, 99).items()} == {
        "a": [0, 2, 3],
        "b": [1, 4],
    }
    with pytest.raises(SubnetError, match="budget is 1 units; expected at least 2"):
        within_budget(kept, scores, 1)
    with pytest.raises(SubnetError, match="the units of b have none"):
        within_budget(kept, {"a": scores["a"]}, 3)


def changed(subnet: Subnet, **changes: Any) -> Subnet:
    return dataclasses.replace(subnet, provenance=dataclasses.replace(subnet.provenance, **changes))


def test_what_does_not_go_together_is_refused() -> None:
    parent, _, loader, statistics = setting()
    one = subnet_of([1], zeta=0.5)
    cases: list[tuple[list[Subnet], str]] = [
        ([], "no subnets to integrate"),
        ([one, changed(one, parent="f" * 32)], "subnet 1 has parent 'ffff"),
        ([one, subnet_of([2], zeta=0.5, head="closed")], "subnet 1 has head 'closed', subnet 0 'open'"),
        ([one, subnet_of([2], zeta=0.5, compensation="mean")], "subnet 1 has compensation"),
        ([one, subnet_of([2], zeta=0.5, ignored_layers=["left"])], "subnet 1 has ignored_layers"),
        ([one, subnet_of([2], ratio=0.5, criterion="mean_weight")], "subnet 1 has criterion 'mean_weight'"),
        ([one, dataclasses.replace(one, label_names=("x",) * LABELS)], "other label names"),
        ([one, dataclasses.replace(one, sizes={**one.sizes, "left": 3})], "3 units in 'left', subnet 0 16"),
    ]
    for subnets, message in cases:
        with pytest.raises(SubnetError, match=message):
            integrate(subnets, parent, statistics, loader=loader)
    torch.manual_seed(1)
    with pytest.raises(SubnetError, match="pass the parent as it was"):
        integrate([one], Net(), statistics, loader=loader)
    with pytest.raises(PruningError, match="head 'open' is fitted on labelled inputs"):
        integrate([one], parent, statistics)
    with pytest.raises(NNSError, match="neither statistics nor a loader"):
        integrate([subnet_of([1], zeta=0.5, head="closed")], parent)
    refit = subnet_of([1], zeta=0.5, head="closed", compensation="refit")
    with pytest.raises(PruningError, match="needs a loader"):
        integrate([refit], parent, statistics)
