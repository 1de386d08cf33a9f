"""No import goes up a floor, the core knows no host, an adapter knows only its own; read from the sources.

Every import counts: at the head of a file, inside a function, under ``TYPE_CHECKING`` or by ``import_module``.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]

# Lowest floor first. A package stands for all its modules; a module that no floor names is a failure.
FLOORS: tuple[frozenset[str], ...] = (
    frozenset({"nns_plugin.errors", "nns_plugin.fingerprint", "nns_plugin.forward", "nns_plugin.preserve"}),
    frozenset(
        {
            "nns_plugin.angles",
            "nns_plugin.batch_norm",
            "nns_plugin.channel_plans",
            "nns_plugin.circle",
            "nns_plugin.comparison",
            "nns_plugin.compensation",
            "nns_plugin.consumers",
            "nns_plugin.environment",
            "nns_plugin.group_mixing",
            "nns_plugin.heads",
            "nns_plugin.intervals",
            "nns_plugin.observe",
            "nns_plugin.operations",
            "nns_plugin.producers",
            "nns_plugin.reduction",
            "nns_plugin.refit",
            "nns_plugin.refitting",
            "nns_plugin.selection",
            "nns_plugin.sensitivity",
            "nns_plugin.selected",
            "nns_plugin.snapshot",
            "nns_plugin.statistics",
            "nns_plugin.statistics_file",
            "nns_plugin.surgery",
            "nns_plugin.survivors",
            "nns_plugin.taps",
            "nns_plugin.ties",
            "nns_plugin.training_state",
            "nns_plugin.unit_synapses",
            "nns_plugin.units",
        }
    ),
    frozenset(
        {
            "nns_plugin.compaction",
            "nns_plugin.criteria",
            "nns_plugin.cutting",
            "nns_plugin.input_selection",
            "nns_plugin.integration",
            "nns_plugin.minimal",
            "nns_plugin.paths",
            "nns_plugin.subnet",
            "nns_plugin.subnet_file",
            "nns_plugin.scales",
            "nns_plugin.switched_weights",
            "nns_plugin.switcher_network",
            "nns_plugin.switches",
            "nns_plugin.switching",
            "nns_plugin.switching_turns",
            "nns_plugin.synapses",
            "nns_plugin.unreached",
        }
    ),
    frozenset({"nns_plugin"}),  # what users of the core import; only this one file
    frozenset({"nns_plugin.adapters"}),
    frozenset({"nns_plugin.jobs"}),
    frozenset({"nns_plugin.cli"}),
)
PACKAGES = frozenset({"nns_plugin.criteria", "nns_plugin.adapters", "nns_plugin.jobs", "nns_plugin.cli"})
ADAPTERS = "nns_plugin.adapters"

# Import names of what a floor may use besides the standard library.
BASE = frozenset({"numpy", "safetensors", "torch", "tqdm"})
JOBS = BASE | {"matplotlib", "pydantic", "sklearn", "yaml"}
CLI = JOBS | {"rich", "typer"}
HOSTS: dict[str, frozenset[str]] = {
    ADAPTERS: frozenset(),
    f"{ADAPTERS}.angle_pruning": frozenset(),
    f"{ADAPTERS}.by_name": frozenset(),
    f"{ADAPTERS}.compensated": frozenset({"torch_pruning"}),
    f"{ADAPTERS}.dependency_graph": frozenset({"torch_pruning"}),
    f"{ADAPTERS}.followed_snapshot": frozenset({"torch_pruning"}),
    f"{ADAPTERS}.pruning_history": frozenset({"torch_pruning"}),
    f"{ADAPTERS}.reading_check": frozenset(),
    f"{ADAPTERS}.removals": frozenset({"torch_pruning"}),
    f"{ADAPTERS}.surgery": frozenset(),
    f"{ADAPTERS}.torch_pruning": frozenset({"torch_pruning"}),
    f"{ADAPTERS}.group_tracing": frozenset({"torch_pruning"}),
    f"{ADAPTERS}.nni": frozenset({"nni"}),
    f"{ADAPTERS}.nni_criterion": frozenset({"nni"}),
    f"{ADAPTERS}.nni_experiment": frozenset({"nni"}),
    f"{ADAPTERS}.nni_global": frozenset({"nni"}),
    f"{ADAPTERS}.nni_guard": frozenset({"psutil"}),
    f"{ADAPTERS}.nni_trial": frozenset({"nni"}),
    f"{ADAPTERS}.nni_groups": frozenset({"nni"}),
    f"{ADAPTERS}.nni_pruners": frozenset({"nni"}),
    f"{ADAPTERS}.masked_removal": frozenset(),
    f"{ADAPTERS}.nni_speedup": frozenset({"nni"}),
    f"{ADAPTERS}.nni_surgery": frozenset({"nni"}),
    f"{ADAPTERS}.nni_wrapped": frozenset({"nni"}),
    f"{ADAPTERS}.unit_masks": frozenset(),
    f"{ADAPTERS}.evaluation": frozenset({"sklearn"}),
    f"{ADAPTERS}.onnxruntime": frozenset(),
    f"{ADAPTERS}.onnx_accuracy": frozenset(),
    f"{ADAPTERS}.onnx_answers": frozenset(),
    f"{ADAPTERS}.onnx_compare": frozenset(),
    f"{ADAPTERS}.onnx_export": frozenset(),
    f"{ADAPTERS}.onnx_feeds": frozenset(),
    f"{ADAPTERS}.onnx_file": frozenset({"onnx"}),
    f"{ADAPTERS}.onnx_gate": frozenset(),
    f"{ADAPTERS}.onnx_latency": frozenset(),
    f"{ADAPTERS}.onnx_layers": frozenset({"onnx"}),
    f"{ADAPTERS}.onnx_memory": frozenset({"onnxruntime", "psutil"}),
    f"{ADAPTERS}.onnx_parity": frozenset(),
    f"{ADAPTERS}.onnx_profile": frozenset(),
    f"{ADAPTERS}.onnx_rounding": frozenset({"onnx"}),
    f"{ADAPTERS}.onnx_session": frozenset({"onnx", "onnxruntime"}),
    f"{ADAPTERS}.output_errors": frozenset(),
}


def onnx_modules(*names: str) -> frozenset[str]:
    """Import names of modules for ONNX."""
    return frozenset(f"{ADAPTERS}.onnx_{name}" for name in names)


# The only adapters that may use other ones, and which.
USES: dict[str, frozenset[str]] = {
    f"{ADAPTERS}.angle_pruning": frozenset(
        {f"{ADAPTERS}.compensated", f"{ADAPTERS}.dependency_graph", f"{ADAPTERS}.removals"}
    ),
    f"{ADAPTERS}.compensated": frozenset({f"{ADAPTERS}.removals"}),
    f"{ADAPTERS}.dependency_graph": frozenset({f"{ADAPTERS}.group_tracing", f"{ADAPTERS}.reading_check"}),
    f"{ADAPTERS}.pruning_history": frozenset({f"{ADAPTERS}.dependency_graph"}),
    f"{ADAPTERS}.removals": frozenset({f"{ADAPTERS}.dependency_graph"}),
    f"{ADAPTERS}.surgery": frozenset(
        {f"{ADAPTERS}.compensated", f"{ADAPTERS}.dependency_graph", f"{ADAPTERS}.removals"}
    ),
    f"{ADAPTERS}.torch_pruning": frozenset(
        {
            f"{ADAPTERS}.by_name",
            f"{ADAPTERS}.compensated",
            f"{ADAPTERS}.dependency_graph",
            f"{ADAPTERS}.followed_snapshot",
            f"{ADAPTERS}.pruning_history",
        }
    ),
    f"{ADAPTERS}.nni": frozenset(
        {
            f"{ADAPTERS}.by_name",
            f"{ADAPTERS}.masked_removal",
            f"{ADAPTERS}.nni_criterion",
            f"{ADAPTERS}.nni_groups",
            f"{ADAPTERS}.nni_pruners",
            f"{ADAPTERS}.nni_speedup",
            f"{ADAPTERS}.nni_surgery",
        }
    ),
    f"{ADAPTERS}.nni_criterion": frozenset(
        {
            f"{ADAPTERS}.dependency_graph",
            f"{ADAPTERS}.nni_global",
            f"{ADAPTERS}.nni_wrapped",
            f"{ADAPTERS}.unit_masks",
        }
    ),
    f"{ADAPTERS}.masked_removal": frozenset({f"{ADAPTERS}.dependency_graph", f"{ADAPTERS}.unit_masks"}),
    f"{ADAPTERS}.nni_speedup": frozenset(
        {f"{ADAPTERS}.masked_removal", f"{ADAPTERS}.nni_wrapped", f"{ADAPTERS}.surgery", f"{ADAPTERS}.unit_masks"}
    ),
    f"{ADAPTERS}.nni_surgery": frozenset(
        {
            f"{ADAPTERS}.masked_removal",
            f"{ADAPTERS}.nni_criterion",
            f"{ADAPTERS}.nni_groups",
            f"{ADAPTERS}.nni_speedup",
            f"{ADAPTERS}.surgery",
            f"{ADAPTERS}.unit_masks",
        }
    ),
    f"{ADAPTERS}.nni_groups": frozenset(
        {f"{ADAPTERS}.dependency_graph", f"{ADAPTERS}.nni_wrapped", f"{ADAPTERS}.unit_masks"}
    ),
    f"{ADAPTERS}.nni_pruners": frozenset({f"{ADAPTERS}.nni_criterion", f"{ADAPTERS}.nni_wrapped"}),
    f"{ADAPTERS}.onnx_accuracy": onnx_modules("answers") | {f"{ADAPTERS}.evaluation"},
    f"{ADAPTERS}.onnx_answers": onnx_modules("feeds", "file", "session") | {f"{ADAPTERS}.output_errors"},
    f"{ADAPTERS}.onnx_compare": onnx_modules(
        "accuracy", "answers", "export", "feeds", "file", "latency", "layers", "memory", "parity", "profile", "session"
    )
    | {f"{ADAPTERS}.output_errors"},
    f"{ADAPTERS}.onnx_export": onnx_modules("file", "session"),
    f"{ADAPTERS}.onnx_feeds": onnx_modules("file"),
    f"{ADAPTERS}.onnx_gate": onnx_modules("accuracy", "compare", "latency") | {f"{ADAPTERS}.output_errors"},
    f"{ADAPTERS}.onnx_latency": onnx_modules("feeds", "file", "session"),
    f"{ADAPTERS}.onnx_parity": onnx_modules("session") | {f"{ADAPTERS}.output_errors"},
    f"{ADAPTERS}.onnx_profile": onnx_modules("feeds", "layers", "session"),
    f"{ADAPTERS}.onnx_rounding": onnx_modules("compare", "feeds", "latency", "layers"),
    f"{ADAPTERS}.onnxruntime": onnx_modules(
        "accuracy",
        "answers",
        "compare",
        "export",
        "feeds",
        "file",
        "gate",
        "latency",
        "layers",
        "memory",
        "parity",
        "profile",
        "rounding",
        "session",
    )
    | {f"{ADAPTERS}.output_errors"},
}

FOREIGN = (
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


class Import(NamedTuple):
    """One imported module, and where."""

    line: int
    target: str


def read_sources() -> dict[str, str]:
    """The text of every module of the package, by its import name."""
    sources = {}
    for folder, package in ((ROOT / "nns_plugin", "nns_plugin"), (ROOT / "adapters", ADAPTERS)):
        for path in sorted(folder.rglob("*.py")):
            parts = path.relative_to(folder).with_suffix("").parts
            name = ".".join((package, *(part for part in parts if part != "__init__")))
            sources[name] = path.read_text(encoding="utf-8")
    return sources


def imports_of(source: str, modules: frozenset[str]) -> Iterator[Import]:
    """All imports of a source text; ``from package import module`` counts as an import of the module."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(node.lineno, alias.name)
        elif isinstance(node, ast.ImportFrom):
            parent = "." * node.level + (node.module or "")
            for alias in node.names:
                child = f"{parent}.{alias.name}"
                yield Import(node.lineno, child if child in modules else parent)
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            function = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            name = node.args[0].value
            if function in {"import_module", "__import__"} and isinstance(name, str):
                yield Import(node.lineno, name)


