"""ONNX Runtime: export a model, prove that the file answers as the model does, and measure how fast it is."""

from __future__ import annotations

import inspect
import json
import logging
import os
import re
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from importlib.util import find_spec
from io import StringIO
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from nns_plugin.errors import ExportError, MissingExtraError, ProviderError
from nns_plugin.forward import device_of
from nns_plugin.preserve import preserved

try:
    import onnx
    import onnxruntime
except ModuleNotFoundError as error:
    raise MissingExtraError(error.name or "onnxruntime", "onnx") from error
if find_spec("onnxscript") is None:  # torch.onnx needs it, and importing it here would cost every session a second
    raise MissingExtraError("onnxscript", "onnx")

Inputs: TypeAlias = Tensor | Sequence[Tensor] | Mapping[str, Tensor]
"""What a model's forward takes: one tensor, its positional tensors, or its tensors by parameter name."""

LABELS_KEY = "nns.labels"
"""Key of the ONNX metadata under which the names of the outputs' labels stand, as a JSON list."""

_SINGLE_FILE_BYTES = 2**31 - 2**26  # protobuf ends at 2 GiB; the 64 MiB between are for the graph itself
_PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
_WARMUP_WINDOW = 10  # rounds whose median is compared with the median of as many before them
_WARMUP_CHANGE = 0.05
_RESAMPLES = 2000

_Floats: TypeAlias = npt.NDArray[np.float64]


# Inputs and the model they go into ------------------------------------------------------------------------------


class _Arguments(NamedTuple):
    """Checked inputs of a forward: positional tensors or tensors by name, all with the same batch size."""

    args: tuple[Tensor, ...]
    kwargs: dict[str, Tensor]

    @classmethod
    def of(cls, inputs: Inputs) -> _Arguments:
        """Check inputs; raises ExportError unless all are tensors whose dimension 0 is one batch."""
        if isinstance(inputs, Mapping):
            arguments = cls((), dict(inputs))
        else:
            arguments = cls((inputs,) if isinstance(inputs, Tensor) else tuple(inputs), {})
        tensors = [*arguments.args, *arguments.kwargs.values()]
        found = [f"{t.dtype}{list(t.shape)}" if isinstance(t, Tensor) else type(t).__name__ for t in tensors]
        if not all(isinstance(t, Tensor) and t.ndim > 0 for t in tensors) or len({len(t) for t in tensors}) != 1:
            raise ExportError(
                f"the inputs are {found or 'none'}; expected one or more tensors whose dimension 0 is the same batch"
            )
        if arguments.batch == 0:
            raise ExportError(f"the inputs {found} hold no example; pass a batch of at least 1")
        return arguments

    @property
    def batch(self) -> int:
        return len(next(iter((*self.args, *self.kwargs.values()))))

    def map(self, change: Callable[[Tensor], Tensor]) -> _Arguments:
        return _Arguments(tuple(map(change, self.args)), {name: change(t) for name, t in self.kwargs.items()})

    def doubled(self) -> _Arguments:
        return self.map(lambda tensor: torch.cat([tensor, tensor]))

    def to(self, device: torch.device) -> _Arguments:
        return self.map(lambda tensor: tensor.to(device))


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model into eval mode without gradients; on exit it is again exactly what it was."""
    # A forward that keeps its activations (self.x = x, self.seen.append(x)) would leave the exporter's fake tensors.
    attributes = [(module, dict(vars(module))) for module in model.modules()]
    values = [value for _, held in attributes for value in held.values()]
    containers = [(value, value.copy()) for value in values if type(value) in (dict, list)]
    with preserved(model), torch.inference_mode(False), torch.no_grad():
        try:
            model.eval()
            yield
        finally:
            for module, held in attributes:
                vars(module).clear()
                vars(module).update(held)
            for container, content in containers:
                container.clear()
                container.extend(content) if isinstance(container, list) else container.update(content)


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the exporter, which warns, logs and prints whole graphs, mostly about itself."""
    disabled = logging.root.manager.disable
    with warnings.catch_warnings(), redirect_stdout(StringIO()), redirect_stderr(StringIO()):
        warnings.simplefilter("ignore")
        logging.disable(logging.CRITICAL)
        try:
            yield
        finally:
            logging.disable(disabled)


