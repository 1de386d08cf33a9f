"""Provenance: where a subnet comes from."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from typing import Any


@dataclass(frozen=True)
class Trial:
    """One point of a search for the smallest subnet within a budget, or for one that is fast enough.

    Attributes:
        ratio: Share of units that was removed.
        parameters: Number of parameters that were left.
        balanced_accuracy: Mean over the labels, on the validation data; of a head that is calibrated on that, on each
            half as calibrated on the other. None of a cut without compensation, of which only latency was measured.
        drop_bound: How far under the dense model's that is at most, with the confidence of the search.
        within: Whether all was within what was asked for.
        round_to: What numbers of units were rounded to a multiple of.
        latency_ms: Median, in milliseconds, if latency was searched for.
        speedup: Ratio of medians, dense over subnet.
        speedup_low: Lower end of its 95 % interval.
        is_fast_enough: Whether it met the target.
    """

    ratio: float
    parameters: int
    balanced_accuracy: float | None
    drop_bound: float | None
    within: bool
    round_to: int = 1
    latency_ms: float | None = None
    speedup: float | None = None
    speedup_low: float | None = None
    is_fast_enough: bool | None = None


@dataclass(frozen=True)
class Provenance:
    """Where a subnet comes from.

    Attributes:
        parent: Digest of the fingerprint of the parent's weights.
        versions: Of Python and the packages that made it.
        criterion: Name of the criterion.
        options: Its options.
        selection: How many units were kept, such as ``{"zeta": 0.4}``.
        compensation: Options of :class:`nns_plugin.compensation.options.Compensation`.
        head: ``"keep"``, ``"closed"`` or ``"open"``.
        ignored_layers: Layers that stayed whole.
        calibrated: Whether the output for everything else was moved to the best balanced accuracy.
        training: What was done to the weights afterwards, such as ``{"fine_tune": 2}``; empty for nothing.
        trials: What a search tried, in order.
    """

    parent: str
    versions: Mapping[str, str]
    criterion: str
    options: Mapping[str, Any]
    selection: Mapping[str, Any]
    compensation: Mapping[str, Any]
    head: str
    ignored_layers: tuple[str, ...] = ()
    calibrated: bool = False
    training: Mapping[str, Any] = field(default_factory=dict)
    trials: tuple[Trial, ...] = ()


def current_versions() -> dict[str, str]:
    """Versions of Python and of the packages that cut."""
    found = {"python": platform.python_version()}
    for name in ("nns-plugin", "torch", "torch-pruning"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found
