"""Semantic scores: eq. 1 by hand, its union property, and contrasts against Cohen's d in NumPy."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from nns_plugin import Port, Statistics, UnitGroup, calibrate
from nns_plugin.criteria.semantic import Semantic, contrast_to_rest, relative_activity
from nns_plugin.errors import CriterionError, LabelError, StaleStatisticsError
from nns_plugin.labels import resolve_label
from nns_plugin.selection import keep_by_threshold


class Consumers(nn.Module):
    """Layers that read the inputs themselves, the second one doubled and reversed."""

    def __init__(self, units: int) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(units, 2), nn.Linear(units, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.one(x) + self.two(2 * x.flip(1))


def group(units: int, *consumers: str) -> UnitGroup:
    every = torch.arange(units)
    return UnitGroup(
        "hidden", units, (Port("hidden", every, every),), tuple(Port(name, every, every) for name in consumers)
    )


def observed(
    activations: Any, of_label: Sequence[int], consumers: tuple[str, ...] = ("one",), **options: Any
) -> tuple[Statistics, UnitGroup]:
    x = torch.as_tensor(activations, dtype=torch.float32)
    hidden = group(x.shape[1], *consumers)
    options = {"labels": max(of_label) + 1, **options}
    return calibrate(Consumers(x.shape[1]), [(x, torch.tensor(of_label))], (hidden,), **options), hidden


# Two inputs of label 0, one of label 1; means of magnitudes (2, 4, 0.5, 0) and (3, 0, 0, 6).
ACTIVATIONS, LABELS = [[1.0, -5.0, 0.5, 0.0], [-3.0, 3.0, 0.5, 0.0], [3.0, 0.0, 0.0, -6.0]], [0, 0, 1]


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        ([0], [0.5, 1.0, 0.125, 0.0]),
        ([1], [0.5, 0.0, 0.0, 1.0]),
        ([0, 1], [0.5, 1.0, 0.125, 1.0]),
        ([1, 0, 1], [0.5, 1.0, 0.125, 1.0]),
        (None, [0.5, 1.0, 0.125, 1.0]),
        (["zero"], [0.5, 1.0, 0.125, 0.0]),
        (["one", 0], [0.5, 1.0, 0.125, 1.0]),
        (np.array([1]), [0.5, 0.0, 0.0, 1.0]),
        (torch.tensor([1]), [0.5, 0.0, 0.0, 1.0]),
        ((0,), [0.5, 1.0, 0.125, 0.0]),
    ],
)
def test_equation_1_by_hand(labels: Any, expected: list[float]) -> None:
    statistics, hidden = observed(ACTIVATIONS, LABELS, labels=["zero", "one"])
    scores = Semantic(statistics, labels)(hidden)
    assert scores is not None
    assert scores.tolist() == expected


@pytest.mark.parametrize(
    ("zeta", "kept"), [(0.125, [0, 1, 2]), (0.126, [0, 1]), (0.5, [0, 1]), (0.51, [1]), (1.0, [1]), (0.0, [0, 1, 2, 3])]
)
def test_the_kept_set_is_the_papers_rule(zeta: float, kept: list[int]) -> None:
    """x >= zeta * beta, for one label."""
    statistics, hidden = observed(ACTIVATIONS, LABELS)
    scores = Semantic(statistics, [0])(hidden)
    assert scores is not None
    assert keep_by_threshold({"hidden": scores}, zeta)["hidden"].tolist() == kept


def test_frequency_counts_inputs_not_magnitudes() -> None:
    """Unit 0 is active on both inputs of label 0, unit 1 on one, however large."""
    statistics, hidden = observed([[0.1, 100.0, -1.0], [0.1, 0.0, -1.0]], [0, 0])
    scores = Semantic(statistics, measure="frequency")(hidden)
    assert scores is not None
    assert scores.tolist() == [1.0, 0.5, 0.0]
    above, hidden = observed([[0.1, 100.0, -1.0], [0.1, 0.0, -1.0]], [0, 0], threshold=0.5)
    scores = Semantic(above, measure="frequency")(hidden)
    assert scores is not None
    assert scores.tolist() == [0.0, 1.0, 0.0]


def test_a_label_without_any_activity_scores_nothing() -> None:
    """beta is 0."""
    statistics, hidden = observed([[0.0, 0.0], [1.0, 2.0]], [0, 1])
    for measure, expected in (("mean", [0.5, 1.0]), ("frequency", [1.0, 1.0])):
        for labels, scores in (([0], [0.0, 0.0]), ([0, 1], expected)):
            found = Semantic(statistics, labels, measure)(hidden)  # type: ignore[arg-type]
            assert found is not None
            assert found.tolist() == scores


def test_several_consumers_count_by_their_maximum() -> None:
    """The second consumer sees units 2 * (c, b, a): relative to its own beta."""
    statistics, hidden = observed([[1.0, 2.0, 4.0]], [0], ("one", "two"))
    scores = Semantic(statistics)(hidden)
    assert scores is not None
    assert scores.tolist() == [1.0, 0.5, 1.0]
    alone, hidden = observed([[1.0, 2.0, 4.0]], [0], ("two",))
    scores = Semantic(alone)(hidden)
    assert scores is not None
    assert scores.tolist() == [1.0, 0.5, 0.25]


def test_beta_is_of_the_group_alone() -> None:
    """Another group on the same consumer, ten times as active, changes nothing."""
    x = torch.tensor([[1.0, 2.0, 10.0, 20.0]])
    mine = UnitGroup("mine", 2, (), (Port("one", torch.tensor([0, 1]), torch.tensor([0, 1])),))
    other = UnitGroup("other", 2, (), (Port("one", torch.tensor([3, 2]), torch.tensor([0, 1])),))
    statistics = calibrate(Consumers(4), [(x, torch.tensor([0]))], (mine, other), labels=1)
    for unit_group, expected in ((mine, [0.5, 1.0]), (other, [1.0, 0.5])):
        for measure, scores in (("mean", expected), ("frequency", [1.0, 1.0])):
            found = Semantic(statistics, measure=measure)(unit_group)  # type: ignore[arg-type]
            assert found is not None
            assert found.tolist() == scores


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_frequency_of_groups_that_stand_in_another_order(order: tuple[int, int]) -> None:
    """The second group of the model owns the first positions of the consumer, as in cat[late, early]."""
    x = torch.tensor([[1.0, 0.0, 0.0, 1.0], [1.0, 0.0, 1.0, 1.0]])
    early = UnitGroup("early", 2, (), (Port("one", torch.tensor([2, 3]), torch.tensor([0, 1])),))
    late = UnitGroup("late", 2, (), (Port("one", torch.tensor([0, 1]), torch.tensor([0, 1])),))
    groups = ((early, late)[order[0]], (early, late)[order[1]])
    statistics = calibrate(Consumers(4), [(x, torch.tensor([0, 0]))], groups, labels=1)
    for unit_group, expected in ((early, [0.5, 1.0]), (late, [1.0, 0.0])):
        found = Semantic(statistics, measure="frequency")(unit_group)
        assert found is not None
        assert found.tolist() == expected


def test_units_of_several_positions_pool_them() -> None:
    """Mean over positions; active where any of them is."""
    x = torch.tensor([[1.0, 0.0, 3.0, 0.0], [0.0, 0.0, 1.0, 5.0]])
    pairs = UnitGroup("hidden", 2, (), (Port("one", torch.arange(4), torch.tensor([0, 1, 0, 1])),))
    statistics = calibrate(Consumers(4), [(x, torch.tensor([0, 0]))], (pairs,), labels=1)
    mean, frequency = Semantic(statistics)(pairs), Semantic(statistics, measure="frequency")(pairs)
    assert mean is not None
    assert frequency is not None
    assert mean.tolist() == [1.0, 1.0]  # 5 and 5 over 4 samples each
    assert frequency.tolist() == [1.0, 0.5]


activations = st.lists(
    st.lists(st.sampled_from([-8.0, -1.0, 0.0, 0.25, 1.0, 2.0, 7.0]), min_size=5, max_size=5), min_size=4, max_size=10
)


@given(
    activations,
    st.sets(st.integers(0, 3), min_size=1),
    st.sampled_from([0.0, 0.1, 0.25, 0.4, 0.5, 0.9, 1.0]),
    st.sampled_from(["mean", "frequency"]),
)
def test_a_label_set_keeps_the_union_of_the_single_label_subnets(
    rows: list[list[float]], chosen: set[int], zeta: float, measure: Any
) -> None:
    """The paper's integration, for any zeta; the reference is eq. 1 in plain Python."""
    labels = [number % 4 for number in range(len(rows))]
    statistics, hidden = observed(rows, labels, ("one", "two"))
    scores = Semantic(statistics, sorted(chosen), measure)(hidden)
    assert scores is not None
    together = set((scores >= zeta).nonzero().flatten().tolist())
    union: set[int] = set()
    for label in chosen:
        single = Semantic(statistics, [label], measure)(hidden)
        assert single is not None
        union |= set((single >= zeta).nonzero().flatten().tolist())
        mine = [row for row, other in zip(rows, labels, strict=True) if other == label]
        by_hand: set[int] = set()
        for consumer in (lambda row: row, lambda row: [2 * value for value in reversed(row)]):
            seen = [consumer(row) for row in mine]
            x = [sum(abs(row[u]) if measure == "mean" else row[u] > 0 for row in seen) / len(seen) for u in range(5)]
            by_hand |= {u for u in range(5) if (x[u] / max(x) if max(x) else 0.0) >= zeta}
        assert set((single >= zeta).nonzero().flatten().tolist()) == by_hand
    assert together == union


