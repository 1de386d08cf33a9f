"""The figures of a job: activity, overlap, integration and size, measured on the job's data."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from nns_plugin.adapters.torch_pruning.groups import unit_groups
from nns_plugin.criteria import Semantic, score_groups
from nns_plugin.evaluation.evaluation import comparable_outputs, evaluate
from nns_plugin.evaluation.prediction import predict
from nns_plugin.jobs.data import Datasets
from nns_plugin.jobs.extraction import Sources, extract, provenance
from nns_plugin.jobs.figures import activity_figure, integration_figure, overlap_figure, size_figure
from nns_plugin.jobs.job import Job
from nns_plugin.jobs.stages import stage
from nns_plugin.labels import LabelSet
from nns_plugin.statistics.calibration import calibrate
from nns_plugin.statistics.statistics import Statistics
from nns_plugin.subnets.integration import integrate
from nns_plugin.subnets.options import ExtractionOptions
from nns_plugin.subnets.subnet import Subnet

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ZETA = 0.4  # the threshold of the source paper
MAX_LABELS = 20
# What makes options of a search those of a single extraction.
UNDECIDED: dict[str, Any] = dict.fromkeys(
    ("max_balanced_accuracy_drop", "confidence", "target_latency_ms", "target_speedup", "roundings")
)
RATIOS = (0.0, 0.25, 0.5, 0.7, 0.8, 0.9, 0.95)


def job_figures(job: Job) -> Iterator[tuple[str, Figure]]:
    """The figures of a job, one by one, with their names.

    They show the activity of each group's units, the overlap of the single-label subnets and the accuracy of their
    integration (for at least two labels), and balanced accuracy against size. Accuracies are on the test data.

    Args:
        job: The job; its dense model is left as it was found.
    """
    data, dense, options, progress = job.data, job.dense, job.options, job.progress
    names = data.label_names
    groups = unit_groups(dense, data.example_inputs, options.ignored_layers)
    with stage("data.calibration"):
        statistics = calibrate(dense, data.calibration, groups, labels=names, gram=True, progress=progress)
    sources = replace(job.sources, statistics=statistics)
    known = sorted(_calibrated(statistics))
    for name, activity in _activities(statistics, known).items():
        file = re.sub(r"[^A-Za-z0-9_.-]", "_", name)
        rows = [names[label] for label in known]
        yield f"activity-{file}", activity_figure(activity, rows, _threshold(options, activity), name)
    labels = job.labels.indices
    with stage("data.test"):
        logits, truth = predict(dense, data.test)
    whole = tuple(range(len(names)))
    shown = [*labels, *(label for label in whole if label not in labels)]
    tested = set(truth.tolist())
    shown = [label for label in shown if label in known and label in tested][:MAX_LABELS]
    if len(shown) > 1 and options.angle is None:
        singles = [
            _subnet(dense, sources, _alone(options, names[label]), names)
            for label in tqdm(shown, desc="single labels", disable=not progress, leave=False)
        ]
        yield "overlap", overlap_figure({names[label]: each.kept for label, each in zip(shown, singles, strict=True)})
        steps = _integrated(singles, data, dense, statistics, progress)
        every = evaluate(logits, truth, whole, shown, names).labels
        yield "integration", integration_figure(steps, {each.label: each.balanced_accuracy or 0.0 for each in every})
    points = []
    for ratio in tqdm(RATIOS, desc="sizes", disable=not progress, leave=False):
        fixed = replace(options, **{**UNDECIDED, "zeta": None, "angle": None, "config_list": None, "ratio": ratio})
        subnet = _subnet(dense, sources, fixed, names)
        columns, seen = comparable_outputs(logits, whole, subnet.labels.indices, subnet.labels.outputs)
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


def _alone(options: ExtractionOptions, label: str) -> ExtractionOptions:
    """The same for a single label, with a head that can reject inputs, and without a search."""
    head = "open" if options.effective_head == "closed" else options.head
    return replace(options, **UNDECIDED, labels=(label,), head=head)


def _threshold(options: ExtractionOptions, activity: Tensor) -> float:
    """The activity below which a label does not need a unit: zeta, or the quantile that the ratio removes."""
    if options.zeta is not None or options.ratio is None:
        return ZETA if options.zeta is None else options.zeta
    return float(activity.flatten().quantile(options.ratio))


def _activities(statistics: Statistics, labels: Sequence[int]) -> dict[str, Tensor]:
    """For each observed group, the relative activity of its units on each label, ``[L, U]``."""
    rows: dict[str, list[Tensor]] = {}
    for label in labels:
        for name, scores in score_groups(Semantic(statistics, [label]), statistics.groups).items():
            rows.setdefault(name, []).append(scores)
    return {name: torch.stack(scores) for name, scores in rows.items()}


def _subnet(dense: nn.Module, sources: Sources, options: ExtractionOptions, names: Sequence[str]) -> Subnet:
    extraction, _ = extract(dense, sources, options, LabelSet.of(names, options.labels))
    return Subnet.of(extraction, provenance(dense, options, extraction))


def _judge(subnet: Subnet, data: Datasets, dense: nn.Module) -> float | None:
    """The mean balanced accuracy of a subnet on the test data."""
    small = subnet.materialise(lambda: copy.deepcopy(dense), data.example_inputs)
    logits, truth = predict(small, data.test)
    return evaluate(
        logits, truth, subnet.labels.outputs, subnet.labels.indices, data.label_names
    ).mean_balanced_accuracy


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
        found = evaluate(logits, truth, subnet.labels.outputs, subnet.labels.indices, data.label_names)
        known = {each.label: each.balanced_accuracy or 0.0 for each in found.labels}
        order = [data.label_names[single.labels.indices[0]] for single in singles[:count]]
        steps.append({name: known[name] for name in order})
    return steps
