"""The main job: extract what some labels need from a classifier, remove the rest, and prove it."""

from __future__ import annotations

import inspect
import json
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from tqdm.auto import tqdm

from nns_plugin.adapters.compensated import Compensation, compensated_removal
from nns_plugin.adapters.dependency_graph import (
    build_graph,
    graph_groups,
    output_layers,
    resolve_layers,
)
from nns_plugin.adapters.onnxruntime import check_parity, check_provider, export, measure_latency
from nns_plugin.adapters.removals import removals_of
from nns_plugin.adapters.torch_pruning import count_operations
from nns_plugin.circle import copied
from nns_plugin.criteria import find, score_groups
from nns_plugin.criteria.semantic import resolve_label
from nns_plugin.errors import CalibrationError, CriterionError, LabelError, NNSError, PruningError, RecipeError
from nns_plugin.forward import device_of, parse_batch, run_model, to_device
from nns_plugin.heads import OTHER, close_head, fit_other, linear_head, open_head
from nns_plugin.jobs.datasets import Datasets
from nns_plugin.jobs.environment import versions
from nns_plugin.jobs.evaluation import evaluate, predict
from nns_plugin.jobs.output import staged_folder
from nns_plugin.jobs.recipe import Recipe, call_factory
from nns_plugin.jobs.report import ModelReport, Report
from nns_plugin.jobs.training import train_classifier
from nns_plugin.observe import calibrate
from nns_plugin.operations import layer_operations, unit_operations
from nns_plugin.preserve import preserved, preserved_rng
from nns_plugin.selection import AngleRule, keep_by_ratio, keep_by_threshold
from nns_plugin.sensitivity import output_sensitivity
from nns_plugin.statistics import Statistics
from nns_plugin.statistics_file import write_safetensors
from nns_plugin.survivors import Survivors, survivors_of
from nns_plugin.taps import collect_inputs
from nns_plugin.units import UnitGroup

EVIDENCE = ("statistics", "model")
FILES = ("baseline.onnx", "subnet.onnx", "subnet.safetensors", "report.json")


@dataclass(frozen=True, eq=False)
class Pruned:
    """A pruned copy of a model.

    Attributes:
        model: The smaller model.
        groups: The unit groups of the model that it was made from.
        kept: For each pruned group's name the kept units, ``[k]`` int64.
        outputs: The label of each output; ``None`` for "other".
    """

    model: nn.Module
    groups: tuple[UnitGroup, ...]
    kept: Mapping[str, Tensor]
    outputs: tuple[int | None, ...]


def run_job(recipe: Recipe, output: Path, progress: bool = False) -> Report:
    """Do the whole job of a recipe and write its four files.

    Args:
        recipe: What to do.
        output: Folder for ``baseline.onnx``, ``subnet.onnx``, ``subnet.safetensors`` and ``report.json``; made if
            missing. The files appear together at the end, or not at all.
        progress: Whether to show progress bars.

    Returns:
        The report, as written.

    Raises:
        NNSError: If anything is wrong with the recipe, the model, the data or the folder.
    """
    check_provider(recipe.measure.provider)
    criterion_class(recipe)
    with staged_folder(output, FILES) as staging, _seeded(recipe.seed):
        data = Datasets.parse(
            call_factory("data.factory", recipe.data.factory, recipe.data.arguments), recipe.data.factory
        )
        chosen = _chosen(recipe, data.label_names)
        _test_inputs(data, 1)
        dense = _dense_model(recipe, data, progress)
        pruned = extract(dense, data, recipe, chosen, progress)
        return _prove(recipe, data, chosen, dense, pruned, staging, progress)


