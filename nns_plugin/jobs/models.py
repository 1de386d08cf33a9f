"""The default job's classifier."""

from __future__ import annotations

from torch import nn


def digits_classifier(width: int = 32, labels: int = 10) -> nn.Module:
    """A small convolutional classifier for 8x8 grey images.

    Args:
        width: Channels of the first of three convolutions; the others have two and four times as many.
        labels: Number of labels.
    """
    return nn.Sequential(
        *_block(1, width),
        *_block(width, 2 * width),
        nn.MaxPool2d(2),
        *_block(2 * width, 4 * width),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(4 * width * 4, 4 * width),
        nn.ReLU(),
        nn.Linear(4 * width, labels),
    )


def _block(inputs: int, outputs: int) -> tuple[nn.Module, ...]:
    return nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()
