"""Batches: what a loader may yield, and the one way to go through it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from tqdm.auto import tqdm

from nns_plugin.errors import CalibrationError
from nns_plugin.models.inputs import device_of, to_device


class Batch(NamedTuple):
    """One batch of a loader.

    Attributes:
        inputs: A tensor, or a tuple or mapping of tensors for a model with several inputs.
        labels: ``[N]`` int64, or ``None`` if the loader yields inputs alone.
        size: N, the length of dimension 0.
        number: Its place in the loader, from 0.
    """

    inputs: Any
    labels: Tensor | None
    size: int
    number: int


def batches(
    loader: Iterable[Any],
    model: nn.Module | None = None,
    *,
    name: str = "loader",
    title: str | None = None,
    progress: bool = False,
) -> Iterator[Batch]:
    """Go through a loader: each batch checked and numbered, its inputs on the model's device.

    Args:
        loader: Yields what :func:`parse_batch` takes; batches without inputs are skipped.
        model: Whose device the inputs are moved to; by default they stay where they are. Labels always do.
        name: What the loader is called in messages.
        title: Title of the progress bar.
        progress: Whether to show a progress bar.

    Raises:
        CalibrationError: If the loader yields something else, or no inputs at all.
    """
    check_loader(loader, name)
    device = None if model is None else device_of(model)
    empty = True
    once = iter(loader)  # tqdm asks for two iterators: workers start, and a generator of a seed is drawn from, twice
    for number, item in enumerate(tqdm(once, desc=title, total=batch_count(loader), disable=not progress, leave=False)):
        batch = parse_batch(item, number, name)
        if batch.size:
            empty = False
            yield batch if device is None else batch._replace(inputs=to_device(batch.inputs, device))
    if empty:
        again = ", anew each time: it is an iterator, which yields once" if isinstance(loader, Iterator) else ""
        raise CalibrationError(f"the {name} yielded no inputs; it must yield at least one batch{again}")


def batch_count(loader: Any) -> int | None:
    """The number of batches; ``None`` if the loader does not know it."""
    try:
        return len(loader)
    except (TypeError, NotImplementedError):
        return None


def check_loader(loader: Any, name: str = "loader") -> None:
    """Refuse what cannot be iterated over batches.

    Raises:
        CalibrationError: If it is a tensor, a text or a mapping, or not iterable at all.
    """
    if isinstance(loader, (Tensor, str, Mapping)) or not isinstance(loader, (Iterable, Dataset)):
        raise CalibrationError(f"the {name} is a {type(loader).__name__}; expected batches, such as [(inputs, labels)]")


def first_inputs(loader: Iterable[Any], model: nn.Module | None = None) -> Any:
    """The inputs of a loader's first batch, on the model's device if a model is given.

    Raises:
        CalibrationError: If there is none.
    """
    return next(batches(loader, model)).inputs


def parse_batch(item: Any, number: int, name: str = "loader") -> Batch:
    """Check what a loader yielded, and split it into inputs and labels.

    Args:
        item: ``inputs``, ``[inputs]`` or ``(inputs, labels)``, where ``inputs`` is a tensor, or a tuple or mapping
            of tensors, and ``labels`` integers ``[N]``.
        number: Number of the batch.
        name: What the loader is called in messages.

    Raises:
        CalibrationError: If it is anything else.
    """
    where = f"batch {number} of the {name}"
    expected = "expected (inputs, labels), with integer labels of shape [N], or inputs alone"
    inputs, labels = item, None
    if isinstance(item, (tuple, list)):
        if len(item) not in (1, 2):
            raise CalibrationError(f"{where} has {len(item)} parts; {expected}")
        inputs, labels = item[0], item[1] if len(item) == 2 else None
    tensors = list(inputs.values()) if isinstance(inputs, Mapping) else inputs
    tensors = list(tensors) if isinstance(tensors, (tuple, list)) else [tensors]
    if not tensors or not all(isinstance(tensor, Tensor) and tensor.dim() > 0 for tensor in tensors):
        raise CalibrationError(f"{where} has inputs of type {type(inputs).__name__}; {expected}")
    size = tensors[0].shape[0]
    if any(tensor.shape[0] != size for tensor in tensors):
        raise CalibrationError(f"{where} has inputs of lengths {[tensor.shape[0] for tensor in tensors]}; {expected}")
    if labels is not None:
        if not isinstance(labels, Tensor):
            raise CalibrationError(f"{where} has labels of type {type(labels).__name__}; {expected}")
        if labels.dim() != 1 or labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
            raise CalibrationError(
                f"{where} has labels of shape {list(labels.shape)} and type {labels.dtype}; {expected}"
            )
        if labels.shape[0] != size:
            raise CalibrationError(f"{where} has {size} inputs and {labels.shape[0]} labels")
    return Batch(inputs, None if labels is None else labels.long(), size, number)
