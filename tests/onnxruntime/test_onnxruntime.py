"""ONNX Runtime adapter: export, sessions that are what was asked for, parity, latency."""

from __future__ import annotations

import importlib
import itertools
import json
import logging
import random
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

from nns_plugin.adapters import onnxruntime as adapter  # noqa: E402
from nns_plugin.adapters.onnxruntime import exporting, latency, latency_statistics  # noqa: E402
from nns_plugin.adapters.onnxruntime.host_messages import reason as condensed  # noqa: E402
from nns_plugin.adapters.onnxruntime.modes import ieee_float32  # noqa: E402
from nns_plugin.errors import ExportError, MissingExtraError, ProviderError  # noqa: E402
from nns_plugin.evaluation.agreement import top1_agreement  # noqa: E402
from nns_plugin.evaluation.parity import output_errors  # noqa: E402
from nns_plugin.synapses.input_selection import InputSelection  # noqa: E402

pytestmark = pytest.mark.host("onnxruntime")

MODULE = "nns_plugin.adapters.onnxruntime"
LABELS = ["zero", "één", 'two "2"', "", "four"]


def convnet() -> nn.Sequential:
    """Five labels from 3x8x8 images; batch norm statistics that differ from one batch's."""
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.5), nn.Flatten(), nn.Linear(288, 5)
    )
    with torch.no_grad():
        for _ in range(5):
            model(3 * torch.randn(16, 3, 8, 8) + 1)
    return model


def one_line(failure: pytest.ExceptionInfo[Exception]) -> str:
    """The message of an error, which must be a single line."""
    message = str(failure.value)
    assert len(message.splitlines()) == 1
    return message


def save(path: Path, inputs: list[Any], outputs: list[Any], *nodes: Any) -> Path:
    """Write a hand-made ONNX model."""
    graph = onnx.helper.make_graph(list(nodes), "graph", inputs, outputs)
    opsets = [onnx.helper.make_opsetid("", 17)]
    onnx.save(onnx.helper.make_model(graph, opset_imports=opsets, ir_version=8), path)
    return path


def floats(name: str, *shape: int | str) -> Any:
    return onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, Path]:
    """A network and its file, exported from a single example in train mode."""
    torch.manual_seed(1)
    model = convnet()
    path = tmp_path_factory.mktemp("exported") / "model.onnx"
    returned = adapter.export(
        model, torch.randn(1, 3, 8, 8), path, label_names=LABELS, metadata={"origin": "tests", "note": "ü"}
    )
    assert returned == path
    return model, path


# Export ---------------------------------------------------------------------------------------------------------


def test_a_convnet_with_batch_norm_and_dropout_is_at_parity(exported: tuple[nn.Module, Path]) -> None:
    model, path = exported
    report = adapter.check_parity(model, path, torch.randn(32, 3, 8, 8))
    assert report.passed
    assert report.max_absolute_error < 1e-5
    assert 0 < report.p50_absolute_error <= report.p90_absolute_error <= report.p99_absolute_error
    assert report.p99_absolute_error <= report.max_absolute_error
    assert report.top1_agreement == 1
    assert (report.inputs, report.batch_sizes) == (32, (1, 32))
    assert (report.rtol, report.atol, report.provider) == (1e-3, 1e-5, "CPUExecutionProvider")
    assert json.loads(json.dumps(asdict(report)))["worst_output"] == report.worst_output


