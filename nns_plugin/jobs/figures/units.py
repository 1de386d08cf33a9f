"""Figures of units: how active each is on each label, and how label subnets overlap."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from nns_plugin.errors import CriterionError
from nns_plugin.jobs.figures.canvas import SCALE, new_figure, plain, require_content

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MAX_NUMBERED = 12  # labels up to which cells carry their numbers


def activity_figure(activity: Tensor, label_names: Sequence[str], zeta: float, group: str = "") -> Figure:
    """Plot the relative activity of units on each label, before and after the threshold.

    Args:
        activity: ``[L, U]`` in [0, 1], from :func:`nns_plugin.criteria.semantic.relative_activity`.
        label_names: Name of each label.
        zeta: Threshold below which a label does not need a unit.
        group: Name of the group, for the title.

    Raises:
        CriterionError: If the number of names is not the number of rows.
    """
    values = _matrix(activity, len(label_names))
    # Units sorted by the label that they respond to most, so that related units are adjacent; silent ones last.
    best = values.max(0)
    order = np.lexsort((-best, values.argmax(0), best == 0))
    figure, axes = new_figure(10, 1.6 + 0.5 * len(label_names) + 0.6, 2)
    needed = np.where(values >= zeta, values, 0.0)
    counts = (values >= zeta).sum(1)
    of_group = f" of group {plain(group)}" if group else ""
    titles = (
        f"activity of the {values.shape[1]} units{of_group}, relative to the most active one",
        f"kept at zeta = {zeta:.2f}: {counts.min()} to {counts.max()} units per label",
    )
    for axis, shown, title in zip(axes[:, 0], (values, needed), titles, strict=True):
        image = axis.imshow(shown[:, order], cmap=SCALE, vmin=0, vmax=1, aspect="auto", interpolation="nearest")
        axis.set_title(title, fontsize=10)
        axis.set_ylabel("label")
        axis.set_yticks(range(len(label_names)), [plain(name) for name in label_names])
        figure.colorbar(image, ax=axis, label="relative activity")
    axes[1, 0].set_xlabel("unit, sorted by the label that it responds to most")
    return figure


def overlap_figure(kept: Mapping[str, Mapping[str, Tensor]]) -> Figure:
    """Plot how much the units of label subnets overlap.

    Args:
        kept: For each label, the kept units of its subnet, by group.
    """
    require_content(kept)
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
    axis.set_title("overlap of label subnets: shared units / units in either", fontsize=10)
    if len(names) <= MAX_NUMBERED:
        for row, column in np.ndindex(values.shape):
            colour = "white" if values[row, column] > 0.5 else "black"
            axis.text(column, row, f"{values[row, column]:.2f}", ha="center", va="center", fontsize=7, color=colour)
    figure.colorbar(image, ax=axis, label="Jaccard index")
    return figure


def jaccard(kept: Mapping[str, Mapping[str, Tensor]]) -> NDArray[np.float64]:
    """The Jaccard index of the units of each two subnets: shared units over units in either, ``[L, L]``.

    Example:
        >>> import torch
        >>> jaccard({"a": {"0": torch.tensor([0, 1])}, "b": {"0": torch.tensor([1, 2, 3])}}).tolist()
        [[1.0, 0.25], [0.25, 1.0]]
    """
    sets = [{(group, unit) for group, units in groups.items() for unit in units.tolist()} for groups in kept.values()]
    return np.array([[len(left & right) / max(1, len(left | right)) for right in sets] for left in sets])


def _matrix(values: Tensor, rows: int) -> NDArray[np.float64]:
    if values.dim() != 2 or values.shape[0] != rows:
        raise CriterionError(
            f"the activity has shape {list(values.shape)}; expected [{rows}, units], one row per label"
        )
    return np.asarray(values.double().cpu().numpy())
