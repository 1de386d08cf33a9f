"""README and docs tell the truth: commands are there, links lead somewhere, Python code runs.

Each ```python block runs alone, in an empty folder. A comment on the last line before a block directs this test:
``<!-- not run: reason -->`` skips it, ``<!-- host: onnxruntime, nni -->`` marks it as needing hosts.
"""

from __future__ import annotations

import os
import re
import textwrap
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
PAGES = (README, ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md")))
MAIN_JOB = 'pip install -c constraints.txt ".[all]" && nns run'
TEST_COMMAND = "pip install tox && tox"

FENCE = re.compile(r"^ *(?P<fence>`{3,}|~{3,}) *(?P<language>[^\s`]*)")
DIRECTIVE = re.compile(r"<!-- *(?P<kind>not run|host): *(?P<value>.*?) *-->")


class Block(NamedTuple):
    """A Python code block."""

    line: int  # of its first line of code, from 1
    code: str
    reason: str  # why it does not run; empty if it does
    hosts: tuple[str, ...]


def python_blocks(text: str) -> list[Block]:
    """All ```python blocks of a Markdown text, also indented ones."""
    blocks = []
    lines = text.splitlines()
    position, before = 0, ""
    while position < len(lines):
        opening = FENCE.match(lines[position])
        if opening is None:
            before = lines[position].strip() or before
            position += 1
            continue
        start = position = position + 1
        closing = re.compile(rf" *{opening['fence']}{opening['fence'][0]}* *$")
        while position < len(lines) and not closing.match(lines[position]):
            position += 1
        if opening["language"].lower() in {"python", "py", "python3"}:
            directive = DIRECTIVE.fullmatch(before)
            kind, value = (directive["kind"], directive["value"]) if directive else ("", "")
            blocks.append(
                Block(
                    line=start + 1,
                    code=textwrap.dedent("\n".join(lines[start:position])),
                    reason=value if kind == "not run" else "",
                    hosts=tuple(re.split(r"[ ,]+", value)) if kind == "host" else (),
                )
            )
        before = ""
        position += 1
    return blocks


def code_cases() -> list[object]:
    """One test case a block, marked with the hosts that it needs."""
    return [
        pytest.param(
            page,
            block,
            id=f"{page.name} line {block.line}",
            marks=[pytest.mark.host(*block.hosts)] if block.hosts else [],
        )
        for page in PAGES
        for block in python_blocks(page.read_text(encoding="utf-8"))
    ]


def test_the_readme_shows_both_commands() -> None:
    text = README.read_text(encoding="utf-8")
    assert MAIN_JOB in text
    assert TEST_COMMAND in text
    assert python_blocks(text), "the README shows no Python code"


def test_ci_runs_the_readmes_test_command() -> None:
    script = ROOT / ".ci" / "run"
    assert TEST_COMMAND in script.read_text(encoding="utf-8").splitlines()
    assert os.access(script, os.X_OK)


def test_the_readme_is_short() -> None:
    assert len(README.read_text(encoding="utf-8").splitlines()) <= 150


def test_links_lead_to_files() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


@pytest.mark.parametrize(("page", "block"), code_cases())
def test_code_runs(page: Path, block: Block, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if block.reason:
        pytest.skip(block.reason)
    monkeypatch.chdir(tmp_path)
    code = "\n" * (block.line - 1) + block.code  # so that a traceback shows the page's line
    exec(compile(code, str(page), "exec"), {"__name__": "__main__"})


def test_blocks_are_found_with_their_directives() -> None:
    text = textwrap.dedent(
        """\
        Text.

        ```python
        a = 1
        ```
        ```bash
        ls
        ```

        <!-- not run: needs a GPU -->

        ```python
        b = 2
        ```
        - in a list:
          <!-- host: nni, onnxruntime -->
          ~~~~ py
          if True:
              c = 3
          ~~~~
        ````python
        d = '''
        ```
        '''
        ````
        """
    )
    assert python_blocks(text) == [
        Block(4, "a = 1", "", ()),
        Block(13, "b = 2", "needs a GPU", ()),
        Block(18, "if True:\n    c = 3", "", ("nni", "onnxruntime")),
        Block(22, "d = '''\n```\n'''", "", ()),
    ]
