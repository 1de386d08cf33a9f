"""``nns validate`` with thresholds: what passes, what fails, and with which exit code."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")
pytest.importorskip("typer", reason="the extra cli is not installed")

from validate_models import (  # noqa: E402
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

from nns_plugin.adapters.onnxruntime import comparing  # noqa: E402
from nns_plugin.adapters.onnxruntime.memory import SessionMemory  # noqa: E402

pytestmark = pytest.mark.host("onnxruntime")

NO_BEE = (0.0, -1e3, 0.0)
PROVIDERS = onnxruntime.get_available_providers()


@pytest.fixture(autouse=True)
def _no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory is measured in separate processes, half a second each; only the tests of reports do that."""
    monkeypatch.setattr(comparing, "session_memory", lambda *_, **__: SessionMemory(1, 2))


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A file, others with the same or other outputs, one that is much slower, and data with labels."""
    folder = tmp_path_factory.mktemp("files")
    wide = np.zeros((4, 1024), np.float32)
    wide[:, :3] = WEIGHTS
    nodes = [node("MatMul", "x w", "0"), *(node("MatMul", f"{place} eye", f"{place + 1}") for place in range(4))]
    return {
        "good": linear(folder / "good.onnx", labels=NAMES),
        "bad": linear(folder / "bad.onnx", -WEIGHTS, labels=NAMES),
        "no bee": shifted(folder / "no_bee.onnx", NO_BEE, labels=NAMES),
        "NaN": shifted(folder / "nan.onnx", [0, np.nan, 0], labels=NAMES),
        "slow": save(
            folder / "slow.onnx",
            [value("x", "n", 4)],
            [value("y", "n", 3)],
            [*nodes, node("MatMul", "4 last", "y")],
            {"w": wide, "eye": np.eye(1024, dtype=np.float32), "last": np.eye(1024, 3, dtype=np.float32)},
            labels=NAMES,
        ),
        "data": data(folder / "data.npz"),
    }


@pytest.mark.parametrize(
    ("baseline", "candidate", "threshold", "code"),
    [
        ("good", "good", "--min-speedup 0.001", 0),
        ("good", "good", "--min-speedup 1000", 5),
        ("slow", "good", "--min-speedup 2", 0),
        ("good", "slow", "--min-speedup 0.5", 5),
        ("good", "good", "--max-p90-ms 60000 --samples 100", 0),
        ("good", "good", "--max-p90-ms 0.000001 --samples 100", 5),
        ("good", "slow", "--rtol 1e-3", 0),
        ("good", "bad", "--rtol 1000000000", 0),
        ("good", "bad", "--atol 1000000000", 0),
        ("good", "bad", "--min-top1-agreement 0", 0),
        ("good", "good", "--max-accuracy-drop 0 --max-label-drop 0", 0),
        ("good", "bad", "--max-accuracy-drop 0.1", 4),
        ("good", "bad", "--max-accuracy-drop 1 --max-label-drop 1", 0),
        ("bad", "good", "--max-accuracy-drop 0 --max-label-drop 0", 0),
        ("good", "no bee", "--max-label-drop 0.1", 4),
        ("good", "NaN", "--max-label-drop 1", 4),
    ],
)
def test_each_threshold_passes_and_fails(
    baseline: str,
    candidate: str,
    threshold: str,
    code: int,
    files: dict[str, Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    given = ("--data", files["data"]) if "drop" in threshold else ()
    assert validate(files[baseline], files[candidate], *given, *threshold.split()) == code
    lines = complaints(capsys)
    assert len(lines) == (code != 0)
    assert all({4: "accuracy", 5: "latency"}[code] + " FAILED: " in line for line in lines)


def test_without_thresholds_nothing_can_fail(files: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    for candidate in ("bad", "NaN"):
        assert validate(files["good"], files[candidate], "--data", files["data"]) == 0
        captured = capsys.readouterr()
        assert captured.err == ""
        assert "PASS" in captured.out
        assert "FAIL" not in captured.out


def test_a_label_that_is_lost_is_named(files: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert validate(files["good"], files["no bee"], "--data", files["data"], "--max-label-drop", "0.1") == 4
    text = "label 'bee' falls by 50.00 points, by at most 50.00 at 95 %; 10 are allowed"
    assert complaint(capsys) == f"nns: accuracy FAILED: {text}"


def test_outputs_that_are_not_finite_have_no_accuracy(
    files: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert validate(files["good"], files["NaN"], "--data", files["data"], "--max-accuracy-drop", "1") == 4
    assert "the candidate returns outputs that are not finite for 60 of 60 inputs" in complaint(capsys)


@pytest.mark.parametrize(
    ("thresholds", "code", "subjects"),
    [
        ("--min-speedup 1000 --max-accuracy-drop 0.1", 4, "accuracy latency"),
        ("--min-speedup 1000 --rtol 1e-3", 3, "parity latency"),
        ("--max-label-drop 0.1 --min-top1-agreement 1", 3, "parity accuracy"),
        ("--min-speedup 1000 --max-label-drop 0.1 --rtol 0", 3, "parity accuracy latency"),
        ("--min-speedup 1000 --max-p90-ms 1e-9 --samples 100 --batch 1,2", 5, "latency latency latency latency"),
    ],
)
def test_of_several_failures_the_most_serious_gives_the_code(
    thresholds: str, code: int, subjects: str, files: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    given = ("--data", files["data"]) if "drop" in thresholds else ()
    assert validate(files["good"], files["no bee"], *given, *thresholds.split()) == code
    assert [line.split()[1] for line in complaints(capsys)] == subjects.split()


# Providers ------------------------------------------------------------------------------------------------------


@pytest.mark.skipif("CUDAExecutionProvider" in PROVIDERS, reason="this build of ONNX Runtime has CUDA")
def test_cuda_on_a_build_without_it_says_how_to_get_it(
    files: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert validate(files["good"], files["good"], "--provider", "cuda") == 6
    line = complaint(capsys)
    assert "asked ONNX Runtime for CUDAExecutionProvider, got nothing" in line
    assert 'pip install "nns-plugin[gpu]"' in line


def test_an_unknown_provider_is_reported_before_any_file_is_opened(capsys: pytest.CaptureFixture[str]) -> None:
    assert validate(Path("nowhere.onnx"), Path("nowhere.onnx"), "--provider", "magic") == 6
    assert "asked ONNX Runtime for magic, got nothing; this build offers " in complaint(capsys)


@pytest.mark.skipif("AzureExecutionProvider" not in PROVIDERS, reason="this build has no provider that runs nothing")
def test_a_provider_that_runs_no_node_fails_before_all_else(
    files: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    others = ("--data", files["data"], "--rtol", "0", "--max-label-drop", "0", "--min-speedup", "1000")
    assert validate(files["good"], files["no bee"], "--provider", "azure", *others) == 6
    lines = complaints(capsys)
    subjects = ["provider", "provider", "parity", "accuracy", "latency"]
    assert [line.split()[1] for line in lines] == subjects
    assert "AzureExecutionProvider ran 0 of 1 nodes" in lines[0]
