"""Percentiles of latencies, and the interval of the ratio of two medians."""

from __future__ import annotations

import statistics

import numpy as np
import pytest

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")


from nns_plugin.adapters import onnxruntime as adapter  # noqa: E402

pytestmark = pytest.mark.host("onnxruntime")


@pytest.mark.parametrize(
    ("samples", "p50", "p90", "p99"),
    [(99, 50, None, None), (100, 50.5, 90.1, None), (999, 500, 899.2, None), (1000, 500.5, 900.1, 990.01)],
)
def test_percentiles_need_enough_samples(samples: int, p50: float, p90: float | None, p99: float | None) -> None:
    times = np.random.default_rng(0).permutation(np.arange(1.0, samples + 1))
    report = adapter.latency_report("any", times)
    assert (report.name, report.samples, report.p50_ms) == ("any", samples, p50)
    assert report.p90_ms == (None if p90 is None else pytest.approx(p90))
    assert report.p99_ms == (None if p99 is None else pytest.approx(p99))


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("samples", [2, 21, 200])
def test_the_interval_holds_the_ratio_and_exchange_inverts_both(samples: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    baseline, candidate = 3 * rng.lognormal(0, 0.3, samples), rng.lognormal(0, 0.5, samples)
    ratio, low, high = adapter.median_ratio(baseline, candidate, seed=seed)
    assert ratio == np.median(baseline) / np.median(candidate)
    assert low <= ratio <= high
    assert low < high
    assert adapter.median_ratio(baseline, candidate, seed=seed) == (ratio, low, high)
    assert adapter.median_ratio(candidate, baseline, seed=seed) == pytest.approx((1 / ratio, 1 / high, 1 / low))


def test_the_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    hits = 0
    for seed in range(200):
        baseline, candidate = 2 * rng.lognormal(0, 0.2, 40), rng.lognormal(0, 0.2, 40)
        _, low, high = adapter.median_ratio(baseline, candidate, seed=seed)
        hits += low <= 2 <= high
    assert 180 <= hits <= 199


def test_the_interval_of_several_pairs_of_sessions_covers_the_truth_where_one_of_runs_alone_does_not() -> None:
    rng = np.random.default_rng(0)
    hits, fooled = 0, 0
    for seed in range(200):
        speeds = np.repeat(rng.lognormal(0, 0.01, (10, 2)), 30, axis=0)  # of each pair, for as long as it lives
        baseline, candidate = 2 * speeds[:, 0] * rng.lognormal(0, 0.02, 300), speeds[:, 1] * rng.lognormal(0, 0.02, 300)
        _, low, high = adapter.median_ratio(baseline, candidate, sessions=10, seed=seed)
        hits += low <= 2 <= high
        _, low, high = adapter.median_ratio(baseline, candidate, seed=seed)
        fooled += not low <= 2 <= high
    assert hits >= 192
    assert fooled >= 15


@pytest.mark.parametrize(
    ("pairs", "quantile"), [(2, 12.7062), (3, 4.30265), (4, 3.18245), (5, 2.77645), (10, 2.26216), (30, 2.04523)]
)
def test_few_pairs_of_sessions_expand_the_interval_by_students_t(pairs: int, quantile: float) -> None:
    """The interval is that of a plain bootstrap, its percentiles expanded by the tabulated quantile."""
    rng, each = np.random.default_rng(0), 16
    speeds = np.repeat(rng.lognormal(0, 0.05, (pairs, 2)), each, axis=0)
    baseline, candidate = (speeds * rng.lognormal(0, 0.05, (pairs * each, 2))).T
    drawing = np.random.default_rng(5)
    chosen = drawing.integers(pairs, size=(2000, pairs, 1))
    rows = (chosen * each + drawing.integers(each, size=(2000, pairs, each))).reshape(2000, -1)
    ratios = np.log(np.median(baseline[rows], axis=1) / np.median(candidate[rows], axis=1))
    tail = 100 * statistics.NormalDist().cdf(-quantile * (pairs / (pairs - 1)) ** 0.5)
    low, high = np.percentile(ratios, (tail, 100 - tail))
    found = np.log(adapter.median_ratio(baseline, candidate, sessions=pairs, seed=5)[1:])
    assert found == pytest.approx((low, high), abs=0.01 * (high - low))


def test_what_slows_down_both_runs_of_a_round_does_not_widen_the_interval() -> None:
    machine = np.random.default_rng(0).lognormal(0, 1, 101)
    assert adapter.median_ratio(4 * machine, 2 * machine) == pytest.approx((2, 2, 2))


def test_the_interval_is_that_of_a_plain_bootstrap_also_where_samples_are_drawn_in_parts() -> None:
    rng = np.random.default_rng(0)
    baseline, candidate = 2 * rng.lognormal(0, 0.2, 3000), rng.lognormal(0, 0.2, 3000)
    drawn = np.random.default_rng(5).integers(3000, size=(2000, 3000))
    ratios = np.log(np.median(baseline[drawn], axis=1) / np.median(candidate[drawn], axis=1))
    low, high = np.exp(np.percentile(ratios, (2.5, 97.5)))
    assert adapter.median_ratio(baseline, candidate, seed=5)[1:] == pytest.approx((low, high), rel=1e-12)


def test_an_interval_without_width_still_holds_the_ratio() -> None:
    times = np.array([1.0, 2.0, 7.0])
    for factor in np.linspace(0.3, 9, 30):
        ratio, low, high = adapter.median_ratio(factor * times, times)
        assert low <= ratio <= high
