"""The figures of a job: activity, overlap, integration and size, measured on the job's data."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from nns_plugin.adapters.torch_pruning.groups import unit_groups
from nns_plugin.criteria import Semantic, score_groups
from nns_plugin.evaluation.evaluation import comparable_outputs, evaluate
from nns_plugin.evaluation.prediction import predict
from nns_plugin.jobs.data import Datasets
from nns_plugin.jobs.extraction import chosen_labels, extract_from, provenance, stage
from nns_plugin.jobs.figures import activity_figure, integration_figure, overlap_figure, size_figure
from nns_plugin.jobs.recipe import Recipe
from nns_plugin.statistics.calibration import calibrate
from nns_plugin.statistics.statistics import Statistics
from nns_plugin.subnets.integration import integrate
from nns_plugin.subnets.subnet import Subnet
from nns_plugin.synapses.snapshot import WeightSnapshot

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ZETA = 0.4  # the threshold of the source paper
MAX_LABELS = 20
RATIOS = (0.0, 0.25, 0.5, 0.7, 0.8, 0.9, 0.95)


def job_figures(
    recipe: Recipe,
    data: Datasets,
    dense: nn.Module,
    snapshot: WeightSnapshot | None = None,
    progress: bool = False,
) -> Iterator[tuple[str, Figure]]:
    """The figures of a job, one by one, with their names.

    They show the activity of each group's units, the overlap of the single-label subnets and the accuracy of their
    integration (for at least two labels), and balanced accuracy against size. Accuracies are on the test data.

    Args:
        recipe: How subnets are extracted.
        data: The job's data.
        dense: The dense model; left as it was found.
        snapshot: Its weights before training, for criteria that need them.
        progress: Whether to show progress bars.
    """
    names = data.label_names
    groups = unit_groups(dense, data.example_inputs, recipe.ignored_layers)
    with stage("data.calibration"):
        statistics = calibrate(dense, data.calibration, groups, labels=names, gram=True, progress=progress)
    known = sorted(_calibrated(statistics))
    for name, activity in _activities(statistics, known).items():
        file = re.sub(r"[^A-Za-z0-9_.-]", "_", name)
        rows = [names[label] for label in known]
        yield f"activity-{file}", activity_figure(activity, rows, _threshold(recipe, activity), name)
    labels = chosen_labels(recipe, names) or list(range(len(names)))
    with stage("data.test"):
        logits, truth = predict(dense, data.test)
    whole = tuple(range(len(names)))
    shown = [*labels, *(label for label in whole if label not in labels)]
    tested = set(truth.tolist())
    shown = [label for label in shown if label in known and label in tested][:MAX_LABELS]
    if len(shown) > 1 and recipe.angle is None:
        singles = [
            _subnet(recipe.model_copy(update=_alone(recipe, names[label])), data, dense, statistics, snapshot)
            for label in tqdm(shown, desc="single labels", disable=not progress, leave=False)
        ]
        yield "overlap", overlap_figure({names[label]: each.kept for label, each in zip(shown, singles, strict=True)})
        steps = _integrated(singles, data, dense, statistics, progress)
        every = evaluate(logits, truth, whole, shown, names).labels
        yield "integration", integration_figure(steps, {each.label: each.balanced_accuracy or 0.0 for each in every})
    points = []
    for ratio in tqdm(RATIOS, desc="sizes", disable=not progress, leave=False):
        fixed = {"ratio": ratio, "zeta": None, "angle": None, "max_balanced_accuracy_drop": None, "confidence": None}
        subnet = _subnet(recipe.model_copy(update=fixed), data, dense, statistics, snapshot)
        columns, seen = comparable_outputs(logits, whole, subnet.labels, subnet.outputs)
        before = evaluate(columns, truth, seen, labels, names).mean_balanced_accuracy
        after = _judge(subnet, data, dense)
        if before is not None and after is not None:
            points.append((float(sum(units.numel() for units in subnet.kept.values())), before, after))
    if points:
        curve = [(units, after) for units, _, after in points]
        title = f"{', '.join(names[label] for label in labels[:4])}{', ...' if len(labels) > 4 else ''}"
        yield "size", size_figure({title: curve}, points[0][1], sum(group.size for group in groups))


def _calibrated(statistics: Statistics) -> set[int]:
    """Labels that have inputs in the calibration data."""
    inputs = next(iter(statistics.records.values())).inputs
    return {label for label, count in enumerate(inputs.tolist()) if count}


def _alone(recipe: Recipe, label: str) -> dict[str, Any]:
    """The changes that turn a recipe into one for a single label, with a head that can reject inputs."""
    head = "open" if recipe.effective_head == "closed" else recipe.head
    return {"labels": [label], "max_balanced_accuracy_drop": None, "confidence": None, "head": head}


def _threshold(recipe: Recipe, activity: Tensor) -> float:
    """The activity below which a label does not need a unit: zeta, or the quantile that the ratio removes."""
    if recipe.zeta is not None or recipe.ratio is None:
        return ZETA if recipe.zeta is None else recipe.zeta
    return float(activity.flatten().quantile(recipe.ratio))


def _activities(statistics: Statistics, labels: Sequence[int]) -> dict[str, Tensor]:
    """For each observed group, the relative activity of its units on each label, ``[L, U]``."""
    rows: dict[str, list[Tensor]] = {}
    for label in labels:
        for name, scores in score_groups(Semantic(statistics, [label]), statistics.groups).items():
            rows.setdefault(name, []).append(scores)
    return {name: torch.stack(scores) for name, scores in rows.items()}


def _subnet(
    recipe: Recipe, data: Datasets, dense: nn.Module, statistics: Statistics, snapshot: WeightSnapshot | None
) -> Subnet:
    extraction, _ = extract_from(dense, data, recipe, statistics=statistics, snapshot=snapshot)
    return Subnet.of(extraction, data.label_names, provenance(dense, recipe, extraction))


def _judge(subnet: Subnet, data: Datasets, dense: nn.Module) -> float | None:
    """The mean balanced accuracy of a subnet on the test data."""
    small = subnet.materialise(lambda: copy.deepcopy(dense), data.example_inputs)
    logits, truth = predict(small, data.test)
    return evaluate(logits, truth, subnet.outputs, subnet.labels, data.label_names).mean_balanced_accuracy


def _integrated(
    singles: Sequence[Subnet], data: Datasets, dense: nn.Module, statistics: Statistics, progress: bool
) -> list[Mapping[str, float]]:
    """Balanced accuracy of each label after each integration."""
    steps: list[Mapping[str, float]] = []
    for count in tqdm(range(1, len(singles) + 1), desc="integrating", disable=not progress, leave=False):
        subnet = integrate(
            singles[:count], dense, statistics, loader=data.calibration, example_inputs=data.example_inputs
        )
        small = subnet.materialise(lambda: copy.deepcopy(dense), data.example_inputs)
        logits, truth = predict(small, data.test)
        found = evaluate(logits, truth, subnet.outputs, subnet.labels, data.label_names)
        known = {each.label: each.balanced_accuracy or 0.0 for each in found.labels}
        order = [data.label_names[single.labels[0]] for single in singles[:count]]
        steps.append({name: known[name] for name in order})
    return steps
