"""What the core needs of a host that removes units: groups, removal, and how the kept units take over."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import entry_points
from typing import Any, Literal, Protocol, get_args

from torch import Tensor, nn

from nns_plugin.compensation.survivors import Survivors
from nns_plugin.errors import PruningError
from nns_plugin.statistics.statistics import Statistics
from nns_plugin.units import UnitGroup

ENTRY_POINT_GROUP = "nns_plugin.surgeons"

Method = Literal["refit", "least_squares", "merge", "mean", "none"]
Recalibrate = Literal["once", "each_group"]


@dataclass(frozen=True)
class Compensation:
    """How survivors take over from removed units.

    Attributes:
        method: ``"refit"``, ``"least_squares"``, ``"merge"``, ``"mean"`` or ``"none"``.
        recalibrate: ``"each_group"`` observes the model anew before each group, ``"once"`` does not.
        reestimate: Whether batch norms are re-estimated.
        ridge: Of ``"refit"``: pull towards the weights before it, relative to the inputs' energy.
        max_unfolded: Of ``"refit"``: a consumer whose input unfolds to more rows keeps its least-squares weights.
    """

    method: Method = "refit"
    recalibrate: Recalibrate = "once"
    reestimate: bool = True
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


class Surgery(Protocol):
    """A model that a host has traced and can cut."""

    @property
    def model(self) -> nn.Module:
        """The model."""
        ...

    @property
    def history(self) -> Sequence[tuple[str, bool, list[int]]]:
        """What was removed so far, as the host writes it."""
        ...

    @property
    def heads(self) -> tuple[str, ...]:
        """Names of the layers whose positions are the model's outputs."""
        ...

    def groups(self, ignored_layers: Sequence[str] = (), *, checked: bool = True) -> tuple[UnitGroup, ...]:
        """The unit groups; unless ``checked``, without a look whether they are read where the host says."""
        ...

    def keep(self, groups: Sequence[UnitGroup], kept: Mapping[str, Tensor]) -> None:
        """Remove from each named group all but the kept units, ``[k]`` int64 ascending."""
        ...

    def keep_and_compensate(
        self,
        groups: Sequence[UnitGroup],
        kept: Mapping[str, Tensor],
        statistics: Statistics,
        how: Compensation,
        loader: Iterable[Any] | None,
        survivors: Mapping[str, Survivors] | None = None,
        progress: bool = False,
    ) -> None:
        """The same, and the kept units take over."""
        ...


Surgeon = Callable[[nn.Module, Any], Surgery]
"""Traces a model, which it will change in place, on example inputs."""


def find_surgeon(name: str = "torch_pruning") -> Surgeon:
    """The adapter of a host that removes units, from the entry-point group ``nns_plugin.surgeons``.

    Raises:
        PruningError: If no installed package has one of that name.
    """
    for entry in entry_points(group=ENTRY_POINT_GROUP, name=name):
        loaded: Surgeon = entry.load()
        return loaded
    raise PruningError(
        f"no installed package can remove units as {name!r}: the entry-point group {ENTRY_POINT_GROUP!r} has none of "
        "that name; install nns-plugin again"
    )
