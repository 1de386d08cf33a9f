"""What the core needs of a host that removes units: groups, removal, and how the kept units take over."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.metadata import entry_points
from typing import Any, Protocol

from torch import Tensor, nn

from nns_plugin.compensation.options import Compensation
from nns_plugin.compensation.survivors import Survivors
from nns_plugin.errors import PruningError
from nns_plugin.statistics.statistics import Statistics
from nns_plugin.units import UnitGroup

ENTRY_POINT_GROUP = "nns_plugin.backends"


class TracedModel(Protocol):
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


Backend = Callable[[nn.Module, Any], TracedModel]
"""Traces a model, which it will change in place, on example inputs."""


def find_backend(name: str = "torch_pruning") -> Backend:
    """The adapter of a host that removes units, from the entry-point group ``nns_plugin.backends``.

    Raises:
        PruningError: If no installed package has one of that name.
    """
    for entry in entry_points(group=ENTRY_POINT_GROUP, name=name):
        loaded: Backend = entry.load()
        return loaded
    raise PruningError(
        f"no installed package can remove units as {name!r}: the entry-point group {ENTRY_POINT_GROUP!r} has none of "
        "that name; install nns-plugin again"
    )
