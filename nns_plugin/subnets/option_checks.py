"""Checks of single options: each refuses a value in one line that names the option."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from numbers import Integral, Real
from typing import Any, get_args

from nns_plugin.errors import RecipeError


def as_tuple(name: str, value: Any) -> tuple[Any, ...] | None:
    """A list as a tuple; ``None`` stays except for names of layers."""
    if value is None and name != "ignored_layers":
        return None
    check(name, value, isinstance(value, Iterable) and not isinstance(value, (str, Mapping)), "a list")
    return tuple(value)


def check(name: str, value: Any, allowed: bool, expected: str) -> None:
    """Refuse a value that is not allowed."""
    if not allowed:
        raise RecipeError(f"option {name!r}: found {value!r}; expected {expected}")


def check_choice(name: str, value: Any, kind: Any) -> None:
    """Refuse all but the values of a ``Literal``."""
    check(name, value, value in get_args(kind), f"one of {', '.join(get_args(kind))}")


def check_count(name: str, value: Any) -> None:
    """Refuse all but positive integers."""
    check(name, value, isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= 1, "at least 1")


def check_number(name: str, value: Any, low: float, high: float, *, above: bool = False, below: bool = False) -> None:
    """Refuse all but ``None`` and numbers from ``low`` to ``high``, these excluded if ``above`` or ``below``."""
    if value is None:
        return
    number = isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
    inside = number and (value > low if above else value >= low) and (value < high if below else value <= high)
    shown = f"{'(' if above else '['}{low:g}, {high:g}{')' if below or math.isinf(high) else ']'}"
    check(name, value, inside, f"a number in {shown}")
