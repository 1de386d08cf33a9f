"""Bootstrap intervals against theory and against resampling one by one; the rule of three as published."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from nns_plugin.evaluation import intervals
from nns_plugin.evaluation.evaluation import drops, evaluate
from nns_plugin.evaluation.intervals import bootstrap, interval, resample_counts, rule_of_three

NAMES = ("ant", "bee", "cat")


def test_every_resample_draws_as_many_inputs_as_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(intervals, "_CHUNK", 70)
    parts = list(resample_counts(20, 8, seed=1))
    assert [part.shape for part in parts] == [(3, 20), (3, 20), (2, 20)]
    counts = np.concatenate(parts)
    assert (counts.sum(1) == 20).all()
    assert len({tuple(row) for row in counts}) == 8
    again = np.concatenate(list(resample_counts(20, 8, seed=1)))
    assert np.array_equal(counts, again)


def test_resamples_vary_as_theory_says() -> None:
    """The share of a bootstrap has the standard deviation sqrt(p (1 - p) / N)."""
    right = np.arange(400) < 100
    shares = bootstrap(lambda weights: {"share": weights @ right / weights.sum(1)}, 400, 4000)["share"]
    assert shares.mean() == pytest.approx(0.25, abs=0.002)
    assert shares.std() == pytest.approx((0.25 * 0.75 / 400) ** 0.5, rel=0.05)
    low, high = interval(shares) or (0.0, 0.0)
    assert low == pytest.approx(0.25 - 1.96 * 0.02165, abs=0.004)
    assert high == pytest.approx(0.25 + 1.96 * 0.02165, abs=0.004)


def test_undefined_resamples_are_left_out() -> None:
    assert interval(np.array([np.nan, np.nan, 1.0])) is None
    assert interval(np.array([np.nan, 1.0, 1.0])) == (1.0, 1.0)


def setting() -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    truth = torch.randint(3, (150,))
    return truth, torch.randn(150, 3) + 1.5 * torch.nn.functional.one_hot(truth, 3)


def test_intervals_are_those_of_evaluations_of_resampled_inputs() -> None:
    truth, logits = setting()
    found = evaluate(logits, truth, (0, 1, 2), [0, 2], NAMES, resamples=300, seed=4)
    plain = evaluate(logits, truth, (0, 1, 2), [0, 2], NAMES)
    assert plain.intervals == {}
    assert plain.labels[0].intervals == {}
    values: dict[str, list[float]] = {}
    for weights in np.concatenate(list(resample_counts(150, 300, 4))):
        rows = np.repeat(np.arange(150), weights.astype(int))
        again = evaluate(logits[rows], truth[rows], (0, 1, 2), [0, 2], NAMES)
        for name in ("closed_set_accuracy", "open_set_accuracy", "mean_balanced_accuracy"):
            values.setdefault(name, []).append(getattr(again, name))
        for name in ("recall", "f1", "auroc", "precision", "false_positive_rate", "balanced_accuracy"):
            values.setdefault(f"cat.{name}", []).append(getattr(again.labels[1], name))
    for name, each in values.items():
        limits = found.labels[1].intervals[name[4:]] if name.startswith("cat.") else found.intervals[name]
        assert limits == pytest.approx(tuple(np.percentile(each, [2.5, 97.5])), abs=1e-12), name


def test_a_closed_head_has_no_interval_of_what_it_has_not() -> None:
    truth = torch.tensor([0, 0, 2, 1, 1, 2])
    found = evaluate(torch.randn(6, 2), truth, (0, 2), [0, 2], NAMES, resamples=50)
    assert "open_set_accuracy" not in found.intervals
    assert "closed_set_accuracy" in found.intervals


def test_a_drop_is_resampled_for_both_models_together() -> None:
    """A model against itself loses exactly nothing, in every resample."""
    truth, logits = setting()
    same = drops((logits, (0, 1, 2)), (logits, (0, 1, 2)), truth, [0, 1], NAMES, 200)
    assert same.accuracy.tolist() == [0.0] * 200
    assert {name: lost.tolist() for name, lost in same.balanced_accuracies.items()} == dict.fromkeys(
        NAMES[:2], [0.0] * 200
    )
    worse = logits.clone()
    worse[:40] = worse[:40].roll(1, 1)
    lost = drops((logits, (0, 1, 2)), (worse, (0, 1, 2)), truth, [0, 1], NAMES, 200).mean_balanced_accuracy
    low, high = interval(lost) or (0.0, 0.0)
    assert (low, high) == pytest.approx(tuple(np.percentile(lost, [2.5, 97.5])))
    assert 0 < low < high < 0.4


def test_drops_are_differences_of_evaluations_of_resampled_inputs() -> None:
    truth, logits = setting()
    other = logits.roll(1, 1)
    lost = drops((logits, (0, 1, 2)), (other, (0, 1, 2)), truth, [2, 0], NAMES, 30, seed=3)
    for place, weights in enumerate(np.concatenate(list(resample_counts(150, 30, 3)))):
        rows = np.repeat(np.arange(150), weights.astype(int))
        before, after = (evaluate(each[rows], truth[rows], (0, 1, 2), [2, 0], NAMES) for each in (logits, other))
        assert lost.accuracy[place] == pytest.approx(before.accuracy - after.accuracy)
        mean = (before.mean_balanced_accuracy or 0) - (after.mean_balanced_accuracy or 0)
        assert lost.mean_balanced_accuracy[place] == pytest.approx(mean)
        for left, right in zip(before.labels, after.labels, strict=True):
            drop = (left.balanced_accuracy or 0) - (right.balanced_accuracy or 0)
            assert lost.balanced_accuracies[left.label][place] == pytest.approx(drop)


@pytest.mark.parametrize(("inputs", "published"), [(10, 0.26), (20, 0.14), (30, 0.10), (50, 0.06), (100, 0.03)])
def test_the_rule_of_three_is_as_published(inputs: int, published: float) -> None:
    """Hanley and Lippman-Hand (1983): the exact 95 % bound after 0 events in n, and 3 / n as its approximation."""
    exact = 1 - 0.05 ** (1 / inputs)
    assert exact == pytest.approx(published, abs=0.006)
    bound = rule_of_three(inputs, 0.95)
    assert bound == pytest.approx(3 / inputs, rel=0.002)
    assert exact < bound < exact * (1 + 2 / inputs)


@pytest.mark.parametrize("confidence", [0.5, 0.9, 0.95, 0.99])
def test_the_rule_of_three_holds_at_any_confidence(confidence: float) -> None:
    """With that error rate, none of many inputs is wrong just as often as the confidence leaves open."""
    rate = rule_of_three(10_000, confidence)
    assert (1 - rate) ** 10_000 == pytest.approx(1 - confidence, rel=2e-3)