def extract(
    dense: nn.Module, data: Datasets, recipe: Recipe, chosen: Sequence[int] | None, progress: bool = False
) -> Pruned:
    """Prune a copy of a model as a recipe says.

    It is calibrated, its units are scored, selected and removed, the kept ones take over, batch norms are re-estimated,
    the head is shrunk, and the rest fine-tuned. With compensation the head is shrunk first.

    Args:
        dense: The model; left as it was found.
        data: Its data.
        recipe: What to do.
        chosen: Indices of the labels to keep, ascending; ``None`` for all.
        progress: Whether to show progress bars.

    Raises:
        PruningError: If nothing in the model can be pruned.
    """
    model = copied(dense)
    graph = build_graph(model, data.example_inputs)
    heads = output_layers(graph)
    how = Compensation(
        recipe.effective_method,  # type: ignore[arg-type]
        recipe.compensation.recalibrate,
        recipe.reestimate_batch_norms,
        recipe.compensation.ridge,
        recipe.compensation.max_unfolded,
    )
    outputs = None
    gram = how.method != "none" or getattr(criterion_class(recipe), "needs_gram", False)
    if gram:
        # First, so that a unit counts for what the kept labels do with it, and the survivors take over that.
        outputs = _shrink_head(model, heads, data, recipe, chosen, progress)
        graph = build_graph(model, data.example_inputs)
    groups = graph_groups(graph, resolve_layers(model, recipe.ignored_layers))
    if not groups:
        raise PruningError(
            "nothing in this model can be pruned: no group of units is left beside the output, ignored layers "
            f"({', '.join(recipe.ignored_layers) or 'none'}) and groups that warnings name"
        )
    with stage("data.calibration"):
        statistics = calibrate(model, data.calibration, groups, labels=data.label_names, gram=gram, progress=progress)
    criterion = _criterion(recipe, _evidence(recipe, model, data, statistics, progress), chosen)
    kept, survivors = _selected(recipe, criterion, statistics, groups)
    removals = removals_of(graph, groups, kept)
    compensated_removal(graph, removals, statistics, how, data.calibration, survivors=survivors, progress=progress)
    if outputs is None or None in outputs:
        # The output "other" is fitted to what the features have become.
        outputs = _shrink_head(model, heads, data, recipe, chosen, progress, again=outputs is not None)
    if recipe.fine_tune.epochs:
        _train(model, data, recipe, "fine_tune", outputs, progress)
    _check_runs(model, data.example_inputs, len(outputs))
    return Pruned(model, groups, kept, outputs)


def _prove(
    recipe: Recipe,
    data: Datasets,
    chosen: Sequence[int] | None,
    dense: nn.Module,
    pruned: Pruned,
    staging: Path,
    progress: bool,
) -> Report:
    everything: tuple[int | None, ...] = tuple(range(len(data.label_names)))
    label_set = list(range(len(data.label_names))) if chosen is None else list(chosen)
    settings = recipe.measure
    batch = _test_inputs(data, settings.batch)
    closed = pruned.outputs == tuple(label_set)
    reports = {}
    pair = (("baseline", dense, everything), ("subnet", pruned.model, pruned.outputs))
    for name, model, outputs in tqdm(pair, desc="exporting and evaluating", disable=not progress, leave=False):
        path = staging / f"{name}.onnx"
        names = [OTHER if label is None else data.label_names[label] for label in outputs]
        export(model, data.example_inputs, path, label_names=names, opset=recipe.export.opset)
        with stage("data.test"):
            logits, labels = predict(model, data.test, progress)
        judged = outputs
        if closed:  # the dense model is judged as the subnet is: among the set, on the inputs of the set
            logits, judged = logits[:, [outputs.index(label) for label in label_set]], tuple(label_set)
        reports[name] = ModelReport.of(
            evaluation=evaluate(logits, labels, judged, label_set, data.label_names),
            operations=count_operations(model, data.example_inputs),
            path=path,
            outputs=names,
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
        samples=settings.samples,
        threads=settings.threads,
        provider=settings.provider,
        seed=recipe.seed,
        progress=progress,
    )
    report = Report(
        recipe=recipe.model_dump(mode="json"),
        labels=tuple(data.label_names[label] for label in label_set),
        units={group.name: group.size for group in pruned.groups},
        kept_units={name: tuple(units.tolist()) for name, units in pruned.kept.items()},
        baseline=reports["baseline"],
        subnet=reports["subnet"],
        latency=latency,
        versions=versions(),
    )
    _write(report, pruned, staging)
    return report


