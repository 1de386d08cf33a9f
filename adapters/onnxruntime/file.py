"""ONNX files: declared inputs, outputs and metadata, and why a file cannot be used."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import torch

from nns_plugin.errors import ExportError
from nns_plugin.synapses.input_selection import InputSelection

LABELS_KEY = "nns.labels"
"""Key of the ONNX metadata entry with the label names of the first output, as a JSON list."""

FEATURES_KEY = "nns.features"
"""Key of the metadata entry with the indices of the input features that a narrowed model takes, as a JSON list."""

SELECTION_KEY = "nns.features.of"
"""Key of the metadata entry that says what those indices count, as a JSON object: ``axis``, ``flat``, ``total``."""

_CHUNK = 2**20


@dataclass(frozen=True)
class TensorSpec:
    """An input or output of a file.

    Attributes:
        name: Name of the tensor.
        dtype: NumPy's name of its element type, such as ``float32``.
        shape: Sizes: a name for a free size, ``None`` for a free size without a name. ``None`` if undeclared.
    """

    name: str
    dtype: str
    shape: tuple[int | str | None, ...] | None

    def __str__(self) -> str:
        sizes = ["..."] if self.shape is None else ["?" if size is None else str(size) for size in self.shape]
        return f"{self.name} {self.dtype}[{', '.join(sizes)}]"


@dataclass(frozen=True)
class OnnxFile:
    """What an ONNX file declares.

    Attributes:
        path: Path of the file.
        sha256: SHA-256 of the file and of the files with its external weights, by path relative to its folder.
        file_bytes: Size of all these files.
        opset: Version of ONNX's own operator set.
        producer: Software that wrote it.
        inputs: Inputs of the graph.
        outputs: Outputs of the graph.
        labels: Names of the first output's labels, if it was exported with them.
        metadata: All metadata entries.
    """

    path: str
    sha256: dict[str, str]
    file_bytes: int
    opset: int
    producer: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    labels: tuple[str, ...] | None
    metadata: dict[str, str]

    @property
    def fixed_batch(self) -> int | None:
        """The only batch size that the file takes; ``None`` if the first size of any input is free."""
        sizes = [spec.shape[0] for spec in self.inputs if spec.shape]
        if not sizes or any(spec.shape is None for spec in self.inputs):
            return None
        first = sizes[0]
        return first if isinstance(first, int) and all(isinstance(size, int) for size in sizes) else None

    @property
    def selection(self) -> InputSelection | None:
        """The input features of the wide model that this narrowed one takes; ``None`` if it takes all.

        Raises:
            ExportError: If the metadata cannot be read.
        """
        if FEATURES_KEY not in self.metadata or SELECTION_KEY not in self.metadata:
            return None
        indices, indexed = (_parsed(self.path, self.metadata, key) for key in (FEATURES_KEY, SELECTION_KEY))
        try:
            total = int(indexed["total"])
            if not indices or any(type(index) is not int or not 0 <= index < total for index in indices):
                raise ValueError(f"indices of {total}")
            return InputSelection(torch.tensor(indices), total, int(indexed["axis"]), bool(indexed["flat"]))
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise ExportError(
                f"{self.path!r} has {FEATURES_KEY} {str(indices)[:60]} and {SELECTION_KEY} {indexed!r}; expected "
                "total, axis and flat, and indices below total: export it again"
            ) from error


def read_file(path: str | os.PathLike[str]) -> OnnxFile:
    """Read what an ONNX file declares, without its weights.

    Raises:
        ExportError: If the file is missing, is not an ONNX file, is truncated, or lacks its graph or external weights.
    """
    where = Path(path)
    if not where.is_file():
        raise ExportError(f"there is no file {str(path)!r}; expected an ONNX model, export one first")
    try:
        model = onnx.load(str(where), load_external_data=False)
    except OSError as error:
        raise ExportError(f"{str(path)!r} cannot be read: {error.strerror}") from error
    except Exception as error:  # protobuf's
        raise ExportError(_undecodable(where)) from error
    if not model.graph.node and not model.graph.output:
        raise ExportError(f"{str(path)!r} holds no graph; expected a complete ONNX model, export it again")
    weights = _external_files(model, where)
    files = [where, *weights]
    constants = {tensor.name for tensor in model.graph.initializer}
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    labels = _parsed(str(path), metadata, LABELS_KEY) if LABELS_KEY in metadata else None
    if labels is not None and not (isinstance(labels, list) and all(map(_is_text, labels))):
        raise ExportError(f"{str(path)!r} has {LABELS_KEY} {labels!r}; expected a list of names, export it again")
    return OnnxFile(
        path=str(path),
        sha256={Path(os.path.relpath(file, where.parent)).as_posix(): _sha256(file) for file in files},
        file_bytes=sum(file.stat().st_size for file in files),
        opset=next((entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")), 0),
        producer=f"{model.producer_name} {model.producer_version}".strip(),
        inputs=tuple(_spec(value) for value in model.graph.input if value.name not in constants),
        outputs=tuple(_spec(value) for value in model.graph.output),
        labels=None if labels is None else tuple(labels),
        metadata=metadata,
    )


def _undecodable(path: Path) -> str:
    """Why a file cannot be decoded: a model begins with its version of the format."""
    with path.open("rb") as file:
        start = file.read(2)
    if start[:1] == b"\x08" and 1 <= start[-1] < 128:
        return f"{str(path)!r} is truncated or damaged ({path.stat().st_size:,} bytes); export or copy it again"
    return f"{str(path)!r} is not an ONNX file; expected a model in the ONNX format"


def _external_files(model: onnx.ModelProto, path: Path) -> list[Path]:
    """The files beside it that hold its weights, sorted by name."""
    names = {
        entry.value
        for tensor in _tensors(model.graph)
        if tensor.data_location == onnx.TensorProto.EXTERNAL
        for entry in tensor.external_data
        if entry.key == "location"
    }
    missing = sorted(name for name in names if not (path.parent / name).is_file())
    if missing:
        raise ExportError(
            f"{str(path)!r} keeps its weights in {', '.join(map(repr, missing))}, not found beside it; copy both"
        )
    return [path.parent / name for name in sorted(names)]


def _tensors(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    """The weights of a graph and of the graphs within its nodes."""
    yield from graph.initializer
    for sparse in graph.sparse_initializer:
        yield from (sparse.values, sparse.indices)
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("t"):
                yield attribute.t
            if attribute.HasField("g"):
                yield from _tensors(attribute.g)
            for inner in attribute.graphs:
                yield from _tensors(inner)


def _spec(value: onnx.ValueInfoProto) -> TensorSpec:
    kind = value.type.tensor_type
    if not value.type.HasField("tensor_type"):
        return TensorSpec(value.name, value.type.WhichOneof("value") or "undefined", None)
    try:
        dtype = onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type).name
    except KeyError:
        dtype = "undefined"
    shape = tuple(
        int(size.dim_value) if size.HasField("dim_value") else (size.dim_param or None) for size in kind.shape.dim
    )
    return TensorSpec(value.name, dtype, shape if kind.HasField("shape") else None)


def _is_text(name: Any) -> bool:
    """Whether a name is text that can be encoded."""
    return isinstance(name, str) and name.encode("utf-8", "replace").decode() == name


def _parsed(path: str, metadata: Mapping[str, str], key: str) -> Any:
    try:
        return json.loads(metadata[key])
    except ValueError as error:
        raise ExportError(f"{path!r} has {key} {metadata[key][:60]!r}, which is not JSON; export it again") from error


def _sha256(path: Path) -> str:
    found = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            found.update(chunk)
    return found.hexdigest()
