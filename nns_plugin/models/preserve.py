"""Leave the user's model and the random number generators exactly as they were; copy models."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn


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
def seeded(seed: int) -> Iterator[None]:
    """Seed torch, NumPy and ``random``, and restore their states on leaving."""
    with preserved_rng():
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed % 2**32)
        yield


@contextmanager
def preserved(model: nn.Module) -> Iterator[nn.Module]:
    """Restore everything but the values of the parameters on leaving, also after an exception.

    Restored are the attributes of every module (training flags, caches, counters), the items of lists and dictionaries
    among them, the identity and content of every buffer, ``requires_grad`` of every parameter, the weights of
    embeddings with ``max_norm``, which a forward rescales in place, and the random number generators. Hooks are left to
    :func:`nns_plugin.models.hooks.hooked`.

    Args:
        model: The model to protect.

    Yields:
        The same model.
    """
    attributes = [(module, module.training, dict(vars(module))) for module in model.modules()]
    held = [value for _, _, saved in attributes for value in saved.values()]
    containers = [(value, value.copy()) for value in held if type(value) in (dict, list)]
    buffers = [(module, dict(module._buffers.items())) for module in model.modules()]
    requires_grad = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    rescaled = [
        parameter
        for module in model.modules()
        if getattr(module, "max_norm", None) is not None
        for parameter in module.parameters(recurse=False)
    ]
    known = [buffer for _, named in buffers for buffer in named.values() if buffer is not None]
    contents = [(tensor, tensor.detach().clone()) for tensor in (*known, *rescaled)]
    try:
        with preserved_rng():
            yield model
    finally:
        for module, flag, saved in attributes:
            for name in vars(module).keys() - saved.keys():
                del vars(module)[name]
            vars(module).update(saved)
            module.training = flag
        for container, items in containers:
            container.clear()
            container.extend(items) if isinstance(container, list) else container.update(items)
        for module, named in buffers:
            for name, _ in list(module._buffers.items()):
                if name not in named:
                    del module._buffers[name]
                    module._non_persistent_buffers_set.discard(name)
            for name, buffer in named.items():
                module._buffers[name] = buffer
        for parameter, flag in requires_grad:
            parameter.requires_grad_(flag)
        with torch.no_grad():
            for tensor, content in contents:
                if tensor.shape != content.shape:
                    tensor.data = content
                elif not torch.equal(tensor, content):
                    tensor.copy_(content)


@contextmanager
def preserved_modes(*models: nn.Module) -> Iterator[None]:
    """Restore the training flags of every module on leaving, also after an exception."""
    training = [(module, module.training) for model in models for module in model.modules()]
    try:
        yield
    finally:
        for module, flag in training:
            module.training = flag


@contextmanager
def in_evaluation(model: nn.Module) -> Iterator[nn.Module]:
    """Put a model into evaluation mode while it is being changed; only training flags and random states come back."""
    with preserved_modes(model), preserved_rng():
        yield model.eval()


def copied(model: nn.Module) -> nn.Module:
    """A deep copy; weights that each forward computes anew (masks, parametrizations) lose their autograd graph."""
    computed = [
        value
        for module in model.modules()
        for value in (*vars(module).values(), *module._buffers.values())
        if isinstance(value, Tensor) and value.grad_fn is not None
    ]
    return copy.deepcopy(model, {id(value): value.detach().clone() for value in computed})
