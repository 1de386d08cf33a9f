"""Export: a torch model as a checked ONNX file with a dynamic batch axis and the names of its labels."""

from __future__ import annotations

import inspect
import json
import operator
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import torch
from torch import Tensor, nn

from nns_plugin.adapters.onnxruntime.arguments import Arguments, Inputs
from nns_plugin.adapters.onnxruntime.file import FEATURES_KEY, LABELS_KEY, SELECTION_KEY
from nns_plugin.adapters.onnxruntime.host_messages import quiet, reason
from nns_plugin.adapters.onnxruntime.modes import evaluating
from nns_plugin.errors import ExportError
from nns_plugin.models.inputs import device_of
from nns_plugin.synapses.input_selection import InputSelection

_SINGLE_FILE_BYTES = 2**31 - 2**26  # protobuf holds up to 2 GiB; the 64 MiB are left for the graph itself


@dataclass(frozen=True)
class TensorNames:
    """Names of the inputs and outputs of an ONNX file.

    Attributes:
        inputs: Names of the inputs; the forward's parameter names if ``None``.
        outputs: Names of the outputs; the exporter's if ``None``.
    """

    inputs: Sequence[str] | None = None
    outputs: Sequence[str] | None = None


def export(
    model: nn.Module,
    example_inputs: Inputs,
    path: str | os.PathLike[str],
    *,
    label_names: Sequence[str] | None = None,
    features: InputSelection | Sequence[int] | Tensor | None = None,
    metadata: Mapping[str, str] | None = None,
    opset: int | None = None,
    tensor_names: TensorNames | None = None,
) -> Path:
    """Export a model in eval mode to an ONNX file with a dynamic batch axis on dimension 0 of every input.

    The file appears under its name only when it is complete and checked. Weights of up to 2 GiB minus 64 MiB are stored
    in the file itself; larger ones, which protobuf cannot hold, in ``<file name>.data`` beside it.

    Args:
        model: The model; it is left exactly as it was, even if the export fails.
        example_inputs: Inputs that the model accepts, ``[N, ...]``. A batch of 1 is doubled, because a trace of one
            example follows any branch that the forward has for it; so the model must accept a batch of 2.
        path: The file to write; an existing one is replaced.
        label_names: Names of the first output's labels, in order; stored as a JSON list under ``LABELS_KEY``.
        features: For a model narrowed to some input features of a wider one: which those are, in order. Their indices
            are stored as a JSON list under ``FEATURES_KEY``. A selection also says what they index (the axis, whether
            the axes behind the batch count as one, how many features there were), stored as a JSON object under
            ``SELECTION_KEY``.
        metadata: Further entries of the file's metadata.
        opset: ONNX operator set version; the exporter's default if ``None``.
        tensor_names: Names of the file's inputs and outputs. Inputs passed by name keep their names.

    Returns:
        The path of the file.

    Raises:
        ExportError: If the inputs, names or metadata do not fit the model, if the model cannot be exported with a
            dynamic batch axis, or if the file cannot be written.
    """
    target = Path(path)
    arguments = Arguments.of(example_inputs)
    names = tensor_names or TensorNames()
    properties = _properties(label_names, metadata) | _feature_properties(features, arguments)
    if features is not None and metadata and metadata.keys() & {FEATURES_KEY, SELECTION_KEY}:
        raise ExportError(f"metadata holds {FEATURES_KEY!r}, the key of features; pass one of the two")
    if names.inputs is not None and arguments.kwargs:
        raise ExportError("tensor_names cannot rename inputs that are passed by name; drop the names or pass a tuple")
    if target.is_dir():
        raise ExportError(f"{str(target)!r} is a folder; expected the name of the file to write")
    with _staging_folder(target) as folder:
        program = _trace(model, arguments, opset, names)
        _check_program(program, type(model).__name__, opset, names, label_names)
        program.model.metadata_props.update(properties)
        for node in program.model.graph.all_nodes():
            node.metadata_props.clear()  # stack traces with the paths of this machine
        _write(program, folder / target.name, target)
    return target


def _properties(label_names: Sequence[str] | None, metadata: Mapping[str, str] | None) -> dict[str, str]:
    properties = dict(metadata or {})
    if not all(isinstance(text, str) for pair in properties.items() for text in pair):
        raise ExportError(f"metadata must map strings to strings, found {properties}; convert its values first")
    if label_names is not None:
        if isinstance(label_names, str) or not all(isinstance(name, str) for name in label_names):
            raise ExportError(f"label_names must be a sequence of strings, found {label_names!r}")
        if LABELS_KEY in properties:
            raise ExportError(f"metadata holds {LABELS_KEY!r}, the key of label_names; pass one of the two")
        properties[LABELS_KEY] = json.dumps(list(label_names))
    return properties


