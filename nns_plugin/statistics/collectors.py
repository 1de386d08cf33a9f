"""Collectors: reduce the activations that hooks observe to sums, batch by batch."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from nns_plugin.errors import CalibrationError, LabelError
from nns_plugin.models.batches import Batch
from nns_plugin.models.hooks import Hook
from nns_plugin.models.inputs import run_model
from nns_plugin.models.layers import Convolution, Layout, axis_length, channel_axis, channel_groups, padded_positions
from nns_plugin.statistics.layouts import layout_of
from nns_plugin.statistics.records import Key, Record
from nns_plugin.statistics.reduction import Sums, add_batch, reduce_activation
from nns_plugin.units import UnitGroup


@dataclass
class Collector:
    """Reduces one observed axis to sums by channel.

    Attributes:
        side: ``"in"`` or ``"out"``.
        name: Name of the module.
        module: The module.
        layout: How the positions of its axis are pooled.
        gram_groups: Channel groups of the Gram matrices; 0 for none.
        record: The sums so far; ``None`` before the first batch.
    """

    side: str
    name: str
    module: nn.Module
    layout: Layout
    gram_groups: int
    record: Record | None = None

    @property
    def channels_second(self) -> bool:
        """Whether the axis is dimension 1, as in a convolution; otherwise it is the last one."""
        return channel_axis(self.module) == 1

    @property
    def batch_dimension(self) -> int:
        """The dimension of the batch: 1 in a recurrent or attention layer that has time first, otherwise 0."""
        return int(getattr(self.module, "batch_first", True) is False)

    @property
    def dimensions(self) -> int | None:
        """Number of dimensions that the activation must have; ``None`` for two or more."""
        if isinstance(self.module, Convolution):
            return len(self.module.kernel_size) + 2
        return 3 if hasattr(self.module, "batch_first") else None

    def rows_first(self, activation: Tensor) -> Tensor:
        """The activation as ``[rows, positions, samples]``."""
        if self.channels_second:
            return activation.flatten(2)
        activation = activation.transpose(0, 1) if self.batch_dimension else activation
        return activation.reshape(activation.shape[0], -1, activation.shape[-1]).transpose(1, 2)

    def check(self, activation: Any, size: int) -> None:
        """Check the type and shape of an activation of a batch of ``size`` inputs.

        Raises:
            CalibrationError: If it cannot be observed.
        """
        if isinstance(activation, Tensor) and activation.is_floating_point() and activation.dim() >= 2:
            known = self.dimensions in (None, activation.dim())
            if known and activation.shape[self.batch_dimension] % size == 0:
                return
        found = type(activation).__name__
        if isinstance(activation, Tensor):
            found = f"{activation.dtype}{list(activation.shape)}"
        raise CalibrationError(
            f"the activation of module {self.name!r} is {found}; expected a floating-point tensor of "
            f"{self.dimensions or 'two or more'} dimensions whose dimension {self.batch_dimension} is the batch of "
            f"{size} or a whole multiple of it"
        )


@dataclass
class Collection:
    """One calibration: the sums so far and the batch in flight.

    Attributes:
        collectors: One for each observed axis.
        threshold: A position is active where it exceeds this.
        label_count: Number of labels; ``None`` until it is known.
        labelled: Whether the loader yields labels; ``None`` before the first batch.
        number: Number of the batch in flight.
        size: Number of its inputs.
        reduced: Sums of its activations, by identity and layout.
        pending: Sums that are added to the records once the batch has passed, and padded positions of each input.
    """

    collectors: Mapping[Key, Collector]
    threshold: float
    label_count: int | None
    labelled: bool | None = None
    number: int = 0
    size: int = 0
    reduced: dict[tuple[Any, ...], tuple[weakref.ref[Tensor], Sums]] = field(default_factory=dict)
    pending: list[tuple[Collector, Sums, int]] = field(default_factory=list)

    def hooks(self) -> list[Hook]:
        """The hooks with which the collectors observe activations."""

        def observe_output(collector: Collector, x: Any, output: Any) -> None:
            self.observe(collector, output[0] if isinstance(output, tuple) else output)

        return [
            (collector.module, "input", partial(self.observe, collector))
            if collector.side == "in"
            else (collector.module, "output", partial(observe_output, collector))
            for collector in self.collectors.values()
        ]

    def forward(self, model: nn.Module, batch: Batch) -> None:
        """Run one batch, with the hooks in place, and add its sums to the records."""
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

    def observe(self, collector: Collector, activation: Any) -> None:
        """Reduce one activation; called by the hooks, possibly several times a forward for a reused module."""
        collector.check(activation, self.size)
        # Consumers of one tensor are reduced once; the weak reference proves that an identity was not used again.
        axes = (collector.channels_second, collector.batch_dimension, collector.gram_groups)
        version = -1 if activation.is_inference() else activation._version
        key = (id(activation), version, id(collector.layout), axes)
        known, sums = self.reduced.get(key, (None, None)) if version >= 0 else (None, None)
        if known is None or known() is not activation or sums is None:
            rows = collector.rows_first(activation)
            sums = reduce_activation(rows, collector.layout, self.size, self.threshold, collector.gram_groups)
            self.reduced[key] = (weakref.ref(activation), sums)
        padded = 0
        if collector.gram_groups:
            rows_per_input = activation.shape[collector.batch_dimension] // self.size
            padded = rows_per_input * padded_positions(collector.module, activation.shape[2:])
        self.pending.append((collector, sums, padded))

    def _accumulate(self, labels: Tensor) -> None:
        # Squares are finite only where sums and magnitudes are; checked together, they cost one transfer.
        finite = torch.tensor([True])
        if self.pending:
            finite = torch.stack([torch.isfinite(sums.square).all().cpu() for _, sums, _ in self.pending])
        if not bool(finite.all()):
            name = self.pending[int((~finite).nonzero()[0])][0].name
            raise CalibrationError(
                f"module {name!r} has NaN, infinite or overflowing activations in batch {self.number}; check the "
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
                    "the number of labels is unknown, since the model's output is not an [N, labels] tensor; pass "
                    "labels=<number or names> to calibrate"
                )
            self.label_count = output.shape[1]
        low, high = int(labels.min()), int(labels.max())
        if low < 0 or high >= self.label_count:
            raise LabelError(
                f"batch {self.number} of the loader has labels {low}..{high}; expected 0..{self.label_count - 1}"
            )


def collectors_of(
    modules: Mapping[str, nn.Module], groups: Sequence[UnitGroup], max_gram_units: int
) -> dict[Key, Collector]:
    """One collector for each axis at which units of the groups are observed.

    Args:
        modules: The modules of the model, by name.
        groups: The unit groups.
        max_gram_units: Largest number of channels whose Gram matrix is collected; 0 for no Gram matrices.

    Raises:
        CalibrationError: If a module is missing or cannot be observed, or has too many channels for a Gram matrix.
        GroupError: If a group owns positions that its modules do not have.
    """
    layouts: list[Layout] = []
    collectors = {}
    keys = list(dict.fromkeys((group.side, port.name) for group in groups for port in group.ports))
    for _, name in keys:
        if name not in modules:
            raise CalibrationError(f"the model has no module {name!r}, which the unit groups name")
    for side, name in keys:
        module = modules[name]
        pool = side == "in" and isinstance(module, nn.Linear)
        layout = layout_of(groups, (side, name), axis_length(module, side, name), pool)
        layout = next((known for known in layouts if known.same(layout)), layout)
        layouts.append(layout)
        gram_groups = _gram_groups(module, side, layout, max_gram_units, name)
        collectors[side, name] = Collector(side, name, module, layout, gram_groups)
    return collectors


def _gram_groups(module: nn.Module, side: str, layout: Layout, max_gram_units: int, name: str) -> int:
    """Channel groups of a module's Gram matrices; 0 where channels pool different numbers of positions."""
    if not max_gram_units or layout.positions_per_channel.unique().numel() > 1:
        return 0
    groups = channel_groups(module) if side == "in" else 1
    if (width := layout.slot.numel() // groups) > max_gram_units:
        raise CalibrationError(
            f"module {name!r} has {width} channels, more than max_gram_units={max_gram_units}; raise it (the matrix "
            f"takes {8 * (width + 1) ** 2 / 2**20:.0f} MiB), or add the layers that produce them to ignored_layers"
        )
    return groups