@pytest.mark.parametrize("batch", [1, 2, 7])
def test_a_file_exported_from_one_example_takes_any_batch(exported: tuple[nn.Module, Path], batch: int) -> None:
    model, path = exported
    session = adapter.create_session(path)
    images = torch.randn(batch, 3, 8, 8)
    (found,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
    assert session.get_inputs()[0].shape == ["batch", 3, 8, 8]
    model.eval()
    torch.testing.assert_close(torch.from_numpy(found), model(images).detach(), rtol=1e-4, atol=1e-5)
    model.train()


def test_labels_and_metadata_make_the_round_trip(exported: tuple[nn.Module, Path]) -> None:
    found = adapter.create_session(exported[1]).get_modelmeta().custom_metadata_map
    assert json.loads(found.pop(adapter.LABELS_KEY)) == LABELS
    assert found == {"origin": "tests", "note": "ü"}
    assert adapter.LABELS_KEY == "nns.labels"


def test_the_inputs_of_a_narrowed_model_are_told(tmp_path: Path) -> None:
    path = adapter.export(nn.Linear(3, 2), TWO, tmp_path / "model.onnx", features=torch.tensor([5, 2, 7]))
    found = adapter.create_session(path).get_modelmeta().custom_metadata_map
    assert found == {"nns.features": "[5, 2, 7]"}
    selection = InputSelection(torch.tensor([2, 5, 7]), total=9, axis=-1, flat=False)
    path = adapter.export(nn.Linear(3, 2), TWO, tmp_path / "model.onnx", features=selection)
    found = adapter.create_session(path).get_modelmeta().custom_metadata_map
    told = {"nns.features": "[2, 5, 7]", "nns.features.of": '{"axis": -1, "flat": false, "total": 9}'}
    assert found == told
    assert tuple(told) == (adapter.FEATURES_KEY, adapter.SELECTION_KEY)


def test_the_file_stands_alone_and_tells_nothing_about_this_machine(exported: tuple[nn.Module, Path]) -> None:
    path = exported[1]
    assert [file.name for file in path.parent.iterdir()] == ["model.onnx"]
    content = path.read_bytes()
    assert b".py" not in content
    assert b"stack_trace" not in content


def test_names_and_opset_are_as_asked(tmp_path: Path) -> None:
    path = adapter.export(
        nn.Linear(3, 2),
        torch.randn(4, 3),
        tmp_path / "linear.onnx",
        opset=18,
        tensor_names=adapter.TensorNames(["image"], ["score"]),
    )
    model = onnx.load(path)
    assert [value.name for value in (*model.graph.input, *model.graph.output)] == ["image", "score"]
    assert [(opset.domain, opset.version) for opset in model.opset_import] == [("", 18)]
    assert len(model.metadata_props) == 0


class Several(nn.Module):
    """Two inputs, three outputs: named, nested, and one without a batch of labels."""

    def forward(self, left: Tensor, right: Tensor) -> dict[str, Any]:
        return {"sum": left + right, "more": (left * 2, [right.sum(1)])}


class Variadic(nn.Module):
    """Any number of inputs."""

    def forward(self, *tensors: Tensor) -> Tensor:
        return tensors[0] - tensors[1]


@pytest.mark.parametrize(
    ("model", "inputs"),
    [
        (Several(), (torch.randn(3, 4), torch.randn(3, 4))),
        (Several(), [torch.randn(1, 4), torch.randn(1, 4)]),
        (Several(), {"right": torch.randn(3, 4), "left": torch.randn(3, 4)}),
        (Variadic(), (torch.randn(3, 4), torch.randn(3, 4))),
    ],
    ids=["tuple", "batch of one", "mapping", "variadic"],
)
def test_several_inputs_and_outputs(model: nn.Module, inputs: Any, tmp_path: Path) -> None:
    path = adapter.export(model, inputs, tmp_path / "model.onnx")
    report = adapter.check_parity(model, path, inputs)
    assert report.passed
    assert report.batch_sizes == ((1, 3) if report.inputs == 3 else (2, 1))


class OneIsSpecial(nn.Module):
    """Treats a batch of 1 differently; traced with one example, the special case would serve all others."""

    def forward(self, inputs: Tensor) -> Tensor:
        return inputs * 100 if len(inputs) == 1 else inputs * 2


def test_a_single_example_is_traced_as_two(tmp_path: Path) -> None:
    path = adapter.export(OneIsSpecial(), torch.ones(1, 3), tmp_path / "model.onnx")
    (found,) = adapter.create_session(path).run(None, {"inputs": np.ones((4, 3), np.float32)})
    assert found.tolist() == [[2.0] * 3] * 4
    report = adapter.check_parity(OneIsSpecial(), path, torch.ones(4, 3))
    assert not report.passed
    assert report.max_absolute_error == 98


def test_large_weights_go_into_a_second_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    moved = []
    replace = exporting.os.replace

    def record(source: str | Path, target: str | Path) -> None:
        if Path(target).parent == tmp_path:
            moved.append(Path(target).name)
        replace(source, target)

    monkeypatch.setattr(exporting, "_SINGLE_FILE_BYTES", 10_000)
    monkeypatch.setattr(exporting.os, "replace", record)
    model = nn.Sequential(nn.Linear(100, 25), nn.ReLU(), nn.Linear(25, 2))
    path = adapter.export(model, torch.randn(2, 100), tmp_path / "model.onnx")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["model.onnx", "model.onnx.data"]
    assert moved == ["model.onnx.data", "model.onnx"]
    assert path.stat().st_size < 5_000
    assert adapter.check_parity(model, path, torch.randn(5, 100)).passed


class Recording(nn.Module):
    """Changes itself on every forward, in the ways that user code does, and raises if told to."""

    def __init__(self, message: str | None = None) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(), nn.Linear(4, 2))
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("latest", torch.zeros(1))
        self.seen: list[Tensor] = []
        self.message = message
        self.body[1].eval()
        self.body[0].weight.requires_grad_(False)
        self.body[3].weight.grad = torch.ones(2, 4)

    def forward(self, inputs: Tensor) -> Tensor:
        self.calls += 1
        self.latest = inputs.sum().reshape(1)
        self.seen.append(inputs)
        self.activation = inputs * 2
        if self.message is not None:
            self.eval()
            raise RuntimeError(self.message)
        return self.body(inputs)


