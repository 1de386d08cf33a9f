"""Shared by all figures: an empty figure, line styles that are readable in grey, and names without mathematics."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from numpy.typing import NDArray

from nns_plugin.errors import CriterionError, MissingExtraError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Readable in grey: one hue for heat maps; lines also differ in markers and dashes.
SCALE = "Greys"
STYLES = tuple(zip(("o", "s", "^", "D", "v", "P", "X", "<", ">", "*"), ("-", "--", "-.", ":") * 3, strict=False))


def plain(text: str) -> str:
    """A name as it is: matplotlib reads text between dollar signs as mathematics."""
    return text.replace("$", r"\$")


def new_figure(width: float, height: float, rows: int = 1, columns: int = 1) -> tuple[Figure, NDArray[Any]]:
    """A figure and its axes ``[rows, columns]``, without a window or global state.

    Raises:
        MissingExtraError: If matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtraError("matplotlib", "figures") from error
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False)


def styles(count: int) -> list[tuple[str, str]]:
    """A marker and a dash pattern for each of some lines."""
    return [STYLES[place % len(STYLES)] for place in range(count)]


def require_content(values: object) -> None:
    """Refuse to draw nothing.

    Raises:
        CriterionError: If there are no values.
    """
    if not values:
        raise CriterionError("nothing to draw; pass at least one entry")
