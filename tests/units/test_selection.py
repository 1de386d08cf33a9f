"""Selection: which units stay, against a brute force over sorted pairs."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from nns_plugin.errors import SelectionError
from nns_plugin.selection import keep_by_ratio, keep_by_threshold

SCORES = {"a": torch.tensor([0.1, 0.9, 0.5, 0.3]), "b": torch.tensor([0.2, 0.8])}


def plain(kept: dict[str, torch.Tensor]) -> dict[str, list[int]]:
    for units in kept.values():
        assert units.dtype == torch.int64
    return {name: units.tolist() for name, units in kept.items()}


@pytest.mark.parametrize(
    ("ratio", "expected"),
    [
        (0.0, {"a": [0, 1, 2, 3], "b": [0, 1]}),
        (0.25, {"a": [1, 2, 3], "b": [0, 1]}),
        (0.5, {"a": [1, 2], "b": [1]}),
        (0.74, {"a": [1, 2], "b": [1]}),
        (0.75, {"a": [1], "b": [1]}),
        (0.999, {"a": [1], "b": [1]}),
    ],
)
def test_the_share_of_each_group_goes(ratio: float, expected: dict[str, list[int]]) -> None:
    assert plain(keep_by_ratio(SCORES, ratio)) == expected


@pytest.mark.parametrize(
    ("ratio", "expected"),
    [
        (0.0, {"a": [0, 1, 2, 3], "b": [0, 1]}),
        (0.34, {"a": [1, 2, 3], "b": [1]}),
        (0.5, {"a": [1, 2], "b": [1]}),
        (0.84, {"a": [1], "b": [1]}),  # nothing of b would be left: its best unit stays
    ],
)
def test_the_share_of_all_groups_together_goes(ratio: float, expected: dict[str, list[int]]) -> None:
    assert plain(keep_by_ratio(SCORES, ratio, global_pruning=True)) == expected


@given(st.integers(1, 400), st.integers(0, 999))
@example(50, 580)
def test_the_share_is_exact(size: int, permille: int) -> None:
    """floor(size * ratio) units go, in exact arithmetic: 50 * 0.58 is 29, though floating point makes it less."""
    scores = {"a": torch.arange(size).double()}
    expected = size - math.floor(size * Fraction(permille, 1000))
    assert len(keep_by_ratio(scores, permille / 1000)["a"]) == max(expected, 1)
    assert len(keep_by_ratio(scores, permille / 1000, global_pruning=True)["a"]) == max(expected, 1)


groups = st.dictionaries(
    st.sampled_from("abcd"), st.lists(st.sampled_from([0.0, 0.25, 0.5, 1.0]), min_size=1, max_size=12), min_size=1
)


@given(groups, st.floats(0, 0.99), st.integers(1, 5), st.booleans())
def test_the_lowest_scores_go(scores: dict[str, list[float]], ratio: float, round_to: int, across: bool) -> None:
    """Ties included: of equal scores lower units, and earlier groups, stay."""
    tensors = {name: torch.tensor(value) for name, value in scores.items()}
    ranked = sorted(
        ((-score, order, unit, name) for order, name in enumerate(scores) for unit, score in enumerate(scores[name]))
    )
    if across:
        count = len(ranked) - int(round(len(ranked) * ratio, 9))
        counts = {name: sum(one[3] == name for one in ranked[:count]) for name in scores}
    else:
        counts = {name: len(value) - int(round(len(value) * ratio, 9)) for name, value in scores.items()}
    for name, units in plain(keep_by_ratio(tensors, ratio, round_to=round_to, global_pruning=across)).items():
        size = len(scores[name])
        wanted = min(size, math.ceil(max(counts[name], 1) / round_to) * round_to)
        expected = [unit for _, _, unit, owner in ranked if owner == name][:wanted]
        assert units == sorted(expected)


@pytest.mark.parametrize(
    ("zeta", "round_to", "expected"),
    [
        (0.3, 1, {"a": [1, 2, 3], "b": [1]}),
        (0.30000001, 1, {"a": [1, 2], "b": [1]}),
        (0.0, 1, {"a": [0, 1, 2, 3], "b": [0, 1]}),
        (2.0, 1, {"a": [1], "b": [1]}),
        (-1.0, 1, {"a": [0, 1, 2, 3], "b": [0, 1]}),
        (0.6, 2, {"a": [1, 2], "b": [0, 1]}),
        (0.4, 3, {"a": [1, 2, 3], "b": [0, 1]}),
        (0.3, 8, {"a": [0, 1, 2, 3], "b": [0, 1]}),
    ],
)
def test_units_at_or_above_the_threshold_stay(zeta: float, round_to: int, expected: dict[str, list[int]]) -> None:
    scores = {name: value.double() for name, value in SCORES.items()}
    scores["a"] = torch.tensor([0.1, 0.9, 0.5, 0.3], dtype=torch.float64)
    assert plain(keep_by_threshold(scores, zeta, round_to=round_to)) == expected


@pytest.mark.parametrize("ratio", [1.0, 1.5, -0.1, math.nan, math.inf, -math.inf])
def test_a_ratio_outside_its_range_is_refused(ratio: float) -> None:
    with pytest.raises(SelectionError, match=rf"ratio is {ratio}; it must be in \[0, 1\)"):
        keep_by_ratio(SCORES, ratio)


@pytest.mark.parametrize("zeta", [math.nan, math.inf])
def test_a_threshold_that_is_no_number_is_refused(zeta: float) -> None:
    with pytest.raises(SelectionError, match=f"zeta is {zeta}; it must be a finite number"):
        keep_by_threshold(SCORES, zeta)


@pytest.mark.parametrize("round_to", [0, -8, 2.5])
def test_an_impossible_rounding_is_refused(round_to: int) -> None:
    for select in (
        lambda: keep_by_ratio(SCORES, 0.5, round_to=round_to),
        lambda: keep_by_threshold(SCORES, 0.5, round_to=round_to),
    ):
        with pytest.raises(SelectionError, match=f"round_to is {round_to}; it must be"):
            select()


def test_scores_that_are_not_finite_are_refused() -> None:
    """A NaN sorts above everything: it would be kept in silence."""
    for bad in (math.nan, math.inf, -math.inf):
        scores = {"a": torch.tensor([0.5, bad])}
        for select in (lambda: keep_by_ratio(scores, 0.5), lambda: keep_by_threshold(scores, 0.5)):  # noqa: B023
            with pytest.raises(SelectionError, match="group 'a'"):
                select()


def test_no_groups() -> None:
    assert keep_by_ratio({}, 0.5) == {}
    assert keep_by_ratio({}, 0.5, global_pruning=True) == {}
    assert keep_by_threshold({}, 0.5) == {}
