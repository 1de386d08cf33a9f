"""The main job: extract what some labels need from a classifier, remove the rest, and prove it."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from tqdm.auto import tqdm

from nns_plugin.adapters.onnxruntime import (
    LatencyComparison,
    LatencyOptions,
    ParityReport,
    check_parity,
    check_provider,
    check_removal,
    export,
    label_parity,
    measure_latency,
    runtime_build,
)
from nns_plugin.adapters.torch_pruning.macs import count_macs
from nns_plugin.criteria import needs_of
from nns_plugin.environment import machine, versions
from nns_plugin.errors import NNSError, PruningError, RecipeError
from nns_plugin.evaluation.evaluation import Outputs, comparable_outputs, drops, evaluate
from nns_plugin.evaluation.intervals import Interval, interval
from nns_plugin.evaluation.prediction import predict
from nns_plugin.jobs.data import Datasets, repeated
from nns_plugin.jobs.extraction import backend_of, chosen_labels, criterion_class, extract_from, provenance, stage
from nns_plugin.jobs.figures import new_figure
from nns_plugin.jobs.job_figures import job_figures
from nns_plugin.jobs.latency_search import Target
from nns_plugin.jobs.loading import call_factory
from nns_plugin.jobs.models import load_checkpoint
from nns_plugin.jobs.output import staged_folder
from nns_plugin.jobs.recipe import Recipe
from nns_plugin.jobs.reports import ModelReport, Report
from nns_plugin.jobs.training import train_classifier
from nns_plugin.jobs.turns import iterative_extraction, masked_synapses
from nns_plugin.models.batches import batches
from nns_plugin.models.inputs import device_of, run_model, to_device
from nns_plugin.models.preserve import preserved, seeded
from nns_plugin.subnets.provenance import Trial
from nns_plugin.subnets.steps import Extraction, calibrate_head
from nns_plugin.subnets.subnet import InexactMaskWarning, Subnet
from nns_plugin.synapses.snapshot import WeightSnapshot

FIGURES = ("activity-*.png", "overlap.png", "integration.png", "size.png")
FILES = ("baseline.onnx", "subnet.onnx", "subnet.safetensors", "report.json")


class CalibrationDataWarning(UserWarning):
    """Decisions are made on data that was used before."""


class FigureWarning(UserWarning):
    """A figure could not be drawn."""


def run_job(recipe: Recipe, output: Path, progress: bool = False, figures: bool = False) -> Report:
    """Do the whole job of a recipe and write its four files.

    Args:
        recipe: What to do.
        output: Folder for ``baseline.onnx``, ``subnet.onnx``, ``subnet.safetensors`` and ``report.json``; made if
            missing. The files appear together at the end, or not at all.
        progress: Whether to show progress bars.
        figures: Whether to write figures, too, as PNG files; those of an earlier job go in either case.

    Returns:
        The report, as written.

    Raises:
        NNSError: If anything is wrong with the recipe, the model, the data or the folder.
    """
    check_provider(recipe.measure.provider)
    criterion_class(recipe)
    backend_of(recipe)
    if figures:
        new_figure(1, 1)  # tells what is missing before any work
    with staged_folder(output, FILES, FIGURES) as staging, seeded(recipe.seed):
        data = Datasets.parse(
            call_factory("data.factory", recipe.data.factory, recipe.data.arguments), recipe.data.factory
        )
        chosen_labels(recipe, data.label_names)
        _test_inputs(data, 1)
        dense, snapshot = _dense_model(recipe, data, progress)
        extraction, trials = extracted(dense, data, recipe, snapshot, progress)
        report = _prove(recipe, data, dense, extraction, trials, staging, progress)
        if figures:
            _draw(recipe, data, dense, snapshot, staging, progress)
        return report


def _draw(
    recipe: Recipe, data: Datasets, dense: nn.Module, snapshot: WeightSnapshot | None, staging: Path, progress: bool
) -> None:
    """Write the figures that can be drawn; what stops one does not cost the job its files."""
    try:
        for name, figure in job_figures(recipe, data, dense, snapshot, progress):
            figure.savefig(staging / f"{name}.png", dpi=150)
    except NNSError as error:
        warnings.warn(f"some figures are left out: {error}", FigureWarning, stacklevel=2)


def extracted(
    dense: nn.Module,
    data: Datasets,
    recipe: Recipe,
    snapshot: WeightSnapshot | None = None,
    progress: bool = False,
) -> tuple[Extraction, tuple[Trial, ...]]:
    """Prune a copy of a model as a recipe says, once or in turns, mask synapses, and fine-tune.

    Args:
        dense: The model; left as it was found.
        data: Its data.
        recipe: What to do.
        snapshot: Its weights before training, for criteria that need them.
        progress: Whether to show progress bars.

    Returns:
        The finished cut, and what a search within a budget tried.

    Raises:
        NNSError: If nothing in the model can be pruned, or the data or the recipe cannot be used.
    """
    trials: tuple[Trial, ...] = ()
    if data.validation is None and (
        recipe.calibrate_head or recipe.max_balanced_accuracy_drop is not None or recipe.has_target
    ):
        warnings.warn(
            "there is no validation data: decisions are made on the calibration data, which the head was fitted on",
            CalibrationDataWarning,
            stacklevel=2,
        )

    def tune(extraction: Extraction) -> None:
        """Fine-tune in place; what "other" was calibrated to has moved by then."""
        _train(extraction.model, data, recipe, "fine_tune", extraction.outputs, progress)
        if recipe.calibrate_head:
            with stage("data.validation"):
                calibrate_head(extraction, data.decisive, progress)

    if recipe.iterative is not None:
        extraction = iterative_extraction(dense, data, recipe, recipe.iterative, tune, progress)
    else:
        extraction, trials = extract_from(dense, data, recipe, snapshot=snapshot, progress=progress)
    with masked_synapses(extraction, recipe.synapses):
        if recipe.fine_tune.epochs and (recipe.iterative is None or recipe.synapses is not None):
            tune(extraction)
    _check_runs(extraction.model, data.example_inputs, len(extraction.outputs))
    return extraction, trials


def _prove(
    recipe: Recipe,
    data: Datasets,
    dense: nn.Module,
    extraction: Extraction,
    trials: tuple[Trial, ...],
    staging: Path,
    progress: bool,
) -> Report:
    everything: tuple[int | None, ...] = tuple(range(len(data.label_names)))
    settings = recipe.measure
    batch = _test_inputs(data, settings.batch)
    reports: dict[str, ModelReport] = {}
    raw: dict[str, NDArray[Any]] = {}
    answers: dict[str, Outputs] = {}
    truth: Tensor | None = None
    subnet = Subnet.of(extraction, data.label_names, provenance(dense, recipe, extraction, trials, _training(recipe)))
    pair = (("baseline", dense, everything), ("subnet", extraction.model, extraction.outputs))
    names = {"baseline": data.label_names, "subnet": subnet.output_names}
    for name, model, outputs in tqdm(pair, desc="exporting and evaluating", disable=not progress, leave=False):
        path = staging / f"{name}.onnx"
        export(model, data.example_inputs, path, label_names=names[name], opset=recipe.export.opset)
        with stage("data.test"):
            logits, truth = predict(model, data.test, progress, truth)
        raw[name] = logits.numpy()
        answers[name] = comparable_outputs(logits, outputs, extraction.labels, extraction.outputs)
        evaluation = evaluate(
            answers[name][0],
            truth,
            answers[name][1],
            extraction.labels,
            data.label_names,
            settings.resamples,
            recipe.seed,
        )
        reports[name] = ModelReport.of(
            evaluation=evaluation,
            counts=count_macs(model, data.example_inputs),
            path=path,
            outputs=names[name],
            parity=check_parity(
                model,
                path,
                _test_inputs(data, 64),
                rtol=settings.rtol,
                atol=settings.atol,
                provider=settings.provider,
            ),
        )
    latency = measure_latency(
        {name: staging / f"{name}.onnx" for name in reports},
        batch,
        LatencyOptions(
            samples=settings.samples, threads=settings.threads, provider=settings.provider, seed=recipe.seed
        ),
        progress=progress,
    )
    assert truth is not None
    drop, drop_limits = _drop(reports, answers, truth, extraction.labels, data.label_names, recipe)
    report = Report(
        recipe=recipe.model_dump(mode="json"),
        labels=tuple(data.label_names[label] for label in extraction.labels),
        units={group.name: group.size for group in extraction.groups},
        kept_units={name: tuple(units.tolist()) for name, units in extraction.kept.items()},
        trials=trials,
        target_met=_target_met(recipe, latency),
        balanced_accuracy_drop=drop,
        balanced_accuracy_drop_interval=drop_limits,
        baseline=reports["baseline"],
        subnet=reports["subnet"],
        removal=_removal(recipe, data, dense, extraction, subnet),
        pruning=label_parity(
            raw["baseline"],
            raw["subnet"],
            extraction.outputs,
            ("dense model", "subnet"),
            rtol=settings.rtol,
            atol=settings.atol,
        ),
        latency=latency,
        environment={"machine": asdict(machine()), "onnxruntime": runtime_build()},
        versions=versions(),
    )
    subnet.save(staging / "subnet.safetensors")
    (staging / "report.json").write_text(json.dumps(report.to_dict(), indent=2) + "\n", encoding="utf-8")
    return report


def _removal(recipe: Recipe, data: Datasets, dense: nn.Module, extraction: Extraction, subnet: Subnet) -> ParityReport:
    """How far the small model's outputs are from those of the wide one in which the removed units are masked."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", InexactMaskWarning)  # the report says it in numbers
        masked = subnet.mask(dense, data.example_inputs)
    settings = recipe.measure
    return check_removal(masked, extraction.model, _test_inputs(data, 64), rtol=settings.rtol, atol=settings.atol)