@contextmanager
def _ieee_float32() -> Iterator[None]:
    """Compute float32 as float32 on GPUs too; their TF32 default is off by 1e-3."""
    cudnn: Any = torch.backends.cudnn
    backends: tuple[Any, ...] = (torch.backends.cuda.matmul, cudnn.conv, cudnn.rnn)
    precisions = [backend.fp32_precision for backend in backends]
    try:
        for backend in backends:
            backend.fp32_precision = "ieee"
        yield
    finally:
        for backend, precision in zip(backends, precisions, strict=True):
            backend.fp32_precision = precision


def _reason(error: BaseException) -> str:
    """The error at the root of a chain, in one line: exporters wrap it in pages of advice."""
    while error.__cause__ is not None:
        error = error.__cause__
    first, _, rest = re.sub(r"\x1b\[[0-9;]*m", "", str(error)).strip().partition("\n")
    if first.endswith(":"):  # a heading
        first += " " + rest.strip().partition("\n")[0]
    return f"{type(error).__name__}: {first}".removesuffix(": ")


# Export ---------------------------------------------------------------------------------------------------------


def export(
    model: nn.Module,
    example_inputs: Inputs,
    path: str | os.PathLike[str],
    *,
    label_names: Sequence[str] | None = None,
    metadata: Mapping[str, str] | None = None,
    opset: int | None = None,
    input_names: Sequence[str] | None = None,
    output_names: Sequence[str] | None = None,
) -> Path:
    """Export a model in eval mode to an ONNX file with a dynamic batch axis on dimension 0 of every input.

    The file appears under its name only when it is complete and checked. Weights up to 2 GiB less 64 MiB are stored
    in the file itself; larger ones, which protobuf cannot hold, in ``<file name>.data`` beside it.

    Args:
        model: The model; it is left exactly as it was, also when the export fails.
        example_inputs: Inputs that the model accepts, ``[N, ...]``. A batch of 1 is doubled, because the trace of one
            example takes whatever branch a forward has for it, so the model must accept a batch of 2.
        path: The file to write; an existing one is replaced.
        label_names: Names of the first output's labels, in order; stored as a JSON list under ``LABELS_KEY``.
        metadata: Further entries of the file's metadata.
        opset: ONNX operator set version; the exporter's default if None.
        input_names: Names of the file's inputs instead of the forward's parameter names, which name ``Mapping`` inputs.
        output_names: Names of the file's outputs.

    Returns:
        The path of the file.

    Raises:
        ExportError: If the inputs, names or metadata do not fit the model, if the model cannot be exported with a
            dynamic batch axis, or if the file cannot be written.
    """
    target = Path(path)
    arguments = _Arguments.of(example_inputs)
    properties = _properties(label_names, metadata)
    if input_names is not None and arguments.kwargs:
        raise ExportError("input_names cannot rename inputs that are passed by name; drop it or pass a tuple")
    if target.is_dir():
        raise ExportError(f"{str(target)!r} is a folder; expected the name of the file to write")
    with _staging_folder(target) as folder:
        program = _trace(model, arguments, opset, input_names, output_names)
        _check_program(program, type(model).__name__, opset, input_names, output_names, label_names)
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


@contextmanager
def _staging_folder(target: Path) -> Iterator[Path]:
    """A folder on the target's file system, gone on exit, from which complete files are moved into place."""
    try:
        folder = tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}-")
    except OSError as error:
        raise ExportError(
            f"cannot write to the folder {str(target.parent)!r} ({_reason(error)}); "
            "expected an existing folder with write permission"
        ) from error
    with folder:
        yield Path(folder.name)


