"""Selection by angles: its thresholds, and how survivors take over."""

from __future__ import annotations

from dataclasses import dataclass

from nns_plugin.compensation.least_squares import Merge
from nns_plugin.errors import RecipeError
from nns_plugin.selection import Complement
from nns_plugin.subnets.option_checks import check_choice, check_number


@dataclass(frozen=True)
class Angles:
    """Selection by the angles between units' vectors.

    Attributes:
        similar: One unit of a pair goes below this angle, in degrees.
        complementary: Units of a pair are complementary above this angle, in degrees.
        complement: Whether ``"one"`` or ``"both"`` units of a complementary pair go.
        merge: How the survivor of a pair takes over: ``"none"``, ``"add"`` or ``"scaled"``.
    """

    similar: float = 15.0
    complementary: float = 165.0
    complement: Complement = "one"
    merge: Merge = "scaled"

    def __post_init__(self) -> None:
        for name in ("similar", "complementary"):
            check_number(f"angle.{name}", getattr(self, name), 0, 180)
            object.__setattr__(self, name, float(getattr(self, name)))
        check_choice("angle.complement", self.complement, Complement)
        check_choice("angle.merge", self.merge, Merge)
        if self.similar > self.complementary:
            raise RecipeError("angle: similar must be at most complementary")