def cohens_d(chosen: np.ndarray, rest: np.ndarray) -> float:
    n1, n2 = len(chosen), len(rest)
    pooled = ((n1 - 1) * chosen.var(ddof=1) + (n2 - 1) * rest.var(ddof=1)) / (n1 + n2 - 2)
    return abs(chosen.mean() - rest.mean()) / math.sqrt(pooled)


@pytest.mark.parametrize("chosen", [[0], [1, 2], ["0", 2]])
def test_contrast_is_cohens_d(chosen: list[Any]) -> None:
    x = np.random.default_rng(0).normal(size=(60, 5)) * [1, 2, 3, 0.5, 1] + [0, 1, -1, 5, 0]
    labels = np.arange(60) % 4
    x[labels == 0] += [1, 0, 0, 0.5, -2]
    statistics, hidden = observed(x, labels.tolist())
    mine = np.isin(labels, [int(label) for label in chosen])
    single = x.astype(np.float32).astype(np.float64)
    scores = Semantic(statistics, chosen, contrast="rest")(hidden)
    assert scores is not None
    np.testing.assert_allclose(scores, [cohens_d(single[mine, u], single[~mine, u]) for u in range(5)], rtol=1e-4)
    frequent = Semantic(statistics, chosen, "frequency", "rest")(hidden)
    assert frequent is not None
    active = (x > 0).astype(np.float64)
    varies = active.std(0) > 0
    expected = [cohens_d(active[mine, u], active[~mine, u]) for u in range(5) if varies[u]]
    np.testing.assert_allclose(frequent[torch.tensor(varies)], expected, rtol=1e-6)
    assert not frequent[torch.tensor(~varies)].any()


