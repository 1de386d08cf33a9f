"""Parity with a torch model: of the ONNX file exported from it, and of the smaller model left after removal."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from typing import Any

import numpy.typing as npt
import torch
from torch import Tensor, nn

from nns_plugin.adapters.onnxruntime.arguments import Arguments, Inputs
from nns_plugin.adapters.onnxruntime.host_messages import reason
from nns_plugin.adapters.onnxruntime.modes import evaluating, ieee_float32
from nns_plugin.adapters.onnxruntime.session import create_session, feed_of, run_session
from nns_plugin.errors import ExportError
from nns_plugin.evaluation.agreement import top1_agreement
from nns_plugin.evaluation.parity import ParityAccumulator, ParityReport, check_tolerances
from nns_plugin.models.inputs import device_of


def check_parity(
    model: nn.Module,
    path: str | os.PathLike[str],
    inputs: Inputs,
    *,
    rtol: float = 1e-3,
    atol: float = 1e-5,
    provider: str = "CPUExecutionProvider",
) -> ParityReport:
    """Compare an ONNX file's outputs with the model's, at two batch sizes.

    The second batch is the first input alone (twice, if it is the only one), to detect a file whose batch axis is not
    dynamic.

    Args:
        model: The model, run in eval mode on its own device and left exactly as it was.
        path: The ONNX file.
        inputs: Inputs of the model, ``[N, ...]``; they are run as one batch.
        rtol: Relative tolerance.
        atol: Absolute tolerance.
        provider: Execution provider of the file's session.

    Returns:
        The report, over all outputs and both batches.

    Raises:
        ExportError: If the file cannot be loaded or run, or if its outputs do not match the model's.
        ProviderError: If the session does not get the provider.
    """
    arguments = Arguments.of(inputs)
    check_tolerances(rtol, atol)
    session = create_session(path, provider, threads=torch.get_num_threads())
    accumulator = ParityAccumulator([put.name for put in session.get_outputs()], rtol, atol)
    other = arguments.map(lambda tensor: tensor[:1]) if arguments.batch > 1 else arguments.doubled()
    agreement = None
    for batch in (other, arguments):
        feed = feed_of(session, batch, path)
        expected = _model_outputs(model, batch)
        found = run_session(session, feed, path)
        shapes = [list(value.shape) for value in expected], [list(value.shape) for value in found]
        if shapes[0] != shapes[1]:
            raise ExportError(
                f"{str(path)!r} returns outputs {shapes[1]} for a batch of {batch.batch}, "
                f"{type(model).__name__} returns {shapes[0]}; export this model, and keep the batch in dimension 0"
            )
        accumulator.add(expected, found)
        agreement = top1_agreement(expected[0], found[0])
    return accumulator.report(
        "torch against ONNX",
        (type(model).__name__, os.path.basename(path)),
        inputs=arguments.batch,
        batch_sizes=(other.batch, arguments.batch),
        top1=agreement,
        provider=session.get_providers()[0],
    )


def check_removal(
    masked: nn.Module, removed: nn.Module, inputs: Inputs, *, rtol: float = 1e-3, atol: float = 1e-5
) -> ParityReport:
    """Compare the outputs of a model from which units were removed with those of the model in which they are masked.

    If a group passes a layer norm or group norm, whose statistics change under masks, the two do differ.

    Args:
        masked: The wide model with masks. Both models are left exactly as they were.
        removed: The small model.
        inputs: Inputs of both, ``[N, ...]``; they are run as one batch.
        rtol: Relative tolerance.
        atol: Absolute tolerance.

    Raises:
        ExportError: If a model cannot run, or their outputs do not match.
    """
    arguments = Arguments.of(inputs)
    expected, found = (_model_outputs(model, arguments) for model in (masked, removed))
    shapes = [list(value.shape) for value in expected], [list(value.shape) for value in found]
    if shapes[0] != shapes[1] or not expected:
        raise ExportError(
            f"the masked model returns outputs {shapes[0]}, the small model {shapes[1]}; expected the same"
        )
    accumulator = ParityAccumulator([f"output {place}" for place in range(len(expected))], rtol, atol)
    accumulator.add(expected, found)
    return accumulator.report(
        "masked against removed",
        (f"masked {type(masked).__name__}", f"small {type(removed).__name__}"),
        inputs=arguments.batch,
        batch_sizes=(arguments.batch,),
        top1=top1_agreement(expected[0], found[0]),
    )


def _model_outputs(model: nn.Module, arguments: Arguments) -> list[npt.NDArray[Any]]:
    here = arguments.to(device_of(model))
    try:
        with evaluating(model), ieee_float32():
            outputs = model(*here.args, **here.kwargs)
        return [tensor.cpu().numpy() for tensor in _tensors(outputs)]
    except Exception as error:
        raise ExportError(
            f"{type(model).__name__} cannot run on a batch of {here.batch} ({reason(error)}); its forward must accept "
            "the inputs in eval mode at any batch size"
        ) from error


def _tensors(outputs: Any) -> Iterator[Tensor]:
    """The tensors in a forward's nested outputs, in the exporter's order."""
    if isinstance(outputs, Tensor):
        yield outputs
    elif isinstance(outputs, Mapping):
        yield from _tensors(list(outputs.values()))
    elif isinstance(outputs, (list, tuple)):
        for output in outputs:
            yield from _tensors(output)
