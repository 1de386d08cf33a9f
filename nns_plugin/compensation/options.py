"""Options of compensation."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, get_args

from nns_plugin.errors import PruningError

Method = Literal["refit", "least_squares", "merge", "mean", "none"]


@dataclass(frozen=True)
class Compensation:
    """How kept units take over from removed ones.

    Attributes:
        method: ``"refit"`` (layer-wise reconstruction: each consumer in turn learns to repeat the dense model's
            outputs), ``"least_squares"`` (all kept channels together replace the removed ones), ``"merge"`` (one kept
            channel replaces each removed one), ``"mean"`` (biases take up the removed channels' means) or ``"none"``.
        sequential: For ``"refit"`` and ``"least_squares"``: whether to observe the model anew before each group.
        recalibrate_batch_norms: Whether to recalibrate batch norms after removal. ``"refit"`` gives the norms behind
            the layers that it refits the dense model's statistics in either case, and recalibrates the others only
            where it has to leave a consumer out.
        ridge: For ``"refit"``: pull towards the weights before it, relative to the inputs' energy.
        max_unfolded: For ``"refit"``: a consumer whose input unfolds to more rows keeps its least-squares weights.
    """

    method: Method = "refit"
    sequential: bool = False
    recalibrate_batch_norms: bool = True
    ridge: float = 1e-4
    max_unfolded: int = 8192

    def check(self, loader: Iterable[Any] | None) -> None:
        """Refuse what cannot work, before anything changes.

        Raises:
            PruningError: If an option is unknown or the loader is missing.
        """
        if self.method not in get_args(Method):
            raise PruningError(f"method is {self.method!r}; it must be one of {', '.join(get_args(Method))}")
        if self.sequential and self.method not in ("refit", "least_squares"):
            raise PruningError(f"sequential=True requires refit or least_squares, not method {self.method!r}")
        if loader is None and (self.method == "refit" or self.sequential):
            raise PruningError(f"method {self.method!r} with sequential={self.sequential} needs a loader; pass one")
        if isinstance(loader, Iterator):
            raise PruningError("the loader is an iterator, which yields once; pass something that yields anew")
        if not self.ridge > 0:
            raise PruningError(f"ridge is {self.ridge}; it must be positive")