def _trace(
    model: nn.Module,
    arguments: _Arguments,
    opset: int | None,
    input_names: Sequence[str] | None,
    output_names: Sequence[str] | None,
) -> Any:
    """Run PyTorch's exporter; returns its program."""
    example = (arguments.doubled() if arguments.batch == 1 else arguments).to(device_of(model))
    # A name makes the axis dynamic or the export fail; a torch.export.Dim is dropped for a constant in silence.
    axes = {0: "batch"}
    try:
        bound = inspect.signature(model.forward).bind(*example.args, **example.kwargs).arguments
        shapes = {name: axes if isinstance(value, Tensor) else (axes,) * len(value) for name, value in bound.items()}
        with _evaluating(model), _quiet():
            return torch.onnx.export(
                model,
                example.args,
                kwargs=example.kwargs or None,
                dynamo=True,
                verbose=False,
                opset_version=opset,
                input_names=input_names,
                output_names=output_names,
                dynamic_shapes=shapes,
            )
    except Exception as error:
        raise ExportError(
            f"{type(model).__name__} cannot be exported to ONNX ({_reason(error)}); its forward must accept the "
            f"example inputs in eval mode at any batch size (tried {example.batch}) and be traceable by torch.export"
        ) from error


def _check_program(
    program: Any,
    model_name: str,
    opset: int | None,
    input_names: Sequence[str] | None,
    output_names: Sequence[str] | None,
    label_names: Sequence[str] | None,
) -> None:
    """Check what the exporter made of requests that it drops without an error."""
    graph, found_opset = program.model.graph, program.model.opset_imports[""]
    if opset is not None and found_opset != opset:
        raise ExportError(
            f"{model_name} was exported with opset {found_opset}, but {opset} was asked for; ask for {found_opset}"
        )
    for kind, names, values in (("input", input_names, graph.inputs), ("output", output_names, graph.outputs)):
        if names is not None and list(names) != [value.name for value in values]:
            raise ExportError(
                f"{kind}_names is {list(names)}, but {model_name} has the {kind}s {[value.name for value in values]}; "
                "give one name for each"
            )
    if label_names is not None:
        shape = list(graph.outputs[0].shape)
        if len(shape) < 2 or shape[1] != len(label_names):
            raise ExportError(
                f"label_names has {len(label_names)} names, but the first output of {model_name} is "
                f"[{', '.join(map(str, shape))}]; expected one name for each position of its dimension 1"
            )


def _write(program: Any, staged: Path, target: Path) -> None:
    """Save to a staged file, check it, and move it (after its external weights, if any) into place."""
    try:
        size = sum(value.const_value.nbytes for value in program.model.graph.initializers.values())
        with _quiet():
            program.save(staged, external_data=size > _SINGLE_FILE_BYTES)
            onnx.checker.check_model(str(staged))
        for file in sorted(staged.parent.iterdir(), key=lambda file: file == staged):
            os.replace(file, target.parent / file.name)
    except Exception as error:
        raise ExportError(f"cannot write {str(target)!r} ({_reason(error)}); free space or export elsewhere") from error


# Sessions -------------------------------------------------------------------------------------------------------


def create_session(
    path: str | os.PathLike[str],
    provider: str = "CPUExecutionProvider",
    *,
    threads: int | None = 1,
    allow_spinning: bool = False,
) -> onnxruntime.InferenceSession:
    """Open an ONNX file with the execution provider that was asked for, or fail.

    ONNX Runtime itself falls back to the CPU without an error. Its warnings are silenced, and TF32 is off.

    Args:
        path: The ONNX file.
        provider: Name of an execution provider; ``"cpu"`` and ``"cuda"`` will do.
        threads: Threads within an operator; None leaves the number to ONNX Runtime.
        allow_spinning: Whether idle threads spin. That is faster for one session with a machine of its own, and slows
            down every other session of the process.

    Returns:
        The session.

    Raises:
        ExportError: If the file is missing or is not a valid ONNX model, or threads is out of range.
        ProviderError: If the session does not get the provider.
    """
    provider = _PROVIDERS.get(provider.lower(), provider)
    if threads is not None and threads < 1:
        raise ExportError(f"threads is {threads}; expected at least 1, or None to leave it to ONNX Runtime")
    if not Path(path).is_file():
        raise ExportError(f"there is no file {str(path)!r}; expected an ONNX model, export one first")
    if provider not in onnxruntime.get_available_providers():
        raise ProviderError(_no_provider(provider, "nothing"))
    session = _open(os.fspath(path), provider, threads, allow_spinning)
    if session.get_providers()[0] != provider:
        raise ProviderError(_no_provider(provider, session.get_providers()[0]))
    return session


