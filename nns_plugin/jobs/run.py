"""The main job: extract the part of a classifier that some labels need, and prove it."""

from __future__ import annotations

import warnings
from pathlib import Path

from nns_plugin.adapters.onnxruntime import check_provider
from nns_plugin.backends import find_backend
from nns_plugin.errors import NNSError
from nns_plugin.jobs.extraction import extract
from nns_plugin.jobs.figures import new_figure
from nns_plugin.jobs.job import Job, check_runs, train
from nns_plugin.jobs.job_figures import job_figures
from nns_plugin.jobs.output import staged_folder
from nns_plugin.jobs.proof import prove, timing_of
from nns_plugin.jobs.recipe import Recipe
from nns_plugin.jobs.reports import Report
from nns_plugin.jobs.stages import stage
from nns_plugin.jobs.turns import iterative_extraction, masked_synapses
from nns_plugin.models.preserve import seeded
from nns_plugin.subnets.extraction import Extraction
from nns_plugin.subnets.provenance import Trial
from nns_plugin.subnets.steps import calibrate_head

FIGURES = ("activity-*.png", "overlap.png", "integration.png", "size.png")
FILES = ("baseline.onnx", "subnet.onnx", "subnet.safetensors", "report.json")


class CalibrationDataWarning(UserWarning):
    """Decisions are made on data that was used before."""


class FigureWarning(UserWarning):
    """A figure could not be drawn."""


def run_job(recipe: Recipe, output: Path, progress: bool = False, figures: bool = False) -> Report:
    """Run the job of a recipe and write its four files.

    Args:
        recipe: What to do.
        output: Folder for ``baseline.onnx``, ``subnet.onnx``, ``subnet.safetensors`` and ``report.json``; created if
            missing. The files are written atomically.
        progress: Whether to show progress bars.
        figures: Whether to write figures as PNG files as well. Those of an earlier job are deleted in either case.

    Returns:
        The report, as written.

    Raises:
        NNSError: If anything is wrong with the recipe, the model, the data or the folder.
    """
    check_provider(recipe.measure.provider)
    options = recipe.to_options()
    find_backend(options.framework)
    options.criterion_class  # noqa: B018  # raises for a criterion that a recipe cannot build
    if figures:
        new_figure(1, 1)  # raises for a missing extra before any work
    with staged_folder(output, FILES, FIGURES) as staging, seeded(recipe.seed):
        job = Job.of(recipe, options, progress)
        extraction, trials = extract_in_job(job)
        report = prove(job, extraction, trials, staging)
        if figures:
            _draw(job, staging)
        return report


def _draw(job: Job, folder: Path) -> None:
    """Write the figures that can be drawn; an error does not cost the job its files."""
    try:
        for name, figure in job_figures(job):
            figure.savefig(folder / f"{name}.png", dpi=150)
    except NNSError as error:
        warnings.warn(f"some figures are left out: {error}", FigureWarning, stacklevel=2)


def extract_in_job(job: Job) -> tuple[Extraction, tuple[Trial, ...]]:
    """Prune a copy of the dense model once or in turns, mask synapses, and fine-tune.

    Args:
        job: The job; its dense model is left as it was found.

    Returns:
        The finished extraction, and the trials of a search.

    Raises:
        NNSError: If nothing in the model can be pruned, or the data or the recipe cannot be used.
    """
    recipe, options, data = job.recipe, job.options, job.data
    if data.validation is None and (
        options.calibrate_head or options.max_balanced_accuracy_drop is not None or options.has_target
    ):
        warnings.warn(
            "there is no validation data: decisions are made on the calibration data, which the head was fitted on",
            CalibrationDataWarning,
            stacklevel=2,
        )

    def tune(extraction: Extraction) -> None:
        """Fine-tune in place, and calibrate "other" again, which training has shifted."""
        train(extraction.model, data, recipe, "fine_tune", extraction.labels.outputs, job.progress)
        if options.calibrate_head:
            with stage("data.validation"):
                calibrate_head(extraction, data.decisive, job.progress)

    trials: tuple[Trial, ...] = ()
    if recipe.iterative is not None:
        extraction = iterative_extraction(job, recipe.iterative, tune)
    else:
        extraction, trials = extract(job.dense, job.sources, options, job.labels, timing_of(recipe), job.progress)
    with masked_synapses(extraction, recipe.synapses):
        if recipe.fine_tune.epochs and (recipe.iterative is None or recipe.synapses is not None):
            tune(extraction)
    check_runs(extraction.model, data.example_inputs, len(extraction.labels.outputs))
    return extraction, trials
