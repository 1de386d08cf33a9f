"""Parity: how far an ONNX file's outputs are from the model's."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from nns_plugin.adapters.onnx_session import (
    Arguments,
    Floats,
    Inputs,
    create_session,
    evaluating,
    feed_of,
    ieee_float32,
    reason,
    run_session,
)
from nns_plugin.errors import ExportError
from nns_plugin.forward import device_of


@dataclass(frozen=True)
class ParityReport:
    """How far an ONNX file's outputs are from the model's.

    Attributes:
        passed: Whether every value differs by at most ``atol + rtol * |model's value|``; a NaN never passes.
        max_absolute_error: Largest absolute difference, NaN if an output holds one.
        max_relative_error: Largest difference relative to the model's value, over values larger than ``atol``.
        p50_absolute_error: Median of the absolute differences.
        p90_absolute_error: Their 90th percentile.
        p99_absolute_error: Their 99th percentile.
        top1_agreement: Share of inputs (and positions) whose largest first-output label is the same, in [0, 1];
            None if the first output is not ``[N, L, ...]`` with at least two labels.
        worst_output: Name of the output that is furthest from passing.
        inputs: Number of inputs, N.
        batch_sizes: Batch sizes that were compared.
        rtol: Relative tolerance.
        atol: Absolute tolerance.
        provider: Execution provider of the file's session.
    """

    passed: bool
    max_absolute_error: float
    max_relative_error: float
    p50_absolute_error: float
    p90_absolute_error: float
    p99_absolute_error: float
    top1_agreement: float | None
    worst_output: str
    inputs: int
    batch_sizes: tuple[int, int]
    rtol: float
    atol: float
    provider: str


class _Errors(NamedTuple):
    absolute: Floats
    relative: Floats
    excess: float  # largest share of the tolerance that is used up; above 1 fails, NaN counts as infinite


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

    The second batch is the first input alone (twice, if it is the only one), so that a file whose batch axis is not
    dynamic is found out.

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
        ExportError: If the file cannot be loaded or run, or if its outputs do not correspond to the model's.
        ProviderError: If the session does not get the provider.
    """
    arguments = Arguments.of(inputs)
    if not (rtol >= 0 and atol >= 0):
        raise ExportError(f"rtol is {rtol} and atol is {atol}; expected numbers from 0 on")
    session = create_session(path, provider, threads=torch.get_num_threads())
    names = [put.name for put in session.get_outputs()]
    other = arguments.map(lambda tensor: tensor[:1]) if arguments.batch > 1 else arguments.doubled()
    errors: list[tuple[str, _Errors]] = []
    agreement = None
    for batch in (other, arguments):
        feed = feed_of(session, batch, path)
        expected = _model_outputs(model, batch)
        found = run_session(session, feed, path)
        shapes = [list(value.shape) for value in expected], [list(value.shape) for value in found]
        if shapes[0] != shapes[1]:
            raise ExportError(
                f"{str(path)!r} gives outputs {shapes[1]} for a batch of {batch.batch}, {type(model).__name__} gives "
                f"{shapes[0]}; export this model, and keep the batch in dimension 0"
            )
        errors += [(n, _errors(e, f, rtol, atol)) for n, e, f in zip(names, expected, found, strict=True)]
        agreement = _top1_agreement(expected[0], found[0])
    worst_output, worst = max(errors, key=lambda named: named[1].excess)
    absolute = np.concatenate([error.absolute for _, error in errors])
    p50, p90, p99 = (float(value) for value in np.percentile(absolute, (50, 90, 99)))
    return ParityReport(
        passed=worst.excess <= 1,
        max_absolute_error=float(absolute.max()),
        max_relative_error=float(np.concatenate([error.relative for _, error in errors]).max()),
        p50_absolute_error=p50,
        p90_absolute_error=p90,
        p99_absolute_error=p99,
        top1_agreement=agreement,
        worst_output=worst_output,
        inputs=arguments.batch,
        batch_sizes=(other.batch, arguments.batch),
        rtol=rtol,
        atol=atol,
        provider=session.get_providers()[0],
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


def _errors(expected: npt.NDArray[Any], found: npt.NDArray[Any], rtol: float, atol: float) -> _Errors:
    """Element-wise differences of one output; equal infinities do not differ."""
    expected, found = (array.astype(np.float64).ravel() for array in (expected, found))
    with np.errstate(invalid="ignore", divide="ignore"):
        absolute = np.where(expected == found, 0.0, np.abs(found - expected))
        size = np.abs(expected)
        relative = np.divide(absolute, size, out=np.zeros_like(size), where=~(size <= atol) & (absolute != 0))
        excess = np.divide(absolute, atol + rtol * size, out=np.zeros_like(size), where=absolute != 0).max(initial=0)
    return _Errors(absolute, relative, float(np.nan_to_num(excess, nan=np.inf, posinf=np.inf)))


def _top1_agreement(expected: npt.NDArray[Any], found: npt.NDArray[Any]) -> float | None:
    if expected.ndim < 2 or expected.shape[1] < 2 or not np.issubdtype(expected.dtype, np.floating):
        return None
    return float(np.mean(expected.argmax(1) == found.argmax(1)))
