"""Reports of ``nns validate``: their content, how they report bad input, and that they are written atomically."""

from __future__ import annotations

import hashlib
import json
import os
import re
import struct
from pathlib import Path
from typing import Any
from urllib.parse import unquote
from xml.etree import ElementTree

import numpy as np
import pytest

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")
pytest.importorskip("typer", reason="the extra cli is not installed")
pytest.importorskip("matplotlib", reason="the extra figures is not installed")

from validate_models import (
    NAMES,
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

from nns_plugin.adapters.onnxruntime import comparing
from nns_plugin.adapters.onnxruntime.memory import SessionMemory
from nns_plugin.jobs import output
from nns_plugin.jobs.validation import writing

pytestmark = pytest.mark.host("onnxruntime")

OPTIONS = ("--json", "--junit", "--markdown", "--figure")
FILES = ("report.json", "junit.xml", "summary.md", "latency.png")
NO_BEE = (0.0, -1e3, 0.0)


@pytest.fixture(autouse=True)
def _no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory is measured in separate processes, half a second each."""
    monkeypatch.setattr(comparing, "session_memory", lambda *_, **__: SessionMemory(1, 2))


def reports(folder: Path) -> tuple[object, ...]:
    """Options that request all reports."""
    return tuple(part for option, name in zip(OPTIONS, FILES, strict=True) for part in (option, folder / name))


def read_json(folder: Path) -> dict[str, Any]:
    """The JSON report; NaN and infinities are errors."""

    def refuse(constant: str) -> Any:
        raise ValueError(f"{constant} is no JSON")

    found: dict[str, Any] = json.loads((folder / FILES[0]).read_text(encoding="utf-8"), parse_constant=refuse)
    return found


def read_junit(folder: Path) -> ElementTree.Element:
    """The only suite of the JUnit report, whose counts must be right."""
    root = ElementTree.parse(folder / FILES[1]).getroot()
    assert root.tag == "testsuites"
    (suite,) = root
    counts = {"tests": "testcase", "failures": "testcase/failure", "errors": "testcase/error"}
    assert {name: suite.get(name) for name in counts} == {
        name: str(len(suite.findall(path))) for name, path in counts.items()
    }
    return suite


def read_markdown(folder: Path) -> list[str]:
    return (folder / FILES[2]).read_text(encoding="utf-8").splitlines()


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


# Content -------------------------------------------------------------------------------------------------


def test_all_reports_agree(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()  # with memory
    stored = {"save_as_external_data": True, "location": "weights.bin", "size_threshold": 0}
    baseline = linear(tmp_path / "baseline.onnx", labels=NAMES, **stored)
    candidate = shifted(tmp_path / "candidate.onnx", NO_BEE, labels=NAMES)
    thresholds = ("--min-speedup", "0.001", "--max-label-drop", "0.1", "--rtol", "1e-3")
    options = ("--batch", "1,3", "--samples", "30", "--seed", "7", "--threads", "2", "--confidence", "0.9")
    given = ("--data", data(tmp_path / "data.npz"), "--io-binding", "--spinning", *thresholds, *options)
    assert validate(baseline, candidate, *given, *reports(tmp_path)) == 3
    assert len(complaints(capsys)) == 2

    found = read_json(tmp_path)
    comparison, verdict = found["comparison"], found["verdict"]
    assert found["passed"] is verdict["passed"] is False
    assert found["gate"]["rtol"] == 1e-3
    assert found["gate"]["max_p90_ms"] is None
    names = ["nodes, baseline", "nodes, candidate", "tolerance, dense against pruned", "max_label_drop, bee"]
    names += ["min_speedup, batch 1", "min_speedup, batch 3"]
    passed = [True, True, False, False, True, True]
    assert [(check["name"], check["passed"]) for check in verdict["checks"]] == list(zip(names, passed, strict=True))
    weights = tmp_path / "weights.bin"
    assert comparison["baseline"]["sha256"] == {file.name: digest(file) for file in (baseline, weights)}
    assert comparison["candidate"]["sha256"] == {"candidate.onnx": digest(candidate)}
    assert set(comparison["environment"]) == {"machine", "onnxruntime", "versions"}
    assert comparison["environment"]["versions"]["numpy"] == np.__version__
    assert all(comparison[f"{side}_memory"]["running_bytes"] > 2**20 for side in ("baseline", "candidate"))
    assert (comparison["inputs"], comparison["accuracy"]["confidence"]) == (60, 0.9)
    for latency, batch in zip(comparison["latency"], (1, 3), strict=True):
        conditions = {"batch": batch, "samples": 30, "seed": 7, "threads": 2, "io_binding": True, "spinning": True}
        assert {name: latency[name] for name in conditions} == conditions
        assert len(latency["candidate"]["times_ms"]) == 30

    suite = read_junit(tmp_path)
    cases = suite.findall("testcase")
    assert [(case.get("name"), case.find("failure") is None) for case in cases] == list(zip(names, passed, strict=True))
    assert [case.get("classname") for case in cases][2:5] == ["nns.parity", "nns.accuracy", "nns.latency"]
    texts = [check["text"] for check in verdict["checks"] if not check["passed"]]
    assert [failure.get("message") for failure in suite.findall("testcase/failure")] == texts
    properties = {of.get("name"): of.get("value") for of in suite.findall("properties/property")}
    assert properties["candidate.sha256"] == f"candidate.onnx {digest(candidate)}"
    assert properties["versions.numpy"] == np.__version__
    conditions_text = "2 threads, spinning on, inputs and outputs bound, 30 samples each in 3 pairs of sessions"
    assert conditions_text in properties["latency.batch 3"]

    lines = read_markdown(tmp_path)
    assert lines[0] == f"# FAIL: `{candidate}` against `{baseline}`"
    assert f"| **FAIL** | accuracy: max_label_drop, bee | {texts[1]} |" in lines
    assert f"![latency distributions]({FILES[3]})" in lines
    assert any(digest(candidate) in line for line in lines)

    picture = (tmp_path / FILES[3]).read_bytes()
    assert picture[:8] == b"\x89PNG\r\n\x1a\n"
    assert min(struct.unpack(">II", picture[16:24])) > 300


def test_numbers_that_json_lacks_are_null(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    broken = shifted(tmp_path / "b.onnx", [0, np.nan, np.inf])
    assert validate(linear(tmp_path / "a.onnx"), broken, "--rtol", "1e-3", *reports(tmp_path)) == 3
    assert "largest error nan" in complaint(capsys)
    (report,) = read_json(tmp_path)["comparison"]["parity"]
    assert report["max_absolute_error"] is None
    assert report["passed"] is False
    assert len(read_junit(tmp_path).findall("testcase/failure")) == 1


def test_a_candidate_that_passes_says_so_everywhere(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = linear(tmp_path / "a.onnx")
    assert validate(path, path, "--min-top1-agreement", "1", *reports(tmp_path)) == 0
    assert complaints(capsys) == []
    found = read_json(tmp_path)
    assert found["passed"] is found["verdict"]["passed"] is True
    assert found["rounding"] is None
    assert read_junit(tmp_path).get("failures") == "0"
    assert read_markdown(tmp_path)[0].startswith("# PASS: ")
    mask = os.umask(0)
    os.umask(mask)
    assert {(tmp_path / name).stat().st_mode & 0o777 for name in FILES} == {0o666 & ~mask}


@pytest.mark.parametrize("name", ["a\x07b", "\0", "two\nlines", "pipe|", "[red]", "$x^", "`", "<&>"])
def test_any_name_of_a_label_can_be_reported(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    labels = ("ant", name, "cat")
    files = linear(tmp_path / "a.onnx", labels=labels), shifted(tmp_path / "b.onnx", NO_BEE, labels=labels)
    given = ("--data", data(tmp_path / "data.npz"), "--max-label-drop", "0.1")
    assert validate(*files, *given, *reports(tmp_path)) == 4
    complaint(capsys)
    assert read_json(tmp_path)["comparison"]["labels"] == list(labels)
    assert len(read_junit(tmp_path).findall("testcase/failure")) == 1
    columns = 0
    for line in read_markdown(tmp_path):
        bars = len(re.findall(r"(?<!\\)\|", line)) if line.startswith("|") else 0
        assert not (columns and bars) or bars == columns
        assert line.startswith(("|", "#", "!", "-")) or not columns or line == ""
        columns = bars


def test_the_summary_links_a_picture_in_another_folder(tmp_path: Path) -> None:
    path, pictures = linear(tmp_path / "a.onnx"), tmp_path / "my pictures"
    pictures.mkdir()
    figure = pictures / "latency (1).png"
    assert validate(path, path, "--markdown", tmp_path / FILES[2], "--figure", figure) == 0
    (line,) = [line for line in read_markdown(tmp_path) if line.startswith("![")]
    link = line.partition("](")[2].removesuffix(")")
    assert not set(link) & set(" ()")
    assert (tmp_path / unquote(link)).samefile(figure)


def convolutions(path: Path, channels: int) -> Path:
    rng = np.random.default_rng(0)
    nodes = [
        node("Conv", "x a", "h", name="first", pads=[1, 1, 1, 1]),
        node("Relu", "h", "r"),
        node("Conv", "r b", "g", name="second", pads=[1, 1, 1, 1]),
        node("GlobalAveragePool", "g", "p"),
        node("Flatten", "p", "f"),
        node("MatMul", "f w", "y", name="head"),
    ]
    shapes = {"a": (channels, 3, 3, 3), "b": (channels, channels, 3, 3), "w": (channels, 3)}
    weights = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    return save(path, [value("x", "n", 3, 8, 8)], [value("y", "n", 3)], nodes, weights)


def test_odd_channels_are_reported_once_and_below_the_table(tmp_path: Path) -> None:
    odd = convolutions(tmp_path / "odd.onnx", 21)
    assert validate(odd, odd, "--batch", "1,2", *reports(tmp_path)) == 0
    lines = read_markdown(tmp_path)
    (place,) = (here for here, line in enumerate(lines) if "not a multiple of 16" in line)
    assert lines[place].startswith(
        "- candidate: 3 of 3 layers have channels that are not a multiple of 16 (3 of them not of 8 either)"
    )
    assert lines[place - 1] == "", "a list right below a table is a row of it"


def test_rounding_is_suggested_for_odd_channels_only(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    odd, even = convolutions(tmp_path / "odd.onnx", 21), convolutions(tmp_path / "even.onnx", 16)
    assert validate(odd, odd, "--suggest-rounding", *reports(tmp_path)) == 0
    assert "channels rounded up" in capsys.readouterr().out
    gains = read_json(tmp_path)["rounding"]
    assert {(gain["layer"], gain["multiple"], *gain["channels"], *gain["rounded"]) for gain in gains} == {
        ("first", 8, 3, 21, 3, 24),
        ("first", 16, 3, 21, 3, 32),
        ("second", 8, 21, 21, 24, 24),
        ("second", 16, 21, 21, 32, 32),
        ("head", 8, 21, 3, 24, 3),
        ("head", 16, 21, 3, 32, 3),
    }
    assert all(0 < gain["ratio_low"] <= gain["ratio"] <= gain["ratio_high"] for gain in gains)
    assert sum(line.startswith("| second |") for line in read_markdown(tmp_path)) == 2
    assert validate(even, even, "--suggest-rounding", *reports(tmp_path)) == 0
    assert read_json(tmp_path)["rounding"] == []
    assert any(line.startswith("- All channels are multiples of 16") for line in read_markdown(tmp_path))


# Bad input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "code", "kind", "text"),
    [
        ("", 2, "ExportError", "is truncated or damaged"),
        ("--provider magic", 6, "ProviderError", "asked ONNX Runtime for magic"),
        ("--max-label-drop 0.1", 2, "GateError", "need inputs with labels"),
        ("--min-speedup -1", 2, "GateError", "min_speedup is -1.0"),
        ("--batch x", 2, "RecipeError", "--batch: found 'x'"),
        ("--recipe nowhere.yaml", 2, "RecipeError", "nowhere.yaml: cannot be read"),
    ],
)
def test_on_bad_input_the_error_replaces_older_reports(
    arguments: str, code: int, kind: str, text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good, bad = linear(tmp_path / "good.onnx"), tmp_path / "bad.onnx"
    bad.write_bytes(good.read_bytes()[:-20] if not arguments else good.read_bytes())
    for name in FILES[:3]:
        (tmp_path / name).write_text("an earlier verdict: PASS", encoding="utf-8")
    assert validate(good, bad, *arguments.split(), *reports(tmp_path)) == code
    line = complaint(capsys).removeprefix("nns: ")
    assert text in line
    assert read_json(tmp_path) == {"passed": False, "error": {"type": kind, "text": line}}
    suite = read_junit(tmp_path)
    (error,) = suite.findall("testcase/error")
    assert (suite.get("tests"), error.get("type"), error.get("message")) == ("1", kind, line)
    summary = read_markdown(tmp_path)
    assert summary[0] == f"# ERROR: `{bad}` against `{good}`"
    assert summary[-1] == line


# Paths --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("option", OPTIONS)
def test_a_report_in_a_missing_folder_is_refused_before_any_work(
    option: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    nowhere = Path("nowhere.onnx")  # is not looked at yet
    assert validate(nowhere, nowhere, option, tmp_path / "none" / "report") == 2
    assert f"output: {str(tmp_path / 'none')!r} is not a writable folder" in complaint(capsys)
    assert validate(nowhere, nowhere, option, tmp_path) == 2
    assert f"output: {str(tmp_path)!r} is a folder; expected a file name" in complaint(capsys)
    assert list(tmp_path.iterdir()) == []


def test_two_reports_in_one_file_are_refused_before_any_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    nowhere, same = Path("nowhere.onnx"), tmp_path / "report"
    (tmp_path / "folder").mkdir()
    again = tmp_path / "folder" / ".." / "report"
    assert validate(nowhere, nowhere, "--json", same, "--junit", again) == 2
    assert "are the same file; choose distinct paths" in complaint(capsys)
    assert not same.exists()


@pytest.mark.parametrize("name", ["a.onnx", "b.onnx", "data.npz"])
def test_a_report_never_overwrites_an_input(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = linear(tmp_path / "a.onnx"), linear(tmp_path / "b.onnx")
    archive, before = data(tmp_path / "data.npz"), digest(tmp_path / name)
    code = validate(*files, "--data", archive, "--json", tmp_path / name)
    assert digest(tmp_path / name) == before
    assert code == 2
    assert repr(str(tmp_path / name)) in complaint(capsys)


@pytest.mark.parametrize("place", range(4))
def test_reports_that_cannot_be_moved_into_place_leave_the_old_ones(
    place: int, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, replace, failed = linear(tmp_path / "a.onnx"), os.replace, []

    def full(source: Path, target: Path) -> None:
        if Path(target) == tmp_path / FILES[place] and not failed:
            failed.append(target)
            raise OSError(28, "No space left on device")
        replace(source, target)

    for name in FILES:
        (tmp_path / name).write_text("old", encoding="utf-8")
    names = sorted(tmp_path.iterdir())
    monkeypatch.setattr(output.os, "replace", full)
    assert validate(path, path, *reports(tmp_path)) == 2
    assert "cannot be written: No space left on device" in complaint(capsys)
    assert sorted(tmp_path.iterdir()) == names
    assert [(tmp_path / name).read_bytes() for name in FILES] == [b"old"] * 4


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RuntimeError("a fault of our own")])
def test_a_report_that_cannot_be_written_leaves_the_old_ones(
    error: Exception, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Broken:
        def savefig(self, path: Path, **_: Any) -> None:
            path.write_bytes(b"half a pict")
            raise error

    path = linear(tmp_path / "a.onnx")
    for name in FILES[:3]:
        (tmp_path / name).write_text("old", encoding="utf-8")
    names = sorted(tmp_path.iterdir())
    monkeypatch.setattr(writing, "latency_figure", lambda *_: Broken())
    assert validate(path, path, *reports(tmp_path)) == (2 if isinstance(error, OSError) else 1)
    assert str(error.args[-1]) in complaint(capsys)
    assert sorted(tmp_path.iterdir()) == names
    if isinstance(error, OSError):
        assert [(tmp_path / name).read_bytes() for name in FILES[:3]] == [b"old"] * 3
    else:  # any other error is reported in place of results
        content = json.loads((tmp_path / FILES[0]).read_text(encoding="utf-8"))
        assert content == {"passed": False, "error": {"type": "RuntimeError", "text": "a fault of our own"}}
