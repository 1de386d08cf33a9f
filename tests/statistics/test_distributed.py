"""Calibration by two processes under torch.distributed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from observations import (
    assert_same,
)

from nns_plugin import Statistics


@pytest.fixture(scope="module")
def processes(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, str]]]:
    """Two processes run every scenario of distributed_worker.py; their answers by scenario."""
    folder = tmp_path_factory.mktemp("processes")
    worker = Path(__file__).parents[1] / "helpers" / "distributed_worker.py"
    running = [
        subprocess.Popen(
            [sys.executable, str(worker), str(rank), str(folder)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    answers = []
    for process in running:
        try:
            output, _ = process.communicate(timeout=120)
        except subprocess.TimeoutExpired:
            pytest.fail("a process hangs, waiting for the other one's sums")
        finally:
            if process.poll() is None:
                for other in running:
                    other.kill()
                    other.communicate()
        assert process.returncode == 0, output
        answers.append(json.loads(output.splitlines()[-1]))
    return folder, answers


def test_two_processes_have_the_sums_of_both(processes: tuple[Path, list[dict[str, str]]]) -> None:
    folder, answers = processes
    assert [answer["whole"] for answer in answers] == ["ok", "ok"]
    whole = Statistics.load(folder / "whole.safetensors")
    for rank in range(2):
        shared = Statistics.load(folder / f"rank{rank}.safetensors")
        assert_same(shared, whole)
    assert int(whole.records["in", "layer"].inputs.sum()) == 20


ELSEWHERE = "CalibrationError: calibration failed in 1 of 2 processes"
UNEQUAL = "CalibrationError: the processes calibrate different models, groups or labels"


@pytest.mark.parametrize(
    ("scenario", "first", "second"),
    [
        ("empty", ELSEWHERE, "CalibrationError: the loader yielded no inputs"),
        ("nan", ELSEWHERE, "CalibrationError: module 'layer' has NaN"),
        ("raises", ELSEWHERE, "RuntimeError: from the loader"),
        ("no groups", ELSEWHERE, "CalibrationError: there are no unit groups"),
        ("other weights", UNEQUAL, UNEQUAL),
        ("unlabelled", UNEQUAL, UNEQUAL),
        ("both", "CalibrationError: the loader yielded no inputs", "CalibrationError: the loader yielded no inputs"),
    ],
)
def test_no_process_waits_for_one_that_failed(
    processes: tuple[Path, list[dict[str, str]]], scenario: str, first: str, second: str
) -> None:
    for answer, expected in zip(processes[1], (first, second), strict=True):
        assert answer[scenario].startswith(expected)


def test_processes_go_on_after_a_failure(processes: tuple[Path, list[dict[str, str]]]) -> None:
    assert [answer["again"] for answer in processes[1]] == ["ok", "ok"]
