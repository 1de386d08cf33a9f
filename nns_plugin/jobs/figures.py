"""Figures: what units and synapses do for labels, how label subnets overlap, what integration and size cost."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from nns_plugin.errors import CriterionError, MissingExtraError
from nns_plugin.switcher.scaling_factors import Counts

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from nns_plugin.adapters.onnxruntime import LatencyComparison

# Readable in grey: a scale of one hue for heat maps, and lines told apart by markers and dashes as well.
SCALE = "Greys"
STYLES = tuple(zip(("o", "s", "^", "D", "v", "P", "X", "<", ">", "*"), ("-", "--", "-.", ":") * 3, strict=False))
MOST_NUMBERS = 12
# Of factors; in grey, from dark to light.
STATES = {"pruned": (0.0, 0.0, 0.0), "weakened": (0.2, 0.55, 0.3), "strengthened": (1.0, 0.9, 0.35)}
RANGES = {"pruned": "0", "weakened": "below 1", "strengthened": "from 1 on"}


def plain(text: str) -> str:
    """A name as it is: matplotlib would read what stands between dollar signs as mathematics."""
    return text.replace("$", r"\$")


def new_figure(width: float, height: float, rows: int = 1, columns: int = 1) -> tuple[Figure, NDArray[Any]]:
    """A figure and its axes ``[rows, columns]``, without a window or a global state.

    Raises:
        MissingExtraError: If matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtraError("matplotlib", "figures") from error
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False)


def activity_figure(activity: Tensor, label_names: Sequence[str], zeta: float, group: str = "") -> Figure:
    """Relative activity of units on each label, before and after the threshold.

    Args:
        activity: ``[L, U]`` in [0, 1], from :func:`nns_plugin.criteria.semantic.relative_activity`.
        label_names: Name of each label.
        zeta: Threshold; under it, a unit is not needed by a label.
        group: Name of the group, for the title.

    Raises:
        CriterionError: If there are not as many names as rows.
    """
    values = _matrix(activity, len(label_names))
    # Units by the label that they serve most, so that what belongs together stands together; silent ones last.
    best = values.max(0)
    order = np.lexsort((-best, values.argmax(0), best == 0))
    figure, axes = new_figure(10, 1.6 + 0.5 * len(label_names) + 0.6, 2)
    needed = np.where(values >= zeta, values, 0.0)
    counts = (values >= zeta).sum(1)
    of_group = f" of {plain(group)}" if group else ""
    titles = (
        f"activity of the {values.shape[1]} units{of_group}, relative to the most active one",
        f"what is left at zeta = {zeta:.2f}: {counts.min()} to {counts.max()} units a label",
    )
    for axis, shown, title in zip(axes[:, 0], (values, needed), titles, strict=True):
        image = axis.imshow(shown[:, order], cmap=SCALE, vmin=0, vmax=1, aspect="auto", interpolation="nearest")
        axis.set_title(title, fontsize=10)
        axis.set_ylabel("label")
        axis.set_yticks(range(len(label_names)), [plain(name) for name in label_names])
        figure.colorbar(image, ax=axis, label="share of the most active")
    axes[1, 0].set_xlabel("unit, by the label that it serves most")
    return figure


def overlap_figure(kept: Mapping[str, Mapping[str, Tensor]]) -> Figure:
    """How much the units of label subnets overlap.

    Args:
        kept: For each label's name the kept units of its subnet by group.
    """
    _some(kept)
    names = [plain(name) for name in kept]
    values = jaccard(kept)
    side = 2.2 + 0.45 * len(names)
    figure, axes = new_figure(side + 0.8, side)
    axis = axes[0, 0]
    image = axis.imshow(values, cmap=SCALE, vmin=0, vmax=1)
    axis.set_xticks(range(len(names)), names, rotation=45 if max(map(len, names)) > 3 else 0)
    axis.set_yticks(range(len(names)), names)
    axis.set_xlabel("label of the subnet")
    axis.set_ylabel("label of the subnet")
    axis.set_title("units that two label subnets share, of those in either", fontsize=10)
    if len(names) <= MOST_NUMBERS:
        for row, column in np.ndindex(values.shape):
            colour = "white" if values[row, column] > 0.5 else "black"
            axis.text(column, row, f"{values[row, column]:.2f}", ha="center", va="center", fontsize=7, color=colour)
    figure.colorbar(image, ax=axis, label="Jaccard index")
    return figure


