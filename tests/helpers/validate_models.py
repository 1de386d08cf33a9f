"""Small handmade ONNX files, as other tools write them, and ways to call ``nns validate`` on them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from nns_plugin.cli import main

FLOAT, FLOAT16, INT64, BOOL = (getattr(onnx.TensorProto, name) for name in ("FLOAT", "FLOAT16", "INT64", "BOOL"))
QUICK = ("--samples", "20", "--batch", "1", "--quiet")
WEIGHTS = np.random.default_rng(3).standard_normal((4, 3)).astype(np.float32)
INPUTS = np.random.default_rng(4).standard_normal((60, 4)).astype(np.float32)
TRUTH = (INPUTS @ WEIGHTS).argmax(1)
NAMES = ("ant", "bee", "cat")


def run(*arguments: object) -> int:
    """The exit code of ``nns``."""
    with pytest.raises(SystemExit) as caught:
        main([str(argument) for argument in arguments])
    return int(caught.value.code or 0)


def validate(baseline: Path, candidate: Path, *arguments: object) -> int:
    """The exit code of ``nns validate`` with quick settings, which later arguments override."""
    return run("validate", baseline, candidate, *QUICK, *arguments)


def value(name: str, *shape: int | str | None, kind: int = FLOAT) -> Any:
    """An input or output; a size that is a name or ``None`` is free."""
    return onnx.helper.make_tensor_value_info(name, kind, shape)


def node(operator: str, inputs: str, outputs: str, **attributes: Any) -> Any:
    """A node; names of inputs and outputs are separated by spaces."""
    return onnx.helper.make_node(operator, inputs.split(), outputs.split(), **attributes)


def save(
    path: Path,
    inputs: Sequence[Any],
    outputs: Sequence[Any],
    nodes: Sequence[Any],
    weights: dict[str, Any] | None = None,
    *,
    labels: Sequence[str] | None = None,
    opset: int = 17,
    **options: Any,
) -> Path:
    """Write a file; with label names in its metadata, as our own exports have them."""
    constants = [onnx.numpy_helper.from_array(np.asarray(array), name) for name, array in (weights or {}).items()]
    graph = onnx.helper.make_graph(nodes, "graph", inputs, outputs, initializer=constants)
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", opset)], ir_version=8)
    if labels is not None:
        onnx.helper.set_model_props(model, {"nns.labels": json.dumps(labels)})
    onnx.save(model, path, **options)
    return path


def linear(path: Path, weights: Any = WEIGHTS, *, batch: int | str = "n", output: str = "y", **options: Any) -> Path:
    """Scores ``y`` of labels from ``x``: one matrix product."""
    inputs, labels = np.shape(weights)
    return save(
        path,
        [value("x", batch, inputs)],
        [value(output, batch, labels)],
        [node("MatMul", "x w", output)],
        {"w": np.asarray(weights, np.float32)},
        **options,
    )


def shifted(path: Path, bias: Sequence[float], **options: Any) -> Path:
    """The scores of :func:`linear` plus a bias per label."""
    return save(
        path,
        [value("x", "n", 4)],
        [value("y", "n", 3)],
        [node("MatMul", "x w", "s"), node("Add", "s b", "y")],
        {"w": WEIGHTS, "b": np.asarray(bias, np.float32)},
        **options,
    )


def data(path: Path, **arrays: Any) -> Path:
    """An archive of inputs; by default those that :func:`linear` classifies correctly."""
    np.savez(path, **(arrays or {"x": INPUTS, "labels": TRUTH}))
    return path


def complaints(capsys: pytest.CaptureFixture[str]) -> list[str]:
    """The lines of the command on standard error."""
    captured = capsys.readouterr()
    assert "Traceback" not in captured.out + captured.err
    lines = captured.err.splitlines()
    assert all(line.startswith("nns: ") for line in lines)
    return lines


def complaint(capsys: pytest.CaptureFixture[str]) -> str:
    """The only line of the command on standard error."""
    (line,) = complaints(capsys)
    return line
