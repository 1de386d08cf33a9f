"""Latency of two files, measured in turns."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

from onnx_models import exported_convnet, one_line  # noqa: E402

from nns_plugin.adapters import onnxruntime as adapter  # noqa: E402
from nns_plugin.adapters.onnxruntime import latency  # noqa: E402
from nns_plugin.errors import ExportError  # noqa: E402

pytestmark = pytest.mark.host("onnxruntime")


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, Path]:
    """A network and its file, exported from a single example in train mode."""
    return exported_convnet(tmp_path_factory.mktemp("exported"))


class Clock:
    """A clock that sessions move, in place of the wall."""

    def __init__(self) -> None:
        self.now_ns = 0
        self.runs: list[str] = []

    def perf_counter_ns(self) -> int:
        return self.now_ns

    def session(self, name: str, times_ms: Iterator[float]) -> Any:
        def run(outputs: None, feed: dict[str, Any]) -> list[Any]:
            assert outputs is None
            assert feed["x"].shape == (5, 3)
            self.runs.append(name)
            self.now_ns += round(next(times_ms) * 1e6)
            return []

        inputs = [SimpleNamespace(name="x")]
        return SimpleNamespace(run=run, get_inputs=lambda: inputs, get_providers=lambda: ["CPUExecutionProvider"])


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[adapter.LatencyComparison, list[str]]]:
    """Measures a baseline and a candidate that take given times, in milliseconds."""

    def measure(
        baseline: Iterator[float], candidate: Iterator[float], **options: Any
    ) -> tuple[adapter.LatencyComparison, list[str]]:
        clock = Clock()
        sessions = {"dense.onnx": clock.session("dense", baseline), "small.onnx": clock.session("small", candidate)}
        monkeypatch.setattr(latency, "create_session", lambda path, provider, **options: sessions[str(path)])
        spec = adapter.TensorSpec("x", "float32", ("batch", 3))
        monkeypatch.setattr(
            latency,
            "read_file",
            lambda path: SimpleNamespace(path=path, inputs=[spec], selection=None, fixed_batch=None),
        )
        monkeypatch.setattr(latency, "time", clock)
        paths = {"dense": Path("dense.onnx"), "small": Path("small.onnx")}
        return adapter.measure_latency(paths, torch.ones(5, 3), adapter.LatencyOptions(**options)), clock.runs

    return measure


def test_the_baseline_is_measured_against_the_candidate(measured: Any) -> None:
    found, runs = measured(itertools.repeat(4.0), itertools.repeat(2.0), samples=95, threads=3, seed=7)
    assert found == adapter.LatencyComparison(
        baseline=adapter.LatencyReport("dense", 99, 4, None, None, (4, 4), None, (4.0,) * 99),
        candidate=adapter.LatencyReport("small", 99, 2, None, None, (2, 2), None, (2.0,) * 99),
        ratio=2,
        ratio_low=2,
        ratio_high=2,
        provider="CPUExecutionProvider",
        threads=3,
        spinning=False,
        io_binding=False,
        batch=5,
        samples=99,
        sessions=9,
        warmup_rounds=180,
        warmup_stable=True,
        seed=7,
    )
    assert len(runs) == 2 * 9 * (1 + 20 + 11)
    assert json.loads(json.dumps(asdict(found)))["candidate"]["p50_ms"] == 2


def test_the_order_of_runs_is_random(measured: Any) -> None:
    _, runs = measured(itertools.repeat(4.0), itertools.repeat(2.0), samples=100, sessions=1)
    rounds = [tuple(runs[start : start + 2]) for start in range(0, len(runs), 2)]
    assert set(rounds) == {("dense", "small"), ("small", "dense")}
    assert 30 < sum(first == "dense" for first, _ in rounds[21:]) < 70


def test_pairs_of_sessions_that_differ_widen_the_interval(measured: Any) -> None:
    rng = np.random.default_rng(0)

    def times() -> Iterator[float]:
        while True:
            yield from [rng.lognormal(0, 0.05)] * 21  # each session has a speed of its own: opened, 10 warm, 10 timed

    found, _ = measured(times(), itertools.repeat(1.0), samples=100, warmup=10)
    assert found.sessions == 10
    baseline, candidate = (np.array(report.times_ms) for report in (found.baseline, found.candidate))
    assert (found.ratio, found.ratio_low, found.ratio_high) == adapter.median_ratio(baseline, candidate, sessions=10)
    _, low, high = adapter.median_ratio(baseline, candidate)
    assert np.log(found.ratio_high / found.ratio_low) > 3 * np.log(high / low)


def test_warm_up_is_not_timed_and_lasts_until_the_times_have_settled(measured: Any) -> None:
    falling = [100 * 0.9**run for run in range(30)] + [4.0] * 1000
    found, _ = measured(iter(falling), itertools.repeat(2.0), samples=50, sessions=1)
    assert 40 < found.warmup_rounds < 60
    assert found.warmup_stable
    assert (found.baseline.p50_ms, found.ratio) == (4, 2)


def test_warm_up_is_bounded(measured: Any) -> None:
    growing = (1.1**round for round in range(1000))
    found, runs = measured(itertools.repeat(1.0), growing, samples=10, warmup=35)
    assert found.sessions == 1
    assert found.warmup_rounds == 35
    assert not found.warmup_stable
    assert len(runs) == 2 * (1 + 35 + 10)
    found, _ = measured(itertools.repeat(1.0), itertools.repeat(1.0), samples=10, warmup=0)
    assert found.warmup_rounds == 0
    assert not found.warmup_stable


def test_real_files_are_measured(exported: tuple[nn.Module, Path], capfd: pytest.CaptureFixture[str]) -> None:
    _, path = exported
    images = torch.randn(2, 3, 8, 8)
    found = adapter.measure_latency({"one": path, "two": path}, images, adapter.LatencyOptions(samples=30, warmup=20))
    assert (found.baseline.name, found.candidate.name) == ("one", "two")
    assert found.baseline.p50_ms > 0
    assert found.ratio_low <= found.ratio <= found.ratio_high
    assert found.ratio == found.baseline.p50_ms / found.candidate.p50_ms
    assert found.baseline.p90_ms is None
    assert (found.batch, found.threads, found.samples, found.provider) == (2, 1, 30, "CPUExecutionProvider")
    assert capfd.readouterr() == ("", "")
    adapter.measure_latency(
        {"one": path, "two": path}, images, adapter.LatencyOptions(samples=2, warmup=0), progress=True
    )
    assert "measuring" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("names", "options", "message"),
    [
        (["a"], {}, r"paths holds \['a'\]; expected two files"),
        (["a", "b", "c"], {}, "expected two files"),
        (["a", "b"], {"samples": 1}, "samples is 1"),
        (["a", "b"], {"warmup": -1}, "warmup -1"),
        (["a", "b"], {"threads": 0}, "threads 0"),
        (["a", "b"], {"sessions": 0}, "sessions 0"),
    ],
)
def test_latency_arguments_are_checked(
    names: list[str], options: dict[str, int], message: str, exported: tuple[nn.Module, Path]
) -> None:
    with pytest.raises(ExportError, match=message):
        adapter.measure_latency(
            dict.fromkeys(names, exported[1]), torch.randn(2, 3, 8, 8), adapter.LatencyOptions(**options)
        )


def test_latency_of_files_that_do_not_run(exported: tuple[nn.Module, Path], tmp_path: Path) -> None:
    _, path = exported
    with pytest.raises(
        ExportError, match=r"takes input float32\[batch, 3, 8, 8\], found float32\[2, 3, 9, 9\]"
    ) as failure:
        adapter.measure_latency({"a": path, "b": path}, torch.randn(2, 3, 9, 9))
    one_line(failure)
    with pytest.raises(ExportError, match="there is no file"):
        adapter.measure_latency({"a": path, "b": tmp_path / "missing.onnx"}, torch.randn(2, 3, 8, 8))
