"""Calibration: a forward-only pass that collects statistics."""

from __future__ import annotations

import hashlib
import math
import weakref
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from nns_plugin.errors import CalibrationError, LabelError
from nns_plugin.models.batches import Batch, batches
from nns_plugin.models.fingerprint import fingerprint
from nns_plugin.models.hooks import Hook, hooked
from nns_plugin.models.inputs import run_model
from nns_plugin.models.layers import Convolution, Layout, axis_length, channel_groups, padded_positions
from nns_plugin.models.preserve import preserved
from nns_plugin.statistics.layouts import layout_of
from nns_plugin.statistics.records import Key, Record
from nns_plugin.statistics.reduction import Sums, add_batch, reduce_activation
from nns_plugin.statistics.statistics import Statistics, distributed_sum
from nns_plugin.units import UnitGroup


def calibrate(
    model: nn.Module,
    loader: Iterable[Any],
    groups: Sequence[UnitGroup],
    *,
    labels: Sequence[str] | int | None = None,
    threshold: float = 0.0,
    gram: bool = False,
    max_gram_units: int = 8192,
    progress: bool = False,
) -> Statistics:
    """Run the model over calibration data and collect what its units did.

    The model runs in evaluation mode without gradients and is left exactly as it was found, random number
    generators included, also when its forward raises. Under ``torch.distributed`` the sums of all processes are
    reduced. Memory is O(labels x units), plus O(units^2) with Gram matrices, whatever the number of inputs. Dimension
    0 of every observed activation must be the batch, or a whole multiple of it (windows, heads) with the inputs in
    order.

    Args:
        model: The model; runs on the device of its first parameter.
        loader: Yields ``(inputs, labels)`` or ``inputs``; ``inputs`` is a tensor ``[N, ...]``, or a tuple or
            mapping of such tensors; ``labels`` is an integer tensor ``[N]``.
        groups: The unit groups to observe, from an adapter.
        labels: Names of the labels, or their number; by default as many as the model's output has columns.
        threshold: A position is active where it exceeds this.
        gram: Whether to collect the Gram matrices that ``distinctiveness`` and compensation need.
        max_gram_units: Largest number of channels whose Gram matrix is collected.
        progress: Whether to show a progress bar.

    Returns:
        The statistics.

    Raises:
        CalibrationError: If the loader is empty or yields something else, if an activation is not finite or does
            not have the batch in front, or if there is nothing to observe.
        LabelError: If a label is out of range.
        GroupError: If a group owns positions that its modules do not have.
    """
    if not _distributed():
        return _calibrate(model, loader, groups, labels, threshold, max_gram_units if gram else 0, progress)
    outcome: Statistics | Exception
    try:
        outcome = _calibrate(model, loader, groups, labels, threshold, max_gram_units if gram else 0, progress)
    except Exception as error:
        outcome = error
    _agree(outcome)
    if isinstance(outcome, Exception):
        raise outcome
    return outcome.all_reduce()


def _calibrate(
    model: nn.Module,
    loader: Iterable[Any],
    groups: Sequence[UnitGroup],
    labels: Sequence[str] | int | None,
    threshold: float,
    max_gram_units: int,
    progress: bool,
) -> Statistics:
    """The statistics of this process alone."""
    if not groups:
        raise CalibrationError("there are no unit groups to observe: nothing in this model can be pruned")
    if isinstance(loader, (Tensor, str, Mapping)) or not isinstance(loader, (Iterable, Dataset)):
        raise CalibrationError(f"the loader is a {type(loader).__name__}; expected batches, such as [(inputs, labels)]")
    if math.isnan(threshold):
        raise CalibrationError("threshold is nan; it must be a number that activations can exceed")
    modules = dict(model.named_modules())
    keys = list(dict.fromkeys((group.side, port.name) for group in groups for port in group.ports))
    for _, name in keys:
        if name not in modules:
            raise CalibrationError(f"the model has no module {name!r}, which the unit groups name")
    names = _label_names(labels)
    run = _Run(_collectors(modules, keys, groups, max_gram_units), threshold, None if names is None else len(names))
    _observe(model, loader, run, progress)
    return _finish(run, groups, names, threshold, fingerprint(model))


def _observe(model: nn.Module, loader: Iterable[Any], run: _Run, progress: bool) -> None:
    hooks = [_hook(side, collector, run) for (side, _), collector in run.collectors.items()]
    with preserved(model), torch.inference_mode(False), torch.no_grad(), hooked(*hooks):
        model.eval()
        for batch in batches(loader, model, title="calibrating", progress=progress):
            run.forward(model, batch)


