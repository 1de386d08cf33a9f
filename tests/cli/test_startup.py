"""``--version`` and ``--help`` answer without importing torch, which takes seconds."""

from __future__ import annotations

import subprocess
import sys

import pytest

pytest.importorskip("typer", reason="the extra cli is not installed")

CODE = """
import sys
from nns_plugin.cli import main
try:
    main({arguments!r})
finally:
    assert "torch" not in sys.modules, "torch is imported"
"""


@pytest.mark.parametrize(
    "arguments",
    [["--version"], ["--help"], *([command, "--help"] for command in ("run", "sweep", "validate", "doctor"))],
    ids=" ".join,
)
def test_the_command_answers_without_torch(arguments: list[str]) -> None:
    command = [sys.executable, "-c", CODE.format(arguments=arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert ("nns-plugin" if arguments == ["--version"] else "Usage: nns") in done.stdout