def test_contrast_of_constant_units_is_finite() -> None:
    """0 where nothing differs; far above all others where sides are constant and differ."""
    x = [[1.0, 1.0, 0.0, 0.3], [1.0, 1.0, 0.0, 0.7], [1.0, 2.0, 0.0, 0.5], [1.0, 2.0, 0.0, 0.6]]
    statistics, hidden = observed(x, [0, 0, 1, 1])
    scores = Semantic(statistics, [0], contrast="rest")(hidden)
    assert scores is not None
    assert bool(torch.isfinite(scores).all())
    assert scores[0] == scores[2] == 0
    assert scores[1] > 1e3 * scores[3] > 0


def test_contrast_does_not_mistake_rounding_for_a_difference() -> None:
    """A unit that is a constant 1000.1 everywhere, over maps: single-precision sums differ in their last digits."""
    model = nn.Sequential(nn.Conv2d(2, 1, 1), nn.Flatten())
    x = torch.full((9, 2, 13, 11), 1000.1)
    x[:, 1] = torch.randn(9, 13, 11)
    hidden = UnitGroup("hidden", 2, (), (Port("0", torch.arange(2), torch.arange(2)),))
    statistics = calibrate(
        model,
        [(x[:4], torch.zeros(4, dtype=torch.int64)), (x[4:], torch.ones(5, dtype=torch.int64))],
        (hidden,),
        labels=2,
    )
    scores = Semantic(statistics, [0], contrast="rest")(hidden)
    assert scores is not None
    assert float(scores[0]) < 0.1


def test_contrast_uses_signs() -> None:
    """A unit that is +1 on one label and -1 on the others has the same magnitude everywhere."""
    statistics, hidden = observed([[1.0, 0.5], [1.2, 0.6], [-1.0, 0.5], [-1.2, 0.6]], [0, 0, 1, 1])
    scores = Semantic(statistics, [0], contrast="rest")(hidden)
    assert scores is not None
    assert scores[0] > 5
    assert scores[1] == 0


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([7], r"label 7 does not exist; expected an index in 0\.\.2 or one of a, b, c"),
        ([-1], "label -1 does not exist"),
        (["d"], "label 'd' does not exist"),
        ([True], "label True does not exist"),
        ([1.0], "label 1.0 does not exist"),
        ([torch.tensor(0.5)], "label tensor.* does not exist"),
        ([None], "label None does not exist"),
        ([], "labels is empty"),
        ("ab", "labels is 'ab'; it must be a list"),
        ("a", "labels is 'a'; it must be a list"),
        (1, "labels is 1; it must be a list"),
        ([0, 2], "label 'c' was never seen during calibration"),
        (None, "label 'c' was never seen during calibration"),
    ],
)
def test_bad_labels(labels: Any, message: str) -> None:
    statistics, _ = observed(ACTIVATIONS, LABELS, labels=["a", "b", "c"])
    with pytest.raises(LabelError, match=message):
        Semantic(statistics, labels)


