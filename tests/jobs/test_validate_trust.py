"""What would make a verdict untrustworthy: other data than the job's, other names, luck, and lost files."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import textwrap
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
from validate_models import (  # noqa: E402
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

from nns_plugin.adapters.onnxruntime import comparing  # noqa: E402
from nns_plugin.adapters.onnxruntime.memory import SessionMemory, session_memory  # noqa: E402
from nns_plugin.cli import main  # noqa: E402
from nns_plugin.jobs.validation import judging  # noqa: E402

pytestmark = pytest.mark.host("onnxruntime")

FACTORIES = """
    import torch
    from torch import nn
    from torch.utils.data import DataLoader, TensorDataset, random_split

    def model():
        return nn.Sequential(nn.Linear(4, 12), nn.LayerNorm(12) if NORM else nn.Identity(), nn.ReLU(), nn.Linear(12, 3))

    def data():
        generator = torch.Generator().manual_seed(5)
        x, y = torch.randn(400, 4, generator=generator), torch.arange(400) % 3
        x[torch.arange(400), y] += 3
        parts = random_split(TensorDataset(x, y), [200, 200])  # by torch's own seed
        train, test = (DataLoader(part, 50) for part in parts)
        return {
            "train": train, "calibration": train, "test": test, "example_inputs": x[:2],
            "label_names": ["ant", "bee", "cat"],
        }