def package_of(module: str) -> str:
    """What stands for a module in :data:`FLOORS`: its package, or itself."""
    return next((package for package in PACKAGES if module == package or module.startswith(f"{package}.")), module)


def floor_of(module: str) -> int | None:
    """Height of a module, 0 at the bottom; None if no floor names it."""
    return next((height for height, floor in enumerate(FLOORS) if package_of(module) in floor), None)


def allowed_libraries(module: str) -> frozenset[str]:
    """Third-party import names that a module may use."""
    package = package_of(module)
    if package == ADAPTERS:
        return BASE | HOSTS.get(module, frozenset())
    return {"nns_plugin.jobs": JOBS, "nns_plugin.cli": CLI}.get(package, BASE)


def fault_of(module: str, target: str, modules: frozenset[str]) -> str | None:
    """What is wrong with ``module`` importing ``target``; None if nothing."""
    top = target.partition(".")[0]
    if not top:
        return f"imports {target} relatively; write the absolute name"
    if top != "nns_plugin":
        if top in sys.stdlib_module_names or top in allowed_libraries(module):
            return None
        return f"imports {target}, which only other floors may use, or none: {sorted(allowed_libraries(module))}"
    if target not in modules:
        return f"imports {target}, which does not exist"
    height, other = floor_of(module), floor_of(target)
    if height is None or other is None:
        return None  # reported once, at the module itself
    if other > height:
        return f"imports {target} from a higher floor"
    if package_of(module) == package_of(target) == ADAPTERS and target not in {ADAPTERS, *USES.get(module, ())}:
        return f"imports the adapter {target}, which USES does not allow it"
    return None