def state_of(model: nn.Module) -> list[Any]:
    """Everything about a model that a caller could notice; tensors by identity and value."""
    tensors = itertools.chain(model.named_parameters(), model.named_buffers())
    return [
        [(name, module.training, sorted(vars(module))) for name, module in model.named_modules()],
        [(name, id(tensor), tensor.requires_grad, tensor.tolist()) for name, tensor in tensors],
        [None if parameter.grad is None else parameter.grad.tolist() for parameter in model.parameters()],
        list(model.seen) if isinstance(model.seen, list) else None,
        torch.get_rng_state().tolist(),
        np.random.get_state()[1].tolist(),
        random.getstate(),
    ]


def test_the_model_is_untouched_by_export_and_parity(tmp_path: Path) -> None:
    model = Recording()
    before = state_of(model)
    path = adapter.export(model, torch.ones(1, 3), tmp_path / "model.onnx")
    assert state_of(model) == before
    assert adapter.check_parity(model, path, torch.ones(4, 3)).passed
    assert state_of(model) == before


def test_a_failing_forward_leaves_model_and_folder_as_they_were(tmp_path: Path) -> None:
    model = Recording("first line\nsecond line")
    path = tmp_path / "model.onnx"
    path.write_bytes(b"an older file")
    before = state_of(model)
    with pytest.raises(ExportError, match=r"Recording cannot be exported .*RuntimeError: first line\)") as failure:
        adapter.export(model, torch.ones(1, 3), path)
    one_line(failure)
    assert failure.value.__cause__ is not None
    assert state_of(model) == before
    node = onnx.helper.make_node("Identity", ["x"], ["y"])
    anything = save(tmp_path / "any.onnx", [floats("x", "batch", 3)], [floats("y", "batch", 3)], node)
    with pytest.raises(ExportError, match=r"Recording cannot run on a batch of 1 .*first line\)"):
        adapter.check_parity(model, anything, torch.ones(4, 3))
    assert state_of(model) == before
    assert sorted(file.name for file in tmp_path.iterdir()) == ["any.onnx", "model.onnx"]
    assert path.read_bytes() == b"an older file"


@pytest.mark.parametrize("step", ["check", "move"])
def test_a_failure_while_writing_leaves_nothing_behind(
    step: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError("no space left\non this device")

    if step == "check":
        monkeypatch.setattr(onnx.checker, "check_model", fail)
    else:
        monkeypatch.setattr(exporting.os, "replace", fail)
    with pytest.raises(ExportError, match=r"model\.onnx.*OSError: no space left\)") as failure:
        adapter.export(nn.Linear(3, 2), torch.randn(2, 3), tmp_path / "model.onnx")
    one_line(failure)
    assert list(tmp_path.iterdir()) == []


class Branching(nn.Module):
    """Cannot be traced; the exporter prints its graphs and logs about it, and calls this several times."""

    def forward(self, inputs: Tensor) -> Tensor:
        print("once more")
        return inputs if inputs.sum() > 0 else -inputs


@pytest.mark.parametrize("model", [nn.Linear(3, 2), Branching()], ids=["success", "failure"])
def test_the_exporter_is_quiet(
    model: nn.Module, tmp_path: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    try:
        adapter.export(model, torch.randn(2, 3), tmp_path / "model.onnx", opset=17)
    except ExportError:
        assert isinstance(model, Branching)
    assert capfd.readouterr() == ("", "")
    assert [record.message for record in caplog.records if record.levelno > logging.DEBUG] == []
    assert logging.root.manager.disable == logging.NOTSET


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (ValueError("\x1b[96mone\x1b[0m\ntwo"), "ValueError: one"),
        (ValueError("Conflicts:\n  - batch is 2\n  - more"), "ValueError: Conflicts: - batch is 2"),
        (ValueError("Conflicts:"), "ValueError: Conflicts"),
        (ValueError(), "ValueError"),
    ],
)
def test_a_reason_is_the_root_in_one_line(error: Exception, reason: str) -> None:
    outer = RuntimeError("next steps:\n- read the documentation")
    outer.__cause__ = error
    assert condensed(error) == condensed(outer) == reason


class Fixed(nn.Module):
    """Works for a batch of 2 only; some ways of asking for a dynamic axis pass over that in silence."""

    def forward(self, inputs: Tensor) -> Tensor:
        return inputs + torch.ones(2, 3)


TWO = torch.randn(2, 3)
CHANNELS = InputSelection(torch.arange(3), total=5, axis=1, flat=False)


