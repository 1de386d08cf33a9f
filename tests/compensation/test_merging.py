"""Merging: what one kept channel takes over from another, against hand-computed cases."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from nns_plugin.compensation.least_squares import merging, nearest, take_over


def gram_of(values: Tensor) -> Tensor:
    extended = torch.cat([values, torch.ones(values.shape[0], 1, dtype=values.dtype)], 1)
    return extended.T @ extended


def vectors_at(*degrees: float) -> Tensor:
    """``[U, 2]`` vectors in the plane."""
    radians = torch.deg2rad(torch.tensor(degrees, dtype=torch.float64))
    return torch.stack([radians.cos(), radians.sin()], 1)


@pytest.mark.parametrize("center", [None, 0.5, "mean"])
@pytest.mark.parametrize("factor", [2.0, -0.7])
def test_scaled_merging_is_exact_for_a_parallel_pair(center: object, factor: float) -> None:
    values = torch.rand(30, 3, dtype=torch.float64)
    base = 0.0 if center is None else 0.5 if center == 0.5 else float(values[:, 0].mean())
    values[:, 2] = base + factor * (values[:, 0] - base)
    kept, removed = torch.tensor([0, 1]), torch.tensor([2])
    mix = merging(gram_of(values), kept, removed, torch.tensor([0]), center=center)
    weight = torch.randn(4, 1, 3, dtype=torch.float64)
    taken, shift = take_over(weight, mix, kept, removed)
    torch.testing.assert_close(values @ taken[:, 0].T + shift, values @ weight[:, 0].T)


def test_added_merging_adds_the_weights_of_the_pair() -> None:
    values = torch.tensor([[1.0, 2.0, -1.0], [2.0, 4.1, -2.1]], dtype=torch.float64)
    mix = merging(gram_of(values), torch.tensor([0]), torch.tensor([1, 2]), torch.tensor([0, 0]), merge="add")
    assert mix.tolist() == [[1.0, 0.0], [-1.0, 0.0]]


def test_no_merging_and_nobody_to_merge_with_leave_nothing_behind() -> None:
    gram = gram_of(torch.rand(5, 3, dtype=torch.float64))
    kept, removed = torch.tensor([1]), torch.tensor([0, 2])
    assert merging(gram, kept, removed, torch.tensor([1, 1]), merge="none").abs().sum() == 0
    mix = merging(gram, kept, removed, torch.tensor([-1, 1]), merge="add")
    assert mix.tolist() == [[0.0, 0.0], [1.0, 0.0]]


def test_a_survivor_that_is_always_silent_takes_nothing_over() -> None:
    values = torch.rand(5, 2, dtype=torch.float64)
    values[:, 0] = 0
    mix = merging(gram_of(values), torch.tensor([0]), torch.tensor([1]), torch.tensor([0]))
    assert mix.tolist() == [[0.0, 0.0]]


def test_the_nearest_is_parallel_or_opposite() -> None:
    values = torch.cat([vectors_at(0, 80, 175, 85).T, torch.zeros(1, 4, dtype=torch.float64)])
    found = nearest(gram_of(values), torch.tensor([0, 1]), torch.tensor([2, 3]), None)
    assert found.tolist() == [0, 1]
    assert nearest(gram_of(values), torch.tensor([], dtype=torch.int64), torch.tensor([2]), None).tolist() == [-1]
