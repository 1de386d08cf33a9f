"""ONNX Runtime sessions, and what goes into them: the provider that was asked for, or an error."""

from __future__ import annotations

import logging
import os
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from importlib.util import find_spec
from io import StringIO
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from nns_plugin.errors import ExportError, MissingExtraError, ProviderError
from nns_plugin.models.preserve import preserved

try:
    import onnx
    import onnxruntime
    from onnx import checker as onnx_checker
except ModuleNotFoundError as error:
    raise MissingExtraError(error.name or "onnxruntime", "onnx") from error
if find_spec("onnxscript") is None:  # torch.onnx needs it, and importing it here would cost every session a second
    raise MissingExtraError("onnxscript", "onnx")

__all__ = [
    "Arguments",
    "Floats",
    "Inputs",
    "check_provider",
    "create_session",
    "evaluating",
    "feed_of",
    "ieee_float32",
    "onnx_checker",
    "provider_name",
    "quiet",
    "reason",
    "run_session",
    "runtime_build",
    "session_providers",
]

Inputs: TypeAlias = Tensor | Sequence[Tensor] | Mapping[str, Tensor]
"""What a model's forward takes: one tensor, its positional tensors, or its tensors by parameter name."""

Floats: TypeAlias = npt.NDArray[np.float64]

_NOT_KNOWN = re.compile(r"Opset (\d+) is under development.* domain (\S+) is till opset (\d+)")
_PLACE_IN_SOURCE = re.compile(
    r"\S+\.(?:cc|h|cpp):\d+ (?:[^()]*\((?:[^()]|\([^()]*\))*\)(?: const)?|\w+) "  # file, line and signature, or name
)


class Arguments(NamedTuple):
    """Checked inputs of a forward: positional tensors or tensors by name, all with the same batch size."""

    args: tuple[Tensor, ...]
    kwargs: dict[str, Tensor]

    @classmethod
    def of(cls, inputs: Inputs) -> Arguments:
        """Check inputs; raises ExportError unless all are tensors whose dimension 0 is one batch."""
        if isinstance(inputs, Mapping):
            arguments = cls((), dict(inputs))
        else:
            arguments = cls((inputs,) if isinstance(inputs, Tensor) else tuple(inputs), {})
        tensors = arguments.tensors
        found = [f"{t.dtype}{list(t.shape)}" if isinstance(t, Tensor) else type(t).__name__ for t in tensors]
        if not all(isinstance(t, Tensor) and t.ndim > 0 for t in tensors) or len({len(t) for t in tensors}) != 1:
            raise ExportError(
                f"the inputs are {found or 'none'}; expected one or more tensors whose dimension 0 is the same batch"
            )
        if arguments.batch == 0:
            raise ExportError(f"the inputs {found} hold no example; pass a batch of at least 1")
        return arguments

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All of them, in order."""
        return (*self.args, *self.kwargs.values())

    @property
    def batch(self) -> int:
        """Number of inputs."""
        return len(self.tensors[0])

    def map(self, change: Callable[[Tensor], Tensor]) -> Arguments:
        """The same arguments with every tensor changed."""
        return Arguments(tuple(map(change, self.args)), {name: change(t) for name, t in self.kwargs.items()})

    def doubled(self) -> Arguments:
        """The batch twice, one after the other."""
        return self.map(lambda tensor: torch.cat([tensor, tensor]))

    def to(self, device: torch.device) -> Arguments:
        """The same arguments on another device."""
        return self.map(lambda tensor: tensor.to(device))


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model into eval mode without gradients; on exit it is again exactly what it was."""
    with preserved(model), torch.inference_mode(False), torch.no_grad():
        model.eval()
        yield


@contextmanager
def quiet() -> Iterator[None]:
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
def ieee_float32() -> Iterator[None]:
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


