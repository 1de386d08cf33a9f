"""How a torch model is run beside its ONNX file: in eval mode without gradients, with true float32 arithmetic."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from nns_plugin.models.preserve import preserved


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model into eval mode without gradients; on exit it is exactly what it was."""
    with preserved(model), torch.inference_mode(False), torch.no_grad():
        model.eval()
        yield


@contextmanager
def ieee_float32() -> Iterator[None]:
    """Compute float32 as float32 on GPUs too; the TF32 default is off by 1e-3."""
    cudnn: Any = torch.backends.cudnn
    backends: tuple[Any, ...] = (torch.backends.cuda.matmul, cudnn.conv, cudnn.rnn)
    precisions = [backend.fp32_precision for backend in backends]
    try:
        for backend in backends:
            backend.fp32_precision = "ieee"
        yield
    finally:
        for backend, precision in zip(backends, precisions, strict=True):
            backend.fp32_precision = precision