def _target_met(recipe: Recipe, latency: LatencyComparison) -> bool | None:
    """Whether the finished subnet, measured again, is as fast as it was to be."""
    if not recipe.has_target:
        return None
    return Target(recipe.target_latency_ms, recipe.target_speedup).is_met(latency)


def _training(recipe: Recipe) -> dict[str, Any]:
    """What a recipe does to the weights of a subnet after it was cut."""
    found: dict[str, Any] = {"fine_tune": recipe.fine_tune.epochs} if recipe.fine_tune.epochs else {}
    for name in ("iterative", "synapses"):
        section = getattr(recipe, name)
        if section is not None:
            found[name] = section.model_dump()
    return found


def _drop(
    reports: Mapping[str, ModelReport],
    answers: Mapping[str, Outputs],
    truth: Tensor,
    labels: Sequence[int],
    names: Sequence[str],
    recipe: Recipe,
) -> tuple[float | None, Interval | None]:
    """What the subnet loses of the mean balanced accuracy, and the interval of that."""
    before, after = (reports[name].evaluation.mean_balanced_accuracy for name in ("baseline", "subnet"))
    if before is None or after is None:
        return None, None
    resamples = recipe.measure.resamples
    if not resamples:
        return before - after, None
    lost = drops(answers["baseline"], answers["subnet"], truth, labels, names, resamples, recipe.seed)
    return before - after, interval(lost.mean_balanced_accuracy)


