"""Sweeps: runs a recipe with many settings on NNI's engine, and finds the Pareto-optimal trials."""

from __future__ import annotations

import itertools
import os
import random
import sys
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from nns_plugin.errors import MissingExtraError, RecipeError, SweepError
from nns_plugin.jobs.figures import pareto_figure
from nns_plugin.jobs.loading import load_recipe
from nns_plugin.jobs.recipe import WEIGHTS, Recipe, SweepSection
from nns_plugin.jobs.run import FigureWarning
from nns_plugin.jobs.sweep_state import SweepState, SweepTrial
from nns_plugin.jobs.trial import check_metric

FIGURE = "pareto.png"


@dataclass(frozen=True)
class Sweep:
    """The result of a sweep.

    Attributes:
        trials: All finished trials, by number.
        planned: Planned number of trials.
        metric: Name of the number that the tuner optimises.
    """

    trials: tuple[SweepTrial, ...]
    planned: int
    metric: str

    @property
    def pareto(self) -> tuple[SweepTrial, ...]:
        """The Pareto-optimal trials: no other is as accurate and as fast, and better in one; the fastest first."""
        points = [(trial, trial.point) for trial in self.trials]
        there = [(trial, point) for trial, point in points if point is not None]
        front = [
            (trial, point)
            for trial, point in there
            if not any(o[0] >= point[0] and o[1] <= point[1] and o != point for _, o in there)
        ]
        return tuple(trial for trial, point in sorted(front, key=lambda item: item[1][1]))


def run_sweep(
    file: Path,
    output: Path,
    overrides: Mapping[str, Any] | None = None,
    *,
    nni_config: Path | None = None,
    progress: bool = False,
) -> Sweep:
    """Run the sweep of a recipe, or resume it.

    Args:
        file: Recipe with a section ``sweep``.
        output: Folder for ``sweep.json``, ``pareto.png`` and ``trials``. If it holds an interrupted run of the same
            sweep, only the missing trials are run.
        overrides: Values by dotted name of a field of the recipe.
        nni_config: NNI's experiment config, for remote machines or Kubernetes; the local machine by default.
        progress: Whether to show a progress bar.

    Raises:
        NNSError: If the recipe is invalid, the folder holds another sweep, no trial succeeds or NNI fails.
        KeyboardInterrupt: On Ctrl-C; finished trials are in the folder, and no process is left running.
    """
    from nns_plugin.adapters.nni_engine.experiment import ExperimentOptions, ended_trials, experiment_config

    if nni_config is not None:
        experiment_config(nni_config)
    recipe = load_recipe(file, overrides)
    section = recipe.sweep
    if section is None:
        raise RecipeError(
            f"{file}: field 'sweep': found nothing; expected a search, such as {{search: {{ratio: [0.3, 0.5]}}}}"
        )
    check_metric(section.metric)
    planned = _planned(file, overrides, section)
    count = section.trials if planned is None else len(planned)
    state = SweepState(output, _described(recipe, planned))
    done = state.trials
    left = count - len(done)
    if left > 0:
        folder = state.prepare(recipe, planned, section)
        todo = [] if planned is None else [number for number in range(count) if number not in done]
        space = section.space() if planned is None else {"trial": {"_type": "choice", "_value": todo}}
        python = "python3" if nni_config is not None else sys.executable
        bar = tqdm(total=count, initial=len(done), desc="sweep", disable=not progress, leave=False)
        with bar:
            options = ExperimentOptions(
                tuner=section.tuner,
                seed=section.seed + len(done),  # a resumed sweep must not repeat the first trials
                trials=left,
                concurrency=section.concurrency,
                max_minutes=section.max_minutes,
                config_file=nni_config,
            )
            command = f"{python} -m nns_plugin.jobs.trial"
            for ended in ended_trials(command, folder, space, options, working_folder=state.working_folder):
                state.add(ended, planned)
                bar.update()
    sweep = Sweep(tuple(state.all_trials()), count, section.metric)
    if not any(trial.numbers for trial in sweep.trials):
        first = next((trial.error for trial in sweep.trials if trial.error), "none was started")
        raise SweepError(f"no trial succeeded: {first}")
    _draw(sweep, output)
    return sweep


def _planned(file: Path, overrides: Mapping[str, Any] | None, section: SweepSection) -> list[dict[str, Any]] | None:
    """Every combination, or a sample of them, each checked; ``None`` if a tuner chooses."""
    if section.tuner != "GridSearch":
        for name, values in section.search.items():
            for value in values if isinstance(values, list) else ():
                load_recipe(file, {**(overrides or {}), name: value})
        return None
    names = list(section.search)
    values = [[_absolute(file, name, value) for value in section.search[name]] for name in names]
    combinations = [dict(zip(names, found, strict=True)) for found in itertools.product(*values)]
    if len(combinations) > section.trials:
        chosen = random.Random(section.seed).sample(range(len(combinations)), section.trials)
        combinations = [combinations[place] for place in sorted(chosen)]
    for combination in combinations:
        try:
            load_recipe(file, {**(overrides or {}), **combination})
        except RecipeError as error:
            raise RecipeError(f"sweep.search: {combination} is not a valid recipe: {error}") from error
    return combinations


def _absolute(file: Path, name: str, value: Any) -> Any:
    """A value; paths of weights become absolute, since trials read their recipe from another folder."""
    is_file = name in {f"model.{weights}" for weights in WEIGHTS} and isinstance(value, str)
    return str((file.parent / value).resolve()) if is_file else value


def _described(recipe: Recipe, planned: Sequence[Mapping[str, Any]] | None) -> dict[str, Any]:
    """What must be unchanged for a sweep to resume."""
    content = recipe.model_dump(mode="json")
    limits = ("trials", "concurrency", "max_minutes") if planned is None else ("concurrency", "max_minutes")
    content["sweep"] = {name: value for name, value in content["sweep"].items() if name not in limits}
    return {"recipe": content, "planned": planned}


def _draw(sweep: Sweep, output: Path) -> None:
    """Draw the Pareto front; without matplotlib, warn that the figure is left out."""
    points = [(*trial.point, str(trial.number)) for trial in sweep.trials if trial.point is not None]
    if not points:
        return
    try:
        figure = pareto_figure(points, {str(trial.number) for trial in sweep.pareto})
    except MissingExtraError as error:
        (output / FIGURE).unlink(missing_ok=True)  # of fewer trials
        warnings.warn(f"{FIGURE} is left out: {error}", FigureWarning, stacklevel=3)
        return
    staging = output / f".{FIGURE}"
    figure.savefig(staging, dpi=150, format="png")
    os.replace(staging, output / FIGURE)
