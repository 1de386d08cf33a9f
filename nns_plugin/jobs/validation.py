"""The validation job: two ONNX files in, what was measured and the gate's verdict out, and reports of both."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from nns_plugin.adapters.onnxruntime import (
    Comparison,
    Gate,
    OnnxFile,
    RoundingGain,
    Verdict,
    check_provider,
    compare,
    jsonable,
    read_file,
    read_values,
    rounding_gains,
    values_of,
)
from nns_plugin.errors import GateError, LabelError, OutputError, RecipeError
from nns_plugin.jobs.data import Datasets
from nns_plugin.jobs.extraction import chosen_labels, stage
from nns_plugin.jobs.figures import latency_figure, new_figure
from nns_plugin.jobs.loading import call_factory
from nns_plugin.jobs.models import load_checkpoint
from nns_plugin.jobs.output import check_writable, written_together
from nns_plugin.jobs.recipe import WEIGHTS, Recipe
from nns_plugin.jobs.validation_report import junit, junit_of_error, markdown, markdown_of_error
from nns_plugin.labels import OTHER
from nns_plugin.models.inputs import parse_batch
from nns_plugin.models.preserve import seeded
from nns_plugin.subnets.subnet import InexactMaskWarning, Subnet


@dataclass(frozen=True)
class Reports:
    """Where to write what was found; None for nowhere.

    Attributes:
        json: All numbers.
        junit: The checks, as tests.
        markdown: A summary for people.
        figure: Both distributions of latency, a PNG file.
    """

    json: Path | None = None
    junit: Path | None = None
    markdown: Path | None = None
    figure: Path | None = None

    @property
    def paths(self) -> tuple[Path, ...]:
        """All that will be written."""
        return tuple(path for path in (self.json, self.junit, self.markdown, self.figure) if path is not None)


@dataclass(frozen=True)
class Validation:
    """What a validation found.

    Attributes:
        comparison: What was measured.
        gate: The thresholds.
        verdict: What they say.
        rounding: What more channels would gain, if asked for.
    """

    comparison: Comparison
    gate: Gate
    verdict: Verdict
    rounding: tuple[RoundingGain, ...] | None = None

    def to_dict(self) -> dict[str, Any]:
        """The validation as JSON types."""
        found = {
            "passed": self.verdict.passed,
            "verdict": self.verdict.to_dict(),
            "gate": asdict(self.gate),
            "rounding": None if self.rounding is None else [asdict(gain) for gain in self.rounding],
        }
        json_types: dict[str, Any] = jsonable(found)
        return json_types | {"comparison": self.comparison.to_dict()}


@dataclass(frozen=True)
class Evidence:
    """What a comparison goes by beside the two files, and options that a recipe gives.

    Attributes:
        inputs: Inputs in order or by name; None for random ones.
        labels: ``[N]`` their labels, if known.
        label_names: Names of the baseline's labels, if known.
        candidate_labels: Names of the candidate's, if the file does not tell.
        models: Torch models that the files and the removal are compared with, as :func:`compare` takes them.
    """

    inputs: Any = None
    labels: Any = None
    label_names: tuple[str, ...] | None = None
    candidate_labels: tuple[str, ...] | None = None
    models: Mapping[str, Any] | None = None


def validate(
    baseline: Path,
    candidate: Path,
    gate: Gate,
    *,
    data: Path | None = None,
    recipe: Recipe | None = None,
    subnet: Path | None = None,
    reports: Reports | None = None,
    suggest_rounding: bool = False,
    **options: Any,
) -> Validation:
    """Compare a candidate with its baseline, judge it, and write reports, all together when all is measured.

    Args:
        baseline: An ONNX file.
        candidate: Another.
        gate: The thresholds.
        data: Inputs, and labels if known, as :func:`nns_plugin.adapters.onnxruntime.read_values` reads them.
        recipe: In place of that, a recipe whose test data to take. Its ``measure`` section gives what options do not.
        subnet: With a recipe, the subnet's file from which the candidate was exported: the models in torch, and the
            removal, are compared as well.
        reports: Where to write what was found.
        suggest_rounding: Whether to measure what more channels in the candidate's layers would gain.
        options: Of :func:`nns_plugin.adapters.onnxruntime.comparison`.

    Raises:
        NNSError: If anything cannot be used; ProviderError if a session does not get its provider.
    """
    reports = reports or Reports()
    if recipe is not None:
        weights = [getattr(recipe.model, name) for name in WEIGHTS]
        check_writable(reports.paths, [path for path in weights if path is not None])
    found = _validated(baseline, candidate, gate, data, recipe, subnet, reports, suggest_rounding, options)
    link = None
    if reports.figure is not None and reports.markdown is not None:
        link = Path(os.path.relpath(reports.figure.resolve(), reports.markdown.resolve().parent)).as_posix()
    _write(reports, found.to_dict(), junit(found), markdown(found, link), found.comparison)
    return found


@contextmanager
def reported_errors(reports: Reports, baseline: Path, candidate: Path, inputs: Sequence[Path] = ()) -> Iterator[None]:
    """Write errors of the block into the reports, so that no older one is taken for what was found.

    Args:
        reports: Where to write.
        baseline: The first file.
        candidate: The second.
        inputs: What else is read, and must not be written.

    Raises:
        OutputError: At once if a report cannot be written, or is one of the files that are read.
        MissingExtraError: At once if a figure is wanted and matplotlib is missing.
    """
    check_writable(reports.paths, (baseline, candidate, *inputs))
    if reports.figure is not None:
        new_figure(1, 1)
    try:
        yield
    except OutputError:
        raise
    except BaseException as error:  # also what stops the process
        told = {"passed": False, "error": {"type": type(error).__name__, "text": str(error)}}
        if reports.figure is not None:
            reports.figure.unlink(missing_ok=True)
        _write(reports, told, junit_of_error(error), markdown_of_error(error, baseline, candidate))
        raise


def _validated(
    baseline: Path,
    candidate: Path,
    gate: Gate,
    data: Path | None,
    recipe: Recipe | None,
    subnet: Path | None,
    reports: Reports,
    suggest_rounding: bool,
    options: Mapping[str, Any],
) -> Validation:
    if data is not None and recipe is not None:
        raise RecipeError("data and a recipe exclude each other: both say what to compare on; give one of them")
    if subnet is not None and recipe is None:
        raise RecipeError("a subnet needs the recipe that it was made with, for the model's architecture; give both")
    settings = dict(options)
    if recipe is not None:
        measured = {name: getattr(recipe.measure, name) for name in ("provider", "threads", "samples", "rtol", "atol")}
        settings = measured | settings
    if gate.max_p90_ms is not None and settings.get("samples", 100) < 100:
        raise GateError(f"max_p90_ms needs at least 100 samples, found {settings['samples']}; ask for more")
    check_provider(settings.get("provider", "cpu"))
    files = [read_file(path) for path in (baseline, candidate)]
    pairs = zip((baseline, candidate), files, strict=True)
    check_writable(reports.paths, [path.parent / name for path, file in pairs for name in file.sha256])
    if recipe is not None and not any(file.fixed_batch for file in files):
        settings = {"batches": (recipe.measure.batch,)} | settings
    evidence = Evidence()
    if data is not None:
        inputs, labels = read_values(data, files[0])
        evidence = Evidence(inputs, labels)
    elif recipe is not None:
        with seeded(recipe.seed):  # as the job does, so that its test data are the same
            evidence = _from_recipe(recipe, files, subnet)
    if gate.needs_labels and evidence.labels is None:
        raise GateError(
            "max_accuracy_drop and max_label_drop need inputs with labels; give data with an array 'labels', or a "
            "recipe"
        )
    tolerances = {name: getattr(gate, name) for name in ("rtol", "atol") if getattr(gate, name) is not None}
    comparison = compare(
        baseline,
        candidate,
        evidence.inputs,
        evidence.labels,
        label_names=evidence.label_names,
        **(evidence.models or {}),
        **({"candidate_labels": evidence.candidate_labels} | settings | tolerances),
    )
    gains = rounding_gains(candidate, comparison) if suggest_rounding else None
    return Validation(comparison, gate, gate.judge(comparison), gains)


def _from_recipe(recipe: Recipe, files: Sequence[OnnxFile], subnet: Path | None) -> Evidence:
    """The test data of a recipe, the labels that it keeps, and its models where it has trained ones."""
    made = call_factory("data.factory", recipe.data.factory, recipe.data.arguments)
    data = Datasets.parse(made, recipe.data.factory)
    with stage("data.test"):
        batches = [parse_batch(item, number) for number, item in enumerate(data.test)]
    if not batches:
        raise RecipeError("data.test: is empty; it must yield at least one batch")
    if any(batch.labels is None for batch in batches):
        raise RecipeError("data.test: yields inputs alone; expected (inputs, labels)")
    parts = [values_of(batch.inputs, files[0]) for batch in batches]
    by_name = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    inputs = by_name if isinstance(batches[0].inputs, Mapping) else tuple(by_name.values())
    labels = torch.cat([batch.labels for batch in batches if batch.labels is not None])
    names = None
    chosen = chosen_labels(recipe, data.label_names)
    if files[1].labels is None and chosen is not None and recipe.effective_head != "keep":
        kept = tuple(data.label_names[label] for label in chosen)
        names = (*kept, OTHER) if recipe.effective_head == "open" else kept
    models = {} if subnet is None else _models(recipe, data, subnet)
    if files[0].labels is None:
        return Evidence(inputs, labels, data.label_names, names, models)
    return Evidence(inputs, _renumbered(labels, data.label_names, files[0]), None, names, models)


def _renumbered(labels: Tensor, names: Sequence[str], file: OnnxFile) -> Tensor:
    """Labels of the data as the numbers that a file's own names give them."""
    theirs = {name: place for place, name in enumerate(file.labels or ())}
    places = [theirs.get(name, theirs.get(OTHER)) for name in names]
    unknown = [names[label] for label in sorted(set(labels.tolist())) if places[label] is None]
    if unknown:
        raise LabelError(
            f"{file.path!r} has the labels {list(theirs)[:20]}, the recipe's data {unknown[:20]} besides; give data "
            "with the same labels"
        )
    return torch.tensor([-1 if place is None else place for place in places])[labels.long()]


