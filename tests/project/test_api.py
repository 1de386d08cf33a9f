"""The public surface: every name of the faces imports, docs/api.md lists it, and importing costs no host.

``python tests/project/test_api.py`` rewrites the page.
"""

from __future__ import annotations

import importlib
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "api.md"
FACES = {
    "nns_plugin": "What most people import. Names load lazily: `import nns_plugin` imports neither torch nor a host.",
    "nns_plugin.adapters.torch_pruning": "Importances for torch-pruning's pruners, and removal with compensation.",
    "nns_plugin.adapters.nni": "Pruners for NNI, and masked models made small. Needs the extra `nni`.",
    "nns_plugin.adapters.onnxruntime": "Export, measurement and the gate. Needs the extra `onnx`.",
}
HEAD = """# API

Every public name, with the first line of its docstring; `help(name)` has the rest. Errors are in
`nns_plugin.errors`, all of them below `NNSError`.

"""
HOSTS = (
    "torch_pruning",
    "nni",
    "onnx",
    "onnxruntime",
    "onnxscript",
    "sklearn",
    "matplotlib",
    "typer",
    "rich",
    "pydantic",
    "yaml",
)


def summary(face: str, name: str) -> str:
    """First line of a docstring; that of a constant is the string after its assignment."""
    module = importlib.import_module(face)
    value = getattr(module, name)
    if name == "__version__":
        return "Version of the installed package."
    if inspect.isclass(value) or inspect.isfunction(value):
        text = inspect.getdoc(value) or ""
    else:
        sources = (path.read_text(encoding="utf-8") for path in Path(inspect.getfile(module)).parent.glob("*.py"))
        found = [re.search(rf'^{name}\b[^\n]*\n"""(.+?)"""', source, re.MULTILINE | re.DOTALL) for source in sources]
        text = next((match[1] for match in found if match), "")
    return re.sub(r":\w+:`~?(?:[\w.]*\.)?(\w+)`", r"`\1`", text.partition("\n")[0]).replace("|", r"\|")


def section(face: str) -> str:
    """The part of the page about one face."""
    module = importlib.import_module(face)
    rows = [f"| `{name}` | {summary(face, name)} |" for name in sorted(module.__all__, key=str.lower)]
    return "\n".join([f"## {face}", "", FACES[face], "", "| name | |", "|---|---|", *rows, ""])


@pytest.mark.host("torch_pruning", "nni", "onnxruntime")
@pytest.mark.parametrize("face", FACES)
def test_the_page_lists_every_public_name(face: str) -> None:
    text = PAGE.read_text(encoding="utf-8")
    expected = section(face)
    assert expected in text, f"docs/api.md is not what {face} exports: run python {Path(__file__).name}"
    assert text.startswith(HEAD)
    assert text.count("\n## ") == len(FACES)


@pytest.mark.host("torch_pruning", "nni", "onnxruntime")
@pytest.mark.parametrize("face", FACES)
def test_every_public_name_has_a_docstring(face: str) -> None:
    module = importlib.import_module(face)
    assert len(set(module.__all__)) == len(module.__all__)
    missing = [name for name in module.__all__ if not summary(face, name)]
    assert missing == []


def test_pages_import_public_names_only() -> None:
    for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        for face, names in re.findall(
            r"^ *from (nns_plugin[\w.]*) import (.+)$", page.read_text("utf-8"), re.MULTILINE
        ):
            assert face in FACES, f"{page.name} imports from {face}"
            listed = PAGE.read_text("utf-8").split(f"\n## {face}\n")[1].partition("\n## ")[0]
            assert not [name for name in names.split(", ") if f"| `{name}` |" not in listed], f"{page.name}: {names}"


def loaded_after(statements: str, folder: Path) -> list[str]:
    """Which of torch and the hosts a fresh process has loaded after some statements."""
    script = f"{statements}\nimport sys\nprint(*(name for name in {('torch', *HOSTS)!r} if name in sys.modules))"
    run = subprocess.run([sys.executable, "-c", script], cwd=folder, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    return run.stdout.split()


def test_a_fresh_import_loads_nothing(tmp_path: Path) -> None:
    assert loaded_after("import nns_plugin; nns_plugin.__version__; dir(nns_plugin)", tmp_path) == []


def test_the_core_loads_no_host(tmp_path: Path) -> None:
    import nns_plugin

    names = ", ".join(name for name in nns_plugin.__all__)
    assert loaded_after(f"from nns_plugin import {names}", tmp_path) == ["torch"]


if __name__ == "__main__":
    PAGE.write_text(HEAD + "\n".join(section(face) for face in FACES), encoding="utf-8")