def _distributed() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def _agree(outcome: Statistics | Exception) -> None:
    """Let every process fail when one does or calibrates something else, instead of waiting for its sums for ever."""
    count = torch.distributed.get_world_size()
    outcomes = torch.zeros(count, dtype=torch.int64)
    outcomes[torch.distributed.get_rank()] = -1 if isinstance(outcome, Exception) else _digest(outcome)
    outcomes = distributed_sum(outcomes)
    failures = int((outcomes < 0).sum())
    if failures and not isinstance(outcome, Exception):
        raise CalibrationError(f"calibration failed in {failures} of {count} processes; see their errors")
    if not failures and outcomes.unique().numel() > 1:
        raise CalibrationError(
            "the processes calibrate different models, groups or labels; give all of them the same weights and "
            "buffers, groups, labels and threshold"
        )


def _digest(statistics: Statistics) -> int:
    """A number that two processes share if their sums may be added."""
    layouts = [
        (key, record.layout.channel.tolist(), record.layout.slot.tolist()) for key, record in statistics.records.items()
    ]
    collected = (sorted(statistics.fingerprint.items()), statistics.labels, statistics.threshold, layouts)
    return int.from_bytes(hashlib.blake2b(repr(collected).encode(), digest_size=7).digest(), "big")


@dataclass
class _Collector:
    """Reduces one observed axis to sums by channel.

    Attributes:
        name: Name of the module.
        layout: How the positions of its axis are pooled.
        channels_second: Whether the axis is dimension 1, as in a convolution; otherwise it is the last one.
        time_first: Whether the batch is dimension 1.
        dimensions: How many dimensions the activation must have; ``None`` for two or more.
        module: The module.
        gram_groups: Channel groups of the Gram matrices; 0 for none.
        record: The sums so far.
    """

    name: str
    layout: Layout
    channels_second: bool
    time_first: bool
    dimensions: int | None
    module: nn.Module
    gram_groups: int
    record: Record | None = None

    def rows_first(self, activation: Tensor) -> Tensor:
        """The activation as ``[rows, positions, samples]``."""
        if self.channels_second:
            return activation.flatten(2)
        activation = activation.transpose(0, 1) if self.time_first else activation
        return activation.reshape(activation.shape[0], -1, activation.shape[-1]).transpose(1, 2)


@dataclass
class _Run:
    """State of one calibration: the batch in flight and the sums so far."""

    collectors: Mapping[Key, _Collector]
    threshold: float
    label_count: int | None
    labelled: bool | None = None
    number: int = 0
    size: int = 0
    reduced: dict[tuple[Any, ...], tuple[weakref.ref[Tensor], Sums]] = field(default_factory=dict)
    pending: list[tuple[_Collector, Sums, int]] = field(default_factory=list)

    def forward(self, model: nn.Module, batch: Batch) -> None:
        if self.labelled is None:
            self.labelled = batch.labels is not None
        if self.labelled != (batch.labels is not None):
            raise CalibrationError(f"batch {batch.number} of the loader changes between labelled and unlabelled inputs")
        self.size, self.number = batch.size, batch.number
        output = run_model(model, batch.inputs)
        labels = batch.labels
        if labels is None:
            self.label_count, labels = 1, torch.zeros(batch.size, dtype=torch.int64)
        else:
            self._check_labels(labels, output)
        self._accumulate(labels)

    def observe(self, collector: _Collector, activation: Any) -> None:
        """Reduce one activation; called by the hooks, possibly several times a forward for a reused module."""
        if not self._fits(collector, activation):
            found = type(activation).__name__
            if isinstance(activation, Tensor):
                found = f"{activation.dtype}{list(activation.shape)}"
            raise CalibrationError(
                f"module {collector.name!r} works on {found}; expected a floating-point tensor of "
                f"{collector.dimensions or 'two or more'} dimensions whose dimension {int(collector.time_first)} is "
                f"the batch of {self.size} or a whole multiple of it"
            )
        # Consumers of one tensor are reduced once; the weak reference proves that an identity was not used again.
        axes = (collector.channels_second, collector.time_first, collector.gram_groups)
        version = -1 if activation.is_inference() else activation._version
        key = (id(activation), version, id(collector.layout), axes)
        known, sums = self.reduced.get(key, (None, None)) if version >= 0 else (None, None)
        if known is None or known() is not activation or sums is None:
            rows = collector.rows_first(activation)
            sums = reduce_activation(rows, collector.layout, self.size, self.threshold, collector.gram_groups)
            self.reduced[key] = (weakref.ref(activation), sums)
        rows_per_input = activation.shape[int(collector.time_first)] // self.size
        padded = (
            rows_per_input * padded_positions(collector.module, activation.shape[2:]) if collector.gram_groups else 0
        )
        self.pending.append((collector, sums, padded))

    def _fits(self, collector: _Collector, activation: Any) -> bool:
        if not isinstance(activation, Tensor) or not activation.is_floating_point() or activation.dim() < 2:
            return False
        if collector.dimensions not in (None, activation.dim()):
            return False
        return activation.shape[int(collector.time_first)] % self.size == 0

    def _accumulate(self, labels: Tensor) -> None:
        # Squares are finite only where sums and magnitudes are; checked together, they cost one transfer.
        finite = torch.tensor([True])
        if self.pending:
            finite = torch.stack([torch.isfinite(sums.square).all().cpu() for _, sums, _ in self.pending])
        if not bool(finite.all()):
            name = self.pending[int((~finite).nonzero()[0])][0].name
            raise CalibrationError(
                f"module {name!r} works on NaN, infinite or overflowing activations in batch {self.number}; check the "
                "inputs and the weights before it"
            )
        for collector, sums, padded in self.pending:
            if collector.record is None:
                device = torch.device("cpu") if sums.total.device.type == "mps" else sums.total.device
                collector.record = Record.empty(collector.layout, self.label_count or 1, collector.gram_groups, device)
            add_batch(collector.record, labels, sums, padded)
        self.reduced.clear()
        self.pending.clear()

    def _check_labels(self, labels: Tensor, output: Any) -> None:
        if self.label_count is None:
            if not isinstance(output, Tensor) or output.dim() != 2:
                raise LabelError(
                    "cannot tell how many labels there are, since the model's output is no [N, labels] tensor; "
                    "pass labels=<number or names> to calibrate"
                )
            self.label_count = output.shape[1]
        low, high = int(labels.min()), int(labels.max())
        if low < 0 or high >= self.label_count:
            raise LabelError(
                f"batch {self.number} of the loader has labels {low}..{high}; expected 0..{self.label_count - 1}"
            )


