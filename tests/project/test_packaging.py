"""What is installed is what the source tree has, under the right names, from pinned dependencies."""

from __future__ import annotations

import json
import os
import tomllib
from collections.abc import Iterator
from importlib.metadata import Distribution, distributions, version
from pathlib import Path, PurePosixPath

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
NAME = "nns-plugin"
# Where the source folders end up.
FOLDERS = {"nns_plugin": PurePosixPath("nns_plugin"), "adapters": PurePosixPath("nns_plugin", "adapters")}
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def source_files() -> set[PurePosixPath]:
    """Every file of the package in the source tree, under the path that it has once installed."""
    return {
        target / path.relative_to(ROOT / folder).as_posix()
        for folder, target in FOLDERS.items()
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts and not path.name.startswith(".")
    }


def is_wheel(distribution: Distribution) -> bool:
    """Whether a distribution was installed from a wheel that holds the package, not by reference to a tree."""
    origin = json.loads(distribution.read_text("direct_url.json") or "{}")
    return distribution.read_text("WHEEL") is not None and not origin.get("dir_info", {}).get("editable", False)


@pytest.fixture
def wheel() -> Distribution:
    """The installed wheel. Missing: a skip, or a failure where ``NNS_EXPECT_INSTALLED`` is 1."""
    installed = next((found for found in distributions(name=NAME) if is_wheel(found)), None)
    if installed is not None:
        return installed
    reason = f"{NAME} is not installed from a wheel here"
    if os.environ.get("NNS_EXPECT_INSTALLED") == "1":
        pytest.fail(f"{reason}, but NNS_EXPECT_INSTALLED=1 says that it must be")
    pytest.skip(f"{reason}; tox -e package checks it")


def installed_files(wheel: Distribution) -> set[PurePosixPath]:
    """The modules and data that a wheel put into site-packages: no metadata, scripts or byte code."""
    return {
        path
        for path in map(PurePosixPath, wheel.files or ())
        if not path.parts[0].endswith(".dist-info") and path.parts[0] != ".." and "__pycache__" not in path.parts
    }


def test_the_wheel_holds_every_source_file(wheel: Distribution) -> None:
    missing = source_files() - installed_files(wheel)
    assert not missing, "in the tree but not installed: is every package and data file listed in pyproject.toml?"


def test_the_wheel_holds_nothing_else(wheel: Distribution) -> None:
    extra = installed_files(wheel) - source_files()
    assert not extra, "installed but not in the tree: remove the folder build/, setuptools packs what is left in it"


def test_installed_files_equal_their_sources(wheel: Distribution) -> None:
    changed = [
        str(target)
        for folder, target in FOLDERS.items()
        for path in sorted((ROOT / folder).rglob("*.py"))
        if (copy := Path(str(wheel.locate_file(target / path.relative_to(ROOT / folder).as_posix())))).is_file()
        and copy.read_bytes() != path.read_bytes()
    ]
    assert changed == []


def test_no_global_module_is_called_adapters(wheel: Distribution) -> None:
    assert {path.parts[0] for path in installed_files(wheel)} == {"nns_plugin"}
    assert (wheel.read_text("top_level.txt") or "nns_plugin").split() == ["nns_plugin"]


def test_the_command_is_installed(wheel: Distribution) -> None:
    scripts = {entry.name: entry.value for entry in wheel.entry_points if entry.group == "console_scripts"}
    assert scripts == {"nns": "nns_plugin.cli:main"}


def test_the_package_registers_no_criterion_of_its_own(wheel: Distribution) -> None:
    assert [entry.name for entry in wheel.entry_points if entry.group == "nns_plugin.criteria"] == []


def test_the_imported_package_is_the_installed_one(wheel: Distribution) -> None:
    pytest.importorskip("torch", reason="the package needs torch; this environment only compares files")
    import nns_plugin

    assert nns_plugin.__version__ == version(NAME) == PROJECT["project"]["version"]
    assert nns_plugin.__file__ is not None
    assert Path(nns_plugin.__file__).resolve() == Path(str(wheel.locate_file("nns_plugin/__init__.py"))).resolve()


def test_every_package_of_the_tree_is_listed() -> None:
    folders = {path.parent for path in source_files() if path.suffix == ".py"}
    assert {".".join(folder.parts) for folder in folders} == set(PROJECT["tool"]["setuptools"]["packages"])


def test_nothing_in_the_tree_shadows_the_installed_package() -> None:
    assert not (ROOT / "conftest.py").exists()
    assert not list((ROOT / "tests").rglob("__init__.py"))


def direct_dependencies() -> Iterator[Requirement]:
    """What pyproject.toml asks for: base, extras and development tools, without references to the package itself."""
    project = PROJECT["project"]
    for lines in (project["dependencies"], *project["optional-dependencies"].values()):
        yield from (found for found in map(Requirement, lines) if canonicalize_name(found.name) != NAME)


def constraints() -> dict[str, Requirement]:
    """The lines of constraints.txt, by canonical name."""
    lines = (line.partition("#")[0].strip() for line in (ROOT / "constraints.txt").read_text("utf-8").splitlines())
    return {canonicalize_name(found.name): found for found in map(Requirement, filter(None, lines))}


@pytest.mark.parametrize("dependency", [*direct_dependencies()], ids=str)
def test_every_direct_dependency_is_pinned(dependency: Requirement) -> None:
    pin = constraints().get(canonicalize_name(dependency.name))
    assert pin is not None, f"constraints.txt does not pin {dependency.name}"
    (pinned,) = pin.specifier
    assert pinned.operator == "=="
    assert dependency.specifier.contains(pinned.version), f"{pin} is outside of what pyproject.toml allows"
