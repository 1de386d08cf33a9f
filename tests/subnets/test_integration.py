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
from nns_plugin.adapters.torch_pruning.groups import unit_groups  # noqa: E402
from nns_plugin.criteria import Semantic  # noqa: E402
from nns_plugin.errors import NNSError, PruningError, SubnetError  # noqa: E402
from nns_plugin.jobs.extraction import extract_subnet  # noqa: E402
from nns_plugin.labels import LabelSet  # noqa: E402
from nns_plugin.subnets.integration import RetrainedWarning, within_budget  # noqa: E402
from nns_plugin.subnets.provenance import Trial  # noqa: E402

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
    assert left.labels == right.labels
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
    assert united.labels.indices == (2, 5)
    assert united.provenance.selection == {"union": [{"ratio": 0.7}, {"ratio": 0.7}]}


def test_a_budget_drops_the_least_needed_units() -> None:
    parent, _, loader, statistics = setting()
    parts = [subnet_of([label], ratio=0.5) for label in (2, 5, 6)]
    united = integrate(parts, parent, statistics, loader=loader, budget=12)
    assert sum(units.numel() for units in united.kept.values()) == 12
    scores = {  # of all units for the three labels together, by the criterion itself
        (group.name, unit): float(score)
        for group in statistics.groups
        for unit, score in enumerate(Semantic(statistics, [2, 5, 6])(group))
    }
    kept = {(name, unit) for name, units in united.kept.items() for unit in units.tolist()}
    union = {(name, unit) for part in parts for name, units in part.kept.items() for unit in units.tolist()}
    best = {max((key for key in union if key[0] == name), key=scores.__getitem__) for name in united.kept}
    dropped = union - kept
    assert best <= kept <= union
    assert max(scores[key] for key in dropped) <= min(scores[key] for key in kept - best)
    # What subnets say of units that others of them dropped is too little: the scores are those of all labels together.
    silent = [
        dataclasses.replace(part, scores={name: 0 * each for name, each in part.scores.items()}) for part in parts
    ]
    check_equal(integrate(silent, parent, statistics, loader=loader, budget=12), united)
    assert united.provenance.selection == {"union": [{"ratio": 0.5}] * 3, "budget": 12}


def test_a_budget_for_another_criterion() -> None:
    parent, _, loader, _ = setting()
    parts = [subnet_of([label], ratio=0.5, criterion="distinctiveness") for label in (2, 5)]
    united = integrate(parts, parent, loader=loader, budget=10)
    assert sum(units.numel() for units in united.kept.values()) == 10
    assert united.labels.outputs == (2, 5, None)


def test_subnets_of_different_zetas_and_roundings_are_plain_unions() -> None:
    parent, _, loader, statistics = setting()
    for parts in (
        [subnet_of([2], zeta=0.3), subnet_of([5], zeta=0.6)],
        [subnet_of([2], zeta=0.6, round_to=4), subnet_of([5], zeta=0.6, round_to=4)],
    ):
        united = integrate(parts, parent, statistics, loader=loader)
        for name, units in united.kept.items():
            assert set(units.tolist()) == set(parts[0].kept[name].tolist()) | set(parts[1].kept[name].tolist())
        assert united.provenance.selection == {"union": [part.provenance.selection for part in parts]}


def test_a_group_that_is_whole_in_one_subnet_stays_whole() -> None:
    parent, _, loader, statistics = setting()
    one, two = subnet_of([2], zeta=0.5), subnet_of([5], zeta=0.5)
    two = dataclasses.replace(
        two, kept={name: units for name, units in two.kept.items() if name != "join"},
        sizes={name: size for name, size in two.sizes.items() if name != "join"},
    )  # fmt: skip
    for parts in ([one, two], [two, one]):
        united = integrate(parts, parent, statistics, loader=loader)
        assert "join" not in united.kept
        assert united.weights["join.weight"].shape[0] == 20


def test_calibrated_heads_are_calibrated_again() -> None:
    parent, inputs, loader, statistics = setting()
    validation = [(inputs + 0.3 * torch.randn(inputs.shape), torch.arange(400) % LABELS)]
    options: dict[str, Any] = {"zeta": 0.6, "calibrate_head": True, "validation": validation}
    parts = [subnet_of([0], **options), subnet_of([2], **options)]
    united = integrate(parts, parent, statistics, loader=loader, validation=validation)
    check_equal(united, subnet_of([0, 2], **options))
    assert united.provenance.calibrated
    with pytest.raises(SubnetError, match="were calibrated on validation data; pass validation"):
        integrate(parts, parent, statistics, loader=loader)
    with pytest.raises(SubnetError, match="subnet 1 has calibrated False, subnet 0 True"):
        integrate([parts[0], subnet_of([2], zeta=0.6)], parent, statistics, loader=loader, validation=validation)


def test_training_that_is_lost_is_told() -> None:
    parent, _, loader, statistics = setting()
    tuned = changed(subnet_of([2], zeta=0.5), training={"fine_tune": 2}, trials=(Trial(0.5, 3, 0.9, 0.01, True),))
    with pytest.warns(RetrainedWarning, match="their union has the parent's weights; train it again"):
        united = integrate([tuned], parent, statistics, loader=loader)
    check_equal(united, subnet_of([2], zeta=0.5))
    assert united.provenance.training == {}
    assert united.provenance.trials == ()


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
        ([one, subnet_of([2], zeta=0.5, criterion_options={"measure": "frequency"})], "subnet 1 has options"),
        ([changed(one, selection={"angle": {}})], "selected by angles cannot be integrated"),
        (one, "must be a list of Subnet"),  # type: ignore[list-item]
        ([one, dataclasses.replace(one, labels=LabelSet(("x",) * LABELS, (0,), (0,)))], "other label names"),
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
