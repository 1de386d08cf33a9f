"""Heads: the output "other" against an independent optimiser of the whole multinomial likelihood."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nns_plugin.errors import CalibrationError, PruningError
from nns_plugin.subnets.head import (
    balancing_shift,
    close_head,
    cross_calibrated,
    fit_other,
    linear_head,
    open_head,
    resize_head,
)


def problem(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(seed)
    labels = torch.randint(5, (400,))
    features = torch.randn(5, 6)[labels] + 1.5 * torch.randn(400, 6)
    rows = torch.randn(2, 6)
    return features, features @ rows.T, labels, labels >= 2


def multinomial_loss(parameters, features, kept_logits, labels, is_other, ridge) -> float:
    """The textbook loss over all outputs, written for NumPy; the rows of the kept labels are constants."""
    x = features.double().numpy()
    standard = (x - x.mean(0)) / x.std(0)
    other = standard @ parameters[:-1] + parameters[-1]
    logits = np.concatenate([kept_logits.double().numpy(), other[:, None]], 1)
    log_probability = (
        logits
        - np.log(np.exp(logits - logits.max(1, keepdims=True)).sum(1, keepdims=True))
        - logits.max(1, keepdims=True)
    )
    target = np.where(is_other.numpy(), 2, labels.numpy())
    outside = is_other.numpy()
    weight = np.where(outside, 0.5 / outside.sum(), 0.5 / (~outside).sum())
    loss = -(weight * log_probability[np.arange(len(target)), target]).sum()
    return float(loss + ridge / len(target) * (parameters[:-1] ** 2).sum() / 2)


def test_other_minimises_the_multinomial_loss() -> None:
    optimize = pytest.importorskip("scipy.optimize", reason="SciPy comes with scikit-learn")
    features, kept_logits, labels, is_other = problem()
    weight, bias = fit_other(features, kept_logits, is_other, ridge=2.0)
    expected = optimize.minimize(
        multinomial_loss, np.zeros(7), (features, kept_logits, labels, is_other, 2.0), method="BFGS", tol=1e-9
    ).x
    x = features.double().numpy()
    np.testing.assert_allclose(weight.numpy(), expected[:-1] / x.std(0), atol=1e-4)
    assert bias == pytest.approx(expected[-1] - (expected[:-1] / x.std(0)) @ x.mean(0), abs=1e-4)


def test_constant_features_get_no_weight() -> None:
    features, kept_logits, _, is_other = problem()
    features = torch.cat([features, torch.full((400, 1), 7.0)], 1)
    weight, _ = fit_other(features, kept_logits, is_other)
    assert abs(float(weight[-1])) < 1e-8


@pytest.mark.parametrize("value", [True, False])
def test_both_sides_are_needed(value: bool) -> None:
    features, kept_logits, _, _ = problem()
    with pytest.raises(CalibrationError, match="needs calibration inputs of kept and of other labels"):
        fit_other(features, kept_logits, torch.full((400,), value))


@pytest.mark.parametrize("bias", [True, False])
def test_an_opened_head_keeps_its_rows_and_gains_one(bias: bool) -> None:
    head = torch.nn.Linear(4, 5, bias=bias)
    x, before = torch.randn(3, 4), None
    with torch.no_grad():
        before = head(x)
        close_head(head, [1, 3])
        torch.testing.assert_close(head(x), before[:, [1, 3]])
        row = torch.randn(4, dtype=torch.float64)
        open_head(head, row, 0.25)
        after = head(x)
    torch.testing.assert_close(after[:, :2], before[:, [1, 3]])
    torch.testing.assert_close(after[:, 2], x @ row.float() + 0.25)
    assert head.out_features == 3


def test_a_frozen_head_stays_frozen() -> None:
    head = torch.nn.Linear(4, 5).requires_grad_(False)
    close_head(head, [0])
    assert not head.weight.requires_grad
    assert not head.bias.requires_grad


def test_a_head_that_is_not_linear_cannot_be_shrunk() -> None:
    with pytest.raises(PruningError, match=r"'0' is a Conv2d; only nn.Linear"):
        linear_head(torch.nn.Sequential(torch.nn.Conv2d(1, 2, 1)), "0")


@given(seed=st.integers(0, 10_000))
def test_the_shift_of_other_gives_the_best_mean_balanced_accuracy(seed: int) -> None:
    """Against every threshold, one by one."""
    generator = torch.Generator().manual_seed(seed)
    count = int(torch.randint(6, 30, (1,), generator=generator))
    labels = torch.cat([torch.arange(3), torch.randint(3, (count,), generator=generator)])
    logits = (4 * torch.randn(len(labels), 3, generator=generator)).round() / 4  # with ties
    logits[torch.arange(len(labels)), torch.tensor([0, 2, 1])[labels]] += 0.5
    outputs = (0, 2, None)

    def balanced(shift: float) -> float:
        moved = logits.double() + torch.tensor([0.0, 0.0, shift], dtype=torch.float64)
        answers = torch.tensor([0, 2, 1])[moved.argmax(1)]
        return sum(
            float((answers[labels == label] == label).double().mean())
            + float((answers[labels != label] != label).double().mean())
            for label in (0, 2)
        )

    margin = (logits[:, :2].amax(1) - logits[:, 2]).double()
    points = margin.sort().values
    middles = torch.cat([points[:1] - 1, (points[1:] + points[:-1]) / 2, points[-1:] + 1])
    best = max(balanced(float(shift)) for shift in middles)
    shift = balancing_shift(logits, outputs, labels)
    assert balanced(shift) == pytest.approx(best, abs=1e-9)


def test_a_shift_needs_inputs_of_each_label_and_of_others() -> None:
    with pytest.raises(CalibrationError, match=r"kept labels have \[2, 0\] of the 3 validation inputs"):
        balancing_shift(torch.zeros(3, 3), (0, 2, None), torch.tensor([0, 0, 1]))


def test_a_resized_head_is_empty_and_keeps_what_may_be_trained() -> None:
    head = torch.nn.Linear(4, 3, bias=False)
    head.weight.requires_grad_(False)
    resize_head(head, 5, bias=True)
    assert head.weight.shape == (5, 4)
    assert head.bias.shape == (5,)
    assert not bool(head.weight.any())
    assert not head.weight.requires_grad
    assert head.out_features == 5
    resize_head(head, 2, bias=False)
    assert head.bias is None


def test_halves_have_half_of_each_label_even_of_sorted_data() -> None:
    labels = torch.tensor([0] * 100 + [1] * 100 + [2] * 3)
    logits = torch.randn(203, 3, generator=torch.Generator().manual_seed(0))
    shifted = cross_calibrated(logits, (0, 2, None), labels)  # label 2: two in one half, one in the other
    shifts = (shifted - logits)[:, 2]
    assert [int((shifts[labels == label] - shifts.min() < 1e-5).sum()) for label in (0, 1)] == [50, 50]
    assert int((shifts[labels == 2] - shifts.min() < 1e-5).sum()) in (1, 2)
    with pytest.raises(CalibrationError, match="label number 2 has 1 validation input; .* at least 2"):
        cross_calibrated(logits[:201], (0, 2, None), labels[:201])


def test_a_cross_calibrated_half_knows_nothing_of_itself() -> None:
    """Each half gets the shift that is best on the other, whatever the labels of its own inputs are."""
    torch.manual_seed(0)
    labels = torch.arange(300) % 3
    logits = torch.randn(300, 3) + 2 * torch.nn.functional.one_hot(labels, 3)
    outputs = (0, 1, None)
    shifted = cross_calibrated(logits, outputs, labels)
    assert torch.equal(shifted[:, :2], logits[:, :2])
    shifts = (shifted - logits)[:, 2]
    values = shifts.unique()
    groups = [(shifts - value).abs() < 1e-5 for value in (values.min(), values.max())]
    assert [int(group.sum()) for group in groups] == [150, 150]
    for mine, other in (groups, groups[::-1]):
        expected = balancing_shift(logits[other], outputs, labels[other])
        assert torch.allclose(shifts[mine], torch.tensor(expected).float(), atol=1e-5)