def _feature_properties(
    features: InputSelection | Sequence[int] | Tensor | None, arguments: Arguments
) -> dict[str, str]:
    """Metadata on the input features that a narrowed model takes."""
    if features is None:
        return {}
    selection = features if isinstance(features, InputSelection) else None
    try:
        given = features.indices if isinstance(features, InputSelection) else torch.as_tensor(features)
        indices = [operator.index(index) for index in given.reshape(-1).tolist()]
    except (TypeError, ValueError, RuntimeError) as error:
        raise ExportError(f"features must be distinct indices of inputs, found {features!r}") from error
    if min(indices, default=0) < 0 or len(set(indices)) != len(indices):
        raise ExportError(f"features must be distinct indices of inputs, found {indices[:5]}")
    shapes = [list(value.shape) for value in arguments.tensors]
    axes = slice(1, None) if selection is None else slice(selection.axis, (selection.axis + 1) or None)
    if len(shapes) != 1 or len(indices) not in shapes[0][axes]:
        raise ExportError(
            f"there are {len(indices)} features, but the model's inputs are {shapes}; expected one input, as wide as "
            "there are features"
        )
    found = {FEATURES_KEY: json.dumps(indices)}
    if selection is not None:
        indexed = {"axis": selection.axis, "flat": selection.flat, "total": selection.total}
        found[SELECTION_KEY] = json.dumps(indexed)
    return found


@contextmanager
def _staging_folder(target: Path) -> Iterator[Path]:
    """A temporary folder on the target's file system, from which complete files are moved into place."""
    try:
        folder = tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}-")
    except OSError as error:
        raise ExportError(
            f"cannot write to the folder {str(target.parent)!r} ({reason(error)}); "
            "expected an existing folder with write permission"
        ) from error
    with folder:
        yield Path(folder.name)


def _trace(model: nn.Module, arguments: Arguments, opset: int | None, names: TensorNames) -> Any:
    """Run PyTorch's exporter; return its program."""
    example = (arguments.doubled() if arguments.batch == 1 else arguments).to(device_of(model))
    # With a name the axis is dynamic or the export fails; a torch.export.Dim is silently replaced by a constant.
    axes = {0: "batch"}
    try:
        bound = inspect.signature(model.forward).bind(*example.args, **example.kwargs).arguments
        shapes = {name: axes if isinstance(value, Tensor) else (axes,) * len(value) for name, value in bound.items()}
        with evaluating(model), quiet():
            return torch.onnx.export(
                model,
                example.args,
                kwargs=example.kwargs or None,
                dynamo=True,
                verbose=False,
                opset_version=opset,
                input_names=names.inputs,
                output_names=names.outputs,
                dynamic_shapes=shapes,
            )
    except Exception as error:
        raise ExportError(
            f"{type(model).__name__} cannot be exported to ONNX ({reason(error)}); its forward must accept the "
            f"example inputs in eval mode at any batch size (tried {example.batch}) and be traceable by torch.export"
        ) from error


def _check_program(
    program: Any,
    model_name: str,
    opset: int | None,
    names: TensorNames,
    label_names: Sequence[str] | None,
) -> None:
    """Check that the exporter honoured requests that it drops without an error."""
    graph, found_opset = program.model.graph, program.model.opset_imports[""]
    if opset is not None and found_opset != opset:
        raise ExportError(
            f"{model_name} was exported with opset {found_opset}, but {opset} was requested; request {found_opset}"
        )
    for kind, asked, values in (("input", names.inputs, graph.inputs), ("output", names.outputs, graph.outputs)):
        if asked is not None and list(asked) != [value.name for value in values]:
            raise ExportError(
                f"the {kind} names are {list(asked)}, but {model_name} has the {kind}s "
                f"{[value.name for value in values]}; give one name for each"
            )
    if label_names is not None:
        shape = list(graph.outputs[0].shape)
        if len(shape) < 2 or shape[1] != len(label_names):
            raise ExportError(
                f"label_names has {len(label_names)} names, but the first output of {model_name} is "
                f"[{', '.join(map(str, shape))}]; expected one name for each position of its dimension 1"
            )


def _write(program: Any, staged: Path, target: Path) -> None:
    """Save to a staged file, check it, and move it into place, after its external weights if there are any."""
    try:
        size = sum(value.const_value.nbytes for value in program.model.graph.initializers.values())
        with quiet():
            program.save(staged, external_data=size > _SINGLE_FILE_BYTES)
            onnx.checker.check_model(str(staged))
        for file in sorted(staged.parent.iterdir(), key=lambda file: file == staged):
            os.replace(file, target.parent / file.name)
    except Exception as error:
        raise ExportError(f"cannot write {str(target)!r} ({reason(error)}); free space or export elsewhere") from error
