"""Angles, the rule of 15 and 165 degrees, and merged survivors, against hand-computed cases and brute force."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from nns_plugin.criteria import Distinctiveness
from nns_plugin.errors import CriterionError, SelectionError
from nns_plugin.selection import AngleRule, keep_by_angle
from nns_plugin.statistics.angles import angles, centred


def vectors_at(*degrees: float) -> Tensor:
    """``[U, 2]`` vectors in the plane."""
    radians = torch.deg2rad(torch.tensor(degrees, dtype=torch.float64))
    return torch.stack([radians.cos(), radians.sin()], 1)


def between(*degrees: float) -> Tensor:
    vectors = vectors_at(*degrees)
    return angles(vectors @ vectors.T)


@pytest.mark.parametrize(
    ("degrees", "rule", "kept", "survivor"),
    [
        # 0 and 10 are similar; 10 and 20 too, but 10 is gone already, so 20 stays.
        ((0, 10, 20), AngleRule(), [0, 2], [0, 0, 2]),
        ((0, 170, 90), AngleRule(), [0, 2], [0, 0, 2]),
        ((0, 170, 90), AngleRule(complement="both"), [2], [-1, -1, 2]),
        ((0, 170, 90), AngleRule(complementary=180), [0, 1, 2], [0, 1, 2]),
        ((0, 14.9, 90), AngleRule(), [0, 2], [0, 0, 2]),
        ((0, 15.1, 90), AngleRule(), [0, 1, 2], [0, 1, 2]),
        ((0, 164.9, 90), AngleRule(), [0, 1, 2], [0, 1, 2]),
        ((0, 40, 90), AngleRule(similar=45), [0, 2], [0, 0, 2]),
        # Unit 0 takes unit 1, then goes with unit 2: nobody stands for unit 1 either; unit 3 was no longer reached.
        ((0, 5, 178, 3, 90), AngleRule(complement="both"), [3, 4], [-1, -1, -1, 3, 4]),
        # Two that cancel stay where nothing else would be left.
        ((0, 180), AngleRule(complement="both"), [0, 1], [0, 1]),
        ((0, 5, 180), AngleRule(complement="both"), [0, 2], [0, 0, 2]),
        ((30,), AngleRule(), [0], [0]),
    ],
)
def test_pairs_are_taken_in_order(
    degrees: tuple[float, ...], rule: AngleRule, kept: list[int], survivor: list[int]
) -> None:
    found = keep_by_angle(between(*degrees), rule)
    assert found.kept.tolist() == kept
    assert found.survivor.tolist() == survivor


def pair_by_pair(degrees: np.ndarray, rule: AngleRule) -> list[int]:
    """The rule as its words say it: one pair after the other."""
    size = len(degrees)
    alive = set(range(size))
    for u, v in combinations(range(size), 2):
        if u not in alive or v not in alive:
            continue
        if degrees[u, v] < rule.similar or (degrees[u, v] > rule.complementary and rule.complement == "one"):
            alive.remove(v)
        elif degrees[u, v] > rule.complementary and len(alive) > 2:
            alive -= {u, v}
    return sorted(alive)


@settings(deadline=None, max_examples=200)
@given(
    st.lists(st.floats(0, 360), min_size=1, max_size=12),
    st.sampled_from(["one", "both"]),
    st.floats(1, 60),
    st.floats(120, 179),
)
def test_the_rule_is_that_of_its_words(
    degrees: list[float], complement: str, similar: float, complementary: float
) -> None:
    rule = AngleRule(similar, complementary, complement)
    matrix = between(*degrees)
    found = keep_by_angle(matrix, rule)
    assert found.kept.tolist() == pair_by_pair(matrix.numpy(), rule)
    assert found.kept.numel() >= 1
    assert found.survivor[found.kept].tolist() == found.kept.tolist()
    stands = found.survivor[found.survivor >= 0].unique()
    assert torch.isin(stands, found.kept).all()


@pytest.mark.parametrize(
    "options",
    [
        {"similar": -1.0},
        {"complementary": 181.0},
        {"similar": 170.0},
        {"complement": "none"},
        {"similar": float("nan")},
    ],
)
def test_an_impossible_rule_is_refused(options: dict[str, float]) -> None:
    with pytest.raises(SelectionError, match="similar is|complement is"):
        AngleRule(**options)


@pytest.mark.parametrize("matrix", [torch.zeros(2, 3), torch.zeros(3), torch.full((2, 2), torch.nan)])
def test_what_is_no_matrix_of_angles_is_refused(matrix: Tensor) -> None:
    with pytest.raises(SelectionError, match="square matrix"):
        keep_by_angle(matrix)


def gram_of(values: Tensor) -> Tensor:
    extended = torch.cat([values, torch.ones(values.shape[0], 1, dtype=values.dtype)], 1)
    return extended.T @ extended


@pytest.mark.parametrize(("center", "offset"), [(None, 0.0), (0.5, 0.5), ("mean", None)])
def test_centres_are_taken_off_every_entry(center: object, offset: float | None) -> None:
    values = torch.rand(20, 4, dtype=torch.float64)
    gram = gram_of(values)
    shifted = values - (values.mean(0) if offset is None else offset)
    found = centred(gram[:-1, :-1], gram[:-1, -1], 20.0, center)
    torch.testing.assert_close(found, shifted.T @ shifted)


@pytest.mark.parametrize("center", ["median", True, float("inf"), [0.5]])
def test_what_is_no_centre_is_refused(center: object) -> None:
    from nns_plugin.statistics.angles import check_center

    with pytest.raises(CriterionError, match="center is"):
        check_center(center)
    assert Distinctiveness.__dataclass_fields__["center"].default is None
