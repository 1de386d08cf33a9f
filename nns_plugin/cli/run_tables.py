"""Tables of ``nns run``: the search, the subnet beside the dense model, each label, and the kept units."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from rich.markup import escape
from rich.table import Table

from nns_plugin.cli.formats import interval, new_table, number, percent

if TYPE_CHECKING:  # so that --help imports no torch
    from nns_plugin.jobs.reports import Report
    from nns_plugin.subnets.provenance import Trial

SIZES = (("parameters", "parameters"), ("MACs per input", "macs"), ("ONNX file, bytes", "file_bytes"))
ACCURACIES = (
    ("mean balanced accuracy, %", "mean_balanced_accuracy"),
    ("closed-set accuracy, %", "closed_set_accuracy"),
    ("open-set accuracy, %", "open_set_accuracy"),
)


def tables(report: Report) -> Iterator[Table]:
    """All tables of a job; that of the search only if there was one."""
    if report.trials:
        yield _trials(report)
    yield _comparison(report)
    yield _per_label(report)
    yield _kept_units(report)


def _trials(report: Report) -> Table:
    """Every trial of the search, in order."""
    from nns_plugin.subnets.options import CONFIDENCE

    timed = any(trial.latency_ms is not None for trial in report.trials)
    goal = "most accurate subnet that is fast enough" if timed else "smallest subnet within the budget"
    timing = ("rounded to", "p50 latency, ms", "speed-up", "lower bound") if timed else ()
    bound = f"drop at most, points ({100 * (report.recipe['confidence'] or CONFIDENCE):g} % confidence)"
    columns = ("units removed, %", *timing, "parameters", "mean balanced accuracy, %", bound, "")
    table = new_table(f"search for the {goal}", (), columns)
    for trial in report.trials:
        times = (trial.latency_ms, trial.speedup, trial.speedup_low)
        table.add_row(
            percent(trial.ratio),
            *([str(trial.round_to), *(number(value, ".4g") for value in times)] if timed else []),
            f"{trial.parameters:,}",
            "" if trial.balanced_accuracy is None else percent(trial.balanced_accuracy),
            "" if trial.drop_bound is None else percent(trial.drop_bound),
            _status(trial),
        )
    table.caption = "accuracies on the validation data, or on the calibration data if there are none"
    if timed:
        table.caption += "; rows without accuracy: the latency of an uncompensated subnet of that size"
    return table


def _status(trial: Trial) -> str:
    if trial.within:
        return "within"
    return "fast enough" if trial.is_fast_enough else ""


def _comparison(report: Report) -> Table:
    """Size, accuracy and latency of the dense model beside the subnet."""
    title = f"labels {', '.join(report.labels)} on {report.subnet.evaluation.inputs} held-out inputs"
    table = new_table(title, ("",), ("dense", "subnet", "dense / subnet"))
    dense, subnet, latency = report.baseline, report.subnet, report.latency
    for name, field in SIZES:
        left, right = getattr(dense, field), getattr(subnet, field)
        table.add_row(name, f"{left:,}", f"{right:,}", f"{left / right:.2f}")
    for name in ("p50", "p90"):
        left, right = (getattr(model, f"{name}_ms") for model in (latency.baseline, latency.candidate))
        if left is not None and right is not None:
            limits = f" [{latency.ratio_low:.2f}, {latency.ratio_high:.2f}]" if name == "p50" else ""
            ratio = latency.ratio if name == "p50" else left / right
            table.add_row(f"{name} latency, ms", f"{left:.4f}", f"{right:.4f}", f"{ratio:.2f}{escape(limits)}")
    for name, field in ACCURACIES:
        cells = [
            percent(getattr(evaluation, field)) + interval(evaluation.intervals.get(field))
            for evaluation in (dense.evaluation, subnet.evaluation)
        ]
        table.add_row(name, *cells, "")
    if report.balanced_accuracy_drop is not None:
        drop = percent(report.balanced_accuracy_drop) + interval(report.balanced_accuracy_drop_interval)
        table.add_row("  drop, points", "", drop, "")
    table.add_row("largest error of ONNX", *(f"{each.parity.max_absolute_error:.1e}" for each in (dense, subnet)), "")
    table.add_row("parity with torch", *("pass" if each.parity.passed else "FAIL" for each in (dense, subnet)), "")
    removal, pruning = report.removal, report.pruning
    differs = f"differs by {removal.max_absolute_error:.1e}"
    table.add_row("parity with the masked model", "", "pass" if removal.passed else differs, "")
    if pruning.top1_agreement is not None:
        table.add_row("top-1 agreement with dense, %", "", percent(pruning.top1_agreement), "")
    table.caption = escape(
        f"latency: batch {latency.batch}, {latency.conditions}; [95 % intervals], for accuracies by bootstrap"
    )
    return table


def _per_label(report: Report) -> Table:
    """Recall, false-positive rate, precision, balanced accuracy and AUROC of each label, dense above subnet."""
    columns = ("inputs", "recall", "FPR", "precision", "F1", "bal. acc.", "AUROC")
    table = new_table("per label, %", ("label", "model"), columns)
    for place, label in enumerate(report.labels):
        for name, model in (("dense", report.baseline), ("subnet", report.subnet)):
            result = model.evaluation.labels[place]
            values = (result.recall, result.false_positive_rate, result.precision, result.f1)
            balanced = percent(result.balanced_accuracy) + interval(result.intervals.get("balanced_accuracy"))
            cells = (str(result.inputs), *map(percent, values), balanced, percent(result.auroc))
            first = name == "dense"
            table.add_row(escape(label) if first else "", name, *cells, end_section=not first)
    worst = escape(report.subnet.evaluation.worst_label)
    table.caption = f"FPR: share of all other inputs classified as the label; worst label of the subnet: {worst}"
    return table


def _kept_units(report: Report) -> Table:
    table = new_table("units", ("group",), ("dense", "kept"))
    for name, size in report.units.items():
        kept = str(len(report.kept_units[name])) if name in report.kept_units else "all"
        table.add_row(escape(name), str(size), kept)
    return table
