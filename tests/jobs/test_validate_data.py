"""Inputs of ``nns validate``: archives, recipes and options, and one line about each that cannot be used."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")
pytest.importorskip("typer", reason="the extra cli is not installed")

import torch  # noqa: E402
import yaml  # noqa: E402
from safetensors.torch import save_file  # noqa: E402
from validate_models import (  # noqa: E402
    FLOAT,
    INPUTS,
    NAMES,
    TRUTH,
    WEIGHTS,
    complaint,
    complaints,
    data,
    linear,
    node,
    run,
    save,
    validate,
    value,
)

from nns_plugin import Subnet  # noqa: E402
from nns_plugin.adapters.onnxruntime import TensorNames, comparing, export  # noqa: E402
from nns_plugin.adapters.onnxruntime.memory import SessionMemory  # noqa: E402
from nns_plugin.jobs.data import digits  # noqa: E402
from nns_plugin.jobs.models import digits_classifier  # noqa: E402

pytestmark = pytest.mark.host("onnxruntime")


@pytest.fixture(autouse=True)
def _no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory is measured in separate processes, half a second each; only the tests of reports do that."""
    monkeypatch.setattr(comparing, "session_memory", lambda *_, **__: SessionMemory(1, 2))


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A file, and data with labels that it classifies correctly."""
    folder = tmp_path_factory.mktemp("files")
    return {"good": linear(folder / "good.onnx", labels=NAMES), "data": data(folder / "data.npz")}


# Options ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ("--batch 1,,2", "--batch: found '1,,2'; expected whole numbers separated by commas"),
        ("--batch x", "--batch: found 'x'"),
        ("--batch 1.5", "--batch: found '1.5'"),
        ("--batch 0", "batches is [0]; expected sizes of at least 1"),
        ("--batch 1,-1", "batches is [1, -1]"),
        ("--samples 1", "samples is 1"),
        ("--threads 0", "threads 0; expected"),
        ("--seed -1", "seed"),
        ("--confidence 1", "confidence is 1.0"),
        ("--min-speedup -1", "min_speedup is -1.0; expected a number of at least 0"),
        ("--max-p90-ms nan --samples 100", "max_p90_ms is nan"),
        ("--max-p90-ms 1 --samples 99", "max_p90_ms needs at least 100 samples, found 99"),
        ("--max-accuracy-drop 1.01", "max_accuracy_drop is 1.01; expected a share from 0 to 1"),
        ("--min-top1-agreement 2", "min_top1_agreement is 2.0"),
        ("--rtol inf", "rtol is inf"),
        ("--atol -1", "atol is -1.0"),
        ("--max-accuracy-drop 0.1", "max_accuracy_drop and max_label_drop need inputs with labels"),
        ("--max-label-drop 0.1", "max_accuracy_drop and max_label_drop need inputs with labels"),
        ("--subnet nowhere.safetensors", "subnet needs the recipe that it was made with"),
        ("--recipe nowhere.yaml", "nowhere.yaml: cannot be read"),
    ],
)
def test_a_mistake_in_an_option_is_one_line(
    options: str, text: str, files: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert validate(files["good"], files["good"], *options.split()) == 2
    assert text in complaint(capsys)


# Data -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arrays", "text"),
    [
        ({"x": INPUTS, "labels": TRUTH}, None),
        ({"any name will do": INPUTS}, None),
        ({"x": INPUTS.astype(np.float64)}, None),
        ({"a": INPUTS, "b": INPUTS}, "holds ['a', 'b'];"),
        ({"labels": TRUTH}, "holds [];"),
        ({"x": INPUTS.astype(object)}, "Object arrays cannot be loaded when allow_pickle=False"),
        ({"x": INPUTS.astype(complex)}, "found complex128[60, 4]; convert it first"),
        ({"x": INPUTS[:, :3]}, "takes x float32[n, 4], found float32[60, 3]"),
        ({"x": INPUTS[:0]}, "at least one"),
        ({"x": np.float32(1)}, "found float32[]"),
        ({"x": INPUTS, "labels": TRUTH / 2}, "has labels float64[60]; expected integers [N]"),
        ({"x": INPUTS, "labels": TRUTH[:5]}, "int64[5]; expected integers [60], one per input"),
        ({"x": INPUTS, "labels": TRUTH + 7}, "has labels 7..9; expected 0..2"),
        ({"x": INPUTS, "labels": TRUTH - 1}, "has labels -1..1; expected 0..2"),
        ({"x": INPUTS, "labels": 0 * TRUTH}, "label 'bee' is not in the test data"),
    ],
)
def test_data_that_do_not_fit_are_refused(
    arrays: dict[str, Any],
    text: str | None,
    files: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    archive = data(tmp_path / "data.npz", **arrays)
    assert validate(files["good"], files["good"], "--data", archive, "--rtol", "0") == (0 if text is None else 2)
    assert ("".join(complaints(capsys)) == "") if text is None else (text in complaint(capsys))


@pytest.mark.parametrize("kind", ["missing", "folder", "cut short", "damaged", "one array", "text"])
def test_an_unreadable_archive_is_reported(
    kind: str, files: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content, path = bytearray(files["data"].read_bytes()), tmp_path / "data.npz"
    if kind == "one array":
        with path.open("wb") as file:
            np.save(file, INPUTS)
    elif kind == "folder":
        path.mkdir()
    elif kind != "missing":
        content[200] ^= 0xFF
        path.write_bytes({"cut short": bytes(content[:100]), "damaged": bytes(content), "text": b"x,y\n1,2\n"}[kind])
    assert validate(files["good"], files["good"], "--data", path) == 2
    line = complaint(capsys)
    assert str(path) in line
    assert ("holds one array; expected an .npz archive" if kind == "one array" else "cannot be read") in line


def test_a_number_for_an_input_of_any_shape_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    anything = onnx.helper.make_tensor_value_info("x", FLOAT, None)
    path = save(tmp_path / "a.onnx", [anything], [value("y", None)], [node("Relu", "x", "y")])
    assert validate(path, path, "--data", data(tmp_path / "data.npz", x=np.float32(1))) == 2
    assert "found float32[]" in complaint(capsys)


def test_inputs_are_matched_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    inputs, nodes = (
        [value("x", "n", 4), value("mask", "n", 3)],
        [node("MatMul", "x w", "s"), node("Mul", "s mask", "y")],
    )
    path = save(tmp_path / "a.onnx", inputs, [value("y", "n", 3)], nodes, {"w": WEIGHTS})
    mask = np.ones((60, 3), np.float32)
    named = data(tmp_path / "named.npz", mask=mask, x=INPUTS, labels=TRUTH)
    assert validate(path, path, "--data", named, "--max-accuracy-drop", "0") == 0
    assert validate(path, path, "--data", data(tmp_path / "other.npz", x=INPUTS, z=mask)) == 2
    assert "holds ['x', 'z']; " in complaint(capsys)


def test_validate_without_files_is_a_usage_error() -> None:
    assert run("validate") == 2


# Recipes --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a trained classifier of digits, a recipe for a subnet of it, and the files of that job."""
    folder = tmp_path_factory.mktemp("job")
    torch.manual_seed(0)
    model, found = digits_classifier(width=8), digits()
    optimizer = torch.optim.AdamW(model.parameters(), 0.003)
    for inputs, labels in [batch for _ in range(3) for batch in found.train or ()]:
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(inputs), labels).backward()
        optimizer.step()
    save_file(model.state_dict(), folder / "dense.safetensors")
    path = recipe(folder, "recipe")
    assert run("run", path, "--quiet", "--output", folder) == 0
    return folder