@pytest.mark.parametrize(
    ("model", "inputs", "options", "message"),
    [
        (Fixed(), TWO, {}, r"Fixed cannot be exported .*shape of 2.*any batch size \(tried 2\)"),
        (nn.Linear(3, 2), (TWO, TWO), {}, "Linear cannot be exported .*too many positional arguments"),
        (nn.Linear(3, 2), {"x": TWO}, {}, "Linear cannot be exported .*'input'"),
        (nn.Linear(3, 2), torch.randn(2, 4), {}, "Linear cannot be exported"),
        (nn.Linear(3, 2), (), {}, "the inputs are none; expected"),
        (nn.Linear(3, 2), ("x",), {}, r"the inputs are \['str'\]; expected"),
        (nn.Linear(3, 2), torch.tensor(1.0), {}, r"float32\[\].*dimension 0"),
        (nn.Linear(3, 2), torch.zeros(0, 3), {}, r"float32\[0, 3\]'\] hold no example"),
        (Several(), (TWO, torch.randn(3, 3)), {}, r"\[2, 3\].*\[3, 3\].*same batch"),
        (nn.Linear(3, 2), TWO, {"opset": 999}, r"opset \d\d, but 999 was requested"),
        (
            nn.Linear(3, 2),
            TWO,
            {"tensor_names": adapter.TensorNames(inputs=["a", "b"])},
            r"the input names are \['a', 'b'\].*inputs \['a'\]",
        ),
        (
            nn.Linear(3, 2),
            TWO,
            {"tensor_names": adapter.TensorNames(outputs=["a", "b"])},
            r"the output names are \['a', 'b'\].*outputs \['a'\]",
        ),
        (nn.Linear(3, 2), {"input": TWO}, {"tensor_names": adapter.TensorNames(["a"])}, "tensor_names cannot rename"),
        (nn.Linear(3, 2), TWO, {"label_names": ["a"]}, r"1 names, .*Linear is \[batch, 2\]"),
        (nn.Linear(3, 2), TWO, {"label_names": "ab"}, "sequence of strings, found 'ab'"),
        (nn.Linear(3, 2), TWO, {"label_names": [0, 1]}, r"sequence of strings, found \[0, 1\]"),
        (nn.Linear(3, 2), TWO, {"metadata": {"epochs": 3}}, "strings to strings, found {'epochs': 3}"),
        (nn.Linear(3, 2), TWO, {"label_names": ["a", "b"], "metadata": {"nns.labels": "[]"}}, "pass one of the two"),
        (nn.Linear(3, 2), TWO, {"features": [0, 1, 1]}, r"distinct indices of inputs, found \[0, 1, 1\]"),
        (nn.Linear(3, 2), TWO, {"features": [0, -1]}, "distinct indices of inputs"),
        (nn.Linear(3, 2), TWO, {"features": [0.5]}, "distinct indices of inputs"),
        (nn.Linear(3, 2), TWO, {"features": [0, 1]}, r"there are 2 features, but the model's inputs are \[\[2, 3\]\]"),
        (nn.Bilinear(3, 3, 2), (TWO, TWO), {"features": [0, 1, 2]}, r"3 features, .* are \[\[2, 3\], \[2, 3\]\]"),
        (nn.Conv2d(2, 2, 1), torch.ones(2, 2, 3, 3), {"features": CHANNELS}, r"3 features, .* \[\[2, 2, 3, 3\]\]"),
        (nn.Linear(3, 2), TWO, {"features": [0, 1, 2], "metadata": {"nns.features": "[]"}}, "pass one of the two"),
    ],
)
def test_what_cannot_be_exported_as_asked_is_an_error(
    model: nn.Module, inputs: Any, options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ExportError, match=message) as failure:
        adapter.export(model, inputs, tmp_path / "model.onnx", **options)
    one_line(failure)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("name", "message"), [("missing/m.onnx", "cannot write to the folder"), ("", "is a folder")])
def test_a_place_that_cannot_be_written_is_found_before_the_export(
    name: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.onnx, "export", lambda *_, **__: pytest.fail("exported"))
    with pytest.raises(ExportError, match=message) as failure:
        adapter.export(nn.Linear(3, 2), TWO, tmp_path / name)
    one_line(failure)
    assert list(tmp_path.iterdir()) == []


# Sessions -------------------------------------------------------------------------------------------------------


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
    path = save(tmp_path / "model.onnx", [floats("x", 1)], [floats("y", 1)], node)
    model = onnx.load(path)
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.ones(2), "unused"))  # worth a warning
    onnx.save(model, path)
    adapter.create_session(path)
    with pytest.raises(ExportError, match=r"cannot load.*empty\.onnx"):
        adapter.create_session(save(tmp_path / "empty.onnx", [], []))
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


def test_session_providers_tells_what_sessions_get(monkeypatch: pytest.MonkeyPatch) -> None:
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


# Parity ---------------------------------------------------------------------------------------------------------


def test_other_weights_fail(exported: tuple[nn.Module, Path]) -> None:
    other = convnet()
    report = adapter.check_parity(other, exported[1], torch.randn(64, 3, 8, 8))
    assert not report.passed
    assert report.max_absolute_error > 1e-2
    assert report.top1_agreement is not None
    assert report.top1_agreement < 1


