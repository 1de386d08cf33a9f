"""Tables of ``nns validate`` for the terminal."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from rich.markup import escape
from rich.table import Table

from nns_plugin.cli.formats import new_table

if TYPE_CHECKING:  # so that --help imports no torch
    from nns_plugin.jobs.validation import Validation

_ROWS = 12  # of tables whose rows are ranked


def tables(found: Validation) -> Iterator[Table]:
    """All tables of a validation, the verdict last."""
    from nns_plugin.jobs.validation.tables import measurements, verdict

    for measured in measurements(found):
        table = new_table(measured.title, measured.columns[:1], measured.columns[1:])
        for row in measured.rows[: _ROWS if measured.ranked else None]:
            table.add_row(*map(escape, row))
        table.caption = escape("\n".join(measured.notes)) or None
        table.caption_justify = "left"
        yield table
    judged = verdict(found)
    table = new_table(judged.title, judged.columns)
    for outcome, *texts in judged.rows:
        table.add_row(outcome if outcome == "pass" else f"[bold red]{outcome}[/]", *map(escape, texts))
    yield table
