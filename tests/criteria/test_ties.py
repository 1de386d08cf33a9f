"""Ties between scores are separated, and no other order changes."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from nns_plugin.criteria.ties import separate_ties

numbers = st.one_of(
    st.sampled_from([0.0, 1.0, -1.0, 0.5, 1e-40, -0.0, 1.0 + 1e-9, 3.0]),
    st.floats(-1e6, 1e6, allow_nan=False, allow_subnormal=True),
)


@given(st.lists(numbers, min_size=1, max_size=40), st.integers(0, 300))
def test_ties_are_separated_and_order_is_kept(values: list[float], ordinal: int) -> None:
    scores = torch.tensor(values, dtype=torch.float64)
    separated = separate_ties(scores, ordinal)
    assert separated.dtype == torch.float64
    assert separated.unique().numel() == len(values), "all different"
    assert bool(torch.isfinite(separated).all())
    small = scores.abs() <= 1e-30
    for first in range(len(values)):
        for second in range(first + 1, len(values)):
            if values[first] == values[second] or (small[first] and small[second]):
                continue
            assert (values[first] < values[second]) == bool(separated[first] < separated[second])
    equal = [unit for unit in range(len(values)) if values[unit] == values[0]]
    assert separated[equal].tolist() == sorted(separated[equal].tolist(), reverse=True), (
        "of equal ones, lower units stay"
    )
    slack = 1e-5 * scores.abs() + 1e-29
    assert bool(((separated - scores).abs() <= slack).all())


@given(
    st.lists(st.sampled_from([0.0, 0.25, 1.0]), min_size=1, max_size=20),
    st.lists(st.integers(0, 500), min_size=2, max_size=6, unique=True),
)
def test_ties_between_groups_are_separated(values: list[float], ordinals: list[int]) -> None:
    joined = torch.cat([separate_ties(torch.tensor(values, dtype=torch.float64), ordinal) for ordinal in ordinals])
    assert joined.unique().numel() == len(values) * len(ordinals)
    for count in (2, 3, 4, 7):  # the host averages equal scores over channel groups
        averaged = torch.stack([joined] * count).mean(0)
        assert averaged.unique().numel() == len(values) * len(ordinals)
