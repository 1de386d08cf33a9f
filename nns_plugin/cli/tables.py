"""Tables for the terminal."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from rich.markup import escape
from rich.table import Table

from nns_plugin.jobs.recipe import CONFIDENCE

if TYPE_CHECKING:  # the report needs the extra onnx, other commands do not
    from nns_plugin.environment import Host
    from nns_plugin.jobs.reports import Report
    from nns_plugin.jobs.sweep import Sweep
    from nns_plugin.subnets.provenance import Trial


def comparison(report: Report) -> Table:
    """Size, accuracy and latency of the dense model beside the subnet."""
    table = Table(
        title=escape(f"labels {', '.join(report.labels)} on {report.subnet.evaluation.inputs} held-out inputs")
    )
    for column in ("", "dense", "subnet", "dense / subnet"):
        table.add_column(column, justify="left" if not column else "right")
    dense, subnet, latency = report.baseline, report.subnet, report.latency
    for name, field in (
        ("parameters", "parameters"),
        ("MACs for one input", "macs"),
        ("ONNX file, bytes", "file_bytes"),
    ):
        left, right = getattr(dense, field), getattr(subnet, field)
        table.add_row(name, f"{left:,}", f"{right:,}", f"{left / right:.2f}")
    for name, left, right in (
        ("p50", latency.baseline.p50_ms, latency.candidate.p50_ms),
        ("p90", latency.baseline.p90_ms, latency.candidate.p90_ms),
    ):
        if left is not None and right is not None:
            interval = f" [{latency.ratio_low:.2f}, {latency.ratio_high:.2f}]" if name == "p50" else ""
            ratio = latency.ratio if name == "p50" else left / right
            table.add_row(f"latency {name}, ms", f"{left:.4f}", f"{right:.4f}", f"{ratio:.2f}{interval}")
    for name, field in (
        ("mean balanced accuracy, %", "mean_balanced_accuracy"),
        ("closed-set accuracy, %", "closed_set_accuracy"),
        ("open-set accuracy, %", "open_set_accuracy"),
    ):
        cells = [
            _percent(getattr(evaluation, field)) + _limits(evaluation.intervals.get(field))
            for evaluation in (dense.evaluation, subnet.evaluation)
        ]
        table.add_row(name, *cells, "")
    if report.balanced_accuracy_drop is not None:
        drop = 100 * report.balanced_accuracy_drop
        table.add_row("  lost, points", "", f"{drop:.1f}" + _limits(report.balanced_accuracy_drop_interval), "")
    table.add_row(
        "largest error of ONNX", f"{dense.parity.max_absolute_error:.1e}", f"{subnet.parity.max_absolute_error:.1e}", ""
    )
    table.add_row("parity with torch", *("pass" if model.parity.passed else "FAIL" for model in (dense, subnet)), "")
    removal, pruning = report.removal, report.pruning
    table.add_row("  with masks", "", "pass" if removal.passed else f"off by {removal.max_absolute_error:.1e}", "")
    if pruning.top1_agreement is not None:
        table.add_row("same answer as dense, %", "", _percent(pruning.top1_agreement), "")
    table.caption = (
        f"latency: batch {latency.batch}, {latency.conditions}; [95 % interval], accuracies over resampled inputs"
    )
    return table


def per_label(report: Report) -> Table:
    """Recall, false-positive rate, precision, balanced accuracy and AUROC of each label, dense above subnet."""
    table = Table(title="per label, %")
    table.add_column("label")
    table.add_column("model")
    for column in ("inputs", "recall", "false pos.", "precision", "F1", "balanced acc.", "AUROC"):
        table.add_column(column, justify="right")
    models = (("dense", report.baseline), ("subnet", report.subnet))
    for place, label in enumerate(report.labels):
        for name, model in models:
            result = model.evaluation.labels[place]
            values = (
                result.recall,
                result.false_positive_rate,
                result.precision,
                result.f1,
            )
            balanced = _percent(result.balanced_accuracy) + _limits(result.intervals.get("balanced_accuracy"))
            first = name == models[0][0]
            cells = (str(result.inputs), *map(_percent, values), balanced, _percent(result.auroc))
            table.add_row(escape(label) if first else "", name, *cells, end_section=not first)
    table.caption = (
        f"false pos.: share of all other inputs answered with the label; worst label of the subnet: "
        f"{escape(report.subnet.evaluation.worst_label)}"
    )
    return table


def trials(report: Report) -> Table:
    """What a search within a budget, or for a latency, tried, in order."""
    timed = any(trial.latency_ms is not None for trial in report.trials)
    what = "that is fast enough" if timed else "within the budget"
    table = Table(title=f"search for the {'best' if timed else 'smallest'} subnet {what}, on the data that decides")
    bound = f"drop at {100 * (report.recipe['confidence'] or CONFIDENCE):g} % at most, points"
    timing = ("rounded to", "p50, ms", "times as fast", "at least") if timed else ()
    for column in ("units removed, %", *timing, "parameters", "mean balanced accuracy, %", bound, ""):
        table.add_column(column, justify="right")
    for trial in report.trials:
        times = (trial.latency_ms, trial.speedup, trial.speedup_low)
        shown = [str(trial.round_to), *(_number(value) for value in times)] if timed else []
        table.add_row(
            f"{100 * trial.ratio:.1f}",
            *shown,
            f"{trial.parameters:,}",
            "" if trial.balanced_accuracy is None else _percent(trial.balanced_accuracy),
            "" if trial.drop_bound is None else f"{100 * trial.drop_bound:.1f}",
            _within(trial),
        )
    if timed:
        table.caption = "without an accuracy: measured without compensation, to see how fast such a subnet is"
    return table


def _within(trial: Trial) -> str:
    if trial.within:
        return "within"
    return "fast enough" if trial.is_fast_enough else ""


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def kept_units_table(report: Report) -> Table:
    """How many units of each group are left."""
    table = Table(title="units")
    table.add_column("group")
    for column in ("dense", "kept"):
        table.add_column(column, justify="right")
    for name, size in report.units.items():
        table.add_row(
            escape(name), str(size), str(len(report.kept_units[name])) if name in report.kept_units else "all"
        )
    return table


def hosts(found: Iterable[Host]) -> Table:
    """Versions of the hosts, and how to install what is missing."""
    table = Table(title="hosts")
    for column in ("package", "version", "to install"):
        table.add_column(column, overflow="fold")
    for host in found:
        table.add_row(host.name, host.version or "missing", escape(host.install))
    return table


def providers(found: Mapping[str, list[str]]) -> Table:
    """Execution providers that were asked for, and those that the session got."""
    table = Table(title="ONNX Runtime execution providers")
    for column in ("asked for", "the session gets"):
        table.add_column(column, overflow="fold")
    for asked, got in found.items():
        table.add_row(asked, ", ".join(got))
    return table


def _limits(limits: tuple[float, float] | None) -> str:
    return "" if limits is None else escape(f" [{100 * limits[0]:.1f}, {100 * limits[1]:.1f}]")


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}"


def sweep(found: Sweep) -> Table:
    """Trials of a sweep, the fastest first; those that nothing beats are marked."""
    table = Table(title=f"{len(found.trials)} of {found.planned} trials; * nothing is as accurate and as fast")
    fields = list(dict.fromkeys(field for trial in found.trials for field in trial.parameters))
    for column in ("trial", *fields, "balanced acc., %", "lost, points", "latency p50, ms", "speed-up", "parameters"):
        table.add_column(escape(column), justify="left" if column in fields else "right")
    front = {trial.number for trial in found.pareto}
    for trial in sorted(found.trials, key=lambda trial: (trial.point is None, (trial.point or (0, 0))[1])):
        chosen = [escape(str(trial.parameters.get(field, ""))) for field in fields]
        name = f"{trial.number}{' *' if trial.number in front else '  '}"
        if trial.numbers is None:
            table.add_row(name, *chosen, escape(f"failed: {trial.error}"))
            continue
        values = trial.numbers
        formats = (("balanced_accuracy", 100, ".1f"), ("lost", 100, ".1f"), ("latency_ms", 1, ".4f"))
        cells = [_cell(values.get(key), scale, form) for key, scale, form in formats]
        cells += [_cell(values.get("speed_up"), 1, ".2f"), _cell(values.get("parameters"), 1, ",.0f")]
        table.add_row(name, *chosen, *cells)
    return table


def _cell(value: float | None, scale: float, form: str) -> str:
    return "" if value is None else format(scale * value, form)
