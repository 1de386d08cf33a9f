"""Memory of sessions, measured in processes of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

from onnx_graphs import W, X, linear

from nns_plugin.adapters.onnxruntime.memory import session_memory
from nns_plugin.errors import ExportError

pytestmark = pytest.mark.host("onnxruntime")


def test_a_session_takes_memory_for_its_weights(tmp_path: Path) -> None:
    small = linear(tmp_path / "small.onnx", np.ones((2048, 64), np.float32))
    large = linear(tmp_path / "large.onnx", np.ones((2048, 8192), np.float32), put="a name / of its own")  # 64 MiB
    taken = [
        session_memory(path, {name: np.ones((1, 2048), np.float32)})
        for path, name in ((small, "x"), (large, "a name / of its own"))
    ]
    assert all(0 < each.session_bytes <= each.running_bytes for each in taken)
    assert taken[1].session_bytes - taken[0].session_bytes > 0.9 * 2048 * 8128 * 4


def test_activations_are_in_what_running_takes(tmp_path: Path) -> None:
    path = linear(tmp_path / "model.onnx", np.ones((4, 1024), np.float32))
    few, many = (session_memory(path, {"x": np.ones((count, 4), np.float32)}) for count in (1, 8192))
    assert many.running_bytes - few.running_bytes > 0.9 * 8192 * 1024 * 4


def test_memory_of_a_file_that_does_not_run_is_an_error(tmp_path: Path) -> None:
    path = linear(tmp_path / "model.onnx", W)
    with pytest.raises(ExportError, match="the memory of .*model.onnx' cannot be measured") as failure:
        session_memory(path, {"x": X[:, :2]})
    assert len(str(failure.value).splitlines()) == 1
    assert "check whether it runs alone" in str(failure.value)


def test_memory_is_measured_where_libraries_are_on_the_path_of_this_process_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, Any] = {}
    real = subprocess.run

    def record(command: list[str], **options: Any) -> Any:
        seen.update(options, command=command)
        return real(command, **options)

    monkeypatch.setattr(subprocess, "run", record)
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path / "libraries")])
    found = session_memory(linear(tmp_path / "model.onnx", W), {"x": X})
    assert found.running_bytes >= found.session_bytes
    assert str(tmp_path / "libraries") in seen["env"]["PYTHONPATH"].split(os.pathsep)
    assert "-I" not in seen["command"], "it drops the user's site and PYTHONPATH"
    assert "-P" in seen["command"], "the adapters' folder has a module that is called onnxruntime"
