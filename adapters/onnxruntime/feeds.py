"""Inputs for an ONNX file: given, read or drawn at random, checked against the file, and split into batches."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
from torch import Tensor

from nns_plugin.adapters.onnxruntime.file import OnnxFile, TensorSpec
from nns_plugin.errors import ExportError
from nns_plugin.evaluation.metrics import Array

Values: TypeAlias = Mapping[str, Array]
"""Inputs by name, ``[N, ...]``; an input whose first size is fixed to another number is the same in every run."""

LABELS = "labels"  # entry of a data file that holds the labels of the inputs


@dataclass(frozen=True, eq=False)
class Feeds:
    """The inputs of one file.

    Attributes:
        inputs: Number of inputs, N.
        batched: ``[N, ...]`` by name.
        constant: Inputs by name that are the same in every run.
        fixed: The only batch size that the file takes; ``None`` if it takes any.
        path: The file.
    """

    inputs: int
    batched: Values
    constant: Values
    fixed: int | None
    path: str

    def batch(self, size: int) -> dict[str, Array]:
        """One batch of the first inputs, repeated if there are too few.

        Raises:
            ExportError: If the file takes only another batch size.
        """
        if self.fixed not in (None, size):
            raise ExportError(
                f"{self.path!r} takes batches of {self.fixed} only, found {size}: measure with {self.fixed}"
            )
        return self._taken(np.arange(size) % self.inputs)

    def batches(self, first: int, end: int) -> Iterator[tuple[dict[str, Array], int, int]]:
        """Inputs in batches, with the size of each and how many of its inputs count: a fixed batch size is padded."""
        size = self.fixed or max(1, end - first)
        for start in range(first, end, size):
            count = min(size, end - start)
            whole = count if self.fixed is None else size
            yield self._taken(np.arange(start, start + whole) % self.inputs), whole, count

    def _taken(self, rows: npt.NDArray[np.intp]) -> dict[str, Array]:
        return {name: values[rows] for name, values in self.batched.items()} | dict(self.constant)


def values_of(inputs: Any, file: OnnxFile) -> dict[str, Array]:
    """Map inputs (one tensor or array, several in order, or several by name) to a file's input names.

    Raises:
        ExportError: If they are not tensors or arrays, or not as many as the file takes.
    """
    names = [spec.name for spec in file.inputs]
    single = isinstance(inputs, (Tensor, np.ndarray))
    if not single and not isinstance(inputs, (Mapping, Sequence)):
        raise ExportError(f"the inputs are a {type(inputs).__name__}; expected tensors or arrays, in order or by name")
    if isinstance(inputs, Mapping):
        given = dict(inputs)
    else:
        listed = [inputs] if single else list(inputs)
        if len(listed) != len(names):
            raise ExportError(f"{file.path!r} has the inputs {names}, found {len(listed)}; pass one for each")
        given = dict(zip(names, listed, strict=True))
    return {str(name): _array(name, value) for name, value in given.items()}


def _array(name: str, value: Any) -> Array:
    if isinstance(value, np.ndarray):
        return value
    if not isinstance(value, Tensor):
        raise ExportError(f"input {name!r} is a {type(value).__name__}; expected a tensor or an array")
    try:
        return np.asarray(value.detach().cpu().numpy())
    except TypeError as error:
        raise ExportError(f"input {name!r} is {value.dtype}, which NumPy lacks; convert it first") from error


def read_values(path: str | os.PathLike[str], file: OnnxFile) -> tuple[dict[str, Array], Array | None]:
    """Read the inputs of a file, and their labels, from a NumPy archive.

    Args:
        path: An ``.npz`` file: one array per input name, and ``labels`` with ``[N]`` integers, if known. If the model
            has one input, its array may have any name.
        file: The ONNX file.

    Returns:
        The inputs by name, and the labels.

    Raises:
        ExportError: If the archive cannot be read, or its entries do not match.
    """
    where = Path(path)
    names = [spec.name for spec in file.inputs]
    try:
        with where.open("rb") as stream:
            archive = np.load(stream, allow_pickle=False)
            if not isinstance(archive, np.lib.npyio.NpzFile):
                raise ExportError(f"{str(path)!r} holds one array; expected an .npz archive with {names}")
            with archive:
                entries = {name: archive[name] for name in archive.files}
    except ExportError:
        raise
    except Exception as error:  # damaged archives raise errors from several libraries
        text = " ".join(str(error).split())[:200]
        raise ExportError(f"{str(path)!r} cannot be read as an .npz archive: {type(error).__name__}: {text}") from error
    labels = entries.pop(LABELS, None) if LABELS not in names else None
    if len(names) == len(entries) == 1:
        entries = {names[0]: next(iter(entries.values()))}
    if sorted(entries) != sorted(names):
        raise ExportError(f"{str(path)!r} holds {sorted(entries)}; {file.path!r} has the inputs {sorted(names)}")
    if labels is not None and (labels.ndim != 1 or not np.issubdtype(labels.dtype, np.integer)):
        raise ExportError(f"{str(path)!r} has labels {labels.dtype}{list(labels.shape)}; expected integers [N]")
    return entries, labels


def random_values(file: OnnxFile, count: int, seed: int = 0) -> dict[str, Array]:
    """Random inputs for a file: normal numbers, and zeros and ones if it takes integers or booleans.

    Args:
        file: The file.
        count: Number of inputs.
        seed: Seed of the numbers.

    Raises:
        ExportError: If a size other than the batch is free, or inputs of an element type cannot be drawn.
    """
    rng = np.random.default_rng(seed)
    fixed = file.fixed_batch
    values = {}
    for spec in file.inputs:
        sizes = spec.shape
        if sizes is None or any(not isinstance(size, int) for size in sizes[1:]):
            raise ExportError(
                f"{file.path!r} takes {spec}: its free sizes are unknown, so inputs cannot be drawn; give data"
            )
        whole = [count if size == fixed or not isinstance(size, int) else size for size in sizes[:1]]
        shape = tuple(size for size in (*whole, *sizes[1:]) if isinstance(size, int))
        values[spec.name] = _drawn(spec, file, shape, rng)
    return values


def _drawn(spec: TensorSpec, file: OnnxFile, shape: tuple[int, ...], rng: np.random.Generator) -> Array:
    kind = spec.dtype
    if kind in ("float16", "float32", "float64"):
        return np.asarray(rng.standard_normal(shape)).astype(kind)
    if kind == "bool" or kind.startswith(("int", "uint")):
        return np.asarray(rng.integers(0, 2, shape)).astype(kind)
    raise ExportError(f"{file.path!r} takes {spec}, for which inputs cannot be drawn; give data")


def feeds_of(file: OnnxFile, values: Values) -> Feeds:
    """Check inputs against what a file takes; the features of a narrowed model are selected from the wide inputs.

    Args:
        file: The file.
        values: Inputs by name, or by another file's names in the same order.

    Raises:
        ExportError: If a name, an element type or a shape does not fit.
    """
    names = [spec.name for spec in file.inputs]
    if sorted(values) != sorted(names):
        if len(values) != len(names) or set(values) & set(names):
            raise ExportError(f"{file.path!r} has the inputs {names}, found {list(values)}; pass one for each")
        values = dict(zip(names, values.values(), strict=True))
    if len(names) == 1:
        values = {names[0]: _narrowed(file, values[names[0]])}
    fixed = file.fixed_batch
    batched, constant = {}, {}
    for spec in file.inputs:
        array = _fitting(file, spec, values[spec.name])
        first = spec.shape[0] if spec.shape else None
        if spec.shape == () or (isinstance(first, int) and first != fixed):
            constant[spec.name] = array
        else:
            batched[spec.name] = array
    counts = {name: len(array) for name, array in batched.items()}
    if len(set(counts.values())) > 1 or 0 in counts.values():
        raise ExportError(f"the inputs hold {counts} examples; expected equally many of each, at least one")
    return Feeds(next(iter(counts.values()), 1), batched, constant, fixed, file.path)


def _narrowed(file: OnnxFile, wide: Array) -> Array:
    """The features that a narrowed model takes, selected from wide inputs; other inputs are returned as they are."""
    selection = file.selection
    if selection is None or wide.ndim < 2:
        return wide
    flat = wide.reshape(len(wide), -1) if selection.flat else wide
    if not -flat.ndim <= selection.axis < flat.ndim or flat.shape[selection.axis] != selection.total:
        return wide
    return np.take(flat, selection.indices.numpy(), axis=selection.axis)


def _fitting(file: OnnxFile, spec: TensorSpec, array: Array) -> Array:
    """An array converted to the element type that a file takes, if that is of the same kind; its shape is checked."""
    try:
        wanted = np.dtype(spec.dtype)
    except TypeError as error:
        raise ExportError(f"{file.path!r} takes {spec}, which NumPy lacks; export it with another type") from error
    if not np.can_cast(array.dtype, wanted, "same_kind"):
        raise ExportError(f"{file.path!r} takes {spec}, found {array.dtype}{list(array.shape)}; convert it first")
    if spec.shape is None and array.ndim == 0:
        raise ExportError(f"{file.path!r} takes {spec}, found {array.dtype}[]; pass one number for each input")
    sizes = array.shape if spec.shape is None else spec.shape
    fixed = [size if isinstance(size, int) else math.nan for size in sizes[1:]]
    fits = len(sizes) == array.ndim and all(
        size == found or math.isnan(size) for size, found in zip(fixed, array.shape[1:], strict=True)
    )
    if not fits:
        raise ExportError(f"{file.path!r} takes {spec}, found {array.dtype}{list(array.shape)}; pass such inputs")
    with np.errstate(over="ignore"):
        cast = array.astype(wanted, copy=False)
    lost = (cast != array).any() if wanted.kind in "iu" else (np.isfinite(array) & ~np.isfinite(cast)).any()
    if cast is not array and lost:
        raise ExportError(f"{file.path!r} takes {spec}, and the {array.dtype} inputs hold numbers out of its range")
    return cast
