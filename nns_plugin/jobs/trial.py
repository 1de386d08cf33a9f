"""Runs one trial of a sweep; NNI starts ``python -m nns_plugin.jobs.trial`` in the folder with the plan."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from pathlib import Path
from typing import Any, get_type_hints

from nns_plugin.errors import NNSError, RecipeError, SweepError
from nns_plugin.jobs.loading import load_recipe
from nns_plugin.jobs.reports import Report
from nns_plugin.jobs.run import run_job

PLAN, RECIPE = "plan.json", "recipe.yaml"
NUMBERS = {
    "balanced_accuracy": "subnet.evaluation.mean_balanced_accuracy",
    "lost": "balanced_accuracy_drop",
    "latency_ms": "latency.candidate.p50_ms",
    "speed_up": "latency.ratio",
    "parameters": "subnet.parameters",
    "macs": "subnet.macs",
    "file_bytes": "subnet.file_bytes",
}
PARITY = "an ONNX file does not reproduce its torch model"


def number_of(report: Any, name: str) -> float:
    """A number of a report, by its dotted name, such as ``subnet.evaluation.mean_balanced_accuracy``.

    Raises:
        RecipeError: If there is no such number.
    """
    found = report
    for part in name.split("."):
        if not isinstance(found, dict) or part not in found:
            there = ", ".join(found) if isinstance(found, dict) else type(found).__name__
            raise RecipeError(f"sweep.metric: the report has no {name!r}: expected one of {there} instead of {part!r}")
        found = found[part]
    if isinstance(found, bool) or not isinstance(found, (int, float)):
        raise RecipeError(f"sweep.metric: {name!r} is {found!r} in the report; expected a number")
    return float(found)


def check_metric(name: str) -> None:
    """Refuse a metric that no report can have, as far as the types of its fields tell.

    Raises:
        RecipeError: If a part of its name is not a field of a report.
    """
    kind: Any = Report
    for part in name.split("."):
        if not dataclasses.is_dataclass(kind):
            return  # dictionaries and intervals: only the report shows their content
        hints = get_type_hints(kind)
        if part not in hints:
            raise RecipeError(f"sweep.metric: found {name!r}; expected one of {', '.join(hints)} instead of {part!r}")
        kind = hints[part]
    if dataclasses.is_dataclass(kind):
        raise RecipeError(
            f"sweep.metric: {name!r} is not a number; it has the fields {', '.join(get_type_hints(kind))}"
        )


def run_trial(folder: Path, parameters: dict[str, Any], number: int) -> dict[str, Any]:
    """Run the job of a trial.

    Args:
        folder: Folder with the plan and the recipe.
        parameters: What the tuner chose: the number of a planned trial, or values by field of the recipe.
        number: Number of the trial, which names its folder.

    Returns:
        The numbers of its report, with the metric as ``"default"``; the trial's ``"number"``; and its parameters as
        ``"chosen"``.
    """
    plan = json.loads((folder / PLAN).read_text(encoding="utf-8"))
    if "trial" in parameters:
        number = int(parameters["trial"])
        parameters = plan["trials"][number]
    else:
        number += plan["first"]
    recipe = load_recipe(folder / RECIPE, parameters)
    output = Path(plan["output"])
    if not output.is_dir():  # on another machine
        output = folder
    elif Path(plan["folder"]).is_dir():  # with the user's code and files
        os.chdir(plan["folder"])
        sys.path.insert(0, plan["folder"])
    error_file = output / f"{number:03d}.error"
    error_file.unlink(missing_ok=True)
    try:
        report = run_job(recipe, output / f"{number:03d}").to_dict()
        if not (report["baseline"]["parity"]["passed"] and report["subnet"]["parity"]["passed"]):
            raise SweepError(PARITY)
        sign = 1.0 if plan["maximize"] else -1.0
        numbers = {"default": sign * number_of(report, plan["metric"]), "number": number, "chosen": parameters}
        return numbers | {short: _found(report, name) for short, name in NUMBERS.items()}
    except NNSError as error:
        error_file.write_text(f"{error}\n", encoding="utf-8")
        raise


def _found(report: Any, name: str) -> float | None:
    try:
        return number_of(report, name)
    except RecipeError:  # such as the accuracy of a label without test data
        return None


def main() -> None:
    """Get parameters from NNI and report numbers to it; a known error is one line and exit code 2."""
    from nns_plugin.adapters.nni_engine.trial import next_trial, report

    parameters, number = next_trial()
    try:
        report(run_trial(Path.cwd(), parameters, number))
    except NNSError as error:
        print(f"nns: {' '.join(str(error).split())}", file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