def jaccard(kept: Mapping[str, Mapping[str, Tensor]]) -> NDArray[np.float64]:
    """Units that two subnets share over the units in either of them, ``[L, L]``.

    Example:
        >>> import torch
        >>> jaccard({"a": {"0": torch.tensor([0, 1])}, "b": {"0": torch.tensor([1, 2, 3])}}).tolist()
        [[1.0, 0.25], [0.25, 1.0]]
    """
    sets = [{(group, unit) for group, units in groups.items() for unit in units.tolist()} for groups in kept.values()]
    return np.array([[len(left & right) / max(1, len(left | right)) for right in sets] for left in sets])


def integration_figure(accuracy: Sequence[Mapping[str, float]], dense: Mapping[str, float]) -> Figure:
    """Balanced accuracy of each label as label subnets are integrated one by one.

    Args:
        accuracy: For each number of integrated labels, from 1 on, the balanced accuracy of each of them.
        dense: The dense model's.

    Source:
        "NNS: Neural network surgery", table 4 and figure 9.
    """
    _some(accuracy)
    figure, axes = new_figure(8, 4.8)
    axis = axes[0, 0]
    names = list(accuracy[-1])
    for name, (marker, line) in zip(names, _styles(len(names)), strict=True):
        points = [(count, 100 * known[name]) for count, known in enumerate(accuracy, 1) if name in known]
        axis.plot(
            *zip(*points, strict=True), marker=marker, linestyle=line, label=plain(name), markersize=5, linewidth=1
        )
    mean = [100 * float(np.mean(list(known.values()))) for known in accuracy]
    axis.plot(range(1, len(accuracy) + 1), mean, color="black", linewidth=2.5, label="mean")
    before = 100 * float(np.mean([dense[name] for name in names]))
    axis.axhline(before, color="black", linewidth=1, linestyle=(0, (1, 3)), label="dense, mean")
    axis.set_xticks(range(1, len(accuracy) + 1), [f"{count}\n+ {plain(name)}" for count, name in enumerate(names, 1)])
    axis.set_xlabel("integrated labels, and the one that came last")
    axis.set_ylabel("balanced accuracy, %")
    axis.set_title("accuracy of each label as label subnets are integrated", fontsize=10)
    figure.legend(loc="outside right upper", title="label", fontsize=8)
    return figure


def size_figure(curves: Mapping[str, Sequence[tuple[float, float]]], dense: float, total: int) -> Figure:
    """Balanced accuracy against kept units.

    Args:
        curves: By name of the label (or method): kept units and balanced accuracy, one pair a subnet.
        dense: Balanced accuracy of the dense model.
        total: Number of units of the dense model.
    """
    _some(curves)
    figure, axes = new_figure(8, 4.8)
    axis = axes[0, 0]
    for (name, points), (marker, line) in zip(curves.items(), _styles(len(curves)), strict=True):
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


