"""How tables for the terminal are laid out, and how their numbers are written."""

from __future__ import annotations

from collections.abc import Sequence

from rich.markup import escape
from rich.table import Table


def new_table(title: str, left: Sequence[str], right: Sequence[str] = ()) -> Table:
    """A table with columns aligned to the left and, after them, columns aligned to the right."""
    table = Table(title=escape(title))
    for column in left:
        table.add_column(escape(column))
    for column in right:
        table.add_column(escape(column), justify="right")
    return table


def percent(value: float | None) -> str:
    """A share in per cent; ``-`` if there is none."""
    return "-" if value is None else f"{100 * value:.1f}"


def interval(limits: tuple[float, float] | None) -> str:
    """An interval of a share, in per cent, to append to it; empty if there is none."""
    return "" if limits is None else escape(f" [{100 * limits[0]:.1f}, {100 * limits[1]:.1f}]")


def number(value: float | None, form: str) -> str:
    """A number in a format; empty if there is none."""
    return "" if value is None else format(value, form)