def recipe(folder: Path, name: str, **changes: Any) -> Path:
    """A recipe for digits, with some sections replaced."""
    content = {
        "model": {
            "factory": "nns_plugin.jobs.models:digits_classifier",
            "arguments": {"width": 8},
            "checkpoint": str(folder / "dense.safetensors"),
        },
        "data": {"factory": "nns_plugin.jobs.data:digits"},
        "labels": ["3", "5"],
        "ratio": 0.3,
        "measure": {"samples": 20, "resamples": 0, "batch": 2, "threads": 2},
    }
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(content | changes), encoding="utf-8")
    return path


def bare(path: Path, target: Path) -> Path:
    """A copy of a file without its metadata."""
    model = onnx.load(path)
    del model.metadata_props[:]
    onnx.save(model, target)
    return target


def compared(*arguments: object, report: Path, code: int = 0) -> dict[str, Any]:
    """The comparison of a validation by recipe."""
    assert run("validate", *arguments, "--quiet", "--json", report) == code
    found: dict[str, Any] = json.loads(report.read_text(encoding="utf-8"))
    return found["comparison"]


def test_a_recipe_gives_data_labels_and_how_to_measure(job: Path, tmp_path: Path) -> None:
    files = job / "baseline.onnx", job / "subnet.onnx"
    thresholds = ("--max-accuracy-drop", "0.5", "--max-label-drop", "0.5", "--min-top1-agreement", "0.5")
    found = compared(*files, "--recipe", job / "recipe.yaml", *thresholds, report=tmp_path / "a.json")
    assert (found["inputs"], found["random_inputs"], found["labels"]) == (540, False, ["3", "5"])
    (latency,) = found["latency"]
    assert (latency["batch"], latency["threads"], latency["samples"]) == (2, 2, 20)
    content = json.loads((job / "report.json").read_text(encoding="utf-8"))
    for ours, theirs in (("baseline", "baseline"), ("candidate", "subnet")):
        before, after = content[theirs]["evaluation"], found["accuracy"][ours]
        assert after["open_set_accuracy"] == pytest.approx(before["open_set_accuracy"])
    options = ("--batch", "3", "--threads", "1", "--samples", "30")
    found = compared(*files, "--recipe", job / "recipe.yaml", *options, report=tmp_path / "a.json")
    (latency,) = found["latency"]
    assert (latency["batch"], latency["threads"], latency["samples"]) == (3, 1, 30)


