"""``nns validate`` on real files: each failure has its exit code and one line that says what is wrong."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")
pytest.importorskip("typer", reason="the extra cli is not installed")

import torch  # noqa: E402
from validate_models import (  # noqa: E402
    BOOL,
    FLOAT,
    FLOAT16,
    INPUTS,
    INT64,
    NAMES,
    WEIGHTS,
    complaint,
    complaints,
    data,
    linear,
    node,
    save,
    shifted,
    validate,
    value,
)

from nns_plugin.adapters.onnxruntime import comparing, export  # noqa: E402
from nns_plugin.adapters.onnxruntime.memory import SessionMemory  # noqa: E402

pytestmark = pytest.mark.host("onnxruntime")

SWAPPED = WEIGHTS[:, [1, 0, 2]]


@pytest.fixture(autouse=True)
def _no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory is measured in separate processes, half a second each; only the tests of reports do that."""
    monkeypatch.setattr(comparing, "session_memory", lambda *_, **__: SessionMemory(1, 2))


# Unusable files --------------------------------------------------------------------------------------


def several_outputs(path: Path, names: str) -> Path:
    """Scores of labels, and another output."""
    first, second = names.split()
    outputs = [value(first, "n", 3), value(second, "n", 4)]
    nodes = [node("MatMul", "x w", first), node("Relu", "x", second)]
    return save(path, [value("x", "n", 4)], outputs, nodes, {"w": WEIGHTS})


def of_bytes(path: Path, change: Callable[[bytes], bytes]) -> Path:
    """A good file with other bytes."""
    path.write_bytes(change(linear(path).read_bytes()))
    return path


def external(path: Path, change: Callable[[Path], object]) -> Path:
    """A file whose external weights are changed."""
    linear(path, np.ones((4, 300)), save_as_external_data=True, location="weights.bin", size_threshold=0)
    change(path.parent / "weights.bin")
    return path


def newer(path: Path) -> Path:
    """A file of a future version of the format."""
    model = onnx.load(linear(path))
    model.ir_version = 99
    onnx.save(model, path)
    return path


def one_at_a_time(path: Path) -> Path:
    """Declares a free batch size, but takes only one input."""
    nodes = [node("Reshape", "x s", "r"), node("MatMul", "r w", "y")]
    weights = {"w": WEIGHTS, "s": np.array([1, 4])}
    return save(path, [value("x", "n", 4)], [value("y", "n", 3)], nodes, weights)


UNUSABLE: dict[str, tuple[Callable[[Path], Path], str]] = {
    "missing": (lambda path: path, "there is no file"),
    "folder": (lambda path: path.parent, "there is no file"),
    "truncated": (lambda path: of_bytes(path, lambda content: content[:-20]), "is truncated or damaged (122 bytes)"),
    "truncated early": (lambda path: of_bytes(path, lambda content: content[:5]), "is truncated or damaged (5 bytes)"),
    "empty": (lambda path: of_bytes(path, lambda content: b""), "holds no graph"),
    "not an ONNX file": (lambda path: of_bytes(path, lambda content: b"PK\3\4" + content), "is not an ONNX file"),
    "external data missing": (lambda path: external(path, Path.unlink), "'weights.bin', not found beside it"),
    "external data short": (lambda path: external(path, lambda file: file.write_bytes(b"abc")), "cannot load"),
    "opset too new": (lambda path: linear(path, opset=99), "asks for opset 99 of ai.onnx, and this ONNX Runtime knows"),
    "labels that are no text": (
        lambda path: linear(path, labels=("ant", "\ud800", "cat")),
        "has nns.labels ['ant', '\\ud800', 'cat']",
    ),
    "format too new": (newer, "Unsupported model IR version: 99"),
    "batch it cannot take": (one_at_a_time, "cannot run on {'x': 'float32[64, 4]'}"),
    "fixed batch": (lambda path: linear(path, batch=4), "takes batches of 4 only, found 1"),
}


