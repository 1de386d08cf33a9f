"""Provenance: where a subnet comes from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from nns_plugin.subnets.options import Head


@dataclass(frozen=True)
class Trial:
    """One trial of a search for the smallest subnet within a budget, or for one that is fast enough.

    Attributes:
        ratio: Share of units that was removed.
        parameters: Number of remaining parameters.
        balanced_accuracy: Mean over the labels, on the validation data; with a calibrated head on each half, as
            calibrated on the other. ``None`` for a trial without compensation, which was only timed.
        drop_bound: Upper bound on the drop below the dense model, at the confidence of the search.
        within: Whether the trial met the budget and the target.
        round_to: Numbers of units are multiples of this.
        latency_ms: Median latency in milliseconds, in a search for latency.
        speedup: Ratio of medians, dense over subnet.
        speedup_low: Lower end of its 95 % interval.
        is_fast_enough: Whether the trial met the target.
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
        versions: Versions of Python and of the packages, from :func:`nns_plugin.environment.versions`.
        criterion: Name of the criterion.
        options: Its options.
        selection: What decided how many units stay, such as ``{"zeta": 0.4}``.
        compensation: Options of :class:`nns_plugin.compensation.options.Compensation`.
        head: ``"keep"``, ``"closed"`` or ``"open"``.
        ignored_layers: Layers that stayed whole.
        calibrated: Whether the output "other" was shifted for the best balanced accuracy.
        training: How the weights were trained after extraction, such as ``{"fine_tune": 2}``; empty if they were not.
        trials: The trials of a search, in order.
    """

    parent: str
    versions: Mapping[str, str]
    criterion: str
    options: Mapping[str, Any]
    selection: Mapping[str, Any]
    compensation: Mapping[str, Any]
    head: Head
    ignored_layers: tuple[str, ...] = ()
    calibrated: bool = False
    training: Mapping[str, Any] = field(default_factory=dict)
    trials: tuple[Trial, ...] = ()
