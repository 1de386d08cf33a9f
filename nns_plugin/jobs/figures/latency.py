"""The figure of two latency distributions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from nns_plugin.jobs.figures.canvas import new_figure, plain, require_content

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from numpy.typing import NDArray

    from nns_plugin.adapters.onnxruntime import LatencyComparison


def latency_figure(comparisons: Sequence[LatencyComparison]) -> Figure:
    """Both latency distributions: one panel per batch size, the baseline dashed, the candidate solid.

    Args:
        comparisons: One per batch size.
    """
    require_content(comparisons)
    figure, axes = new_figure(6.4, 0.6 + 2.6 * len(comparisons), len(comparisons))
    for axis, each in zip(axes[:, 0], comparisons, strict=True):
        times = [np.array(report.times_ms) for report in (each.baseline, each.candidate)]
        least = min(map(np.min, times))
        edges = np.linspace(least, max(1.01 * least, *map(_longest_shown, times)), 60)
        for of, report, (dash, colour) in zip(
            times, (each.baseline, each.candidate), (("--", "0.5"), ("-", "black")), strict=True
        ):
            label = f"{plain(report.name)}, median {report.p50_ms:.4g} ms"
            axis.hist(of, edges, histtype="step", linestyle=dash, color=colour, linewidth=1.5, label=label)
            axis.axvline(report.p50_ms, linestyle=dash, color=colour, linewidth=0.8)
        beyond = sum(int((of > edges[-1]).sum()) for of in times)
        more = f"; {beyond} slower runs not shown" if beyond else ""
        axis.set_title(
            f"batch {each.batch}: speed-up {each.ratio:.2f} [{each.ratio_low:.2f}, {each.ratio_high:.2f}]{more}",
            fontsize=9,
        )
        axis.set_xlabel("latency, ms")
        axis.set_ylabel("runs")
        axis.legend(fontsize=8)
        axis.grid(alpha=0.3)
    return figure


def _longest_shown(times: NDArray[np.float64]) -> float:
    """Where the axis ends: at p99, or earlier where a few stalls would squeeze the distributions."""
    low, high, p99 = np.percentile(times, [25, 75, 99])
    return float(min(p99, high + 6 * (high - low)))