@pytest.mark.parametrize("place", ["baseline", "candidate"])
@pytest.mark.parametrize("kind", UNUSABLE)
def test_an_unusable_file_is_reported_in_one_line(
    kind: str, place: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make, text = UNUSABLE[kind]
    bad, good = make(tmp_path / "bad.onnx"), linear(tmp_path / "good.onnx")
    assert validate(*((bad, good) if place == "baseline" else (good, bad)), "--min-top1-agreement", "0") == 2
    line = complaint(capsys)
    assert text in line
    assert str(bad) in line


def test_a_different_input_shape_is_reported_with_both_shapes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wide = linear(tmp_path / "wide.onnx", np.ones((5, 3)))
    assert validate(linear(tmp_path / "a.onnx"), wide) == 2
    assert "takes x float32[n, 5], found float32[64, 4]" in complaint(capsys)


PARITY: dict[str, tuple[Callable[[Path], Path], Callable[[Path], Path], tuple[str, ...], str]] = {
    "wrong weights": (linear, lambda path: linear(path, -WEIGHTS), ("--rtol", "1e-3"), "over rtol 0.001, atol 1e-05"),
    "wrong weights, atol": (linear, lambda path: linear(path, -WEIGHTS), ("--atol", "1e-3"), "first at y[0, 0]: "),
    "wrong order": (linear, lambda path: linear(path, SWAPPED), ("--min-top1-agreement", "0.9"), "answers agree, 0.9"),
    "wrong names": (
        lambda path: linear(path, labels=NAMES),
        lambda path: linear(path, labels=("bee", "ant", "cat")),
        ("--rtol", "1e-3"),
        "largest error",
    ),
    "missing output": (
        lambda path: several_outputs(path, "y z"),
        linear,
        ("--rtol", "1e-3"),
        "output 'z' is missing from the candidate, which has 'y'",
    ),
    "no output of that name": (
        linear,
        lambda path: several_outputs(path, "a b"),
        ("--rtol", "1e-3"),
        "output 'y' is missing from the candidate, which has 'a', 'b'",
    ),
    "NaN": (linear, lambda path: shifted(path, [0, np.nan, 0]), ("--rtol", "1e-3"), "first at y[0, 1]: nan instead"),
    "NaN, wide tolerance": (linear, lambda path: shifted(path, [np.nan] * 3), ("--atol", "1e9"), "largest error nan"),
    "NaN, answers": (linear, lambda path: shifted(path, [np.nan] * 3), ("--min-top1-agreement", "0.05"), "agree"),
    "NaN in both": (
        lambda path: shifted(path, [np.nan] * 3),
        lambda path: shifted(path, [np.nan] * 3),
        ("--min-top1-agreement", "0.05"),
        "agree",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", PARITY)
def test_a_candidate_with_other_outputs_fails_with_3_if_a_tolerance_is_given(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    baseline, candidate, threshold, text = PARITY[kind]
    files = baseline(tmp_path / "a.onnx"), candidate(tmp_path / "b.onnx")
    assert validate(*files, *threshold) == 3
    line = complaint(capsys)
    assert "parity FAILED: " in line
    assert text in line
    assert validate(*files) == 0
    assert complaints(capsys) == []


def test_labels_are_matched_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dense = linear(tmp_path / "dense.onnx", labels=NAMES)
    swapped = linear(tmp_path / "swapped.onnx", SWAPPED, labels=("bee", "ant", "cat"))
    fewer = linear(tmp_path / "fewer.onnx", WEIGHTS[:, [2, 0]], labels=("cat", "ant"))
    for candidate in (swapped, fewer):
        assert validate(dense, candidate, "--rtol", "1e-3", "--min-top1-agreement", "1") == 0
    strange = linear(tmp_path / "strange.onnx", labels=("ant", "bee", "yak"))
    assert validate(dense, strange) == 2
    assert "has the labels ['ant', 'bee', 'yak'], the baseline ['ant', 'bee', 'cat']" in complaint(capsys)


def test_labels_that_a_file_does_not_name_are_given(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dense = linear(tmp_path / "dense.onnx", labels=NAMES)
    fewer, swapped = linear(tmp_path / "few.onnx", WEIGHTS[:, [2, 0]]), linear(tmp_path / "swapped.onnx", SWAPPED)
    assert validate(dense, fewer) == 0
    assert validate(dense, fewer, "--rtol", "1e-3") == 3
    text = "output 'y' has 3 scores of the baseline and 2 of the candidate, which does not say for which labels"
    assert text in complaint(capsys)
    assert validate(dense, fewer, "--rtol", "1e-3", "--candidate-labels", "cat, ant") == 0
    assert validate(dense, swapped, "--rtol", "1e-3", "--candidate-labels", "bee,ant,cat") == 0
    assert validate(dense, swapped, "--rtol", "1e-3", "--candidate-labels", "ant,bee,cat") == 3
    capsys.readouterr()
    assert validate(dense, fewer, "--candidate-labels", "ant,bee,cat") == 2
    assert "returns 2 scores, but there are 3 label names" in complaint(capsys)


def test_our_own_exports_name_their_labels(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dense, small = torch.nn.Linear(4, 3), torch.nn.Linear(4, 2)
    with torch.no_grad():
        small.weight.copy_(dense.weight[[2, 0]])
        small.bias.copy_(dense.bias[[2, 0]])
    example = torch.randn(2, 4)
    baseline = export(dense, example, tmp_path / "dense.onnx", label_names=NAMES)
    right = export(small, example, tmp_path / "right.onnx", label_names=("cat", "ant"))
    wrong = export(small, example, tmp_path / "wrong.onnx", label_names=("ant", "cat"))
    thresholds = ("--rtol", "1e-3", "--min-top1-agreement", "1")
    assert validate(baseline, right, *thresholds) == 0
    assert complaints(capsys) == []
    assert validate(baseline, wrong, *thresholds) == 3
    assert len(complaints(capsys)) == 2


# Files from elsewhere -------------------------------------------------------------------------------------------


def cast(path: Path, weights: Any, kind: int) -> Path:
    """Takes inputs that are not floating-point numbers."""
    nodes = [node("Cast", "x", "c", to=FLOAT), node("MatMul", "c w", "y")]
    return save(path, [value("x", "n", 4, kind=kind)], [value("y", "n", 3)], nodes, {"w": weights})


def half(path: Path, weights: Any) -> Path:
    inputs, outputs = [value("x", "n", 4, kind=FLOAT16)], [value("y", "n", 3, kind=FLOAT16)]
    return save(path, inputs, outputs, [node("MatMul", "x w", "y")], {"w": weights.astype(np.float16)})


def two_inputs(path: Path, weights: Any) -> Path:
    """One with a name that no keyword could have, and one without a batch axis."""
    inputs = [value("x/1:0", "n", 4), value("scale", "n", 1), value("rows", 4, 3)]
    nodes = [node("Add", "w rows", "v"), node("MatMul", "x/1:0 v", "s"), node("Mul", "s scale", "y")]
    return save(path, inputs, [value("y", "n", 3)], nodes, {"w": 100 * weights})


FOREIGN: dict[str, tuple[Callable[[Path, Any], Path], tuple[str, ...]]] = {
    "fixed batch": (lambda path, weights: linear(path, weights, batch=4), ("--batch", "4")),
    "several inputs": (two_inputs, ("--batch", "1,3")),
    "integer inputs": (lambda path, weights: cast(path, weights, INT64), ()),
    "boolean inputs": (lambda path, weights: cast(path, weights, BOOL), ("--io-binding",)),
    "float16": (half, ()),
    "float16, bound": (half, ("--io-binding",)),
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_a_file_of_another_exporter_is_compared(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make, options = FOREIGN[kind]
    baseline, other = make(tmp_path / "a.onnx", WEIGHTS), make(tmp_path / "b.onnx", -WEIGHTS)
    thresholds = ("--min-top1-agreement", "1", "--rtol", "1e-3")
    assert validate(baseline, baseline, *options, *thresholds) == 0
    assert complaints(capsys) == []
    assert validate(baseline, other, *options, *thresholds) == 3
    assert len(complaints(capsys)) == 2


def test_a_free_size_besides_the_batch_needs_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    free = save(tmp_path / "a.onnx", [value("x", "n", "m")], [value("y", "n", "m")], [node("Relu", "x", "y")])
    assert validate(free, free) == 2
    assert "takes x float32[n, m]: its free sizes are unknown, so inputs cannot be drawn" in complaint(capsys)
    assert validate(free, free, "--data", data(tmp_path / "data.npz", x=INPUTS), "--rtol", "0") == 0


def test_a_file_without_nodes_after_optimisation_has_its_provider(tmp_path: Path) -> None:
    nodes = [node("Identity", "w", "y")]
    same = save(tmp_path / "a.onnx", [value("x", "n", 4)], [value("y", 1, 3)], nodes, {"w": WEIGHTS[:1]})
    assert validate(same, same) == 0