def _write(report: Report, pruned: Pruned, staging: Path) -> None:
    header = {
        "labels": report.subnet.outputs,
        "kept_units": report.kept_units,
        "recipe": report.recipe,
        "versions": report.versions,
    }
    metadata = {"format": "nns-plugin subnet weights 1", "nns": json.dumps(header)}
    write_safetensors(pruned.model.state_dict(), metadata, staging / "subnet.safetensors")
    (staging / "report.json").write_text(json.dumps(report.to_dict(), indent=2) + "\n", encoding="utf-8")


def _dense_model(recipe: Recipe, data: Datasets, progress: bool) -> nn.Module:
    section = recipe.model
    model = call_factory("model.factory", section.factory, section.arguments)
    if not isinstance(model, nn.Module):
        raise RecipeError(
            f"model.factory: {section.factory} returned a {type(model).__name__}; expected a torch module"
        )
    if section.checkpoint is not None:
        _load_checkpoint(model, section.checkpoint)
    if recipe.train.epochs:
        _train(model, data, recipe, "train", tuple(range(len(data.label_names))), progress)
    model.eval()
    _check_runs(model, data.example_inputs, len(data.label_names))
    return model


def _load_checkpoint(model: nn.Module, path: Path) -> None:
    try:
        weights = load_file(path)
    except FileNotFoundError as error:
        raise RecipeError(f"model.checkpoint: there is no file {str(path)!r}") from error
    except (OSError, SafetensorError) as error:
        raise RecipeError(f"model.checkpoint: {str(path)!r} is no safetensors file: {error}") from error
    expected = {name: list(value.shape) for name, value in model.state_dict().items()}
    found = {name: list(value.shape) for name, value in weights.items()}
    for name in [*expected, *(name for name in found if name not in expected)]:
        if expected.get(name) != found.get(name):
            raise RecipeError(
                f"model.checkpoint: {str(path)!r} does not fit the model: {name!r} is {found.get(name, 'missing')} in "
                f"the file and {expected.get(name, 'missing')} in the model"
            )
    model.load_state_dict(weights)


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


def criterion_class(recipe: Recipe) -> type[Any]:
    """The criterion that a recipe names, after a look at its options.

    Raises:
        CriterionError: If it needs something that a recipe cannot provide.
        RecipeError: If an option does not exist or contradicts the recipe.
    """
    name, options = recipe.effective_criterion.name, recipe.effective_criterion.options
    criterion = find(str(name))
    missing = [need for need in criterion.requires if need not in EVIDENCE]
    if missing:
        raise CriterionError(f"criterion {name!r} needs {', '.join(missing)}, which a recipe cannot provide")
    taken = {*criterion.requires, *getattr(criterion, "optional", ()), "labels"}
    allowed = [option for option in inspect.signature(criterion).parameters if option not in taken]
    for option in options:
        if option not in allowed:
            raise RecipeError(f"criterion.options: found {option!r}; {name!r} has the options {', '.join(allowed)}")
    return criterion


def _criterion(recipe: Recipe, evidence: Mapping[str, Any], chosen: Sequence[int] | None) -> Any:
    criterion = criterion_class(recipe)
    arguments = {need: evidence[need] for need in criterion.requires} | recipe.effective_criterion.options
    arguments |= {name: evidence[name] for name in getattr(criterion, "optional", ()) if name in evidence}
    if getattr(criterion, "accepts_labels", False):
        arguments["labels"] = chosen
    try:
        return criterion(**arguments)
    except (CriterionError, TypeError, ValueError) as error:
        if isinstance(error, LabelError):
            raise
        raise RecipeError(f"criterion.options: {' '.join(str(error).split())}") from error


def _evidence(
    recipe: Recipe, model: nn.Module, data: Datasets, statistics: Statistics, progress: bool
) -> dict[str, Any]:
    """What a criterion may be built from; the costly parts only where they change something."""
    evidence: dict[str, Any] = {"statistics": statistics, "model": model}
    wanted = getattr(criterion_class(recipe), "optional", ())
    if "sensitivity" in wanted and (recipe.across_groups or recipe.labels is not None):
        with stage("data.calibration"):
            evidence["sensitivity"] = output_sensitivity(model, data.calibration, statistics.groups, progress=progress)
    if "cost" in wanted and recipe.across_groups:
        operations = layer_operations(model, data.example_inputs)
        evidence["cost"] = unit_operations(model, statistics.groups, operations)
    return evidence


