"""Figures of scaling factors: which pixels are pruned, weakened or strengthened, and how many of each per epoch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from nns_plugin.errors import CriterionError
from nns_plugin.jobs.figures.canvas import STYLES, new_figure, plain, require_content

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from nns_plugin.switcher.scaling_factors import Counts

# States of scaling factors; in grey, from dark to light.
STATES = {"pruned": (0.0, 0.0, 0.0), "weakened": (0.2, 0.55, 0.3), "strengthened": (1.0, 0.9, 0.35)}
RANGES = {"pruned": "0", "weakened": "below 1", "strengthened": "1 or more"}


def scaling_figure(factors: Tensor, shape: tuple[int, int], title: str = "") -> Figure:
    """Plot which pixels a switcher prunes (black), weakens (green) and strengthens (yellow).

    Args:
        factors: ``[H * W]``, one per pixel.
        shape: Height and width of the image.
        title: Title of the figure.

    Source:
        Han et al., "Mining the Knowledge of Weights for Optimizing Neural Network Structures", figure 4, left.
    """
    if factors.shape != (shape[0] * shape[1],):
        raise CriterionError(
            f"the factors have shape {list(factors.shape)}; expected one for each of {shape[0]} x {shape[1]} pixels"
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
    """Plot how many factors prune, weaken and strengthen after each epoch: one panel per switch.

    Args:
        epochs: The ``counts`` of each :class:`nns_plugin.switcher.training.Epoch`.

    Source:
        Han et al., "Mining the Knowledge of Weights for Optimizing Neural Network Structures", figure 4, right.
    """
    require_content(epochs and epochs[0])
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