def faults(sources: Mapping[str, str]) -> list[str]:
    """All breaches of the floors in the given modules, one line each."""
    modules = frozenset(sources)
    found = [f"{module}: no floor names it, add it to FLOORS" for module in sources if floor_of(module) is None]
    found += [
        f"{module}: its host is not known, add it to HOSTS"
        for module in sources
        if package_of(module) == ADAPTERS and module not in HOSTS
    ]
    for module, source in sources.items():
        for line, target in imports_of(source, modules):
            if fault := fault_of(module, target, modules):
                found.append(f"{module}:{line}: {fault}")
    return found


def test_the_package_keeps_to_its_floors() -> None:
    sources = read_sources()
    assert {"nns_plugin", "nns_plugin.units", "nns_plugin.adapters"} <= sources.keys()
    found = faults(sources)
    assert not found, "\n".join(found)


# A tree that keeps to the floors; each case below adds one module to it, or replaces one.
SOUND = {
    "nns_plugin": "from nns_plugin.criteria import semantic\nimport nns_plugin.units\n",
    "nns_plugin.errors": "import warnings\n",
    "nns_plugin.units": "from __future__ import annotations\nimport torch.nn as nn\nfrom nns_plugin import errors\n",
    "nns_plugin.criteria": "from nns_plugin.criteria.semantic import Semantic\n",
    "nns_plugin.criteria.semantic": "import math, numpy as np\nfrom nns_plugin.units import Port\n",
    "nns_plugin.adapters": "",
    "nns_plugin.adapters.dependency_graph": "import torch_pruning as tp\nfrom nns_plugin import UnitGroup\n",
    "nns_plugin.adapters.nni": "import nni.compression\nfrom nns_plugin.adapters import nni_groups\n",
    "nns_plugin.adapters.nni_groups": "import nni.compression\nfrom nns_plugin.adapters import dependency_graph\n",
    "nns_plugin.adapters.onnx_session": "def export():\n    import onnx, onnxruntime\n",
    "nns_plugin.adapters.onnxruntime": "from nns_plugin.adapters.onnx_session import export\n",
    "nns_plugin.jobs.budget": "import sklearn, yaml\nfrom nns_plugin.adapters.nni import Pruner\n",
    "nns_plugin.cli": "import rich, typer\nfrom nns_plugin.jobs.budget import search\n",
}


