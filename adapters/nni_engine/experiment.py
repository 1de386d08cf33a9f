"""Trials on NNI's engine: started, watched to their end, and stopped whatever happens."""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import logging
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nns_plugin.errors import MissingExtraError, SweepError

try:
    from nni.experiment import AlgorithmConfig, Experiment, ExperimentConfig
except ImportError as error:
    raise MissingExtraError("nni", "nni") from error

ENDED = frozenset({"SUCCEEDED", "FAILED", "USER_CANCELED", "SYS_CANCELED", "EARLY_STOPPED"})
INTERVAL_SECONDS = 1.0
ATTEMPTS = 3


@dataclass(frozen=True)
class Ended:
    """A trial that has ended.

    Attributes:
        number: In the experiment, from 0 on; the trial knows it as well.
        parameters: What the tuner gave it.
        numbers: What it reported; ``None`` if it failed.
        status: In NNI's words.
    """

    number: int
    parameters: Mapping[str, Any]
    numbers: Mapping[str, Any] | None
    status: str


def ended_trials(
    command: str,
    folder: Path,
    space: Mapping[str, Any],
    *,
    tuner: str,
    seed: int,
    trials: int,
    concurrency: int,
    working_folder: Path,
    max_minutes: float | None = None,
    config_file: Path | None = None,
) -> Iterator[Ended]:
    """Run an experiment and yield its trials as they end; nothing of it is left running, whatever ends it.

    Args:
        command: Starts a trial, in a copy of the folder.
        folder: What a trial needs.
        space: NNI's search space.
        tuner: ``"GridSearch"``, ``"Random"`` or ``"TPE"``.
        seed: Of the tuners that sample.
        trials: Most trials.
        concurrency: Trials at a time.
        working_folder: Where NNI keeps its database and logs.
        max_minutes: Most time; trials that run then are stopped.
        config_file: NNI's experiment config in YAML, for other training services than the local one. Its training
            service counts, and its trial command if it has one; all else is as said here.

    Raises:
        SweepError: If the experiment cannot be started, or fails.
    """
    experiment = Experiment("local" if config_file is None else experiment_config(config_file))
    config = experiment.config
    assert isinstance(config, ExperimentConfig)
    config.search_space = dict(space)
    arguments = {"GridSearch": None, "Random": {"seed": seed}, "TPE": {"seed": seed, "optimize_mode": "maximize"}}
    config.tuner = AlgorithmConfig(name=tuner, class_args=arguments[tuner])
    config.trial_command = getattr(config, "trial_command", None) or command
    config.trial_code_directory = str(folder)
    config.max_trial_number, config.trial_concurrency = trials, concurrency
    config.experiment_working_directory = str(working_folder)
    if max_minutes is not None:
        config.max_experiment_duration = f"{max(1, round(60 * max_minutes))}s"
    with _guarded(working_folder), _quiet(), _stopped(experiment):
        for attempt in itertools.count(1):
            try:
                experiment.start(_free_port())
                break
            except Exception as error:  # the host fails in any way, and now and then on a busy machine
                if attempt == ATTEMPTS:
                    raise SweepError(f"NNI's experiment cannot be started: {type(error).__name__}: {error}") from error
                with contextlib.suppress(Exception):
                    experiment.stop()
                time.sleep(5 * INTERVAL_SECONDS)
        yield from _watched(experiment, trials)


def experiment_config(file: Path) -> ExperimentConfig:
    """NNI's experiment config of a file.

    Raises:
        SweepError: If it is none.
    """
    try:
        found: ExperimentConfig = ExperimentConfig.load(file)
    except Exception as error:  # the host fails in any way
        raise SweepError(f"{str(file)!r} is no experiment config of NNI: {type(error).__name__}: {error}") from error
    return found


def _watched(experiment: Experiment, trials: int) -> Iterator[Ended]:
    told: set[str] = set()
    while True:
        status, jobs = experiment.get_status(), experiment.list_trial_jobs()
        for job in jobs:
            if job.status in ENDED and job.trialJobId not in told:
                told.add(job.trialJobId)
                yield _ended(job)
        running = any(job.status not in ENDED for job in jobs)
        if len(told) >= trials or (status in ("DONE", "NO_MORE_TRIAL", "TUNER_NO_MORE_TRIAL") and not running):
            return
        if status in ("ERROR", "STOPPED"):
            raise SweepError(
                f"NNI's experiment is {status}; its logs lie in {experiment.config.experiment_working_directory}"
            )
        time.sleep(INTERVAL_SECONDS)


def _ended(job: Any) -> Ended:
    parameters = job.hyperParameters[0].parameters if job.hyperParameters else {}
    metrics = job.finalMetricData[0].data if job.status == "SUCCEEDED" and job.finalMetricData else None
    if isinstance(metrics, str):
        metrics = json.loads(metrics)
    return Ended(int(job.sequenceId), parameters, metrics if isinstance(metrics, Mapping) else None, job.status)


@contextlib.contextmanager
def _stopped(experiment: Experiment) -> Iterator[None]:
    try:
        yield
    finally:
        with contextlib.suppress(Exception):
            experiment.stop()


@contextlib.contextmanager
def _guarded(working_folder: Path) -> Iterator[None]:
    """Have another process end NNI's and all of its children when this one is gone, killed or not."""
    guard = subprocess.Popen(
        [sys.executable, "-m", "nns_plugin.adapters.nni_engine.guard", str(working_folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        yield
    finally:
        assert guard.stdin is not None
        guard.stdin.close()
        guard.wait()


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
        return port


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """NNI tells on standard output what its log file says as well."""
    disabled = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.disable(disabled)
