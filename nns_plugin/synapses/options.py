"""Options of the search for a minimal network."""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass

from nns_plugin.errors import PruningError

SCHEDULE = (0.5, 0.35, 0.2, 0.1, 0.05, 0.02, 0.01)


@dataclass(frozen=True)
class MinimalNetworkOptions:
    """How :func:`~nns_plugin.synapses.minimal.minimal_network` searches.

    Attributes:
        schedule: Shares of the remaining synapses to remove in one step, each in (0, 1), decreasing.
        one_by_one: Whether to continue with single synapses after the schedule.
        global_pruning: Whether to rank the synapses of all layers together instead of removing equal shares of each.
        by_unit: Whether a synapse scores the total of the weakest hidden unit at its ends, so that whole units are
            removed before parts of them: this gives fewer units, where plain ranking leaves many units with few
            synapses each.
        max_drop: How far accuracy may fall below that of the model.
        min_synapses: Stop at this number of synapses.
        max_steps: Stop after this many steps, including those of earlier runs; ``None`` for no limit.
        ignored_layers: Names of layers whose outputs compaction must not remove.
        checkpoint: File that is written after every step; if it exists, the search resumes from it.
        seed: Seeds torch, NumPy and ``random``, together with the number of the step, before every call of ``train``,
            ``evaluate`` and ``scores``: an interrupted search ends as an uninterrupted one does.
        progress: Whether to show a progress bar.

    Raises:
        PruningError: If an option is out of range.
    """

    schedule: Sequence[float] = SCHEDULE
    one_by_one: bool = True
    global_pruning: bool = True
    by_unit: bool = False
    max_drop: float = 0.0
    min_synapses: int = 0
    max_steps: int | None = None
    ignored_layers: Sequence[str] = ()
    checkpoint: str | os.PathLike[str] | None = None
    seed: int = 0
    progress: bool = False

    def __post_init__(self) -> None:
        schedule = self.schedule
        valid = isinstance(schedule, Sequence) and all(0 < share < 1 for share in schedule)
        if not valid or not all(left > right for left, right in itertools.pairwise(schedule)):
            raise PruningError(f"schedule is {schedule!r}; expected decreasing shares in (0, 1), such as (0.5, 0.1)")
        if not schedule and not self.one_by_one:
            raise PruningError("schedule is empty and one_by_one is False, so nothing would be tried; set one of them")
        if not 0 <= self.max_drop < math.inf:
            raise PruningError(f"max_drop is {self.max_drop}; expected a finite number of at least 0")
        if self.min_synapses < 0:
            raise PruningError(f"min_synapses is {self.min_synapses}; expected at least 0")
        if isinstance(self.seed, bool) or not isinstance(self.seed, int) or self.seed < 0:
            raise PruningError(f"seed is {self.seed!r}; expected a whole number of at least 0")