def _collectors(
    modules: Mapping[str, nn.Module], keys: Sequence[Key], groups: Sequence[UnitGroup], max_gram_units: int
) -> dict[Key, _Collector]:
    layouts: list[Layout] = []
    collectors = {}
    for side, name in keys:
        module = modules[name]
        pool = side == "in" and isinstance(module, nn.Linear)
        layout = layout_of(groups, (side, name), axis_length(module, side, name), pool)
        layout = next((known for known in layouts if known.same(layout)), layout)
        layouts.append(layout)
        dimensions: int | None = 3 if hasattr(module, "batch_first") else None
        if convolution := isinstance(module, Convolution):
            dimensions = len(module.kernel_size) + 2
        time_first = getattr(module, "batch_first", True) is False
        gram_groups = _gram_groups(module, side, layout, max_gram_units, name)
        collectors[side, name] = _Collector(name, layout, convolution, time_first, dimensions, module, gram_groups)
    return collectors


def _gram_groups(module: nn.Module, side: str, layout: Layout, max_gram_units: int, name: str) -> int:
    """Channel groups of a module's Gram matrices; 0 where channels pool different numbers of positions."""
    if not max_gram_units or layout.positions_per_channel.unique().numel() > 1:
        return 0
    groups = channel_groups(module) if side == "in" else 1
    if (width := layout.slot.numel() // groups) > max_gram_units:
        raise CalibrationError(
            f"module {name!r} works on {width} channels, more than max_gram_units={max_gram_units}; raise it (the "
            f"matrix takes {8 * (width + 1) ** 2 / 2**20:.0f} MiB) or list what writes them in ignored_layers"
        )
    return groups


def _hook(side: str, collector: _Collector, run: _Run) -> Hook:
    def write(x: Any, output: Any) -> None:
        run.observe(collector, output[0] if isinstance(output, tuple) else output)

    if side == "in":
        return collector.module, "input", partial(run.observe, collector)
    return collector.module, "output", write


def _label_names(labels: Sequence[str] | int | None) -> tuple[str, ...] | None:
    if labels is None:
        return None
    if isinstance(labels, int):
        labels = [str(label) for label in range(labels)]
    names = () if isinstance(labels, str) else tuple(labels)
    if not names or len(set(names)) != len(names) or not all(isinstance(name, str) for name in names):
        raise LabelError(f"labels must be a positive number or distinct names, found {labels!r}")
    return names


def _finish(
    run: _Run,
    groups: Sequence[UnitGroup],
    names: tuple[str, ...] | None,
    threshold: float,
    weights: Mapping[str, str],
) -> Statistics:
    missing = [collector.name for collector in run.collectors.values() if collector.record is None]
    if missing:
        raise CalibrationError(f"module {missing[0]!r} never ran during calibration; its units cannot be observed")
    if run.labelled and names is None:
        names = tuple(str(label) for label in range(run.label_count or 0))
    records = {key: collector.record.cpu() for key, collector in run.collectors.items() if collector.record}
    return Statistics(records, tuple(groups), names if run.labelled else None, threshold, weights)