"""


@pytest.fixture(autouse=True)
def _no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(comparing, "session_memory", lambda *_, **__: SessionMemory(1, 2))


def job(folder: Path, monkeypatch: pytest.MonkeyPatch, norm: bool = False, **changes: Any) -> Path:
    """A recipe with its own factories in a folder, and its job run there."""
    name = f"factories_{folder.name}"
    text = textwrap.dedent(FACTORIES).replace("NORM", str(norm))
    (folder / f"{name}.py").write_text(text, encoding="utf-8")
    monkeypatch.syspath_prepend(folder)
    content = {
        "model": {"factory": f"{name}:model"},
        "data": {"factory": f"{name}:data"},
        "labels": ["ant", "cat"],
        "ratio": 0.3,
        "train": {"epochs": 2},
        "measure": {"samples": 20, "resamples": 0},
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(content | changes), encoding="utf-8")
    assert run("run", path, "--quiet", "--output", folder) == 0
    return path


def test_the_test_data_are_those_of_the_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = job(tmp_path, monkeypatch)
    report = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    for again in range(2):
        torch.manual_seed(again)
        files = tmp_path / "baseline.onnx", tmp_path / "subnet.onnx"
        before = torch.get_rng_state()
        assert validate(*files, "--recipe", path, "--json", tmp_path / "out.json") == 0
        assert torch.equal(torch.get_rng_state(), before)
        accuracy = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))["comparison"]["accuracy"]
        for ours, theirs in (("baseline", "baseline"), ("candidate", "subnet")):
            expected = [label["inputs"] for label in report[theirs]["evaluation"]["labels"]]
            assert [label["inputs"] for label in accuracy[ours]["labels"]] == expected
            for name in ("open_set_accuracy", "mean_balanced_accuracy"):
                assert accuracy[ours][name] == pytest.approx(report[theirs]["evaluation"][name], abs=1e-9)


def test_a_norm_over_units_is_noted_and_does_not_fail(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = job(tmp_path, monkeypatch, norm=True)
    capsys.readouterr()
    files = tmp_path / "baseline.onnx", tmp_path / "subnet.onnx"
    assert validate(*files, "--recipe", path, "--subnet", tmp_path / "subnet.safetensors") == 0, "trained by the job"
    from safetensors.torch import save_file

    weights = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in onnx.load(files[0]).graph.initializer}
    module = sys.modules[f"factories_{tmp_path.name}"].model()
    state = {name: torch.from_numpy(weights[name].copy()) for name in module.state_dict()}
    save_file(state, tmp_path / "dense.safetensors")
    content = yaml.safe_load(path.read_text(encoding="utf-8")) | {"train": {"epochs": 0}}
    content["model"]["checkpoint"] = "dense.safetensors"
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    capsys.readouterr()
    given = ("--recipe", path, "--subnet", tmp_path / "subnet.safetensors", "--json", tmp_path / "out.json")
    assert validate(*files, *given) == 0
    assert "the masked model differs from the small one" in " ".join(capsys.readouterr().out.split())
    parity = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))["comparison"]["parity"]
    assert [report["kind"] for report in parity] == ["torch against ONNX"] * 2 + ["dense against pruned"]
    start = sys.modules[f"factories_{tmp_path.name}"].model().state_dict()  # what a job starts from is not what it cuts
    save_file(start, tmp_path / "dense.safetensors")
    path.write_text(yaml.safe_dump(content | {"train": {"epochs": 2}}), encoding="utf-8")
    assert validate(*files, *given) == 0


def test_the_label_names_in_a_file_take_precedence_over_the_recipe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = job(tmp_path, monkeypatch)
    order = ["cat", "ant", "bee"]
    columns = [NAMES.index(name) for name in order]
    turned = linear(tmp_path / "turned.onnx", WEIGHTS[:, columns], labels=order)
    straight, wrong = linear(tmp_path / "straight.onnx", labels=NAMES), linear(tmp_path / "wrong.onnx", labels=order)
    given = ("--recipe", path, "--min-top1-agreement", "1", "--max-accuracy-drop", "0.05")
    assert validate(turned, turned, *given) == 0
    assert validate(turned, straight, *given) == 0
    assert validate(turned, wrong, *given) == 3
    capsys.readouterr()
    strange = linear(tmp_path / "strange.onnx", labels=["ant", "bee", "yak"])
    assert validate(strange, strange, *given) == 2
    assert "has the labels ['ant', 'bee', 'yak'], but the recipe's data also ['cat']" in complaint(capsys)
    assert validate(turned, turned, "--candidate-labels", "ant,bee,cat") == 2
    assert "holds the label names ['cat', 'ant', 'bee'], but" in complaint(capsys)


def test_a_few_inputs_without_a_drop_do_not_pass(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good, off = linear(tmp_path / "good.onnx"), linear(tmp_path / "off.onnx", WEIGHTS * np.float32(1.5))
    few = data(tmp_path / "few.npz", x=INPUTS[:12], labels=TRUTH[:12])
    assert validate(good, off, "--data", few, "--max-accuracy-drop", "0.1") == 4
    assert (
        "falls by 0.00 points, by at most 24.96 at 95 %; 10 are allowed (more inputs narrow this bound)"
        in complaint(capsys)
    )
    assert validate(good, off, "--data", few, "--max-accuracy-drop", "0.1", "--confidence", "0.5") == 0


def test_one_pair_of_sessions_is_too_few_to_judge_speed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = linear(tmp_path / "a.onnx")
    assert run("validate", path, path, "--samples", "10", "--min-speedup", "0.1", "--quiet") == 2
    assert "min_speedup needs at least two pairs of sessions with 10 samples each, found 10 in 1" in complaint(capsys)


# Files from elsewhere -------------------------------------------------------------------------------------------


def test_a_fixed_batch_size_is_measured_by_default(tmp_path: Path) -> None:
    path = linear(tmp_path / "a.onnx", batch=8)
    assert run("validate", path, path, "--samples", "20", "--quiet", "--json", tmp_path / "out.json") == 0
    (latency,) = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))["comparison"]["latency"]
    assert latency["batch"] == 8


def test_scores_need_not_come_first(tmp_path: Path) -> None:
    nodes = [node("MatMul", "x w", "p"), node("ArgMax", "p", "label", axis=1, keepdims=0)]
    outputs = [value("label", "n", kind=onnx.TensorProto.INT64), value("p", "n", 3)]
    paths = [
        save(tmp_path / f"{name}.onnx", [value("x", "n", 4)], outputs, nodes, {"w": weights})
        for name, weights in (("good", WEIGHTS), ("bad", -WEIGHTS))
    ]
    given = ("--data", data(tmp_path / "data.npz"), "--max-accuracy-drop", "0.1", "--min-top1-agreement", "0.9")
    assert validate(paths[0], paths[0], *given) == 0
    assert validate(*paths, *given[:-2]) == 4


def test_embeddings_of_other_widths_fail_only_with_a_threshold(tmp_path: Path) -> None:
    wide, narrow = linear(tmp_path / "wide.onnx"), linear(tmp_path / "narrow.onnx", WEIGHTS[:, :2])
    assert validate(wide, narrow) == 0
    assert validate(wide, narrow, "--atol", "1") == 3


# Files that are read, and files that are written ------------------------------------------------------------------


def test_weights_beside_a_file_are_not_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = {"save_as_external_data": True, "location": "weights.bin", "size_threshold": 0}
    path = linear(tmp_path / "a.onnx", **options)
    content = (tmp_path / "weights.bin").read_bytes()
    assert validate(path, path, "--json", tmp_path / "weights.bin") == 2
    assert "is an input file; choose another output path" in complaint(capsys)
    assert (tmp_path / "weights.bin").read_bytes() == content


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no such files here")
def test_only_regular_files_are_replaced(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    os.mkfifo(tmp_path / "pipe")
    path = linear(tmp_path / "a.onnx")
    assert validate(path, path, "--json", tmp_path / "pipe") == 2
    assert "is not a regular file" in complaint(capsys)
    assert (tmp_path / "pipe").is_fifo()


def test_each_file_is_hashed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hashed, real = [], hashlib.sha256
    monkeypatch.setattr(hashlib, "sha256", lambda *content: hashed.append(content) or real(*content))
    assert validate(linear(tmp_path / "a.onnx"), linear(tmp_path / "b.onnx")) == 0
    assert len(hashed) == 2


def test_a_link_is_followed_when_writing(tmp_path: Path) -> None:
    (tmp_path / "real.json").write_text("old", encoding="utf-8")
    (tmp_path / "link.json").symlink_to(tmp_path / "real.json")
    path = linear(tmp_path / "a.onnx")
    assert validate(path, path, "--json", tmp_path / "link.json") == 0
    assert (tmp_path / "link.json").is_symlink()
    assert json.loads((tmp_path / "real.json").read_text(encoding="utf-8"))["passed"]


@pytest.mark.parametrize("stop", [KeyboardInterrupt(), SystemExit(143)])
def test_an_interrupted_run_leaves_no_older_verdict(
    stop: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(*_: Any, **__: Any) -> None:
        raise stop

    path = linear(tmp_path / "a.onnx")
    (tmp_path / "out.json").write_text('{"passed": true}', encoding="utf-8")
    (tmp_path / "out.png").write_bytes(b"old")
    monkeypatch.setattr(judging, "compare", stopped)
    given = ["validate", path, path, "--json", tmp_path / "out.json", "--figure", tmp_path / "out.png"]
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        main([str(part) for part in given])
    content = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))
    assert (content["passed"], content["error"]["type"]) == (False, type(stop).__name__)
    assert not (tmp_path / "out.png").exists()


def test_the_working_folder_shadows_no_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = linear(tmp_path / "a.onnx")
    before = list(sys.path)
    monkeypatch.chdir(tmp_path)
    assert validate(path, path) == 0
    assert sys.path == before


def test_memory_that_cannot_be_measured_is_a_note(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(comparing, "session_memory", session_memory)
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: subprocess.CompletedProcess([], 1, "", "no such library"))
    path = linear(tmp_path / "a.onnx")
    assert validate(path, path, "--json", tmp_path / "out.json") == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    assert "cannot be measured (no such library)" in " ".join(captured.out.split())
    found = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))["comparison"]
    assert found["baseline_memory"] is found["candidate_memory"] is None


def test_several_failures_are_one_line_each(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good, bad = linear(tmp_path / "good.onnx"), linear(tmp_path / "bad.onnx", -WEIGHTS)
    given = ("--rtol", "1e-3", "--min-top1-agreement", "1", "--max-accuracy-drop", "0", "--min-speedup", "1000")
    assert validate(good, bad, "--data", data(tmp_path / "data.npz"), *given) == 3
    subjects = [line.split()[1] for line in complaints(capsys)]
    assert subjects == ["parity", "parity", "accuracy", "latency"]
