"""Sessions of ONNX Runtime: the execution provider that was asked for, or an error; and their runs."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx
import onnxruntime

from nns_plugin.adapters.onnxruntime.arguments import Arguments
from nns_plugin.adapters.onnxruntime.host_messages import reason
from nns_plugin.errors import ExportError, ProviderError
from nns_plugin.evaluation.metrics import Array


def provider_name(provider: str) -> str:
    """ONNX Runtime's name of an execution provider, given in any case and with or without its suffix: ``cuda``."""
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
    """Open an ONNX file with the requested execution provider, or fail.

    ONNX Runtime itself falls back to the CPU without an error. Its warnings are silenced, and TF32 is off.

    Args:
        path: The ONNX file.
        provider: Name of an execution provider, such as ``"cpu"`` or ``"cuda"``.
        threads: Intra-op threads; ``None`` leaves the number to ONNX Runtime.
        allow_spinning: Whether idle threads spin. That speeds up a session that has the machine to itself, and slows
            down every other session of the process.
        profile: Prefix of the file to which ONNX Runtime writes the time of each node at the session's
            ``end_profiling``; ``None`` for no profile.

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
    options.log_severity_level = 4  # errors are raised anyway
    options.add_session_config_entry("session.intra_op.allow_spinning", str(int(allow_spinning)))
    if profile is not None:
        options.enable_profiling = True
        options.profile_file_prefix = str(profile)
    settings = {"use_tf32": "0"} if provider == "CUDAExecutionProvider" else {}
    try:
        return onnxruntime.InferenceSession(model, options, providers=[(provider, settings)], enable_fallback=0)
    except (ValueError, RuntimeError) as error:  # about providers; errors about the model are plain Exceptions
        raise ProviderError(_no_provider(provider, reason(error))) from error
    except Exception as error:
        source = repr(model) if isinstance(model, str) else "a model in memory"
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
    """Check, before any work, that sessions get an execution provider.

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
    """Find the providers that sessions actually get, for each provider that this build of ONNX Runtime claims to offer.

    Returns:
        For each available provider, the providers of a session of a tiny model that requested it; if no session could
        be created, one text that starts with ``error:``.

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
    """Return the version, build and device of this ONNX Runtime, and the providers that it offers."""
    return {
        "onnxruntime": onnxruntime.__version__,
        "build": onnxruntime.get_build_info().removeprefix("ORT Build Info: "),
        "device": onnxruntime.get_device(),
        "providers": ", ".join(onnxruntime.get_available_providers()),
    }


def feed_of(session: Any, arguments: Arguments, path: object) -> dict[str, Array]:
    """The inputs as a session takes them: positional ones in order, named ones by name."""
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
    session: Any, feed: Mapping[str, Array], path: object, outputs: Sequence[str] | None = None
) -> list[Array]:
    """Outputs of one run, all in order or some by name.

    Raises:
        ExportError: If the session cannot run on the inputs.
    """
    try:
        return list(session.run(outputs, feed))
    except Exception as error:
        shapes = {name: f"{array.dtype}{list(array.shape)}" for name, array in feed.items()}
        raise ExportError(
            f"{str(path)!r} cannot run on {shapes} ({reason(error)}); "
            "pass inputs like those that it was exported with, and export it with a dynamic batch axis"
        ) from error