def inputs_figure(paths: Mapping[str, Tensor], label_names: Sequence[str], shape: tuple[int, int]) -> Figure:
    """Which pixels a sparse network uses, in all and for each label: with how many synapses that lead to it.

    Args:
        paths: From :func:`nns_plugin.synapses.paths.synapse_paths`; the first layer reads the pixels.
        label_names: Name of each output.
        shape: Height and width of the image.

    Source:
        Bulin and Smidl, "Optimization of Neural Network", the figure of used features.
    """
    _some(paths)
    first = next(iter(paths.values())).cpu()
    if first.shape[0] != len(label_names) or first.shape[2] != shape[0] * shape[1]:
        raise CriterionError(
            f"the paths are of {first.shape[0]} outputs and {first.shape[2]} inputs; expected {len(label_names)} and "
            f"the {shape[0]} x {shape[1]} pixels"
        )
    counts = [first.any(0).sum(0), *first.sum(1)]
    columns = min(len(counts), 6)
    rows = -(-len(counts) // columns)
    figure, axes = new_figure(1.2 + 1.7 * columns, 0.6 + 2.0 * rows, rows, columns)
    most = max(1, max(int(count.max()) for count in counts))
    for place, axis in enumerate(axes.ravel()):
        if place >= len(counts):
            axis.set_axis_off()
            continue
        image = axis.imshow(
            counts[place].reshape(shape).numpy(), cmap=SCALE, vmin=0, vmax=most, interpolation="nearest"
        )
        name = "all labels" if place == 0 else f"label {plain(label_names[place - 1])}"
        axis.set_title(f"{name}: {int((counts[place] > 0).sum())} pixels", fontsize=8)
        axis.set_xticks([])
        axis.set_yticks([])
    figure.colorbar(image, ax=axes, label="synapses of a pixel", shrink=0.8)
    return figure


def paths_figure(paths: Mapping[str, Tensor], label_names: Sequence[str]) -> Figure:
    """Which synapses lead from the inputs to each output: one panel a label, its paths in black, the others in grey.

    Args:
        paths: From :func:`nns_plugin.synapses.paths.synapse_paths`, of layers each of which reads the one before.
        label_names: Name of each output.

    Source:
        Bulin and Smidl, "Optimization of Neural Network", the figure of network demystification.
    """
    _some(paths)
    layers = [value.cpu() for value in paths.values()]
    chained = all(left.shape[1] == right.shape[2] for left, right in itertools.pairwise(layers))
    if not chained or layers[-1].shape[1] != len(label_names):
        shapes = ", ".join(f"{name} {list(value.shape[1:])}" for name, value in paths.items())
        raise CriterionError(
            f"the layers are {shapes} with {len(label_names)} labels; expected each to read the one before, and one "
            "output a label"
        )
    used = [layers[0].any(0).any(0), *(layer.any(0).any(1) for layer in layers)]
    heights = [_spaced(nodes) for nodes in used]
    columns = min(len(label_names), 5)
    rows = -(-len(label_names) // columns)
    figure, axes = new_figure(1 + 2.2 * columns, 0.6 + 2.4 * rows, rows, columns)
    for label, axis in enumerate(axes.ravel()):
        axis.set_axis_off()
        if label >= len(label_names):
            continue
        for depth, layer in enumerate(layers):
            mine = layer[label]
            for synapses, colour, width in ((layer.any(0) & ~mine, "0.85", 0.4), (mine, "black", 0.8)):
                out, into = synapses.nonzero().T.numpy()
                ends = np.stack([heights[depth][into], heights[depth + 1][out]])
                axis.plot([[depth], [depth + 1]] * np.ones_like(ends), ends, color=colour, linewidth=width)
        for depth, nodes in enumerate(used):
            height = heights[depth][nodes.numpy()]
            axis.plot(np.full_like(height, depth), height, "o", color="black", markersize=1.5)
        count = sum(int(layer[label].sum()) for layer in layers)
        axis.set_title(f"label {plain(label_names[label])}: {count} synapses", fontsize=8)
    names = ", ".join(f"{int(nodes.sum())}" for nodes in used)
    figure.suptitle(f"paths from inputs (left) to outputs (right); nodes in each layer: {names}", fontsize=9)
    return figure


def scaling_figure(factors: Tensor, shape: tuple[int, int], title: str = "") -> Figure:
    """Which pixels a switcher prunes (black), weakens (green) and strengthens (yellow).

    Args:
        factors: ``[H * W]``, one a pixel.
        shape: Height and width of the image.
        title: Above it.

    Source:
        Han et al., "Mining the Knowledge of Weights for Optimizing Neural Network Structures", figure 4, left.
    """
    if factors.shape != (shape[0] * shape[1],):
        raise CriterionError(
            f"there are {list(factors.shape)} factors; expected one for each of {shape[0]} x {shape[1]}"
        )
    states = np.digitize(factors.detach().double().cpu().numpy(), [1e-300, 1.0])
    colours = np.array([STATES[name] for name in STATES])
    figure, axes = new_figure(5.4, 3.8)
    axis = axes[0, 0]
    axis.imshow(colours[states].reshape(*shape, 3), interpolation="nearest")
    axis.set_xticks([])
    axis.set_yticks([])
    axis.set_title(plain(title), fontsize=10)
    for state, (name, colour) in enumerate(STATES.items()):
        label = f"{name} ({RANGES[name]}): {int((states == state).sum())}"
        axis.plot([], [], "s", color=colour, markeredgecolor="black", markersize=10, label=label)
    figure.legend(loc="outside right center", fontsize=8)
    return figure


def states_figure(epochs: Sequence[Mapping[str, Counts]]) -> Figure:
    """How many factors prune, weaken and strengthen after each epoch: one panel a switch.

    Args:
        epochs: The ``counts`` of each :class:`nns_plugin.switcher.training.Epoch`.

    Source:
        Han et al., "Mining the Knowledge of Weights for Optimizing Neural Network Structures", figure 4, right.
    """
    _some(epochs and epochs[0])
    names = list(epochs[0])
    columns = min(len(names), 4)
    rows = -(-len(names) // columns)
    figure, axes = new_figure(1.6 + 3.0 * columns, 0.8 + 2.4 * rows, rows, columns)
    for place, axis in enumerate(axes.ravel()):
        if place >= len(names):
            axis.set_axis_off()
            continue
        for (state, _), (marker, dash) in zip(STATES.items(), STYLES, strict=False):
            counts = [getattr(epoch[names[place]], state) for epoch in epochs]
            label = f"{state} ({RANGES[state]})" if place == 0 else None
            axis.plot(range(1, len(counts) + 1), counts, color="black", marker=marker, linestyle=dash, label=label)
        axis.set_ylim(bottom=0)
        axis.set_xlabel("epoch")
        axis.set_ylabel("factors")
        axis.set_title(plain(names[place]), fontsize=9)
        axis.grid(alpha=0.3)
    figure.legend(loc="outside upper center", ncols=3, fontsize=8)
    return figure


def pareto_figure(points: Sequence[tuple[float, float, str]], front: Collection[str]) -> Figure:
    """Balanced accuracy against latency, a point for each result; those that nothing beats stand out.

    Args:
        points: Balanced accuracy in [0, 1], latency in ms, and a name that is written beside it.
        front: Names of those that no other beats.
    """
    _some(points)
    figure, axes = new_figure(6.4, 4.2)
    axis = axes[0, 0]
    best = sorted((latency, 100 * accuracy) for accuracy, latency, name in points if name in front)
    others = [(latency, 100 * accuracy) for accuracy, latency, name in points if name not in front]
    if others:
        axis.plot(*zip(*others, strict=True), "o", color="0.6", label="beaten by another")
    if best:
        axis.plot(
            *zip(*best, strict=True), "s-", color="black", drawstyle="steps-post", label="as accurate, none is faster"
        )
    for accuracy, latency, name in points:
        axis.annotate(plain(name), (latency, 100 * accuracy), (4, 4), textcoords="offset points", fontsize=8)
    axis.set_xlabel("latency p50, ms")
    axis.set_ylabel("mean balanced accuracy, %")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    return figure


def _spaced(used: Tensor) -> NDArray[np.float64]:
    """Heights in [-1, 1] of the nodes of a layer, those that are used evenly spaced."""
    places = used.double().cumsum(0).numpy() - 1
    last = max(1.0, float(used.sum()) - 1)
    return np.asarray(1 - 2 * places / last) if int(used.sum()) > 1 else np.zeros_like(places)


def _some(values: object) -> None:
    if not values:
        raise CriterionError("there is nothing to draw; pass at least one subnet")


def _matrix(values: Tensor, rows: int) -> NDArray[np.float64]:
    if values.dim() != 2 or values.shape[0] != rows:
        raise CriterionError(f"the activity is {list(values.shape)}; expected [{rows}, units], one row a label")
    return np.asarray(values.double().cpu().numpy())


def _styles(count: int) -> list[tuple[str, str]]:
    return [STYLES[place % len(STYLES)] for place in range(count)]


def latency_figure(comparisons: Sequence[LatencyComparison]) -> Figure:
    """How latencies are distributed: a panel a batch size, the baseline dashed, the candidate solid.

    Args:
        comparisons: One a batch size.
    """
    _some(comparisons)
    figure, axes = new_figure(6.4, 0.6 + 2.6 * len(comparisons), len(comparisons))
    for axis, each in zip(axes[:, 0], comparisons, strict=True):
        times = [np.array(report.times_ms) for report in (each.baseline, each.candidate)]
        edges = np.linspace(min(map(np.min, times)), max(np.percentile(of, 99) for of in times), 60)
        for of, report, (dash, colour) in zip(
            times, (each.baseline, each.candidate), (("--", "0.5"), ("-", "black")), strict=True
        ):
            label = f"{plain(report.name)}, median {report.p50_ms:.4g} ms"
            axis.hist(of, edges, histtype="step", linestyle=dash, color=colour, linewidth=1.5, label=label)
            axis.axvline(report.p50_ms, linestyle=dash, color=colour, linewidth=0.8)
        beyond = sum(int((of > edges[-1]).sum()) for of in times)
        more = f"; {beyond} slower runs are not shown" if beyond else ""
        axis.set_title(
            f"batch {each.batch}: {each.ratio:.2f} times as fast [{each.ratio_low:.2f}, {each.ratio_high:.2f}]{more}",
            fontsize=9,
        )
        axis.set_xlabel("latency, ms")
        axis.set_ylabel("runs")
        axis.legend(fontsize=8)
        axis.grid(alpha=0.3)
    return figure
