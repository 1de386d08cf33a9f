"""The part of a sweep that is on disk: finished trials, and the plan that new trials read."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nns_plugin.errors import MissingExtraError, RecipeError, SweepError
from nns_plugin.jobs.recipe import WEIGHTS, Recipe, SweepSection
from nns_plugin.jobs.trial import PLAN, RECIPE

try:
    import yaml
except ModuleNotFoundError as error:
    raise MissingExtraError("yaml", "cli") from error

if TYPE_CHECKING:  # needs the extra nni
    from nns_plugin.adapters.nni_engine.experiment import Ended


FORMAT = "nns-plugin sweep 1"
STATE = "sweep.json"


@dataclass(frozen=True)
class SweepTrial:
    """A finished trial of a sweep.

    Attributes:
        number: Its number, which names its folder ``trials/NNN``.
        parameters: Values by field of the recipe.
        numbers: Its measurements, by name; ``None`` if it failed.
        error: Why it failed.
    """

    number: int
    parameters: dict[str, Any]
    numbers: dict[str, float | None] | None
    error: str | None = None

    @property
    def point(self) -> tuple[float, float] | None:
        """Balanced accuracy and latency in ms, if it has both."""
        accuracy, latency = ((self.numbers or {}).get(name) for name in ("balanced_accuracy", "latency_ms"))
        return None if accuracy is None or latency is None else (accuracy, latency)


class SweepState:
    """The part of a sweep that is on disk.

    Args:
        output: Folder of the sweep.
        described: What must be unchanged for the sweep to resume.

    Raises:
        SweepError: If the folder's file is damaged or of another sweep.
    """

    def __init__(self, output: Path, described: Mapping[str, Any]) -> None:
        self._output = output.resolve()
        self._described = json.loads(json.dumps(described))
        self._failed: dict[int, SweepTrial] = {}
        self.trials: dict[int, SweepTrial] = {}
        path = self._output / STATE
        if path.exists():
            try:
                content = json.loads(path.read_text(encoding="utf-8"))
                former = content["sweep"] if content["format"] == FORMAT else None
                self.trials = {trial["number"]: SweepTrial(**trial) for trial in content["trials"] if trial["numbers"]}
            except (OSError, ValueError, KeyError, TypeError) as error:
                raise SweepError(f"{str(path)!r} is damaged: {error}; remove it or choose another folder") from error
            if former != self._described:
                raise SweepError(f"{str(output)!r} holds another sweep; choose another folder or remove {STATE}")
        self._first = max(self.trials, default=-1) + 1  # number of the first trial that a tuner chooses

    @property
    def working_folder(self) -> Path:
        """Folder for NNI's own files."""
        return self._output / ".nni"

    def _errors(self) -> list[Path]:
        return list((self._output / "trials").glob("*.error"))

    def all_trials(self) -> list[SweepTrial]:
        """Finished trials, also those that failed, by number."""
        return sorted([*self.trials.values(), *self._failed.values()], key=lambda trial: trial.number)

    def prepare(self, recipe: Recipe, planned: Sequence[Mapping[str, Any]] | None, section: SweepSection) -> Path:
        """Write what trials need, and return its folder."""
        folder = self._output / ".plan"
        try:
            (self._output / "trials").mkdir(parents=True, exist_ok=True)
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            for file in self._errors():
                file.unlink()
            content = recipe.model_dump(mode="json", exclude_unset=True, exclude={"sweep"})
            for name in WEIGHTS:
                if content["model"].get(name) is not None:
                    content["model"][name] = str(Path(content["model"][name]).resolve())
            (folder / RECIPE).write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
            plan = {
                "trials": planned,
                "metric": section.metric,
                "maximize": section.maximize,
                "output": str(self._output / "trials"),
                "folder": str(Path.cwd()),
                "first": self._first,
            }
            (folder / PLAN).write_text(json.dumps(plan), encoding="utf-8")
        except OSError as error:
            raise RecipeError(f"output: {str(self._output)!r} cannot be written: {error.strerror}") from error
        return folder

    def add(self, ended: Ended, planned: Sequence[Mapping[str, Any]] | None) -> None:
        """Record a finished trial, also on disk."""
        numbers = dict(ended.numbers or {})
        # NNI gives parameters to the trial that asks first, and may list them for another; only the trial knows.
        number, chosen = numbers.pop("number", None), numbers.pop("chosen", dict(ended.parameters))
        if number is None:
            failed = (int(path.stem) for path in self._errors() if int(path.stem) not in self._failed)
            listed = self._first + ended.number if planned is None else int(ended.parameters["trial"])
            number = min(failed, default=listed)
        chosen = chosen if planned is None else dict(planned[number])
        if ended.numbers is not None:
            self.trials[number] = SweepTrial(number, chosen, numbers)
        else:
            file = self._output / "trials" / f"{number:03d}.error"
            text = file.read_text(encoding="utf-8").strip() if file.exists() else f"{ended.status.lower()}, see .nni"
            self._failed[number] = SweepTrial(number, chosen, None, " ".join(text.split()))
        content = {"format": FORMAT, "sweep": self._described, "trials": [vars(trial) for trial in self.all_trials()]}
        staging = self._output / f".{STATE}"
        staging.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        os.replace(staging, self._output / STATE)
