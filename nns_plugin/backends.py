"""Backends: the protocol of hosts that remove units, and their lookup by name."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
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
    """A model that a backend has traced, and from which it can remove units in place."""

    @property
    def model(self) -> nn.Module:
        """The model."""
        ...

    @property
    def history(self) -> Sequence[tuple[str, bool, list[int]]]:
        """What was removed so far, in the format of torch-pruning's ``pruning_history``."""
        ...

    @property
    def heads(self) -> tuple[str, ...]:
        """Names of the layers that write the model's outputs."""
        ...

    def groups(self, ignored_layers: Sequence[str] = (), *, checked: bool = True) -> tuple[UnitGroup, ...]:
        """The unit groups.

        Args:
            ignored_layers: Names of layers whose outputs must stay whole.
            checked: Whether to check that units are read where the backend says, and to warn about groups left out.
        """
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
        """Remove the same units, and let the kept ones take over."""
        ...


class Backend(Protocol):
    """Removes units: traces models into :class:`TracedModel`."""

    def __call__(self, model: nn.Module, example_inputs: Any) -> TracedModel:
        """Trace a model, which the result changes in place, on example inputs."""
        ...


def find_backend(name: str = "torch_pruning") -> Backend:
    """The backend of a name, from the entry-point group ``nns_plugin.backends``.

    Raises:
        MissingExtraError: If its host is not installed.
        PruningError: If no installed package has a backend of that name.
    """
    for entry in entry_points(group=ENTRY_POINT_GROUP, name=name):
        loaded: Backend = entry.load()
        return loaded
    known = ", ".join(sorted(entry_points(group=ENTRY_POINT_GROUP).names)) or "none"
    raise PruningError(
        f"there is no backend {name!r}; the installed packages have {known}; install nns-plugin again if one is missing"
    )
