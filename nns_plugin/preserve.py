"""Leave the user's model, and the random number generators, exactly as they were found."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn


@contextmanager
def preserved_rng() -> Iterator[None]:
    """Restore the states of torch (CPU and CUDA), NumPy and ``random`` on leaving, also after an exception."""
    python_state, numpy_state = random.getstate(), np.random.get_state()
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)


@contextmanager
def preserved(model: nn.Module) -> Iterator[nn.Module]:
    """Restore everything but the values of the parameters on leaving, also after an exception.

    Restored are the training flag of every module, the identity and content of every buffer, ``requires_grad``
    of every parameter, and the random number generators. Hooks are removed by whoever registers them.

    Args:
        model: The model to protect.

    Yields:
        The same model.
    """
    training = [(module, module.training) for module in model.modules()]
    requires_grad = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    buffers = [
        (module, name, buffer, None if buffer is None else buffer.detach().clone())
        for module in model.modules()
        for name, buffer in module._buffers.items()
    ]
    try:
        with preserved_rng():
            yield model
    finally:
        for module, flag in training:
            module.training = flag
        for parameter, flag in requires_grad:
            parameter.requires_grad_(flag)
        with torch.no_grad():
            for module, name, buffer, content in buffers:
                module._buffers[name] = buffer
                if buffer is not None and content is not None and not torch.equal(buffer, content):
                    buffer.copy_(content)

