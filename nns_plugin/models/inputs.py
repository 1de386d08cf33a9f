"""Feed batches to a model: what a loader may yield, and how it reaches the forward."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from nns_plugin.errors import CalibrationError


class Batch(NamedTuple):
    """One batch of a loader.

    Attributes:
        inputs: A tensor, or a tuple or mapping of tensors for a model with several inputs.
        labels: ``[N]`` int64, or ``None`` if the loader yields inputs alone.
        size: N, the length of dimension 0.
    """

    inputs: Any
    labels: Tensor | None
    size: int


def parse_batch(item: Any, number: int) -> Batch:
    """Take apart what a loader yielded.

    Args:
        item: ``inputs``, ``[inputs]`` or ``(inputs, labels)``, where ``inputs`` is a tensor, or a tuple or mapping
            of tensors, and ``labels`` integers ``[N]``.
        number: Number of the batch, for messages.

    Raises:
        CalibrationError: If it is anything else.
    """
    expected = "expected (inputs, labels), with integer labels of shape [N], or inputs alone"
    inputs, labels = item, None
    if isinstance(item, (tuple, list)):
        if len(item) not in (1, 2):
            raise CalibrationError(f"batch {number} of the loader has {len(item)} parts; {expected}")
        inputs, labels = item[0], item[1] if len(item) == 2 else None
    tensors = list(inputs.values()) if isinstance(inputs, Mapping) else inputs
    tensors = list(tensors) if isinstance(tensors, (tuple, list)) else [tensors]
    if not tensors or not all(isinstance(tensor, Tensor) and tensor.dim() > 0 for tensor in tensors):
        raise CalibrationError(f"batch {number} of the loader has inputs of type {type(inputs).__name__}; {expected}")
    size = tensors[0].shape[0]
    if any(tensor.shape[0] != size for tensor in tensors):
        lengths = [tensor.shape[0] for tensor in tensors]
        raise CalibrationError(f"batch {number} of the loader has inputs of lengths {lengths}; {expected}")
    if labels is not None:
        if not isinstance(labels, Tensor):
            raise CalibrationError(
                f"batch {number} of the loader has labels of type {type(labels).__name__}; {expected}"
            )
        if labels.dim() != 1 or labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
            raise CalibrationError(
                f"batch {number} of the loader has labels of shape {list(labels.shape)} and type {labels.dtype}; "
                f"{expected}"
            )
        if labels.shape[0] != size:
            raise CalibrationError(f"batch {number} of the loader has {size} inputs and {labels.shape[0]} labels")
    return Batch(inputs, None if labels is None else labels.long(), size)


def run_model(model: nn.Module, inputs: Any) -> Any:
    """Call the model on a tensor, a tuple of tensors (positional) or a mapping of tensors (by keyword)."""
    if isinstance(inputs, Mapping):
        return model(**inputs)
    if isinstance(inputs, (tuple, list)):
        return model(*inputs)
    return model(inputs)


def to_device(inputs: Any, device: torch.device) -> Any:
    """The same inputs on another device."""
    return map_tensors(inputs, lambda value: value.to(device))


def map_tensors(inputs: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """Inputs of a model with a function applied to each tensor; everything else stays."""
    if isinstance(inputs, Mapping):
        return {name: map_tensors(value, function) for name, value in inputs.items()}
    if isinstance(inputs, (tuple, list)):
        mapped = [map_tensors(value, function) for value in inputs]
        return type(inputs)(*mapped) if hasattr(inputs, "_fields") else tuple(mapped)
    return function(inputs) if isinstance(inputs, Tensor) else inputs


def tensors_of(values: Any) -> list[Tensor]:
    """The tensors in inputs or outputs of a model, in order."""
    found: list[Tensor] = []

    def note(value: Tensor) -> Tensor:
        found.append(value)
        return value

    map_tensors(values, note)
    return found


def device_of(model: nn.Module) -> torch.device:
    """Where the model's first parameter lives; the CPU for a model without parameters."""
    parameter = next(model.parameters(), None)
    return torch.device("cpu") if parameter is None else parameter.device


def first_inputs(loader: Iterable[Any]) -> Any:
    """The inputs of a loader's first batch.

    Raises:
        CalibrationError: If there is none.
    """
    item = next(iter(loader), None)
    if item is None:
        raise CalibrationError("the loader yielded no inputs; it must yield at least one batch")
    return parse_batch(item, 0).inputs


def kinds_of(inputs: Any) -> Any:
    """What made-up inputs need to know of real ones, as JSON types: shapes, element types and structure.

    Example:
        >>> kinds_of({"x": torch.zeros(2, 3)})
        {'mapping': {'x': {'shape': [2, 3], 'dtype': 'float32'}}}
    """
    if isinstance(inputs, Tensor):
        return {"shape": list(inputs.shape), "dtype": str(inputs.dtype).removeprefix("torch.")}
    if isinstance(inputs, Mapping):
        return {"mapping": {str(name): kinds_of(value) for name, value in inputs.items()}}
    if isinstance(inputs, (tuple, list)):
        return {"tuple": [kinds_of(value) for value in inputs]}
    return {"value": inputs}


def inputs_like(kinds: Any, device: torch.device | None = None) -> Any:
    """Inputs of the kinds that :func:`kinds_of` told: normal numbers, the same each time, and zeros for integers."""
    if "mapping" in kinds:
        return {name: inputs_like(value, device) for name, value in kinds["mapping"].items()}
    if "tuple" in kinds:
        return tuple(inputs_like(value, device) for value in kinds["tuple"])
    if "value" in kinds:
        return kinds["value"]
    dtype = INPUT_TYPES[kinds["dtype"]]
    if not dtype.is_floating_point:
        return torch.zeros(kinds["shape"], dtype=dtype, device=device)
    generator = torch.Generator().manual_seed(0)
    return torch.randn(kinds["shape"], generator=generator).to(device, dtype)


def check_kinds(kinds: Any, most: int = 2**26) -> int:
    """Number of elements of inputs of the given kinds, after a look whether they are kinds at all.

    Raises:
        ValueError: If they are not, or there are more than ``most`` elements.
    """
    count = 0
    if isinstance(kinds, Mapping) and len(kinds) == 1 and "mapping" in kinds:
        count = sum(check_kinds(value, most) for value in kinds["mapping"].values())
    elif isinstance(kinds, Mapping) and len(kinds) == 1 and "tuple" in kinds:
        count = sum(check_kinds(value, most) for value in kinds["tuple"])
    elif isinstance(kinds, Mapping) and set(kinds) == {"shape", "dtype"} and kinds["dtype"] in INPUT_TYPES:
        shape = kinds["shape"]
        if not isinstance(shape, list) or any(type(length) is not int or length < 0 for length in shape):
            raise ValueError(f"{shape!r} is no shape")
        count = math.prod(shape)
    elif not (isinstance(kinds, Mapping) and set(kinds) == {"value"}):
        raise ValueError(f"{kinds!r} does not tell of inputs")
    if count > most:
        raise ValueError(f"the example inputs have {count} elements, more than {most}")
    return count


INPUT_TYPES = {
    name: getattr(torch, name)
    for name in ("float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool")
}
