"""Figures of single synapses: which inputs are used, and which paths lead to a label."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from nns_plugin.errors import CriterionError
from nns_plugin.jobs.figures.canvas import SCALE, new_figure, plain, require_content

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def inputs_figure(paths: Mapping[str, Tensor], label_names: Sequence[str], shape: tuple[int, int]) -> Figure:
    """Plot which pixels a sparse network uses, for all labels and for each, and with how many synapses.

    Args:
        paths: From :func:`nns_plugin.synapses.paths.synapse_paths`; the first layer reads the pixels.
        label_names: Name of each output.
        shape: Height and width of the image.

    Source:
        Bulin and Smidl, "Optimization of Neural Network", the figure of used features.
    """
    require_content(paths)
    first = next(iter(paths.values())).cpu()
    if first.shape[0] != len(label_names) or first.shape[2] != shape[0] * shape[1]:
        raise CriterionError(
            f"the paths have {first.shape[0]} outputs and {first.shape[2]} inputs; expected {len(label_names)} and "
            f"{shape[0]} x {shape[1]} pixels"
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
    figure.colorbar(image, ax=axes, label="synapses per pixel", shrink=0.8)
    return figure


def paths_figure(paths: Mapping[str, Tensor], label_names: Sequence[str]) -> Figure:
    """Plot which synapses lead from the inputs to each output: a panel per label, its paths black, the others grey.

    Args:
        paths: From :func:`nns_plugin.synapses.paths.synapse_paths`, for layers each of which reads the previous one.
        label_names: Name of each output.

    Source:
        Bulin and Smidl, "Optimization of Neural Network", the figure of network demystification.
    """
    require_content(paths)
    layers = [value.cpu() for value in paths.values()]
    chained = all(left.shape[1] == right.shape[2] for left, right in itertools.pairwise(layers))
    if not chained or layers[-1].shape[1] != len(label_names):
        shapes = ", ".join(f"{name} {list(value.shape[1:])}" for name, value in paths.items())
        raise CriterionError(
            f"the layers are {shapes} with {len(label_names)} labels; expected each to read the previous one, and "
            "one output per label"
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


def _spaced(used: Tensor) -> NDArray[np.float64]:
    """Heights in [-1, 1] of a layer's nodes; the used ones are evenly spaced."""
    places = used.double().cumsum(0).numpy() - 1
    last = max(1.0, float(used.sum()) - 1)
    return np.asarray(1 - 2 * places / last) if int(used.sum()) > 1 else np.zeros_like(places)