def test_one_weight_off_by_little_fails_and_tolerances_decide(exported: tuple[nn.Module, Path]) -> None:
    model, path = exported
    head = model[-1]
    images = torch.randn(8, 3, 8, 8)
    with torch.no_grad():
        head.bias[2] += 0.01
    try:
        report = adapter.check_parity(model, path, images)
        assert not report.passed
        assert report.max_absolute_error == pytest.approx(0.01, rel=1e-2)
        assert adapter.check_parity(model, path, images, atol=0.02).passed
    finally:
        with torch.no_grad():
            head.bias[2] -= 0.01


def test_the_worst_output_is_named(tmp_path: Path) -> None:
    path = save(
        tmp_path / "model.onnx",
        [floats("left", "batch", 4), floats("right", "batch", 4)],
        [floats("total", "batch", 4), floats("twice", "batch", 4), floats("rows", "batch")],
        onnx.helper.make_node("Add", ["left", "right"], ["total"]),
        onnx.helper.make_node("Add", ["left", "right"], ["twice"]),
        onnx.helper.make_node("ReduceSum", ["right", "axis"], ["rows"], keepdims=0),
        onnx.helper.make_node("Constant", [], ["axis"], value_ints=[1]),
    )
    left, right = torch.ones(3, 4), torch.ones(3, 4)
    assert adapter.check_parity(Several(), path, (left, right)).passed
    report = adapter.check_parity(Several(), path, (left, torch.tensor([[1.0], [1.0], [1.5]]).expand(3, 4)))
    assert report.worst_output == "twice"
    assert not report.passed
    assert report.max_absolute_error == 0.5
    assert report.max_relative_error == 0.25
    assert report.p50_absolute_error == 0
    assert report.p99_absolute_error == 0.5


class NotANumber(nn.Module):
    """0 / 0 in the second label of every input that is 0."""

    def forward(self, inputs: Tensor) -> Tensor:
        return inputs / inputs.abs()


def test_a_nan_fails_even_if_both_sides_agree_on_it(tmp_path: Path) -> None:
    path = adapter.export(NotANumber(), torch.randn(2, 3), tmp_path / "model.onnx")
    inputs = torch.ones(4, 3)
    assert adapter.check_parity(NotANumber(), path, inputs).passed
    inputs[3, 1] = 0
    report = adapter.check_parity(NotANumber(), path, inputs)
    assert not report.passed
    assert np.isnan(report.max_absolute_error)
    assert np.isnan(report.max_relative_error)


@pytest.mark.parametrize(
    ("expected", "found", "absolute", "relative", "excess"),
    [
        (2.0, 2.0, 0, 0, 0),
        (2.0, 2.5, 0.5, 0.25, 0.5 / 0.21),
        (-2.0, -2.1, 0.1, 0.05, 0.1 / 0.21),
        (0.0, 0.005, 0.005, 0, 0.5),
        (0.01, 0.02, 0.01, 0, 0.01 / 0.011),
        (np.inf, np.inf, 0, 0, 0),
        (np.inf, 1.0, np.inf, np.nan, np.inf),
        (1.0, np.inf, np.inf, np.inf, np.inf),
        (np.inf, -np.inf, np.inf, np.nan, np.inf),
        (np.nan, np.nan, np.nan, np.nan, np.inf),
        (np.nan, 1.0, np.nan, np.nan, np.inf),
        (1.0, np.nan, np.nan, np.nan, np.inf),
    ],
)
def test_errors_by_hand(expected: float, found: float, absolute: float, relative: float, excess: float) -> None:
    errors = output_errors(np.array([expected]), np.array([found]), rtol=0.1, atol=0.01)
    np.testing.assert_allclose(errors.absolute, [absolute], atol=1e-12)
    np.testing.assert_allclose(errors.relative, [relative], atol=1e-12)
    np.testing.assert_allclose(errors.excess, excess, atol=1e-12)


def test_errors_without_tolerance() -> None:
    same, other = np.array([0.0, 3.0]), np.array([0.0, 3.0 + 1e-9])
    assert output_errors(same, same, rtol=0, atol=0).excess == 0
    assert output_errors(same, other, rtol=0, atol=0).excess == np.inf
    assert output_errors(np.array([True, False]), np.array([True, True]), rtol=0, atol=0).excess == np.inf


def test_top1_agreement_by_hand() -> None:
    expected = np.array([[1.0, 2.0], [2.0, 1.0], [0.0, 1.0], [5.0, 4.0]])
    found = np.array([[1.0, 2.0], [2.0, 3.0], [0.0, 1.0], [5.0, 4.0]])
    assert top1_agreement(expected, found) == 0.75
    assert top1_agreement(expected[:, 0], found[:, 0]) is None
    assert top1_agreement(expected[:, :1], found[:, :1]) is None
    assert top1_agreement(expected.astype(int), found.astype(int)) is None


