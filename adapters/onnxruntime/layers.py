"""Layers of an ONNX file: its convolutions and matrix products with constant weights, and their widths."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import onnx
from onnx import helper

MULTIPLES = (16, 8)  # block sizes of the kernels: 16 channels with AVX-512, 8 without
IMAGE_CHANNELS = 4  # up to this many input channels are colours, not units


@dataclass(frozen=True)
class OnnxLayer:
    """A layer of an ONNX graph with constant weights.

    Attributes:
        name: Name of the node.
        operator: Type of the node.
        input: Name of the tensor that it reads.
        attributes: Attributes of the node.
        inputs: Number of input channels.
        outputs: Number of output channels.
        kernel: Kernel size of a convolution; empty for a matrix product.
        groups: Groups of a convolution; 1 for a matrix product.
        is_float32: Whether its weights are float32.
    """

    name: str
    operator: str
    input: str
    attributes: Mapping[str, Any]
    inputs: int
    outputs: int
    kernel: tuple[int, ...]
    groups: int
    is_float32: bool = True

    @property
    def is_convolution(self) -> bool:
        """Whether the layer is a convolution, not a matrix product."""
        return self.operator == "Conv"

    def is_odd(self, multiple: int) -> bool:
        """Whether any of its channel counts that can be rounded up is not a multiple of a number."""
        channels = self.inputs, self.outputs
        return rounded_up(*channels, multiple, self.is_convolution) != channels


def rounded_up(inputs: int, outputs: int, multiple: int, is_convolution: bool) -> tuple[int, int]:
    """Channels of a layer, rounded up; except those of an image, and outputs of a product, which may be labels."""
    up = [size if size <= IMAGE_CHANNELS else -(-size // multiple) * multiple for size in (inputs, outputs)]
    return up[0], up[1] if is_convolution else outputs


def layers(model: onnx.ModelProto) -> tuple[OnnxLayer, ...]:
    """The layers of a model, in node order; its weights need not be loaded."""
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    for node in model.graph.node:
        for entry in node.attribute if node.op_type == "Constant" else ():
            if entry.name == "value":
                constants[node.output[0]] = entry.t
    found = []
    for node in model.graph.node:
        tensor = constants.get(node.input[1]) if len(node.input) > 1 else None
        weights = () if tensor is None else tuple(tensor.dims)
        attributes = {entry.name: helper.get_attribute_value(entry) for entry in node.attribute}
        groups = int(attributes.get("group", 1))
        if node.op_type == "Conv" and len(weights) > 2:
            sizes = weights[1] * groups, weights[0], weights[2:]
        elif node.op_type in ("Gemm", "MatMul") and len(weights) == 2:
            turned = bool(attributes.get("transB", 0))
            sizes = *(weights[::-1] if turned else weights), ()
        else:
            continue
        name = node.name or node.output[0]
        found.append(OnnxLayer(name, node.op_type, node.input[0], attributes, *sizes, groups, _is_float32(tensor)))
    return tuple(found)


def _is_float32(tensor: onnx.TensorProto | None) -> bool:
    return tensor is not None and tensor.data_type == onnx.TensorProto.FLOAT


def read_layers(path: str | os.PathLike[str]) -> tuple[OnnxLayer, ...]:
    """Read the layers of an ONNX file that have constant weights."""
    return layers(onnx.load(os.fspath(path), load_external_data=False))


def odd_layers(found: Sequence[OnnxLayer], multiple: int = MULTIPLES[0]) -> tuple[OnnxLayer, ...]:
    """Select the layers with a channel count that is not a multiple of ``multiple``."""
    return tuple(layer for layer in found if layer.is_odd(multiple))
