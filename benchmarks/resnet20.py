"""The ResNet-20 for CIFAR-10 that lies beside the data, and its inputs."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

WIDTHS = (16, 16, 16, 32, 32, 32, 64, 64, 64)
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.247, 0.2435, 0.2616)


class Block(nn.Module):
    """Two convolutions and a shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        same = stride == 1 and inputs == outputs
        projection = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))
        self.short = nn.Identity() if same else projection

    def forward(self, x: Tensor) -> Tensor:
        return (self.bn2(self.conv2(self.bn1(self.conv1(x)).relu())) + self.short(x)).relu()


class ResNet20(nn.Module):
    """The usual ResNet-20 for images of 32x32."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, WIDTHS[0], 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(WIDTHS[0])
        before = (WIDTHS[0], *WIDTHS)
        self.layers = nn.Sequential(*(Block(a, b, 1 if a == b else 2) for a, b in zip(before, WIDTHS, strict=False)))
        self.fc = nn.Linear(WIDTHS[-1], 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.layers(self.bn(self.conv(x)).relu()).mean((2, 3)))


def load_resnet20(data_dir: Path) -> ResNet20:
    """The trained network from ``../models/resnet20-cifar10`` beside the data folder, in evaluation mode."""
    path = data_dir.parent / "models" / "resnet20-cifar10" / "trained.safetensors"
    model = ResNet20()
    try:
        model.load_state_dict(load_file(path))
    except OSError as error:
        raise SystemExit(f"cannot read {path}: {error}; it lies beside the data folder, see --data-dir") from error
    return model.eval()


def normalised(images: Tensor) -> Tensor:
    """The network's inputs, from uint8 images ``[N, 3, 32, 32]``."""
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (MEAN, STD))
    return (images.float() / 255 - mean) / std
