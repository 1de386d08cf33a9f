"""Small torch models, and one that is exported, for the tests of the ONNX Runtime adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nns_plugin.adapters.onnxruntime import export

LABELS = ["zero", "één", 'two "2"', "", "four"]


def convnet() -> nn.Sequential:
    """Five labels from 3x8x8 images; batch norm statistics that differ from one batch's."""
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.5), nn.Flatten(), nn.Linear(288, 5)
    )
    with torch.no_grad():
        for _ in range(5):
            model(3 * torch.randn(16, 3, 8, 8) + 1)
    return model


class Several(nn.Module):
    """Two inputs, three outputs: named, nested, and one without a batch of labels."""

    def forward(self, left: Tensor, right: Tensor) -> dict[str, Any]:
        return {"sum": left + right, "more": (left * 2, [right.sum(1)])}


def exported_convnet(folder: Path) -> tuple[nn.Module, Path]:
    """A network and its file, exported from a single example in train mode."""
    torch.manual_seed(1)
    model = convnet()
    metadata = {"origin": "tests", "note": "ü"}
    return model, export(model, torch.randn(1, 3, 8, 8), folder / "model.onnx", label_names=LABELS, metadata=metadata)


def one_line(failure: pytest.ExceptionInfo[Exception]) -> str:
    """The message of an error, which must be a single line."""
    message = str(failure.value)
    assert len(message.splitlines()) == 1
    return message