def test_a_fixed_batch_axis_is_found_out(tmp_path: Path) -> None:
    node = onnx.helper.make_node("Identity", ["x"], ["y"])
    fixed = save(tmp_path / "fixed.onnx", [floats("x", 4, 3)], [floats("y", 4, 3)], node)
    dynamic = save(tmp_path / "dynamic.onnx", [floats("x", "batch", 3)], [floats("y", "batch", 3)], node)
    assert adapter.check_parity(nn.Identity(), dynamic, torch.randn(4, 3)).passed
    with pytest.raises(ExportError, match=r"fixed\.onnx.*cannot run on .*\[1, 3\].*dynamic batch axis") as failure:
        adapter.check_parity(nn.Identity(), fixed, torch.randn(4, 3))
    one_line(failure)


@pytest.mark.parametrize(
    ("inputs", "options", "message"),
    [
        ((torch.ones(2, 3), torch.ones(2, 3)), {}, r"inputs \['x'\], found 2 positional tensors"),
        ({"input": torch.ones(2, 3)}, {}, r"inputs \['x'\], found \['input'\]"),
        (torch.ones(2, 3, dtype=torch.bfloat16), {}, "cannot be converted to NumPy"),
        (torch.ones(2, 4), {}, r"cannot run on .*\[1, 4\]"),
        (torch.ones(2, 3), {"rtol": -1}, "rtol is -1 and atol is 1e-05; expected"),
        (torch.ones(2, 3), {"atol": float("nan")}, "atol is nan; expected"),
    ],
)
def test_inputs_that_do_not_fit_the_file(inputs: Any, options: dict[str, Any], message: str, tmp_path: Path) -> None:
    node = onnx.helper.make_node("Identity", ["x"], ["y"])
    path = save(tmp_path / "model.onnx", [floats("x", "batch", 3)], [floats("y", "batch", 3)], node)
    model = Several() if isinstance(inputs, tuple) else nn.Identity()
    with pytest.raises(ExportError, match=message) as failure:
        adapter.check_parity(model, path, inputs, **options)
    one_line(failure)


def test_outputs_of_another_model_are_an_error(exported: tuple[nn.Module, Path]) -> None:
    other = nn.Sequential(nn.Flatten(), nn.Linear(192, 4))
    with pytest.raises(ExportError, match=r"outputs \[\[1, 5\]\] .*Sequential gives \[\[1, 4\]\]") as failure:
        adapter.check_parity(other, exported[1], torch.randn(2, 3, 8, 8))
    one_line(failure)


def test_tf32_is_off_inside_and_put_back() -> None:
    cudnn: Any = torch.backends.cudnn
    backends: list[Any] = [torch.backends.cuda.matmul, cudnn.conv, cudnn.rnn]
    before = [backend.fp32_precision for backend in backends]
    assert before != ["ieee"] * 3
    inside = []

    def fail() -> None:
        with ieee_float32():
            inside.extend(backend.fp32_precision for backend in backends)
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert inside == ["ieee"] * 3
    assert [backend.fp32_precision for backend in backends] == before


