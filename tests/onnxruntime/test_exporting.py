"""Export: files with a dynamic batch axis, their metadata, and models and folders left as they were."""

from __future__ import annotations

import itertools
import json
import logging
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

from onnx_graphs import tensor, write  # noqa: E402
from onnx_models import LABELS, Several, exported_convnet, one_line  # noqa: E402

from nns_plugin.adapters import onnxruntime as adapter  # noqa: E402
from nns_plugin.adapters.onnxruntime import exporting  # noqa: E402
from nns_plugin.errors import ExportError  # noqa: E402
from nns_plugin.synapses.input_selection import InputSelection  # noqa: E402

pytestmark = pytest.mark.host("onnxruntime")

TWO = torch.randn(2, 3)
CHANNELS = InputSelection(torch.arange(3), total=5, axis=1, flat=False)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, Path]:
    """A network and its file, exported from a single example in train mode."""
    return exported_convnet(tmp_path_factory.mktemp("exported"))


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


def test_the_features_of_a_narrowed_model_are_in_the_metadata(tmp_path: Path) -> None:
    path = adapter.export(nn.Linear(3, 2), TWO, tmp_path / "model.onnx", features=torch.tensor([5, 2, 7]))
    found = adapter.create_session(path).get_modelmeta().custom_metadata_map
    assert found == {"nns.features": "[5, 2, 7]"}
    selection = InputSelection(torch.tensor([2, 5, 7]), total=9, axis=-1, flat=False)
    path = adapter.export(nn.Linear(3, 2), TWO, tmp_path / "model.onnx", features=selection)
    found = adapter.create_session(path).get_modelmeta().custom_metadata_map
    expected = {"nns.features": "[2, 5, 7]", "nns.features.of": '{"axis": -1, "flat": false, "total": 9}'}
    assert found == expected
    assert tuple(expected) == (adapter.FEATURES_KEY, adapter.SELECTION_KEY)


def test_the_file_stands_alone_and_reveals_nothing_about_this_machine(exported: tuple[nn.Module, Path]) -> None:
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
    anything = write(tmp_path / "any.onnx", [tensor("x", "batch", 3)], [tensor("y", "batch", 3)], [node])
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


class Fixed(nn.Module):
    """Works for a batch of 2 only; some ways of asking for a dynamic axis pass over that in silence."""

    def forward(self, inputs: Tensor) -> Tensor:
        return inputs + torch.ones(2, 3)


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
