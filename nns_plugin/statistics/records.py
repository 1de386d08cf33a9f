"""Records: the sums about one observed axis, which merge by addition."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from nns_plugin.errors import StatisticsError
from nns_plugin.models.layers import Layout

Key = tuple[str, str]  # side ("in" or "out") and module name
SUMS = ("inputs", "samples", "total", "magnitude", "square", "active")


@dataclass(frozen=True, eq=False)
class Record:
    """Sums about one observed axis; L labels (one row if the data is unlabelled), C channels, S slots.

    Attributes:
        layout: How positions were pooled.
        inputs: ``[L]`` int64, number of inputs.
        samples: ``[L]`` int64, number of (input, position) pairs; a pooled channel has
            ``layout.positions_per_channel`` times as many.
        total: ``[L, C]`` float64, sum of activations.
        magnitude: ``[L, C]`` float64, sum of absolute activations.
        square: ``[L, C]`` float64, sum of squared activations.
        active: ``[L, S]`` int64, inputs for which any position of the slot exceeds the threshold.
        gram: ``None``, or ``[G, C / G + 1, C / G + 1]`` float64: for each of the G groups in which the channels are
            read (1 except for grouped convolutions) the Gram matrix of its channels and a constant 1, which stands
            last, over inputs and positions, the zero positions of a padded convolution included.
    """

    layout: Layout
    inputs: Tensor
    samples: Tensor
    total: Tensor
    magnitude: Tensor
    square: Tensor
    active: Tensor
    gram: Tensor | None = None

    @classmethod
    def empty(cls, layout: Layout, labels: int, gram_groups: int = 0, device: torch.device | None = None) -> Record:
        """A record with all sums at 0."""
        shape = (labels, layout.slot.numel())
        return cls(
            layout,
            torch.zeros(labels, dtype=torch.int64, device=device),
            torch.zeros(labels, dtype=torch.int64, device=device),
            torch.zeros(shape, dtype=torch.float64, device=device),
            torch.zeros(shape, dtype=torch.float64, device=device),
            torch.zeros(shape, dtype=torch.float64, device=device),
            torch.zeros(labels, layout.slots, dtype=torch.int64, device=device),
            _empty_gram(layout, gram_groups).to(device) if gram_groups else None,
        )

    def sums(self) -> dict[str, Tensor]:
        """Everything that merges by addition, by name."""
        named = {name: getattr(self, name) for name in SUMS}
        return named if self.gram is None else {**named, "gram": self.gram}

    def cpu(self) -> Record:
        """The record on the CPU, where statistics live."""
        return Record(self.layout, **{name: value.cpu() for name, value in self.sums().items()})

    def merge(self, other: Record) -> Record:
        """The record of both calibrations combined.

        Raises:
            StatisticsError: If the two records were collected differently.
        """
        mine, theirs = self.sums(), other.sums()
        if mine.keys() != theirs.keys() or any(mine[name].shape != theirs[name].shape for name in mine):
            raise StatisticsError(
                f"records hold {_shapes(mine)} and {_shapes(theirs)}; only records of the same model, groups and "
                "labels can be merged"
            )
        return Record(self.layout, **{name: mine[name] + theirs[name] for name in mine})

    def narrow(self, kept_positions: Tensor) -> Record:
        """The record after only ``kept_positions`` (int64, ascending) of the axis are left."""
        channels = self.layout.channel[kept_positions].unique()
        slots = self.layout.slot[channels].unique()
        layout = self.layout.narrow(kept_positions)
        gram = self.gram
        if gram is not None:
            gram = _narrow_gram(gram, channels)
        return replace(
            self,
            layout=layout,
            total=self.total[:, channels],
            magnitude=self.magnitude[:, channels],
            square=self.square[:, channels],
            active=self.active[:, slots],
            gram=gram,
        )


def _empty_gram(layout: Layout, groups: int) -> Tensor:
    size = layout.slot.numel() // groups + 1
    return torch.zeros(groups, size, size, dtype=torch.float64)


def _narrow_gram(gram: Tensor, channels: Tensor) -> Tensor:
    """Sub-matrices of the kept channels (equally many in each group) and the constant, which stands last."""
    size = gram.shape[-1] - 1
    parts = []
    for number, matrix in enumerate(gram):
        local = channels[channels // size == number] - number * size
        basis = torch.cat([local, torch.tensor([size])])
        parts.append(matrix[basis][:, basis])
    return torch.stack(parts)


def _shapes(sums: Mapping[str, Tensor]) -> str:
    return ", ".join(f"{name}{list(value.shape)}" for name, value in sums.items())