def test_bad_options() -> None:
    statistics, _ = observed(ACTIVATIONS, LABELS)
    with pytest.raises(CriterionError, match="measure is 'median'; it must be one of mean, frequency"):
        Semantic(statistics, [0], "median")  # type: ignore[arg-type]
    with pytest.raises(CriterionError, match="contrast is 'all'; it must be None or 'rest'"):
        Semantic(statistics, [0], contrast="all")  # type: ignore[arg-type]
    with pytest.raises(LabelError, match="contrast='rest' needs inputs of other labels"):
        Semantic(statistics, [0, 1], contrast="rest")
    unlabelled = calibrate(Consumers(4), [torch.randn(3, 4)], (group(4, "one"),))
    with pytest.raises(LabelError, match="carry no labels; calibrate with a loader of"):
        Semantic(unlabelled, [0])


def test_other_labels_that_were_never_seen_do_not_matter() -> None:
    statistics, hidden = observed(ACTIVATIONS, LABELS, labels=["a", "b", "c"])
    scores = Semantic(statistics, ["a"], contrast="rest")(hidden)
    assert scores is not None
    assert bool(torch.isfinite(scores).all())


def test_names_win_over_indices_only_as_text() -> None:
    names = ("2", "0", "1")
    assert [resolve_label(label, names) for label in ("0", 0, "2", 2)] == [1, 0, 0, 2]


def test_a_group_that_was_not_observed_has_no_scores() -> None:
    statistics, _ = observed(ACTIVATIONS, LABELS)
    every = torch.arange(4)
    assert Semantic(statistics)(UnitGroup("stranger", 4, (), (Port("one", every, every),))) is None


@pytest.mark.parametrize(
    "changed",
    [
        UnitGroup("hidden", 3, (), (Port("one", torch.arange(3), torch.arange(3)),)),
        UnitGroup("hidden", 4, (), (Port("one", torch.arange(4), torch.tensor([0, 1, 3, 2])),)),
        UnitGroup("hidden", 4, (), (Port("one", torch.arange(4) + 1, torch.arange(4)),)),
        UnitGroup("hidden", 4, (), (Port("two", torch.arange(4), torch.arange(4)),)),
        UnitGroup("hidden", 4, (Port("one", torch.arange(4), torch.arange(4)),), ()),
    ],
)
def test_stale_statistics_raise(changed: UnitGroup) -> None:
    """The model was pruned or changed since, and its groups traced again."""
    statistics, _ = observed(ACTIVATIONS, LABELS)
    with pytest.raises(StaleStatisticsError, match="group 'hidden' has .* calibrate again"):
        Semantic(statistics)(changed)


def test_pure_functions_by_hand() -> None:
    assert relative_activity(torch.tensor([[1.0, 4.0, 0.0]])).tolist() == [[0.25, 1.0, 0.0]]
    tiny = relative_activity(torch.tensor([[1e-300, 2e-300]], dtype=torch.float64))
    assert tiny.tolist() == [[0.5, 1.0]]
    # Two samples of mean 2 and variance 2 against three of mean 6 and variance 1: d = 4 / sqrt((2 + 2) / 3).
    one, rest = torch.tensor([1.0, 3.0]), torch.tensor([5.0, 6.0, 7.0])
    found = contrast_to_rest(
        torch.stack([one.sum(), rest.sum()])[:, None],
        torch.stack([one.square().sum(), rest.square().sum()])[:, None],
        torch.tensor([[2.0], [3.0]]),
        torch.tensor([True, False]),
    )
    assert float(found) == pytest.approx(4 / math.sqrt(4 / 3))


def test_labels_that_look_like_numbers_are_names_first() -> None:
    names = ("5", "3", "7", "0")
    assert resolve_label("3", names) == 1
    assert resolve_label("2", names) == 2, "no such name, so an index"
    assert resolve_label(3, names) == 3
