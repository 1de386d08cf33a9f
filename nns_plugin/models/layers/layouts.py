"""How the positions of an axis are pooled into channels and slots."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Layout:
    """How the positions of one observed axis are pooled.

    Attributes:
        channel: ``[positions]`` int64, the channel of each position. Positions that a flatten made out of one
            map share a channel; elsewhere every position is a channel of its own.
        slot: ``[C]`` int64, the slot of each channel. Channels of one unit share a slot; slots are numbered as they
            first appear, so that an axis without pooling has its positions for slots.
    """

    channel: Tensor
    slot: Tensor

    @property
    def positions_per_channel(self) -> Tensor:
        """``[C]`` int64, how many positions each channel pools."""
        return torch.bincount(self.channel, minlength=self.slot.numel())

    @property
    def slots(self) -> int:
        """Number of slots."""
        return int(self.slot.max()) + 1

    def same(self, other: Layout) -> bool:
        """Whether two layouts pool alike."""
        return torch.equal(self.channel, other.channel) and torch.equal(self.slot, other.slot)

    def narrow(self, kept_positions: Tensor) -> Layout:
        """The layout after only ``kept_positions`` (int64, ascending) are left."""
        channels, channel = self.channel[kept_positions].unique(return_inverse=True)
        _, slot = self.slot[channels].unique(return_inverse=True)
        return Layout(channel, slot)