def _selected(
    recipe: Recipe, criterion: Any, statistics: Statistics, groups: Sequence[UnitGroup]
) -> tuple[dict[str, Tensor], dict[str, Survivors] | None]:
    """The kept units of each group that can be scored, and after a selection by angles who takes over from whom."""
    if recipe.angle is not None:
        rule = AngleRule(recipe.angle.similar, recipe.angle.complementary, recipe.angle.complement)
        selections = criterion.select(groups, rule)
        survivors = survivors_of(statistics, groups, selections, recipe.angle.merge, criterion.center)
        return {name: selection.kept for name, selection in selections.items()}, survivors
    scores = score_groups(criterion, groups)
    if recipe.zeta is not None:
        return keep_by_threshold(scores, recipe.zeta, round_to=recipe.round_to), None
    ratio = 0.5 if recipe.ratio is None else recipe.ratio
    return keep_by_ratio(scores, ratio, round_to=recipe.round_to, across_groups=recipe.across_groups), None


def _shrink_head(
    model: nn.Module,
    heads: Sequence[str],
    data: Datasets,
    recipe: Recipe,
    chosen: Sequence[int] | None,
    progress: bool,
    again: bool = False,
) -> tuple[int | None, ...]:
    """Keep the chosen labels' outputs, and fit the output "other"; ``again`` if it is there already."""
    if chosen is None or recipe.effective_head == "keep":
        return tuple(range(len(data.label_names)))
    if len(heads) != 1:
        raise PruningError(
            f"the model's outputs are written by {len(heads)} layers ({', '.join(heads) or 'none'}); shrinking the "
            "head needs exactly one: use head 'keep'"
        )
    head = linear_head(model, heads[0])
    if recipe.effective_head == "closed":
        close_head(head, chosen)
        return tuple(chosen)
    features, labels = collect_inputs(model, heads[0], data.calibration, progress)
    if labels is None:
        raise LabelError("head 'open' needs labelled calibration data; it yields inputs alone")
    close_head(head, range(len(chosen)) if again else chosen)
    with torch.no_grad():
        kept_logits = head(features.to(head.weight)).cpu()
    open_head(head, *fit_other(features, kept_logits, ~torch.isin(labels, torch.tensor(chosen))))
    return (*chosen, None)


def _chosen(recipe: Recipe, names: Sequence[str]) -> list[int] | None:
    if recipe.labels is None:
        return None
    for label in recipe.labels:
        if isinstance(label, int) and str(label) in names and names.index(str(label)) != label:
            raise LabelError(
                f"label {label} is ambiguous: it is an index, and the name of label number {names.index(str(label))}; "
                f'write "{label}" for the name'
            )
    return sorted({resolve_label(label, names) for label in recipe.labels})


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
        item = next(iter(data.test), None)
        if item is None:
            raise CalibrationError("the test loader is empty; it must yield at least one batch")
        batch = parse_batch(item, 0)

    def take(tensor: Tensor) -> Tensor:
        repeats = -(-count // tensor.shape[0])
        return torch.cat([tensor] * repeats)[:count]

    if isinstance(batch.inputs, Mapping):
        return {name: take(value) for name, value in batch.inputs.items()}
    if isinstance(batch.inputs, (tuple, list)):
        return tuple(take(value) for value in batch.inputs)
    return take(batch.inputs)


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    with preserved_rng():
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed % 2**32)
        yield


@contextmanager
def stage(field: str) -> Iterator[None]:
    """Name the field of the recipe whose code or data failed.

    Raises:
        RecipeError: For whatever the user's code or data raises that is no error of ours.
    """
    try:
        yield
    except NNSError:
        raise
    except Exception as error:
        text = " ".join(str(error).split())
        raise RecipeError(f"{field}: {type(error).__name__}: {text[:300]}") from error
