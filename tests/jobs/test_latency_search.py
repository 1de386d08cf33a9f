"""The search for a latency: a stopwatch that counts instead of measuring, and real jobs."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

pytest.importorskip("typer", reason="the extra cli is not installed")
for module in ("onnx", "onnxruntime", "onnxscript"):
    pytest.importorskip(module)

from nns_plugin import Subnet  # noqa: E402
from nns_plugin.adapters.onnxruntime import LatencyComparison, latency_report, median_ratio  # noqa: E402
from nns_plugin.cli import main  # noqa: E402
from nns_plugin.errors import LabelError, SelectionError  # noqa: E402
from nns_plugin.jobs.latency_search import MOST, Candidates, Target, fast_enough  # noqa: E402
from nns_plugin.subnets.extraction import Choice  # noqa: E402
from nns_plugin.subnets.provenance import Trial  # noqa: E402

pytestmark = pytest.mark.host("onnxruntime")

UNITS = 100


def measured(candidate_ms: float, baseline_ms: float = 10.0) -> LatencyComparison:
    """What exact clocks would find."""
    times = np.full(20, baseline_ms), np.full(20, candidate_ms)
    ratio, low, high = median_ratio(*times)
    reports = latency_report("dense", times[0]), latency_report("subnet", times[1])
    return LatencyComparison(*reports, ratio, low, high, "CPU", 1, False, False, 1, 20, 1, 0, True, 0)


class Search:
    """A search over one group of 100 units whose latency and accuracy are functions of the units that are left."""

    def __init__(
        self, latency_ms: Callable[[int], float], drop: Callable[[int], float], slower_when_finished: float = 0.0
    ) -> None:
        self.latency_ms, self.drop, self.slower = latency_ms, drop, slower_when_finished
        self.finished: list[int] = []

    def keep(self, share: float, multiple: int) -> Choice:
        left = UNITS - math.floor(share * UNITS)
        return Choice({"group": torch.arange(min(UNITS, max(multiple, math.ceil(left / multiple) * multiple)))})

    def sketch(self, choice: Choice) -> nn.Module:
        return nn.Linear(len(choice.kept["group"]), 1, bias=False)

    def finish(self, choice: Choice) -> Any:
        model = self.sketch(choice)
        self.finished.append(len(choice.kept["group"]))
        model.finished = True  # type: ignore[assignment]
        return type("Finished", (), {"model": model, "kept": choice.kept})()

    def stopwatch(self, model: nn.Module) -> LatencyComparison:
        units = sum(parameter.numel() for parameter in model.parameters())
        return measured(self.latency_ms(units) + self.slower * hasattr(model, "finished"))

    def judge(self, extraction: Any) -> tuple[float, float]:
        drop = self.drop(len(extraction.kept["group"]))
        return 1 - drop, drop

    def run(self, target: Target, roundings: tuple[int, ...] = (1,), max_drop: float | None = None) -> Any:
        candidates = Candidates(self.keep, self.sketch, self.finish)
        return fast_enough(self.stopwatch, candidates, self.judge, target, roundings, max_drop)


def fewer(units: int) -> float:
    """A drop that grows as units go."""
    return (UNITS - units) / 1000


def test_no_more_goes_than_the_target_asks_for() -> None:
    search = Search(lambda units: units / 10, fewer)
    extraction, trials = search.run(Target(latency_ms=4.0))
    assert 39 <= len(extraction.kept["group"]) <= 40  # 40 units take 4 ms; a bisection ends within 0.99 / 64 of that
    assert trials[-1] == replace(
        trials[-1],
        round_to=1,
        within=True,
        is_fast_enough=True,
        drop_bound=0.06 + 0.001 * (40 - len(extraction.kept["group"])),
    )
    extraction, _ = search.run(Target(speedup=2.0))
    assert 49 <= len(extraction.kept["group"]) <= 50
    extraction, trials = search.run(Target(speedup=1.0))
    assert len(extraction.kept["group"]) == UNITS
    assert [trial.ratio for trial in trials] == [0, 0]


def test_every_point_is_told_with_what_was_measured() -> None:
    _, trials = Search(lambda units: units / 10, fewer).run(Target(latency_ms=4.0))
    assert [trial.ratio for trial in trials[:3]] == [0, MOST, MOST / 2]
    for trial in trials:
        assert trial.latency_ms == pytest.approx(trial.parameters / 10)
        assert trial.speedup == pytest.approx(10 / trial.latency_ms)
        assert trial.is_fast_enough == (trial.latency_ms <= 4)
    assert [trial.drop_bound is None for trial in trials] == [True] * (len(trials) - 1) + [False]


def test_of_several_roundings_that_wins_which_loses_least() -> None:
    """Kernels that work on blocks of 16: 50 units take as long as 64, which lose less."""
    search = Search(lambda units: math.ceil(units / 16) * 1.6, fewer)
    extraction, trials = search.run(Target(latency_ms=6.5), roundings=(1, 16))
    assert len(extraction.kept["group"]) == 64
    finished = [trial for trial in trials if trial.drop_bound is not None]
    assert [trial.round_to for trial in finished] == [1, 16]
    assert finished[0].drop_bound is not None
    assert finished[1].drop_bound == pytest.approx(0.036)


def test_a_finished_extraction_that_is_slower_than_its_sketch_goes_further() -> None:
    search = Search(lambda units: units / 10, fewer, slower_when_finished=0.3)
    extraction, trials = search.run(Target(latency_ms=4.0))
    assert trials[-1].is_fast_enough
    assert len(extraction.kept["group"]) <= 37
    assert len(search.finished) == len(set(search.finished)) > 1


def test_nothing_is_measured_again_until_it_happens_to_pass() -> None:
    search = Search(lambda units: units / 10, fewer, slower_when_finished=100)
    with pytest.raises(SelectionError, match="cannot be met: the fastest of"):
        search.run(Target(latency_ms=4.0), roundings=(1, 50))
    assert len(search.finished) == len(set(search.finished))


def test_a_target_beyond_reach_names_the_fastest() -> None:
    message = r"a median of at most 0\.01 ms and a speed-up of at least 3 cannot be met.* 0\.1000 ms .*ratio 0\.99"
    with pytest.raises(SelectionError, match=message):
        Search(lambda units: units / 10, fewer).run(Target(0.01, 3.0))


def test_the_budget_decides_and_the_nearest_is_named() -> None:
    search = Search(lambda units: units / 10, fewer)
    assert len(search.run(Target(4.0), max_drop=0.07)[0].kept["group"]) >= 39
    with pytest.raises(SelectionError, match=r"at most 4 ms costs at most 6\.\d points .*, more than 5: "):
        search.run(Target(4.0), max_drop=0.05)


def test_without_a_balanced_accuracy_the_largest_is_taken_unless_there_is_a_budget(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(extraction: Any) -> tuple[float, float]:
        raise LabelError("one label with a closed head")

    search = Search(lambda units: math.ceil(units / 16) * 1.6, fewer)
    monkeypatch.setattr(search, "judge", refuse)
    assert len(search.run(Target(6.5), roundings=(1, 16))[0].kept["group"]) == 64
    with pytest.raises(LabelError):
        search.run(Target(6.5), max_drop=0.5)


def test_targets_are_judged_at_the_worse_end_of_the_interval() -> None:
    found = measured(5.0)
    noisy = replace(found, ratio_low=1.9, candidate=replace(found.candidate, p50_interval_ms=(4.9, 5.2)))
    assert Target(5.0, 2.0).is_met(found)
    assert not Target(speedup=2.0).is_met(noisy)
    assert not Target(latency_ms=5.0).is_met(noisy)
    assert Target(5.2, 1.9).is_met(noisy)


# Real jobs ------------------------------------------------------------------------------------------------------

QUICK = ("--set", "measure.samples=20", "--set", "measure.resamples=0", "--set", "train.epochs=2", "--quiet")


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as caught:
        main(list(arguments))
    return int(caught.value.code or 0)


def test_a_job_reaches_its_target_and_tells_how(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    output = tmp_path / "out"
    settings = ("--set", "roundings=[8]", "--target-latency-ms", "60000", "--max-drop", "0.5")
    assert run("run", *settings, *QUICK, "--output", str(output)) == 0
    report = json.loads((output / "report.json").read_text(encoding="utf-8"))
    assert [trial["ratio"] for trial in report["trials"]] == [0, 0]
    assert report["latency"]["candidate"]["p50_ms"] < 60_000
    assert report["kept_units"] == {name: list(range(size)) for name, size in report["units"].items()}
    provenance = Subnet.load(output / "subnet.safetensors").provenance
    assert [trial.round_to for trial in provenance.trials] == [8, 8]
    assert provenance.trials == tuple(Trial(**trial) for trial in report["trials"])
    assert provenance.selection == {
        "max_balanced_accuracy_drop": 0.5, "target_latency_ms": 60_000.0, "confidence": 0.95, "roundings": [8]
    }  # fmt: skip
    printed = capsys.readouterr().out
    assert "search for the most accurate subnet that is fast enough" in printed
    assert re.search(r"0\.0 +│ +8 +│", printed)


def test_a_job_that_cannot_reach_its_target_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = ("--set", "roundings=[16]", "--target-speedup", "100000")
    assert run("run", *settings, *QUICK, "--output", str(tmp_path / "out")) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("nns: a speed-up of at least 100000 cannot be met: the fastest of 2 extractions")
    assert captured.err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_subnet_that_misses_its_target_in_the_end_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from nns_plugin.jobs import latency_search

    monkeypatch.setattr(latency_search.Stopwatch, "__call__", lambda self, model: measured(1.0))
    settings = ("--set", "roundings=[8]", "--target-speedup", "9")
    assert run("run", *settings, *QUICK, "--output", str(tmp_path / "out")) == 5
    assert "misses its target" in capsys.readouterr().out