def _dense_model(recipe: Recipe, data: Datasets, progress: bool) -> tuple[nn.Module, WeightSnapshot | None]:
    """The trained model, and its weights before training if the criterion needs them."""
    section = recipe.model
    model = call_factory("model.factory", section.factory, section.arguments)
    if not isinstance(model, nn.Module):
        raise RecipeError(
            f"model.factory: {section.factory} returned a {type(model).__name__}; expected a torch module"
        )
    if section.checkpoint is not None:
        load_checkpoint(model, section.checkpoint)
    snapshot = None
    if "snapshot" in needs_of(criterion_class(recipe)).requires:
        if section.initial is not None:
            snapshot = WeightSnapshot.load(section.initial)
        elif recipe.train.epochs:
            snapshot = WeightSnapshot(model)
    if recipe.train.epochs:
        _train(model, data, recipe, "train", tuple(range(len(data.label_names))), progress)
    model.eval()
    _check_runs(model, data.example_inputs, len(data.label_names))
    return model, snapshot


def _train(
    model: nn.Module, data: Datasets, recipe: Recipe, field: str, outputs: Sequence[int | None], progress: bool
) -> None:
    if data.train is None:
        raise RecipeError(f"{field}.epochs: the data factory returned no train data; expected some, or 0 epochs")
    section = getattr(recipe, field)
    other = outputs.index(None) if None in outputs else -1
    targets = [outputs.index(label) if label in outputs else other for label in range(len(data.label_names))]
    with stage("data.train"):
        train_classifier(
            model,
            data.train,
            epochs=section.epochs,
            learning_rate=section.learning_rate,
            weight_decay=section.weight_decay,
            target_of_label=torch.tensor(targets),
            title="training" if field == "train" else "fine-tuning",
            progress=progress,
        )


def _check_runs(model: nn.Module, example_inputs: Any, outputs: int) -> None:
    with preserved(model), torch.no_grad():
        model.eval()
        try:
            found = run_model(model, to_device(example_inputs, device_of(model)))
        except Exception as error:
            raise PruningError(
                f"the model cannot run on the example inputs: {type(error).__name__}: {' '.join(str(error).split())}"
            ) from error
    if not isinstance(found, Tensor) or found.dim() != 2 or found.shape[1] != outputs:
        shape = list(found.shape) if isinstance(found, Tensor) else type(found).__name__
        raise PruningError(
            f"the model gives {shape} for the example inputs; expected [N, {outputs}], one column a label"
        )


def _test_inputs(data: Datasets, count: int) -> Any:
    """The first inputs of the test data, repeated if they are too few."""
    with stage("data.test"):
        batch = next(batches(data.test, name="test loader"))

    return repeated(batch.inputs, count)
