"""Inputs of a model: how they reach the forward, and how they are described and made up."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

INPUT_TYPES = {
    name: getattr(torch, name)
    for name in ("float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool")
}


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


def repeated(inputs: Any, count: int) -> Any:
    """The first inputs of a batch, repeated if there are too few: a tensor, or a tuple or mapping of tensors."""

    def take(tensor: Tensor) -> Tensor:
        repeats = -(-count // tensor.shape[0])
        return torch.cat([tensor] * repeats)[:count]

    return map_tensors(inputs, take)


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


def kinds_of(inputs: Any) -> Any:
    """Structure, shapes and element types of inputs, as JSON types: all that :func:`inputs_like` needs.

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
    """Inputs of the kinds that :func:`kinds_of` returned: the same normal numbers each time; zeros for integers."""
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
    """Check kinds that were read from a file, and count the elements of inputs of these kinds.

    Raises:
        ValueError: If they are malformed, or there are more than ``most`` elements.
    """
    count = 0
    if isinstance(kinds, Mapping) and len(kinds) == 1 and "mapping" in kinds:
        count = sum(check_kinds(value, most) for value in kinds["mapping"].values())
    elif isinstance(kinds, Mapping) and len(kinds) == 1 and "tuple" in kinds:
        count = sum(check_kinds(value, most) for value in kinds["tuple"])
    elif isinstance(kinds, Mapping) and set(kinds) == {"shape", "dtype"} and kinds["dtype"] in INPUT_TYPES:
        shape = kinds["shape"]
        if not isinstance(shape, list) or any(type(length) is not int or length < 0 for length in shape):
            raise ValueError(f"{shape!r} is not a shape")
        count = math.prod(shape)
    elif not (isinstance(kinds, Mapping) and set(kinds) == {"value"}):
        raise ValueError(f"{kinds!r} does not describe inputs")
    if count > most:
        raise ValueError(f"the example inputs have {count} elements, more than {most}")
    return count