# Latency --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("samples", "p50", "p90", "p99"),
    [(99, 50, None, None), (100, 50.5, 90.1, None), (999, 500, 899.2, None), (1000, 500.5, 900.1, 990.01)],
)
def test_percentiles_need_enough_samples(samples: int, p50: float, p90: float | None, p99: float | None) -> None:
    times = np.random.default_rng(0).permutation(np.arange(1.0, samples + 1))
    report = adapter.latency_report("any", times)
    assert (report.name, report.samples, report.p50_ms) == ("any", samples, p50)
    assert report.p90_ms == (None if p90 is None else pytest.approx(p90))
    assert report.p99_ms == (None if p99 is None else pytest.approx(p99))


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("samples", [2, 21, 200])
def test_the_interval_holds_the_ratio_and_exchange_inverts_both(samples: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    baseline, candidate = 3 * rng.lognormal(0, 0.3, samples), rng.lognormal(0, 0.5, samples)
    ratio, low, high = adapter.median_ratio(baseline, candidate, seed=seed)
    assert ratio == np.median(baseline) / np.median(candidate)
    assert low <= ratio <= high
    assert low < high
    assert adapter.median_ratio(baseline, candidate, seed=seed) == (ratio, low, high)
    assert adapter.median_ratio(candidate, baseline, seed=seed) == pytest.approx((1 / ratio, 1 / high, 1 / low))


def test_the_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    hits = 0
    for seed in range(200):
        baseline, candidate = 2 * rng.lognormal(0, 0.2, 40), rng.lognormal(0, 0.2, 40)
        _, low, high = adapter.median_ratio(baseline, candidate, seed=seed)
        hits += low <= 2 <= high
    assert 180 <= hits <= 199


def test_the_interval_of_several_pairs_of_sessions_covers_the_truth_where_one_of_runs_alone_does_not() -> None:
    rng = np.random.default_rng(0)
    hits, fooled = 0, 0
    for seed in range(200):
        speeds = np.repeat(rng.lognormal(0, 0.01, (10, 2)), 30, axis=0)  # of each pair, for as long as it lives
        baseline, candidate = 2 * speeds[:, 0] * rng.lognormal(0, 0.02, 300), speeds[:, 1] * rng.lognormal(0, 0.02, 300)
        _, low, high = adapter.median_ratio(baseline, candidate, sessions=10, seed=seed)
        hits += low <= 2 <= high
        _, low, high = adapter.median_ratio(baseline, candidate, seed=seed)
        fooled += not low <= 2 <= high
    assert hits >= 192
    assert fooled >= 15


@pytest.mark.parametrize(("pairs", "quantile"), [(3, 4.30265), (5, 2.77645), (10, 2.26216), (30, 2.04523)])
def test_few_pairs_of_sessions_expand_the_interval_by_students_t(pairs: int, quantile: float) -> None:
    low, high = latency_statistics._levels(pairs)
    assert statistics.NormalDist().inv_cdf(high / 100) == pytest.approx(
        quantile * (pairs / (pairs - 1)) ** 0.5, rel=3e-3
    )
    assert low == pytest.approx(100 - high)
    assert latency_statistics._levels(1) == pytest.approx((2.5, 97.5))
    assert latency_statistics._student(0.975, 1) == pytest.approx(12.7062, rel=1e-5)


def test_what_slows_down_both_runs_of_a_round_does_not_widen_the_interval() -> None:
    machine = np.random.default_rng(0).lognormal(0, 1, 101)
    assert adapter.median_ratio(4 * machine, 2 * machine) == pytest.approx((2, 2, 2))


def test_the_interval_is_that_of_a_plain_bootstrap_also_where_samples_are_drawn_in_parts() -> None:
    rng = np.random.default_rng(0)
    baseline, candidate = 2 * rng.lognormal(0, 0.2, 3000), rng.lognormal(0, 0.2, 3000)
    drawn = np.random.default_rng(5).integers(3000, size=(2000, 3000))
    ratios = np.log(np.median(baseline[drawn], axis=1) / np.median(candidate[drawn], axis=1))
    low, high = np.exp(np.percentile(ratios, (2.5, 97.5)))
    assert adapter.median_ratio(baseline, candidate, seed=5)[1:] == pytest.approx((low, high), rel=1e-12)


def test_an_interval_without_width_still_holds_the_ratio() -> None:
    times = np.array([1.0, 2.0, 7.0])
    for factor in np.linspace(0.3, 9, 30):
        ratio, low, high = adapter.median_ratio(factor * times, times)
        assert low <= ratio <= high


class Clock:
    """A clock that sessions move, in place of the wall."""

    def __init__(self) -> None:
        self.now_ns = 0
        self.runs: list[str] = []

    def perf_counter_ns(self) -> int:
        return self.now_ns

    def session(self, name: str, times_ms: Iterator[float]) -> Any:
        def run(outputs: None, feed: dict[str, Any]) -> list[Any]:
            assert outputs is None
            assert feed["x"].shape == (5, 3)
            self.runs.append(name)
            self.now_ns += round(next(times_ms) * 1e6)
            return []

        inputs = [SimpleNamespace(name="x")]
        return SimpleNamespace(run=run, get_inputs=lambda: inputs, get_providers=lambda: ["CPUExecutionProvider"])


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[adapter.LatencyComparison, list[str]]]:
    """Measures a baseline and a candidate that take given times, in milliseconds."""

    def measure(
        baseline: Iterator[float], candidate: Iterator[float], **options: Any
    ) -> tuple[adapter.LatencyComparison, list[str]]:
        clock = Clock()
        sessions = {"dense.onnx": clock.session("dense", baseline), "small.onnx": clock.session("small", candidate)}
        monkeypatch.setattr(latency, "create_session", lambda path, provider, **options: sessions[str(path)])
        spec = adapter.TensorSpec("x", "float32", ("batch", 3))
        monkeypatch.setattr(
            latency,
            "read_file",
            lambda path: SimpleNamespace(path=path, inputs=[spec], selection=None, fixed_batch=None),
        )
        monkeypatch.setattr(latency, "time", clock)
        paths = {"dense": Path("dense.onnx"), "small": Path("small.onnx")}
        return adapter.measure_latency(paths, torch.ones(5, 3), adapter.LatencyOptions(**options)), clock.runs

    return measure


def test_the_baseline_is_measured_against_the_candidate(measured: Any) -> None:
    found, runs = measured(itertools.repeat(4.0), itertools.repeat(2.0), samples=95, threads=3, seed=7)
    assert found == adapter.LatencyComparison(
        baseline=adapter.LatencyReport("dense", 99, 4, None, None, (4, 4), None, (4.0,) * 99),
        candidate=adapter.LatencyReport("small", 99, 2, None, None, (2, 2), None, (2.0,) * 99),
        ratio=2,
        ratio_low=2,
        ratio_high=2,
        provider="CPUExecutionProvider",
        threads=3,
        spinning=False,
        io_binding=False,
        batch=5,
        samples=99,
        sessions=9,
        warmup_rounds=180,
        warmup_stable=True,
        seed=7,
    )
    assert len(runs) == 2 * 9 * (1 + 20 + 11)
    assert json.loads(json.dumps(asdict(found)))["candidate"]["p50_ms"] == 2


