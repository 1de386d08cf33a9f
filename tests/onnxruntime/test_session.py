"""Sessions: the requested provider or an error, options, and damaged files."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from torch import nn

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

from onnx_graphs import tensor, write  # noqa: E402
from onnx_models import exported_convnet, one_line  # noqa: E402

from nns_plugin.adapters import onnxruntime as adapter  # noqa: E402
from nns_plugin.errors import ExportError, MissingExtraError, ProviderError  # noqa: E402

pytestmark = pytest.mark.host("onnxruntime")

MODULE = "nns_plugin.adapters.onnxruntime"


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, Path]:
    """A network and its file, exported from a single example in train mode."""
    return exported_convnet(tmp_path_factory.mktemp("exported"))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda content: b"this is a text, not a model", "cannot load"),
        (lambda content: content[: len(content) // 2], "cannot load"),
        (lambda content: content[:-1], "cannot load"),
        (lambda content: b"", "cannot load"),
        (None, "there is no file"),
    ],
    ids=["text", "half", "all but a byte", "empty", "missing"],
)
def test_a_damaged_file_is_named(
    damage: Callable[[bytes], bytes] | None,
    message: str,
    exported: tuple[nn.Module, Path],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    path = tmp_path / "damaged.onnx"
    if damage is not None:
        path.write_bytes(damage(exported[1].read_bytes()))
    with pytest.raises(ExportError, match=rf"{message}.*damaged\.onnx.*export") as failure:
        adapter.create_session(path)
    one_line(failure)
    assert capfd.readouterr() == ("", "")


def test_the_runtime_does_not_talk(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    node = onnx.helper.make_node("Identity", ["x"], ["y"])
    path = write(tmp_path / "model.onnx", [tensor("x", 1)], [tensor("y", 1)], [node])
    model = onnx.load(path)
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.ones(2), "unused"))  # worth a warning
    onnx.save(model, path)
    adapter.create_session(path)
    with pytest.raises(ExportError, match=r"cannot load.*empty\.onnx"):
        adapter.create_session(write(tmp_path / "empty.onnx", [], [], []))
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("provider", ["cuda", "CUDA", "CUDAExecutionProvider"])
def test_cuda_on_a_cpu_build_is_an_error(provider: str, exported: tuple[nn.Module, Path]) -> None:
    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("this build of ONNX Runtime has CUDA")
    message = (
        r"CUDAExecutionProvider, got nothing; this build offers .*CPUExecutionProvider.*install \"nns-plugin\[gpu\]\""
    )
    with pytest.raises(ProviderError, match=message) as failure:
        adapter.create_session(exported[1], provider)
    one_line(failure)


def test_a_silent_fallback_to_the_cpu_is_an_error(
    exported: tuple[nn.Module, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []

    def open_on_cpu(model: Any, options: Any, *, providers: Any, enable_fallback: int) -> Any:
        asked.extend((*providers, enable_fallback))
        return SimpleNamespace(get_providers=lambda: ["CPUExecutionProvider"])

    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider"])
    monkeypatch.setattr(onnxruntime, "InferenceSession", open_on_cpu)
    with pytest.raises(ProviderError, match=r"CUDAExecutionProvider, got CPUExecutionProvider; .*onnxruntime-gpu"):
        adapter.create_session(exported[1], "cuda")
    assert asked == [("CUDAExecutionProvider", {"use_tf32": "0"}), 0]


def test_a_provider_that_breaks_is_a_provider_error(
    exported: tuple[nn.Module, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("CUDA failure 35\nmore")

    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider"])
    monkeypatch.setattr(onnxruntime, "InferenceSession", fail)
    with pytest.raises(ProviderError, match="got RuntimeError: CUDA failure 35; ") as failure:
        adapter.create_session(exported[1], "cuda")
    one_line(failure)


def test_session_options_are_as_asked(exported: tuple[nn.Module, Path]) -> None:
    for provider in ("cpu", "CPUExecutionProvider"):
        session = adapter.create_session(exported[1], provider, threads=2, allow_spinning=True)
        options = session.get_session_options()
        assert session.get_providers()[0] == "CPUExecutionProvider"
        assert options.intra_op_num_threads == 2
        assert options.get_session_config_entry("session.intra_op.allow_spinning") == "1"
    options = adapter.create_session(exported[1]).get_session_options()
    assert options.intra_op_num_threads == 1
    assert options.get_session_config_entry("session.intra_op.allow_spinning") == "0"
    assert adapter.create_session(exported[1], threads=None).get_session_options().intra_op_num_threads == 0
    with pytest.raises(ExportError, match="threads is 0; expected at least 1"):
        adapter.create_session(exported[1], threads=0)


def test_session_providers_are_those_that_sessions_get(monkeypatch: pytest.MonkeyPatch) -> None:
    found = adapter.session_providers()
    assert list(found) == onnxruntime.get_available_providers()
    assert found["CPUExecutionProvider"] == ["CPUExecutionProvider"]

    real = onnxruntime.InferenceSession

    def break_cuda(model: Any, options: Any, *, providers: Any, **more: Any) -> Any:
        if providers[0][0] == "CUDAExecutionProvider":
            raise RuntimeError("libcudnn is missing")
        return real(model, options, providers=["CPUExecutionProvider"], **more)

    providers = ["TensorrtExecutionProvider", "CUDAExecutionProvider"]
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: providers)
    monkeypatch.setattr(onnxruntime, "InferenceSession", break_cuda)
    found = adapter.session_providers()
    assert list(found) == providers
    assert found["TensorrtExecutionProvider"] == ["CPUExecutionProvider"]
    (text,) = found["CUDAExecutionProvider"]
    assert text.startswith("error: asked ONNX Runtime for CUDAExecutionProvider, got RuntimeError: libcudnn is missing")


@pytest.mark.parametrize("module", ["onnx", "onnxruntime", "onnxscript"])
def test_a_missing_library_names_the_extra(module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, MODULE)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingExtraError, match=rf"'{module}' is not installed.*nns-plugin\[onnx\]"):
        importlib.import_module(MODULE)