def test_a_recipe_names_the_labels_of_a_file_without_names(job: Path, tmp_path: Path) -> None:
    files = job / "baseline.onnx", bare(job / "subnet.onnx", tmp_path / "bare.onnx")
    given = ("--recipe", job / "recipe.yaml", "--max-label-drop", "0.5")
    assert compared(*files, *given, report=tmp_path / "a.json")["labels"] == ["3", "5"]
    named = compared(*files, *given, "--candidate-labels", "3,5,other", report=tmp_path / "a.json")
    assert named["labels"] == ["3", "5"]
    swapped = ("--candidate-labels", "5,3,other")
    assert validate(*files, *given, *swapped) == 4


@pytest.mark.parametrize("checkpoint", [True, False])
def test_a_subnet_is_compared_in_torch_as_well(checkpoint: bool, job: Path, tmp_path: Path) -> None:
    model = {"factory": "nns_plugin.jobs.models:digits_classifier", "arguments": {"width": 8}}
    path = job / "recipe.yaml" if checkpoint else recipe(tmp_path, "untrained", model=model)
    given = ("--recipe", path, "--subnet", job / "subnet.safetensors")
    found = compared(job / "baseline.onnx", job / "subnet.onnx", *given, report=tmp_path / "a.json")
    kinds = [(report["kind"], report["passed"]) for report in found["parity"]]
    file, removal, pruning = "torch against ONNX", "masked against removed", "dense against pruned"
    assert kinds == (
        [(file, True), (file, True), (removal, True), (pruning, False)]
        if checkpoint
        else [(file, True), (pruning, False)]
    )


def test_a_file_of_another_subnet_fails_without_a_threshold(
    job: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = onnx.load(job / "subnet.onnx")
    weights = next(tensor for tensor in model.graph.initializer if tensor.data_type == FLOAT)
    weights.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(weights) + 0.1, weights.name))
    onnx.save(model, tmp_path / "other.onnx")
    given = ("--recipe", job / "recipe.yaml", "--subnet", job / "subnet.safetensors")
    assert validate(job / "baseline.onnx", tmp_path / "other.onnx", *given) == 3
    assert "parity FAILED: torch against ONNX, other.onnx beside Sequential: largest error" in complaint(capsys)


def test_a_subnet_may_have_been_exported_with_other_names(job: Path, tmp_path: Path) -> None:
    example = digits().example_inputs
    small = Subnet.load(job / "subnet.safetensors").materialise(lambda: digits_classifier(8).eval(), example)
    path = export(
        small,
        example,
        tmp_path / "subnet.onnx",
        label_names=["3", "5", "other"],
        tensor_names=TensorNames(inputs=["image"]),
    )
    given = ("--recipe", job / "recipe.yaml", "--subnet", job / "subnet.safetensors")
    assert validate(job / "baseline.onnx", path, *given) == 0


@pytest.mark.parametrize(
    ("changes", "arguments", "text"),
    [
        ({}, ("--data", "data.npz"), "data and recipe exclude each other"),
        ({}, ("--subnet", "nowhere.safetensors"), "there is no file 'nowhere.safetensors'"),
        ({"labels": ["fox"]}, (), "label 'fox' does not exist"),
        ({"measure": {"batch": 0}}, (), "field 'measure.batch': found 0"),
        ({"data": {"factory": "nns_plugin.jobs.data:nothing"}}, (), "data.factory: "),
        (
            {"data": {"factory": "nns_plugin.jobs.data:digits", "arguments": {"seed": -1}}},
            (),
            "called with {'seed'",
        ),
    ],
)
def test_an_unusable_recipe_is_reported(
    changes: dict[str, Any],
    arguments: tuple[str, ...],
    text: str,
    job: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = recipe(tmp_path, "recipe", **changes)
    assert validate(job / "baseline.onnx", job / "subnet.onnx", "--recipe", path, *arguments) == 2
    assert text in complaint(capsys)


def test_a_subnet_of_another_model_is_reported(job: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ("--recipe", job / "recipe.yaml", "--subnet", job / "subnet.safetensors")
    assert validate(job / "baseline.onnx", job / "baseline.onnx", *given) == 2
    assert "returns outputs [[1, 10]] for a batch of 1, Sequential returns [[1, 3]]" in complaint(capsys)
