"""Experiments on NNI's engine: started, watched until their trials end, and stopped whatever happens."""

from __future__ import annotations

import contextlib
import itertools
import json
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nns_plugin.environment import quiet
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
        number: Its place in the experiment, from 0 on; the trial knows it as well.
        parameters: The tuner's choice.
        numbers: The numbers that it reported; ``None`` if it failed.
        status: NNI's word for how it ended.
    """

    number: int
    parameters: Mapping[str, Any]
    numbers: Mapping[str, Any] | None
    status: str


@dataclass(frozen=True)
class ExperimentOptions:
    """How an experiment searches, and within which limits.

    Attributes:
        tuner: ``"GridSearch"``, ``"Random"`` or ``"TPE"``.
        seed: Seed of the tuners that sample.
        trials: Maximum number of trials.
        concurrency: Trials at a time.
        max_minutes: Maximum time; trials that still run then are stopped.
        config_file: NNI's experiment config in YAML, for training services other than the local one. Its training
            service is used, and its trial command if it has one; everything else comes from these options.
    """

    tuner: str
    seed: int
    trials: int
    concurrency: int
    max_minutes: float | None = None
    config_file: Path | None = None


def ended_trials(
    command: str, folder: Path, space: Mapping[str, Any], options: ExperimentOptions, *, working_folder: Path
) -> Iterator[Ended]:
    """Run an experiment and yield its trials as they end; it leaves no process behind, however it ends.

    NNI is silent; what the caller prints and logs between trials is not.

    Args:
        command: Starts a trial, in a copy of the folder.
        folder: What a trial needs.
        space: NNI's search space.
        options: How to search.
        working_folder: Where NNI keeps its database and logs.

    Raises:
        SweepError: If the experiment cannot be started, or fails.
    """
    with quiet():
        experiment = _configured(command, folder, space, options, working_folder)
    with _guarded(working_folder), _stopped(experiment):
        _start(experiment)
        yield from _watched(experiment, options.trials)


def experiment_config(file: Path) -> ExperimentConfig:
    """Load NNI's experiment config from a file.

    Raises:
        SweepError: If the file holds none.
    """
    try:
        found: ExperimentConfig = ExperimentConfig.load(file)
    except Exception as error:  # the host fails in any way
        raise SweepError(
            f"{str(file)!r} is not an experiment config of NNI: {type(error).__name__}: {error}"
        ) from error
    return found


def _configured(
    command: str, folder: Path, space: Mapping[str, Any], options: ExperimentOptions, working_folder: Path
) -> Experiment:
    file = options.config_file
    experiment = Experiment("local" if file is None else experiment_config(file))
    config = experiment.config
    assert isinstance(config, ExperimentConfig)
    config.search_space = dict(space)
    arguments = {
        "GridSearch": None,
        "Random": {"seed": options.seed},
        "TPE": {"seed": options.seed, "optimize_mode": "maximize"},
    }
    config.tuner = AlgorithmConfig(name=options.tuner, class_args=arguments[options.tuner])
    config.trial_command = getattr(config, "trial_command", None) or command
    config.trial_code_directory = str(folder)
    config.max_trial_number, config.trial_concurrency = options.trials, options.concurrency
    config.experiment_working_directory = str(working_folder)
    if options.max_minutes is not None:
        config.max_experiment_duration = f"{max(1, round(60 * options.max_minutes))}s"
    return experiment


def _start(experiment: Experiment) -> None:
    for attempt in itertools.count(1):
        try:
            with quiet():
                experiment.start(_free_port())
            return
        except Exception as error:  # the host fails in any way, and now and then on a busy machine
            if attempt == ATTEMPTS:
                raise SweepError(f"NNI's experiment cannot be started: {type(error).__name__}: {error}") from error
            _stop(experiment)
            time.sleep(5 * INTERVAL_SECONDS)


def _watched(experiment: Experiment, trials: int) -> Iterator[Ended]:
    yielded: set[str] = set()
    while True:
        with quiet():
            status, jobs = experiment.get_status(), experiment.list_trial_jobs()
        for job in jobs:
            if job.status in ENDED and job.trialJobId not in yielded:
                yielded.add(job.trialJobId)
                yield _ended(job)
        running = any(job.status not in ENDED for job in jobs)
        if len(yielded) >= trials or (status in ("DONE", "NO_MORE_TRIAL", "TUNER_NO_MORE_TRIAL") and not running):
            return
        if status in ("ERROR", "STOPPED"):
            raise SweepError(
                f"NNI's experiment is {status}; see its logs in {experiment.config.experiment_working_directory}"
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
        _stop(experiment)


def _stop(experiment: Experiment) -> None:
    with quiet(), contextlib.suppress(Exception):
        experiment.stop()


@contextlib.contextmanager
def _guarded(working_folder: Path) -> Iterator[None]:
    """Have a guard process end NNI and all of its children once this process is gone, even if it is killed."""
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