def reason(error: BaseException) -> str:
    """The error at the root of a chain, in one line: exporters wrap it in pages of advice."""
    while error.__cause__ is not None:
        error = error.__cause__
    if type(error).__module__.startswith("onnxruntime"):
        return _runtime_reason(" ".join(str(error).split()))
    first, _, rest = re.sub(r"\x1b\[[0-9;]*m", "", str(error)).strip().partition("\n")
    if first.endswith(":"):  # a heading
        first += " " + rest.strip().partition("\n")[0]
    return f"{type(error).__name__}: {first}".removesuffix(": ")


def _runtime_reason(text: str) -> str:
    """What ONNX Runtime says, without places in its sources."""
    if found := _NOT_KNOWN.search(text):
        opset, domain, known = found.groups()
        return f"it asks for opset {opset} of {domain}, and this ONNX Runtime knows those up to {known}"
    text = re.sub(r"^\[ONNXRuntimeError\] : \d+ : ([A-Z_]+) : (Load model from .*? failed: ?)?", r"\1: ", text)
    return _PLACE_IN_SOURCE.sub("", text)[:300]


def provider_name(provider: str) -> str:
    """ONNX Runtime's name of an execution provider, for it in any case or without its ending: ``cpu``, ``cuda``."""
    names = {name.lower(): name for name in onnxruntime.get_all_providers()}
    short = provider.lower()
    return names.get(short) or names.get(f"{short}executionprovider") or provider


def create_session(
    path: str | os.PathLike[str],
    provider: str = "CPUExecutionProvider",
    *,
    threads: int | None = 1,
    allow_spinning: bool = False,
    profile: Path | None = None,
) -> onnxruntime.InferenceSession:
    """Open an ONNX file with the execution provider that was asked for, or fail.

    ONNX Runtime itself falls back to the CPU without an error. Its warnings are silenced, and TF32 is off.

    Args:
        path: The ONNX file.
        provider: Name of an execution provider; ``"cpu"``, ``"cuda"`` and so on will do.
        threads: Threads within an operator; None leaves the number to ONNX Runtime.
        allow_spinning: Whether idle threads spin. That is faster for one session with a machine of its own, and slows
            down every other session of the process.
        profile: How the name of a file begins into which ONNX Runtime writes what each node took, at the session's
            ``end_profiling``; ``None`` for none.

    Returns:
        The session.

    Raises:
        ExportError: If the file is missing or is not a valid ONNX model, or threads is out of range.
        ProviderError: If the session does not get the provider.
    """
    provider = provider_name(provider)
    if threads is not None and threads < 1:
        raise ExportError(f"threads is {threads}; expected at least 1, or None to leave it to ONNX Runtime")
    if not Path(path).is_file():
        raise ExportError(f"there is no file {str(path)!r}; expected an ONNX model, export one first")
    if provider not in onnxruntime.get_available_providers():
        raise ProviderError(_no_provider(provider, "nothing"))
    session = _open(os.fspath(path), provider, threads, allow_spinning, profile)
    if session.get_providers()[0] != provider:
        raise ProviderError(_no_provider(provider, session.get_providers()[0]))
    return session


def _open(
    model: str | bytes, provider: str, threads: int | None, allow_spinning: bool, profile: Path | None = None
) -> Any:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or 0
    options.inter_op_num_threads = 1
    options.log_severity_level = 4  # its errors are raised as well
    options.add_session_config_entry("session.intra_op.allow_spinning", str(int(allow_spinning)))
    if profile is not None:
        options.enable_profiling = True
        options.profile_file_prefix = str(profile)
    settings = {"use_tf32": "0"} if provider == "CUDAExecutionProvider" else {}
    try:
        return onnxruntime.InferenceSession(model, options, providers=[(provider, settings)], enable_fallback=0)
    except (ValueError, RuntimeError) as error:  # about providers; errors about the model are direct Exceptions
        raise ProviderError(_no_provider(provider, reason(error))) from error
    except Exception as error:
        source = repr(model) if isinstance(model, str) else "a model of its own"
        raise ExportError(
            f"ONNX Runtime cannot load {source} ({reason(error)}); expected a complete ONNX file, export it again"
        ) from error


