"""Bootstrap intervals: weighted metrics against scikit-learn, and intervals against resampling one by one."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

metrics = pytest.importorskip("sklearn.metrics", reason="the extra cli is not installed")

from nns_plugin.evaluation import intervals  # noqa: E402
from nns_plugin.evaluation.evaluation import drops, evaluate  # noqa: E402
from nns_plugin.evaluation.intervals import bootstrap, interval, label_metrics, resampled  # noqa: E402

NAMES = ("ant", "bee", "cat")


@given(seed=st.integers(0, 10_000))
def test_weighted_metrics_are_those_of_scikit_learn(seed: int) -> None:
    generator = np.random.default_rng(seed)
    inputs = int(generator.integers(4, 40))
    truth, said = (generator.random((2, inputs)) < 0.4).astype(bool)
    score = np.round(generator.random(inputs), 1)  # with ties
    weights = generator.integers(0, 4, (5, inputs)).astype(float)
    found = label_metrics(weights, truth, said, score)
    for row, weight in enumerate(weights):
        there = weight > 0
        if len(set(truth[there])) < 2 or not said[there].any():
            continue
        expected = {
            "recall": metrics.recall_score(truth, said, sample_weight=weight),
            "false_positive_rate": 1 - metrics.recall_score(~truth, ~said, sample_weight=weight),
            "precision": metrics.precision_score(truth, said, sample_weight=weight),
            "f1": metrics.f1_score(truth, said, sample_weight=weight),
            "balanced_accuracy": metrics.balanced_accuracy_score(truth, said, sample_weight=weight),
            "auroc": metrics.roc_auc_score(truth, score, sample_weight=weight),
        }
        for name, value in expected.items():
            assert found[name][row] == pytest.approx(value, abs=1e-12), name


def test_every_resample_draws_as_many_inputs_as_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(intervals, "_CHUNK", 70)
    parts = list(resampled(20, 8, seed=1))
    assert [part.shape for part in parts] == [(3, 20), (3, 20), (2, 20)]
    counts = np.concatenate(parts)
    assert (counts.sum(1) == 20).all()
    assert len({tuple(row) for row in counts}) == 8
    again = np.concatenate(list(resampled(20, 8, seed=1)))
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
    for weights in np.concatenate(list(resampled(150, 300, 4))):
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
    assert same.tolist() == [0.0] * 200
    worse = logits.clone()
    worse[:40] = worse[:40].roll(1, 1)
    lost = drops((logits, (0, 1, 2)), (worse, (0, 1, 2)), truth, [0, 1], NAMES, 200)
    low, high = interval(lost) or (0.0, 0.0)
    assert (low, high) == pytest.approx(tuple(np.percentile(lost, [2.5, 97.5])))
    assert 0 < low < high < 0.4
