"""Gains from rounding up channels: layers of an ONNX file measured alone, as they are and rounded up.

Kernels process channels in blocks of 8 or 16, so a layer with 21 channels can take longer than one with 24.
"""

from __future__ import annotations

import os
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper, shape_inference

from nns_plugin.adapters.onnxruntime.comparison import Comparison
from nns_plugin.adapters.onnxruntime.latency import FeedPair, LatencyOptions, measure_latency
from nns_plugin.adapters.onnxruntime.layers import MULTIPLES, layers, rounded_up
from nns_plugin.evaluation.metrics import Array

_OPSET = 17


@dataclass(frozen=True)
class RoundingGain:
    """What rounding up the channels of some layers would gain.

    Attributes:
        layer: The layers, all of the same sizes: name of the first, and how many more there are.
        count: Number of layers.
        batch: Number of inputs in one run.
        multiple: The channels were rounded up to a multiple of this.
        channels: Input and output channels as they are.
        rounded: Input and output channels rounded up.
        latency_ms: Median latency of one such layer alone, as it is.
        rounded_ms: Median latency of the layer rounded up.
        ratio: Ratio of the medians; above 1, the layer with more channels is faster.
        ratio_low: Lower end of the ratio's 95 % interval.
        ratio_high: Upper end of the interval.
    """

    layer: str
    count: int
    batch: int
    multiple: int
    channels: tuple[int, int]
    rounded: tuple[int, int]
    latency_ms: float
    rounded_ms: float
    ratio: float
    ratio_low: float
    ratio_high: float


class _LayerKind(NamedTuple):
    """What determines the latency of a layer: its operator with attributes, and its sizes."""

    operator: str
    attributes: tuple[tuple[str, Any], ...]
    inputs: int
    outputs: int
    kernel: tuple[int, ...]
    places: tuple[int, ...]

    @property
    def is_convolution(self) -> bool:
        return self.operator == "Conv"

    def rounded(self, multiple: int) -> _LayerKind:
        """The same with channels rounded up."""
        inputs, outputs = rounded_up(self.inputs, self.outputs, multiple, self.is_convolution)
        return self._replace(inputs=inputs, outputs=outputs)

    def feed(self, batch: int) -> dict[str, Array]:
        """Random inputs of the layer."""
        shape = (batch, self.inputs, *self.places) if self.is_convolution else (batch, *self.places, self.inputs)
        return {"x": np.random.default_rng(0).standard_normal(shape).astype(np.float32)}

    def alone(self) -> onnx.ModelProto:
        """A model with this layer alone, with random weights."""
        rng = np.random.default_rng(0)
        shape = (self.outputs, self.inputs, *self.kernel) if self.is_convolution else (self.inputs, self.outputs)
        weights = numpy_helper.from_array(rng.standard_normal(shape).astype(np.float32), "w")
        sizes = [None] * (2 + len(self.places))
        graph = helper.make_graph(
            [helper.make_node(self.operator, ["x", "w"], ["y"], **dict(self.attributes))],
            "layer",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, sizes)],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, sizes)],
            [weights],
        )
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", _OPSET)], ir_version=8)


def rounding_gains(
    path: str | os.PathLike[str],
    comparison: Comparison,
    *,
    multiples: Sequence[int] = MULTIPLES,
    samples: int = 100,
    sessions: int = 5,
) -> tuple[RoundingGain, ...]:
    """Measure each kind of layer whose channels are not a multiple of 8 or 16 against the same layer rounded up.

    Each is measured alone, with random weights, under the conditions of a comparison and at each of its batch sizes.
    Work between layers, such as reordering channels, is not included: whole models pruned with another rounding are
    more conclusive, see ``round_to`` of a recipe.

    Args:
        path: The file.
        comparison: Provides the execution provider, threads and batch sizes.
        multiples: Multiples to round up to.
        samples: Number of timed runs of each layer.
        sessions: Number of pairs of sessions in which they are taken.

    Returns:
        The gains, largest first; only for ungrouped convolutions and matrix products with constant float32 weights
        whose sizes can be inferred from the file.
    """
    found = []
    for latency in comparison.latency:
        kinds = Counter[_LayerKind]()
        names: dict[_LayerKind, str] = {}
        for name, layer in _layers(Path(path), latency.batch):
            kinds[layer] += 1
            names.setdefault(layer, name)
        for layer, count in kinds.items():
            for multiple in multiples:
                more = layer.rounded(multiple)
                if more == layer:
                    continue
                with tempfile.TemporaryDirectory() as folder:
                    files = {kind: Path(folder, f"{kind}.onnx") for kind in ("as it is", "rounded")}
                    for file, shown in zip(files.values(), (layer, more), strict=True):
                        onnx.save(shown.alone(), file)
                    times = measure_latency(
                        files,
                        FeedPair(layer.feed(latency.batch), more.feed(latency.batch), latency.batch),
                        LatencyOptions(
                            samples=samples,
                            sessions=sessions,
                            threads=latency.threads,
                            provider=latency.provider,
                            seed=latency.seed,
                        ),
                    )
                found.append(
                    RoundingGain(
                        layer=names[layer] + (f" and {count - 1} more" if count > 1 else ""),
                        count=count,
                        batch=latency.batch,
                        multiple=multiple,
                        channels=(layer.inputs, layer.outputs),
                        rounded=(more.inputs, more.outputs),
                        latency_ms=times.baseline.p50_ms,
                        rounded_ms=times.candidate.p50_ms,
                        ratio=times.ratio,
                        ratio_low=times.ratio_low,
                        ratio_high=times.ratio_high,
                    )
                )
    return tuple(sorted(found, key=lambda gain: gain.count * (gain.rounded_ms - gain.latency_ms)))


def _layers(path: Path, batch: int) -> Iterator[tuple[str, _LayerKind]]:
    """The layers of a file that can be measured alone at a batch size, with their names."""
    model = onnx.load(str(path))
    constants = {tensor.name for tensor in model.graph.initializer}
    for value in model.graph.input:
        sizes = value.type.tensor_type.shape.dim
        if value.name not in constants and sizes and not sizes[0].HasField("dim_value"):
            sizes[0].dim_value = batch
    inferred = shape_inference.infer_shapes(model, data_prop=True).graph
    shapes = {value.name: _sizes(value) for value in (*inferred.input, *inferred.value_info)}
    for layer in layers(model):
        shape = shapes.get(layer.input)
        if shape is None or 0 in shape or layer.groups != 1 or len(shape) < 2 or not layer.is_float32:
            continue
        if layer.is_convolution:
            yield (
                layer.name,
                _LayerKind("Conv", _plain(layer.attributes), layer.inputs, layer.outputs, layer.kernel, shape[2:]),
            )
        elif shape[-1] == layer.inputs and not layer.attributes.get("transA", 0):
            yield layer.name, _LayerKind("MatMul", (), layer.inputs, layer.outputs, (), shape[1:-1])


def _plain(attributes: Mapping[str, Any]) -> tuple[tuple[str, Any], ...]:
    """Attributes in hashable form."""
    return tuple(
        sorted((name, tuple(value) if isinstance(value, list) else value) for name, value in attributes.items())
    )


def _sizes(value: onnx.ValueInfoProto) -> tuple[int, ...] | None:
    """The shape of a value; ``None`` if a size is free."""
    sizes = value.type.tensor_type.shape.dim
    if not all(size.HasField("dim_value") for size in sizes):
        return None
    return tuple(int(size.dim_value) for size in sizes)
