"""Without the extra ``cli``: what needs it names the command that installs it, and nothing else does."""

from __future__ import annotations

import subprocess
import sys

import pytest

BLOCKED = "import sys\nfor name in {names!r}:\n    sys.modules[name] = None\n"


def without(names: tuple[str, ...], code: str) -> str:
    """What a fresh process prints in which some packages cannot be imported."""
    command = [sys.executable, "-c", BLOCKED.format(names=names) + code]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    return done.stdout + done.stderr


@pytest.mark.parametrize(
    ("missing", "statement"),
    [
        ("pydantic", "import nns_plugin.jobs.recipe"),
        ("yaml", "import nns_plugin.jobs.loading"),
        ("sklearn", "from nns_plugin.jobs.data import digits; digits()"),
    ],
)
def test_the_missing_extra_is_named(missing: str, statement: str) -> None:
    printed = without((missing,), statement)
    assert f"MissingExtraError: {missing!r} is not installed" in printed
    assert 'run pip install "nns-plugin[cli]"' in printed


def test_the_face_needs_no_extra() -> None:
    code = "from nns_plugin.jobs import *; print('imported')"
    assert without(("pydantic", "yaml", "sklearn", "typer", "matplotlib", "onnx", "onnxruntime"), code) == "imported\n"