def _no_provider(provider: str, found: str) -> str:
    available = ", ".join(onnxruntime.get_available_providers())
    advice = "choose one of these"
    if provider == "CUDAExecutionProvider":
        advice = (
            'run pip uninstall onnxruntime, then pip install "nns-plugin[gpu]" for onnxruntime-gpu, and install its '
            "CUDA and cuDNN"
        )
    return f"asked ONNX Runtime for {provider}, got {found}; this build offers {available}: {advice}"


def check_provider(provider: str) -> None:
    """Make sure, before any work, that sessions get an execution provider.

    Raises:
        ProviderError: If they do not.
    """
    provider = provider_name(provider)
    if provider not in onnxruntime.get_available_providers():
        raise ProviderError(_no_provider(provider, "nothing"))
    got = _open(_tiny_model(), provider, 1, False).get_providers()[0]
    if got != provider:
        raise ProviderError(_no_provider(provider, got))


def _tiny_model() -> bytes:
    vector = onnx.TensorProto.FLOAT
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("Add", ["x", "x"], ["y"])],
        "doubling",
        [onnx.helper.make_tensor_value_info("x", vector, [1])],
        [onnx.helper.make_tensor_value_info("y", vector, [1])],
    )
    opsets = [onnx.helper.make_opsetid("", 17)]
    model: bytes = onnx.helper.make_model(graph, opset_imports=opsets, ir_version=8).SerializeToString()
    return model


def session_providers() -> dict[str, list[str]]:
    """The providers that sessions really get, for each provider that this build of ONNX Runtime claims to offer.

    Returns:
        For each available provider, the providers of a session on a tiny model that asked for it; where no session
        could be created, one text that starts with ``error:``.

    Example:
        >>> session_providers()["CPUExecutionProvider"]
        ['CPUExecutionProvider']
    """
    model = _tiny_model()
    found: dict[str, list[str]] = {}
    for provider in onnxruntime.get_available_providers():
        try:
            found[provider] = list(_open(model, provider, 1, False).get_providers())
        except (ExportError, ProviderError) as error:
            found[provider] = [f"error: {error}"]
    return found


def runtime_build() -> dict[str, str]:
    """Which build of ONNX Runtime this is, what it says of itself, and the providers that it offers."""
    return {
        "onnxruntime": onnxruntime.__version__,
        "build": onnxruntime.get_build_info().removeprefix("ORT Build Info: "),
        "device": onnxruntime.get_device(),
        "providers": ", ".join(onnxruntime.get_available_providers()),
    }


def feed_of(session: Any, arguments: Arguments, path: object) -> dict[str, npt.NDArray[Any]]:
    """The inputs as a session takes them; positional ones by order, named ones by name."""
    names = [put.name for put in session.get_inputs()]
    named = arguments.kwargs or dict(zip(names, arguments.args, strict=False))
    if sorted(named) != sorted(names) or len(arguments.args) not in (0, len(names)):
        given = list(arguments.kwargs) or f"{len(arguments.args)} positional tensors"
        raise ExportError(f"{str(path)!r} has the inputs {names}, found {given}; pass one tensor for each")
    try:
        return {name: tensor.detach().cpu().numpy() for name, tensor in named.items()}
    except TypeError as error:
        raise ExportError(f"the inputs cannot be converted to NumPy ({reason(error)}); convert them first") from error


def run_session(
    session: Any, feed: Mapping[str, npt.NDArray[Any]], path: object, outputs: Sequence[str] | None = None
) -> list[npt.NDArray[Any]]:
    """Outputs of one run, all in order or some by name; raises ExportError if it cannot run on the inputs."""
    try:
        return list(session.run(outputs, feed))
    except Exception as error:
        shapes = {name: f"{array.dtype}{list(array.shape)}" for name, array in feed.items()}
        raise ExportError(
            f"{str(path)!r} cannot run on {shapes} ({reason(error)}); "
            "pass inputs like those it was exported with, and export it with a dynamic batch axis"
        ) from error