def _open(model: str | bytes, provider: str, threads: int | None, allow_spinning: bool) -> Any:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or 0
    options.inter_op_num_threads = 1
    options.log_severity_level = 4  # its errors are raised as well
    options.add_session_config_entry("session.intra_op.allow_spinning", str(int(allow_spinning)))
    settings = {"use_tf32": "0"} if provider == "CUDAExecutionProvider" else {}
    try:
        return onnxruntime.InferenceSession(model, options, providers=[(provider, settings)], enable_fallback=0)
    except (ValueError, RuntimeError) as error:  # about providers; errors about the model are direct Exceptions
        raise ProviderError(_no_provider(provider, _reason(error))) from error
    except Exception as error:
        source = repr(model) if isinstance(model, str) else "a model of its own"
        raise ExportError(
            f"ONNX Runtime cannot load {source} ({_reason(error)}); expected a complete ONNX file, export it again"
        ) from error


def _no_provider(provider: str, found: str) -> str:
    available = ", ".join(onnxruntime.get_available_providers())
    advice = "choose one of these"
    if provider == "CUDAExecutionProvider":
        advice = "run pip uninstall onnxruntime, then pip install onnxruntime-gpu, and install its CUDA and cuDNN"
    return f"asked ONNX Runtime for {provider}, got {found}; this build offers {available}: {advice}"


def session_providers() -> dict[str, list[str]]:
    """The providers that sessions really get, for each provider that this build of ONNX Runtime claims to offer.

    Returns:
        For each available provider, the providers of a session on a tiny model that asked for it; where no session
        could be created, one text that starts with ``error:``.

    Example:
        >>> session_providers()["CPUExecutionProvider"]
        ['CPUExecutionProvider']
    """
    vector = onnx.TensorProto.FLOAT
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("Add", ["x", "x"], ["y"])],
        "doubling",
        [onnx.helper.make_tensor_value_info("x", vector, [1])],
        [onnx.helper.make_tensor_value_info("y", vector, [1])],
    )
    opsets = [onnx.helper.make_opsetid("", 17)]
    model = onnx.helper.make_model(graph, opset_imports=opsets, ir_version=8).SerializeToString()
    found: dict[str, list[str]] = {}
    for provider in onnxruntime.get_available_providers():
        try:
            found[provider] = list(_open(model, provider, 1, False).get_providers())
        except (ExportError, ProviderError) as error:
            found[provider] = [f"error: {error}"]
    return found


def _feed(session: Any, arguments: _Arguments, path: object) -> dict[str, npt.NDArray[Any]]:
    """The inputs as a session takes them; positional ones by order, named ones by name."""
    names = [put.name for put in session.get_inputs()]
    named = arguments.kwargs or dict(zip(names, arguments.args, strict=False))
    if sorted(named) != sorted(names) or len(arguments.args) not in (0, len(names)):
        given = list(arguments.kwargs) or f"{len(arguments.args)} positional tensors"
        raise ExportError(f"{str(path)!r} has the inputs {names}, found {given}; pass one tensor for each")
    try:
        return {name: tensor.detach().cpu().numpy() for name, tensor in named.items()}
    except TypeError as error:
        raise ExportError(f"the inputs cannot be converted to NumPy ({_reason(error)}); convert them first") from error


def _run(session: Any, feed: Mapping[str, npt.NDArray[Any]], path: object) -> list[npt.NDArray[Any]]:
    try:
        return list(session.run(None, feed))
    except Exception as error:
        shapes = {name: f"{array.dtype}{list(array.shape)}" for name, array in feed.items()}
        raise ExportError(
            f"{str(path)!r} cannot run on {shapes} ({_reason(error)}); "
            "pass inputs like those it was exported with, and export it with a dynamic batch axis"
        ) from error


# Parity ---------------------------------------------------------------------------------------------------------


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
    absolute: _Floats
    relative: _Floats
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
    arguments = _Arguments.of(inputs)
    if not (rtol >= 0 and atol >= 0):
        raise ExportError(f"rtol is {rtol} and atol is {atol}; expected numbers from 0 on")
    session = create_session(path, provider, threads=torch.get_num_threads())
    names = [put.name for put in session.get_outputs()]
    other = arguments.map(lambda tensor: tensor[:1]) if arguments.batch > 1 else arguments.doubled()
    errors: list[tuple[str, _Errors]] = []
    agreement = None
    for batch in (other, arguments):
        feed = _feed(session, batch, path)
        expected = _model_outputs(model, batch)
        found = _run(session, feed, path)
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