def test_the_order_of_runs_is_random(measured: Any) -> None:
    _, runs = measured(itertools.repeat(4.0), itertools.repeat(2.0), samples=100, sessions=1)
    rounds = [tuple(runs[start : start + 2]) for start in range(0, len(runs), 2)]
    assert set(rounds) == {("dense", "small"), ("small", "dense")}
    assert 30 < sum(first == "dense" for first, _ in rounds[21:]) < 70


def test_pairs_of_sessions_that_differ_widen_the_interval(measured: Any) -> None:
    rng = np.random.default_rng(0)

    def times() -> Iterator[float]:
        while True:
            yield from [rng.lognormal(0, 0.05)] * 21  # each session has a speed of its own: opened, 10 warm, 10 timed

    found, _ = measured(times(), itertools.repeat(1.0), samples=100, warmup=10)
    assert found.sessions == 10
    baseline, candidate = (np.array(report.times_ms) for report in (found.baseline, found.candidate))
    assert (found.ratio, found.ratio_low, found.ratio_high) == adapter.median_ratio(baseline, candidate, sessions=10)
    _, low, high = adapter.median_ratio(baseline, candidate)
    assert np.log(found.ratio_high / found.ratio_low) > 3 * np.log(high / low)


def test_warm_up_is_not_timed_and_lasts_until_the_times_have_settled(measured: Any) -> None:
    falling = [100 * 0.9**run for run in range(30)] + [4.0] * 1000
    found, _ = measured(iter(falling), itertools.repeat(2.0), samples=50, sessions=1)
    assert 40 < found.warmup_rounds < 60
    assert found.warmup_stable
    assert (found.baseline.p50_ms, found.ratio) == (4, 2)


def test_warm_up_is_bounded(measured: Any) -> None:
    growing = (1.1**round for round in range(1000))
    found, runs = measured(itertools.repeat(1.0), growing, samples=10, warmup=35)
    assert found.sessions == 1
    assert found.warmup_rounds == 35
    assert not found.warmup_stable
    assert len(runs) == 2 * (1 + 35 + 10)
    found, _ = measured(itertools.repeat(1.0), itertools.repeat(1.0), samples=10, warmup=0)
    assert found.warmup_rounds == 0
    assert not found.warmup_stable


def test_real_files_are_measured(exported: tuple[nn.Module, Path], capfd: pytest.CaptureFixture[str]) -> None:
    _, path = exported
    images = torch.randn(2, 3, 8, 8)
    found = adapter.measure_latency({"one": path, "two": path}, images, adapter.LatencyOptions(samples=30, warmup=20))
    assert (found.baseline.name, found.candidate.name) == ("one", "two")
    assert found.baseline.p50_ms > 0
    assert found.ratio_low <= found.ratio <= found.ratio_high
    assert found.ratio == found.baseline.p50_ms / found.candidate.p50_ms
    assert found.baseline.p90_ms is None
    assert (found.batch, found.threads, found.samples, found.provider) == (2, 1, 30, "CPUExecutionProvider")
    assert capfd.readouterr() == ("", "")
    adapter.measure_latency(
        {"one": path, "two": path}, images, adapter.LatencyOptions(samples=2, warmup=0), progress=True
    )
    assert "measuring" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("names", "options", "message"),
    [
        (["a"], {}, r"paths holds \['a'\]; expected two files"),
        (["a", "b", "c"], {}, "expected two files"),
        (["a", "b"], {"samples": 1}, "samples is 1"),
        (["a", "b"], {"warmup": -1}, "warmup -1"),
        (["a", "b"], {"threads": 0}, "threads 0"),
        (["a", "b"], {"sessions": 0}, "sessions 0"),
    ],
)
def test_latency_arguments_are_checked(
    names: list[str], options: dict[str, int], message: str, exported: tuple[nn.Module, Path]
) -> None:
    with pytest.raises(ExportError, match=message):
        adapter.measure_latency(
            dict.fromkeys(names, exported[1]), torch.randn(2, 3, 8, 8), adapter.LatencyOptions(**options)
        )


def test_latency_of_files_that_do_not_run(exported: tuple[nn.Module, Path], tmp_path: Path) -> None:
    _, path = exported
    with pytest.raises(
        ExportError, match=r"takes input float32\[batch, 3, 8, 8\], found float32\[2, 3, 9, 9\]"
    ) as failure:
        adapter.measure_latency({"a": path, "b": path}, torch.randn(2, 3, 9, 9))
    one_line(failure)
    with pytest.raises(ExportError, match="there is no file"):
        adapter.measure_latency({"a": path, "b": tmp_path / "missing.onnx"}, torch.randn(2, 3, 8, 8))
