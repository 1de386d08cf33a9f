"""How often two models answer with the same label, by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from nns_plugin.evaluation.agreement import label_agreement, top1_agreement


def test_top1_agreement_by_hand() -> None:
    expected = np.array([[1.0, 2.0], [2.0, 1.0], [0.0, 1.0], [5.0, 4.0]])
    found = np.array([[1.0, 2.0], [2.0, 3.0], [0.0, 1.0], [5.0, 4.0]])
    assert top1_agreement(expected, found) == 0.75
    assert top1_agreement(expected[:, 0], found[:, 0]) is None
    assert top1_agreement(expected[:, :1], found[:, :1]) is None
    assert top1_agreement(expected.astype(int), found.astype(int)) is None


@pytest.mark.parametrize(
    ("columns", "pruned", "expected"),
    [
        ([0, 1, 2], [[3, 1, 2], [1, 2, 3], [1, 3, 2], [9, 0, 0]], 1),
        ([0, 1, 2], [[3, 1, 2], [1, 2, 3], [1, 3, 2], [0, 9, 0]], 0.75),
        ([2, 0, 1], [[2, 3, 1], [3, 1, 2], [2, 1, 3], [0, 9, 0]], 1),
        ([0, None], [[9, 0], [0, 9], [9, 0], [9, 0]], 0.75),  # dense: 0, other, other, 0
        ([None, 1, 2], [[9, 0, 0], [9, 0, 0], [0, 9, 0], [0, 9, 0]], 0.5),
        ([2, 0], [[0, 9], [0, 9], [9, 0], [0, 9]], 2 / 3),  # the third input is answered with 1, and does not count
        ([1], [[0], [0], [0], [0]], None),
    ],
)
def test_agreement_by_hand(columns: list[int | None], pruned: Any, expected: float | None) -> None:
    dense = np.array([[3.0, 1, 2], [1, 2, 3], [1, 3, 2], [5, 0, 0]])
    found = label_agreement(dense, np.array(pruned, float), columns)
    assert found == (expected if expected is None else pytest.approx(expected))
