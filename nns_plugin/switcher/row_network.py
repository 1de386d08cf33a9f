"""The network that turns an image of weights into one number per row: encoder and decoder with narrow skips."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from nns_plugin.errors import PruningError


@dataclass(frozen=True)
class SwitcherArchitecture:
    """The size of a switcher network.

    Attributes:
        channels: Channels of the first block; each further block has twice as many.
        depth: Number of blocks, each of which halves the image; fewer for small images.
        width: Width of the rows to which the filters of convolutions are reduced.

    Raises:
        PruningError: If one of them is less than 1.
    """

    channels: int = 4
    depth: int = 3
    width: int = 64

    def __post_init__(self) -> None:
        if min(self.channels, self.depth, self.width) < 1:
            raise PruningError(
                f"channels, depth and width are {self.channels}, {self.depth} and {self.width}; expected at least 1"
            )


class RowNetwork(nn.Module):
    """Computes one number per row of an image, for each of its channels: encoder and decoder with skips of width 1.

    Args:
        images: Number C of channels of the image.
        height: Number of its rows.
        width: Number of its columns.
        architecture: Channels and depth of the network.
        normed: Whether group norms follow the convolutions.
    """

    def __init__(self, images: int, height: int, width: int, architecture: SwitcherArchitecture, normed: bool) -> None:
        super().__init__()
        self.size = height, width
        depth = min(architecture.depth, max(1, int(math.log2(max(1, min(height, width))))))
        step = 2**depth
        self._padding = -width % step, -height % step
        widths = [architecture.channels * 2**level for level in range(depth + 1)]
        columns = [(width + self._padding[0]) // 2**level for level in range(depth + 1)]
        into = [images, *widths]
        self.encoders = nn.ModuleList(_block(into[level], widths[level], (3, 3), normed) for level in range(depth + 1))
        self.rows = nn.ModuleList(nn.Conv2d(c, c, (1, w)) for c, w in zip(widths, columns, strict=True))
        self.raises = nn.ModuleList(
            nn.ConvTranspose2d(widths[level + 1], widths[level], (2, 1), (2, 1)) for level in range(depth)
        )
        self.decoders = nn.ModuleList(_block(2 * c, c, (3, 1), normed) for c in widths[:-1])
        self.head = nn.Conv2d(widths[0], images, 1)

    def forward(self, image: Tensor) -> Tensor:
        """Map ``[C, height, width]`` to ``[C, height]``."""
        features = nn.functional.pad(image, (0, self._padding[0], 0, self._padding[1]))[None]
        skips = []
        for level, (encoder, row) in enumerate(zip(self.encoders, self.rows, strict=True)):
            features = encoder(nn.functional.max_pool2d(features, 2) if level else features)
            skips.append(row(features))
        found = skips.pop()
        for up, decoder, skip in reversed(list(zip(self.raises, self.decoders, skips, strict=True))):
            found = decoder(torch.cat([skip, up(found)], 1))
        output: Tensor = self.head(found)[0, :, : image.shape[1], 0]
        return output


def _block(into: int, out: int, kernel: tuple[int, int], normed: bool) -> nn.Sequential:
    block = nn.Sequential(nn.Conv2d(into, out, kernel, padding=(kernel[0] // 2, kernel[1] // 2)))
    if normed:
        block.append(nn.GroupNorm(math.gcd(out, 4), out))
    return block.append(nn.ReLU())
