"""``nns doctor``: versions, missing extras, execution providers and criteria."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
from rich.table import Table

if TYPE_CHECKING:
    from nns_plugin.environment import Host


def doctor() -> None:
    """Show versions, missing extras and the execution providers that a session actually gets."""
    from nns_plugin.criteria import available, broken
    from nns_plugin.environment import hosts
    from nns_plugin.errors import MissingExtraError

    console = Console()
    console.print(_hosts(hosts()))
    try:
        from nns_plugin.adapters.onnxruntime import session_providers

        console.print(_providers(session_providers()))
    except MissingExtraError as error:
        console.print(str(error), highlight=False, markup=False)
    failures = broken()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # broken plug-ins are listed below
        console.print(f"criteria: {', '.join(sorted(available()))}", highlight=False)
    for name, failure in failures.items():
        console.print(f"broken criterion plug-in {name!r}: {failure}", style="red", highlight=False, markup=False)


def _hosts(found: Iterable[Host]) -> Table:
    table = Table(title="hosts")
    for column in ("package", "version", "install with"):
        table.add_column(column, overflow="fold")
    for host in found:
        table.add_row(host.name, host.version or "missing", escape(host.install))
    return table


def _providers(found: Mapping[str, list[str]]) -> Table:
    table = Table(title="ONNX Runtime execution providers")
    for column in ("requested", "the session gets"):
        table.add_column(column, overflow="fold")
    for requested, got in found.items():
        table.add_row(requested, ", ".join(got))
    return table