def test_sound_imports_are_no_faults() -> None:
    assert faults(SOUND) == []


@pytest.mark.parametrize(
    ("module", "source", "fault"),
    [
        ("nns_plugin.units", "from nns_plugin.criteria import semantic", "higher floor"),
        ("nns_plugin.units", "from nns_plugin.criteria.semantic import Semantic", "higher floor"),
        ("nns_plugin.units", "from nns_plugin import units, criteria", "nns_plugin.criteria from a higher floor"),
        ("nns_plugin.errors", "def f():\n    import nns_plugin.units", "nns_plugin.errors:2: imports nns_plugin.units"),
        ("nns_plugin.criteria.semantic", "import nns_plugin", "imports nns_plugin from a higher floor"),
        ("nns_plugin", "import nns_plugin.adapters.nni", "higher floor"),
        ("nns_plugin.adapters.nni", "from nns_plugin import cli", "higher floor"),
        ("nns_plugin.jobs.budget", "if TYPE_CHECKING:\n    from nns_plugin.cli import main", "higher floor"),
        ("nns_plugin.units", "from .errors import NNSError", "imports .errors relatively"),
        ("nns_plugin.units", "from . import errors", "imports . relatively"),
        ("nns_plugin.units", "importlib.import_module('.errors', 'nns_plugin')", "imports .errors relatively"),
        ("nns_plugin.units", "import torch_pruning", "imports torch_pruning"),
        ("nns_plugin.units", "def f():\n    from onnxruntime import InferenceSession", "imports onnxruntime"),
        ("nns_plugin.units", "importlib.import_module('nni.compression')", "imports nni.compression"),
        ("nns_plugin.criteria.semantic", "import typer", "imports typer"),
        ("nns_plugin.criteria.semantic", "from pydantic import BaseModel", "imports pydantic"),
        ("nns_plugin.units", "import torchvision", "imports torchvision"),
        ("nns_plugin.units", "import adapters.nni", "imports adapters.nni"),
        ("nns_plugin.units", "import nns_plugin.unit", "nns_plugin.unit, which does not exist"),
        ("nns_plugin.jobs.budget", "import onnxruntime", "imports onnxruntime"),
        ("nns_plugin.jobs.budget", "import typer", "imports typer"),
        ("nns_plugin.adapters", "import nni", "imports nni"),
        ("nns_plugin.adapters.nni", "import torch_pruning", "imports torch_pruning"),
        ("nns_plugin.adapters.nni", "from nns_plugin.adapters import onnxruntime", "which USES does not allow"),
        ("nns_plugin.adapters.onnxruntime", "import nns_plugin.adapters.dependency_graph", "which USES does not allow"),
        ("nns_plugin.adapters.tflite", "", "its host is not known"),
        ("nns_plugin.helpers", "", "no floor names it"),
        ("nns_plugin.units.more", "", "no floor names it"),
    ],
)
def test_a_breach_is_found(module: str, source: str, fault: str) -> None:
    found = faults({**SOUND, module: source})
    assert len(found) == 1
    assert found[0].startswith(module)
    assert fault in found[0]


def foreign_after(statements: str, folder: Path) -> list[str]:
    """Which foreign packages a fresh process has loaded after the given statements."""
    script = f"{statements}\nimport sys\nprint(*(name for name in {FOREIGN!r} if name in sys.modules))"
    run = subprocess.run([sys.executable, "-c", script], cwd=folder, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    return run.stdout.split()


def test_a_fresh_import_loads_no_host(tmp_path: Path) -> None:
    assert foreign_after("import nns_plugin", tmp_path) == []


def test_no_module_of_the_core_loads_a_host(tmp_path: Path) -> None:
    facade = floor_of("nns_plugin")
    assert facade is not None
    core = [name for name in read_sources() if (height := floor_of(name)) is not None and height <= facade]
    assert "nns_plugin.criteria" in core
    assert foreign_after("\n".join(f"import {name}" for name in core), tmp_path) == []


def test_a_loaded_foreign_package_is_seen(tmp_path: Path) -> None:
    (tmp_path / "yaml.py").touch()
    assert foreign_after(f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import yaml", tmp_path) == ["yaml"]