def _model_outputs(model: nn.Module, arguments: _Arguments) -> list[npt.NDArray[Any]]:
    here = arguments.to(device_of(model))
    try:
        with _evaluating(model), _ieee_float32():
            outputs = model(*here.args, **here.kwargs)
        return [tensor.cpu().numpy() for tensor in _tensors(outputs)]
    except Exception as error:
        raise ExportError(
            f"{type(model).__name__} cannot run on a batch of {here.batch} ({_reason(error)}); its forward must accept "
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


# Latency --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LatencyReport:
    """Latency of one ONNX file, copies of inputs and outputs between host and device included.

    Attributes:
        name: The name under which the file was given.
        samples: Number of timed runs.
        p50_ms: Median, in milliseconds.
        p90_ms: 90th percentile, in milliseconds; None below 100 samples.
        p99_ms: 99th percentile, in milliseconds; None below 1000 samples.
    """

    name: str
    samples: int
    p50_ms: float
    p90_ms: float | None
    p99_ms: float | None


@dataclass(frozen=True)
class LatencyComparison:
    """Latency of a candidate beside its baseline.

    Attributes:
        baseline: Latency of the first file.
        candidate: Latency of the second file.
        ratio: Median of the baseline over median of the candidate; above 1, the candidate is faster.
        ratio_low: Lower end of the ratio's 95 % bootstrap interval.
        ratio_high: Upper end of the interval.
        provider: Execution provider of both sessions.
        threads: Threads within an operator, in each session.
        batch: Inputs in one run.
        samples: Number of timed runs of each file.
        warmup_rounds: Untimed runs of each file before.
        warmup_stable: Whether the medians had settled by then.
        seed: Seed of the order of runs and of the bootstrap.
    """

    baseline: LatencyReport
    candidate: LatencyReport
    ratio: float
    ratio_low: float
    ratio_high: float
    provider: str
    threads: int
    batch: int
    samples: int
    warmup_rounds: int
    warmup_stable: bool
    seed: int


def measure_latency(
    paths: Mapping[str, str | os.PathLike[str]],
    inputs: Inputs,
    *,
    samples: int = 200,
    warmup: int = 200,
    threads: int = 1,
    provider: str = "CPUExecutionProvider",
    seed: int = 0,
    progress: bool = False,
) -> LatencyComparison:
    """Measure two ONNX files against each other, in one process and in turns of random order.

    Args:
        paths: The baseline's name and file, then the candidate's.
        inputs: Inputs that both accept, ``[N, ...]``; every run takes all of them.
        samples: Timed runs of each file.
        warmup: Untimed runs of each file at most; they end once the median of 10 runs is within 5 % of that of the 10
            before, for both files.
        threads: Threads within an operator, in each session.
        provider: Execution provider of both sessions.
        seed: Seed of the order of runs and of the bootstrap.
        progress: Whether to show a progress bar.

    Returns:
        The comparison.

    Raises:
        ExportError: If the arguments are out of range or a file cannot be loaded or run.
        ProviderError: If a session does not get the provider.
    """
    if len(paths) != 2:
        raise ExportError(f"paths holds {list(paths)}; expected two files, the baseline and then the candidate")
    if samples < 2 or warmup < 0 or threads < 1:
        raise ExportError(f"samples is {samples}, warmup {warmup} and threads {threads}; expected at least 2, 0 and 1")
    arguments = _Arguments.of(inputs)
    runs = []
    for path in paths.values():
        session = create_session(path, provider, threads=threads)
        feed = _feed(session, arguments, path)
        _run(session, feed, path)
        runs.append((session, feed))
    rng = np.random.default_rng(seed)
    rounds = [_time_round(runs, rng) for _ in range(min(warmup, 2 * _WARMUP_WINDOW))]
    while len(rounds) < warmup and not _is_stable(rounds):
        rounds.append(_time_round(runs, rng))
    bar = tqdm(range(samples), desc="measuring", disable=not progress, leave=False)
    timed = [_time_round(runs, rng) for _ in bar]
    baseline_ms, candidate_ms = np.array(timed).T / 1e6
    ratio, low, high = median_ratio(baseline_ms, candidate_ms, seed=seed)
    baseline_name, candidate_name = paths
    return LatencyComparison(
        baseline=latency_report(baseline_name, baseline_ms),
        candidate=latency_report(candidate_name, candidate_ms),
        ratio=ratio,
        ratio_low=low,
        ratio_high=high,
        provider=session.get_providers()[0],
        threads=threads,
        batch=arguments.batch,
        samples=samples,
        warmup_rounds=len(rounds),
        warmup_stable=_is_stable(rounds),
        seed=seed,
    )


def _time_round(runs: Sequence[tuple[Any, Mapping[str, npt.NDArray[Any]]]], rng: np.random.Generator) -> list[int]:
    """Run every session once, in random order; returns nanoseconds, in the order of the sessions."""
    times = [0] * len(runs)
    for turn in rng.permutation(len(runs)):
        session, feed = runs[turn]
        start = time.perf_counter_ns()
        session.run(None, feed)
        times[turn] = time.perf_counter_ns() - start
    return times


def _is_stable(rounds: Sequence[Sequence[float]]) -> bool:
    """Whether the medians of the last two windows of rounds are close, for every session."""
    if len(rounds) < 2 * _WARMUP_WINDOW:
        return False
    windows = np.array(rounds[-2 * _WARMUP_WINDOW :]).reshape(2, _WARMUP_WINDOW, -1)
    before, after = np.median(windows, axis=1)
    return bool((np.abs(after - before) <= _WARMUP_CHANGE * before).all())


def latency_report(name: str, times_ms: _Floats) -> LatencyReport:
    """Summarise measured times with no percentile that the number of samples cannot carry.

    Args:
        name: Name of what was measured.
        times_ms: ``[samples]``, times of single runs in milliseconds.

    Returns:
        The report.

    Example:
        >>> latency_report("dense", np.arange(1.0, 102.0))
        LatencyReport(name='dense', samples=101, p50_ms=51.0, p90_ms=91.0, p99_ms=None)
    """
    samples = len(times_ms)
    return LatencyReport(
        name=name,
        samples=samples,
        p50_ms=float(np.median(times_ms)),
        p90_ms=float(np.percentile(times_ms, 90)) if samples >= 100 else None,
        p99_ms=float(np.percentile(times_ms, 99)) if samples >= 1000 else None,
    )


def median_ratio(baseline_ms: _Floats, candidate_ms: _Floats, *, seed: int = 0) -> tuple[float, float, float]:
    """Ratio of the medians of two interleaved measurements, with a 95 % bootstrap interval.

    Whole rounds are drawn, so that what slowed down both runs of a round does not widen the interval, and the interval
    is taken of the logarithm, so that exchanging the two inverts it.

    Args:
        baseline_ms: ``[samples]``, times of the baseline, one a round.
        candidate_ms: ``[samples]``, times of the candidate in the same rounds.
        seed: Seed of the bootstrap.

    Returns:
        Median of the baseline over median of the candidate, and the lower and upper end of the interval.

    Example:
        >>> ratio, low, high = median_ratio(np.array([4.0, 6.0, 4.0]), np.array([2.0, 3.0, 2.0]))
        >>> round(ratio, 6), round(low, 6), round(high, 6)
        (2.0, 2.0, 2.0)
    """
    times = np.stack([baseline_ms, candidate_ms])
    rounds, rng = times.shape[1], np.random.default_rng(seed)
    logs: list[_Floats] = []
    for size in np.diff(np.linspace(0, _RESAMPLES, 1 + -(-_RESAMPLES * rounds // 2**20)).astype(int)):
        medians = np.log(np.median(times[:, rng.integers(rounds, size=(size, rounds))], axis=2))
        logs.append(medians[0] - medians[1])
    ratio = float(np.median(baseline_ms) / np.median(candidate_ms))
    low, high = np.exp(np.percentile(np.concatenate(logs), (2.5, 97.5)))
    return ratio, min(float(low), ratio), max(float(high), ratio)  # logarithms may miss the ratio by a rounding
