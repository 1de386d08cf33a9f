"""Options of compensation."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, get_args

from nns_plugin.errors import PruningError

Method = Literal["refit", "least_squares", "merge", "mean", "none"]
Recalibrate = Literal["once", "each_group"]


@dataclass(frozen=True)
class Compensation:
    """How survivors take over from removed units.

    Attributes:
        method: ``"refit"``, ``"least_squares"``, ``"merge"``, ``"mean"`` or ``"none"``.
        recalibrate: ``"each_group"`` observes the model anew before each group, ``"once"`` does not.
        recalibrate_batch_norms: Whether batch norms are recalibrated.
        ridge: Of ``"refit"``: pull towards the weights before it, relative to the inputs' energy.
        max_unfolded: Of ``"refit"``: a consumer whose input unfolds to more rows keeps its least-squares weights.
    """

    method: Method = "refit"
    recalibrate: Recalibrate = "once"
    recalibrate_batch_norms: bool = True
    ridge: float = 1e-4
    max_unfolded: int = 8192

    def check(self, loader: Iterable[Any] | None) -> None:
        """Refuse what cannot work, before anything changes.

        Raises:
            PruningError: If an option is unknown or the loader is missing.
        """
        for name, kind in (("method", Method), ("recalibrate", Recalibrate)):
            if getattr(self, name) not in get_args(kind):
                raise PruningError(f"{name} is {getattr(self, name)!r}; it must be one of {', '.join(get_args(kind))}")
        if self.recalibrate == "each_group" and self.method not in ("refit", "least_squares"):
            raise PruningError(
                f"recalibrate='each_group' goes with least_squares and refit, not with method {self.method!r}"
            )
        if loader is None and (self.method == "refit" or self.recalibrate == "each_group"):
            raise PruningError(f"method {self.method!r} with recalibrate={self.recalibrate!r} needs a loader; pass one")
        if isinstance(loader, Iterator):
            raise PruningError("the loader is an iterator, which yields once; pass something that yields anew")
        if not self.ridge > 0:
            raise PruningError(f"ridge is {self.ridge}; it must be positive")
