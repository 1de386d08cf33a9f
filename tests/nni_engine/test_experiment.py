"""Experiments on NNI's engine: silent themselves, without silencing the caller, and stopped however they end."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytestmark = pytest.mark.host("nni")
pytest.importorskip("nni")

from nns_plugin.adapters.nni_engine import experiment as engine  # noqa: E402
from nns_plugin.errors import SweepError  # noqa: E402

OPTIONS = engine.ExperimentOptions("Random", seed=0, trials=2, concurrency=1)


@pytest.fixture
def chatty(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    """Put an engine in NNI's place that talks in every call, and ends one trial a look; its calls are listed."""

    def install(status: str = "RUNNING", failed_starts: int = 0) -> list[str]:
        calls: list[str] = []

        def called(name: str) -> None:
            calls.append(name)
            print(f"NNI prints in {name}")
            logging.getLogger("nni.test").error("NNI logs in %s", name)

        def start(self: Any, port: int) -> None:
            called("start")
            if calls.count("start") <= failed_starts:
                raise RuntimeError("busy")

        def jobs(self: Any) -> list[Any]:
            called("jobs")
            metrics = [SimpleNamespace(data='{"default": 0.5}')]
            parameters = [SimpleNamespace(parameters={"ratio": 0.3})]
            return [
                SimpleNamespace(
                    trialJobId=str(number),
                    sequenceId=number,
                    status="SUCCEEDED",
                    hyperParameters=parameters,
                    finalMetricData=metrics,
                )
                for number in range(calls.count("jobs"))
            ]

        monkeypatch.setattr(engine.Experiment, "start", start)
        monkeypatch.setattr(engine.Experiment, "get_status", lambda self: status)
        monkeypatch.setattr(engine.Experiment, "list_trial_jobs", jobs)
        monkeypatch.setattr(engine.Experiment, "stop", lambda self: called("stop"))
        monkeypatch.setattr(engine, "INTERVAL_SECONDS", 0.01)
        return calls

    return install


def trials(folder: Path) -> Any:
    return engine.ended_trials("true", folder, {}, OPTIONS, working_folder=folder)


def test_nni_is_silent_and_the_caller_is_not(
    chatty: Callable[..., list[str]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    calls = chatty()
    for ended in trials(tmp_path):
        print(f"trial {ended.number}: {ended.numbers}")
        logging.getLogger("caller").error("trial %d", ended.number)
    assert calls == ["start", "jobs", "jobs", "stop"]
    assert capsys.readouterr().out == "trial 0: {'default': 0.5}\ntrial 1: {'default': 0.5}\n"
    assert [record.getMessage() for record in caplog.records] == ["trial 0", "trial 1"]


def test_a_caller_that_leaves_early_stops_the_experiment(chatty: Callable[..., list[str]], tmp_path: Path) -> None:
    calls = chatty()
    found = trials(tmp_path)
    assert next(found).parameters == {"ratio": 0.3}
    found.close()
    assert calls == ["start", "jobs", "stop"]


def test_a_start_is_tried_three_times(chatty: Callable[..., list[str]], tmp_path: Path) -> None:
    calls = chatty(failed_starts=2)
    assert len(list(trials(tmp_path))) == 2
    assert calls[:5] == ["start", "stop", "start", "stop", "start"]
    calls = chatty(failed_starts=3)
    with pytest.raises(SweepError, match="NNI's experiment cannot be started: RuntimeError: busy"):
        next(trials(tmp_path))
    assert calls.count("start") == 3


def test_an_experiment_that_fails_is_an_error(chatty: Callable[..., list[str]], tmp_path: Path) -> None:
    calls = chatty(status="ERROR")
    found = trials(tmp_path)
    next(found)
    with pytest.raises(SweepError, match=f"NNI's experiment is ERROR; see its logs in {tmp_path}"):
        next(found)
    assert calls[-1] == "stop"