def _models(recipe: Recipe, data: Datasets, path: Path) -> dict[str, nn.Module]:
    """The subnet in torch; with a checkpoint of the dense model that, too, and with masks, where these are exact."""

    def parent() -> nn.Module:
        model: nn.Module = call_factory("model.factory", recipe.model.factory, recipe.model.arguments)
        return model.eval()

    subnet = Subnet.load(path)
    small = subnet.materialise(parent, data.example_inputs)
    if recipe.model.checkpoint is None or recipe.train.epochs:
        return {"candidate_model": small}  # the dense model was trained by the job, and is in its ONNX file only
    dense = parent()
    load_checkpoint(dense, recipe.model.checkpoint)
    models = {"baseline_model": dense, "candidate_model": small}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        masked = subnet.mask(dense, data.example_inputs)
    for warning in caught:
        warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
    inexact = any(issubclass(warning.category, InexactMaskWarning) for warning in caught)
    return models if inexact else models | {"masked": masked}


def _write(
    reports: Reports, found: Mapping[str, Any], as_junit: str, as_markdown: str, comparison: Comparison | None = None
) -> None:
    """Write the reports that are asked for, all of them or none."""
    as_json = json.dumps(found, indent=2, allow_nan=False)
    texts = ((reports.json, as_json), (reports.junit, as_junit), (reports.markdown, as_markdown))
    contents: dict[Path, Callable[[Path], object]] = {path: _writer(text) for path, text in texts if path is not None}
    if reports.figure is not None and comparison is not None and comparison.latency:
        figure = latency_figure(comparison.latency)
        contents[reports.figure] = lambda path: figure.savefig(path, dpi=150, format="png")
    written_together(contents)


def _writer(text: str) -> Callable[[Path], object]:
    return lambda path: path.write_text(text.rstrip("\n") + "\n", encoding="utf-8")
