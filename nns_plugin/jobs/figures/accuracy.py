"""Figures of accuracy: against integrated labels, against size, and against latency."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from nns_plugin.jobs.figures.canvas import new_figure, plain, require_content, styles

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def integration_figure(accuracy: Sequence[Mapping[str, float]], dense: Mapping[str, float]) -> Figure:
    """Plot the balanced accuracy of each label as label subnets are integrated one by one.

    Args:
        accuracy: For each number of integrated labels, starting at 1, the balanced accuracy of each.
        dense: Balanced accuracy of the dense model on each label.

    Source:
        "NNS: Neural network surgery", table 4 and figure 9.
    """
    require_content(accuracy)
    figure, axes = new_figure(8, 4.8)
    axis = axes[0, 0]
    names = list(accuracy[-1])
    for name, (marker, line) in zip(names, styles(len(names)), strict=True):
        points = [(count, 100 * known[name]) for count, known in enumerate(accuracy, 1) if name in known]
        axis.plot(
            *zip(*points, strict=True), marker=marker, linestyle=line, label=plain(name), markersize=5, linewidth=1
        )
    mean = [100 * float(np.mean(list(known.values()))) for known in accuracy]
    axis.plot(range(1, len(accuracy) + 1), mean, color="black", linewidth=2.5, label="mean")
    before = 100 * float(np.mean([dense[name] for name in names]))
    axis.axhline(before, color="black", linewidth=1, linestyle=(0, (1, 3)), label="dense, mean")
    axis.set_xticks(range(1, len(accuracy) + 1), [f"{count}\n+ {plain(name)}" for count, name in enumerate(names, 1)])
    axis.set_xlabel("number of integrated labels, and the latest one")
    axis.set_ylabel("balanced accuracy, %")
    axis.set_title("accuracy of each label as label subnets are integrated", fontsize=10)
    figure.legend(loc="outside right upper", title="label", fontsize=8)
    return figure


def size_figure(curves: Mapping[str, Sequence[tuple[float, float]]], dense: float, total: int) -> Figure:
    """Plot balanced accuracy against the number of kept units.

    Args:
        curves: By label or method, the kept units and the balanced accuracy of each subnet.
        dense: Balanced accuracy of the dense model.
        total: Number of units of the dense model.
    """
    require_content(curves)
    figure, axes = new_figure(8, 4.8)
    axis = axes[0, 0]
    for (name, points), (marker, line) in zip(curves.items(), styles(len(curves)), strict=True):
        ordered = sorted(points)
        axis.plot(
            [units for units, _ in ordered],
            [100 * value for _, value in ordered],
            marker=marker,
            linestyle=line,
            label=plain(name),
            markersize=5,
            linewidth=1,
        )
    axis.axhline(100 * dense, color="black", linewidth=1, linestyle=(0, (1, 3)), label="dense")
    axis.set_xlabel(f"kept units, of {total}")
    axis.set_ylabel("mean balanced accuracy, %")
    axis.set_title("balanced accuracy against size, on held-out data", fontsize=10)
    axis.grid(alpha=0.3)
    figure.legend(loc="outside right upper", title="subnet", fontsize=8)
    return figure


def pareto_figure(points: Sequence[tuple[float, float, str]], front: Collection[str]) -> Figure:
    """Balanced accuracy against latency, one point per trial; the Pareto-optimal ones stand out.

    Args:
        points: Balanced accuracy in [0, 1], latency in ms, and a name to write beside the point.
        front: Names of the Pareto-optimal points.
    """
    require_content(points)
    figure, axes = new_figure(6.4, 4.2)
    axis = axes[0, 0]
    best = sorted((latency, 100 * accuracy) for accuracy, latency, name in points if name in front)
    others = [(latency, 100 * accuracy) for accuracy, latency, name in points if name not in front]
    if others:
        axis.plot(*zip(*others, strict=True), "o", color="0.6", label="dominated")
    if best:
        axis.plot(*zip(*best, strict=True), "s-", color="black", drawstyle="steps-post", label="Pareto-optimal")
    for accuracy, latency, name in points:
        axis.annotate(plain(name), (latency, 100 * accuracy), (4, 4), textcoords="offset points", fontsize=8)
    axis.set_xlabel("p50 latency, ms")
    axis.set_ylabel("mean balanced accuracy, %")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    return figure
