"""The command line: tables for people, one line per mistake, never a traceback."""

from __future__ import annotations

import builtins
import json
import re
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("typer", reason="the extra cli is not installed")

from nns_plugin import Subnet
from nns_plugin.cli import main


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as caught:
        main(list(arguments))
    return int(caught.value.code or 0)


@pytest.mark.host("onnxruntime")
def test_a_search_within_a_budget_reports_every_trial(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    settings = ("calibrate_head=true", "measure.samples=20", "measure.resamples=0")
    given = [part for setting in settings for part in ("--set", setting)]
    output = tmp_path / "out"
    assert run("run", "--labels", "3,5", "--max-drop", "0.05", *given, "--quiet", "--output", str(output)) == 0
    printed = capsys.readouterr().out
    report = json.loads((output / "report.json").read_text(encoding="utf-8"))
    assert "drop at most, points (95 % confidence)" in printed
    assert len(report["trials"]) > 3
    for trial in report["trials"]:
        assert trial["within"] == (trial["drop_bound"] <= 0.05)
        row = rf"{100 * trial['ratio']:.1f} +│ +{trial['parameters']:,} +│ +{100 * trial['balanced_accuracy']:.1f} +│ +"
        assert re.search(row + rf"{100 * trial['drop_bound']:.1f}", printed)
    selection = Subnet.load(output / "subnet.safetensors").provenance.selection
    assert selection == {
        "max_balanced_accuracy_drop": 0.05,
        "confidence": 0.95,
        "round_to": selection.get("round_to", 1),
    }


@pytest.mark.host("onnxruntime")
def test_run_prints_every_number_and_writes_every_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    output = tmp_path / "out"
    assert run("run", "--labels", "1,8", "--ratio", "0.3", "--quiet", "--output", str(output)) == 0
    printed = capsys.readouterr().out
    for text in (
        "parameters", "MACs", "ONNX file", "p50 latency", "p90 latency", "mean balanced accuracy",
        "closed-set accuracy",
        "open-set accuracy", "parity", "recall", "FPR", "bal. acc.", "AUROC", "worst label",
    ):  # fmt: skip
        assert text in printed
    assert re.search(r"labels 1, 8 on 540 held-out inputs", printed)
    assert {file.name for file in output.iterdir()} == {
        "baseline.onnx", "subnet.onnx", "subnet.safetensors", "report.json"
    }  # fmt: skip


@pytest.mark.host("onnxruntime")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--ratio", "1.5"], "field 'ratio': found 1.5"),
        (["--labels", "fox"], "label 'fox' does not exist"),
        (["--head", "square"], "field 'head': found 'square'"),
        (["--criterion", "magic"], "field 'criterion.name': found 'magic'"),
        (["--set", "ratio:3"], "--set: found 'ratio:3'; expected FIELD=VALUE"),
        (["--set", "iterative.max_rounds=0"], "field 'iterative.max_rounds': found 0"),
        (["nowhere.yaml"], "nowhere.yaml: cannot be read"),
    ],
)
def test_a_mistake_is_one_line(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("run", "--quiet", "--output", str(tmp_path / "out"), *arguments) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.count("\n") == 1
    assert "Traceback" not in captured.err + captured.out
    assert not (tmp_path / "out").exists()


def test_doctor_shows_versions_and_criteria(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    monkeypatch.setenv("COLUMNS", "160")
    assert run("doctor") == 0
    printed = capsys.readouterr().out
    assert torch.__version__ in printed
    assert "criteria: distinctiveness, mean_weight, semantic, switcher, wsf" in printed


@pytest.mark.host("onnxruntime")
def test_doctor_queries_a_real_session(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    run("doctor")
    assert "CPUExecutionProvider" in capsys.readouterr().out


def test_doctor_names_the_extra_that_is_missing(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from nns_plugin import environment

    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.setattr(environment, "_version", lambda name, module: None if name == "nni" else "1.0")
    run("doctor")
    assert 'pip install "nns-plugin[nni]"' in capsys.readouterr().out


def test_a_missing_command_line_library_is_named(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import sys

    real = builtins.__import__

    def without_typer(name: str, *arguments: Any) -> Any:
        if name == "typer":
            raise ModuleNotFoundError("No module named 'typer'", name="typer")
        return real(name, *arguments)

    monkeypatch.delitem(sys.modules, "nns_plugin.cli.app", raising=False)
    monkeypatch.setattr(builtins, "__import__", without_typer)
    assert run("doctor") == 2
    assert 'pip install "nns-plugin[cli]"' in capsys.readouterr().err


def test_unknown_options_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("run", "--speed", "9") == 2
    assert "No such option" in capsys.readouterr().err


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    from nns_plugin import __version__

    assert run("--version") == 0
    assert __version__ in capsys.readouterr().out
