"""Tiny ONNX files by hand for the tests of the ONNX Runtime adapter."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from nns_plugin.adapters.onnxruntime.comparing import compare
from nns_plugin.adapters.onnxruntime.comparison import CompareOptions, Comparison
from nns_plugin.adapters.onnxruntime.file import LABELS_KEY
from nns_plugin.evaluation.parity import ParityReport

TYPES = onnx.TensorProto
_QUICK: dict[str, Any] = {"batches": (1,), "samples": 2, "sessions": 1, "profile_runs": 1, "memory": False}
NAMES = ["cat", "dog", "owl", "pig"]
W = np.array([[1, 0, 0, 0.5], [0, 1, 0, -0.75], [0, 0, 1, 0.25]], np.float32)
X = np.random.default_rng(0).standard_normal((90, 3)).astype(np.float32)  # more than a chunk


def tensor(name: str, *shape: int | str | None, kind: int = TYPES.FLOAT) -> Any:
    """An input or output of a graph."""
    return onnx.helper.make_tensor_value_info(name, kind, shape)


def write(
    path: Path,
    inputs: list[Any],
    outputs: list[Any],
    nodes: list[Any],
    constants: dict[str, Any] | None = None,
    metadata: dict[str, str] | None = None,
) -> Path:
    """Write a hand-made ONNX model."""
    weights = [onnx.numpy_helper.from_array(array, name) for name, array in (constants or {}).items()]
    graph = onnx.helper.make_graph(nodes, "graph", inputs, outputs, weights)
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8)
    onnx.helper.set_model_props(model, metadata or {})
    onnx.save(model, path)
    return path


def linear(
    path: Path,
    weights: Any,
    labels: list[str] | None = None,
    *,
    batch: int | str = "n",
    kind: int = TYPES.FLOAT,
    put: str = "x",
    out: str = "y",
    more: dict[str, Any] | None = None,
    metadata: dict[str, str] | None = None,
) -> Path:
    """A matrix product, or several of one input; in half precision where it takes that."""
    wide = kind != TYPES.FLOAT16
    inner, dtype = ("cast", np.float32) if wide else (put, np.float16)
    nodes = [onnx.helper.make_node("Cast", [put], ["cast"], to=TYPES.FLOAT)] if wide else []
    products = {out: weights} | (more or {})
    nodes += [onnx.helper.make_node("MatMul", [inner, f"w_{name}"], [name]) for name in products]
    return write(
        path,
        [tensor(put, batch, len(weights), kind=kind)],
        [tensor(n, batch, w.shape[1], kind=TYPES.FLOAT if wide else kind) for n, w in products.items()],
        nodes,
        {f"w_{name}": array.astype(dtype) for name, array in products.items()},
        (metadata or {}) | ({LABELS_KEY: json.dumps(labels)} if labels else {}),
    )


def quick_compare(baseline: Any, candidate: Any, inputs: Any = None, labels: Any = None, **options: Any) -> Comparison:
    """Compare with as little measuring as there can be; options of the comparison and other arguments alike."""
    others = {
        name: options.pop(name) for name in ("torch_models", "label_names", "candidate_labels") if name in options
    }
    return compare(baseline, candidate, inputs, labels, CompareOptions(**(_QUICK | options)), **others)


def parity(found: Comparison) -> ParityReport:
    """How far the two files' outputs are from each other."""
    (report,) = (report for report in found.parity if report.kind == "dense against pruned")
    return report
