"""A room imports only from rooms on lower floors, no files import each other in a circle, a library has its rooms."""

import ast
import graphlib
import re
import sys
from pathlib import Path

FLOORS = """errors __version__
models units selection labels files environment
statistics evaluation
compensation
backends
synapses
switcher
criteria adapters.onnxruntime+onnx+onnxruntime+psutil
subnets adapters.torch_pruning+torch_pruning
adapters.nni+nni adapters.nni_engine+nni+psutil
jobs+matplotlib+pydantic+sklearn+yaml
cli+typer+rich""".splitlines()  # the lowest first; every room with the libraries that it may import beside these:
BASE = {"numpy", "safetensors", "torch", "tqdm", *sys.stdlib_module_names}
LIBRARIES = {entry.split("+")[0]: {*entry.split("+")[1:]} | BASE for floor in FLOORS for entry in floor.split()}
HEIGHT = {entry.split("+")[0]: height for height, floor in enumerate(FLOORS) for entry in floor.split()}
ROOT = Path(__file__).parents[2]
GLOBS = ("nns_plugin/[!_]*.py", "nns_plugin/*/**/*.py", "adapters/*/**/*.py")
SOURCES = {".".join(path.relative_to(ROOT).parts): path.read_text() for glob in GLOBS for path in ROOT.glob(glob)}
SOURCES = {re.sub(r"^nns_plugin\.|(\.__init__)?\.py$", "", name): source for name, source in SOURCES.items()}


def faults(sources: dict[str, str]) -> list[str]:
    found, graph = [], {name: set() for name in sources}
    for name, node in ((name, node) for name, text in sources.items() for node in ast.walk(ast.parse(text))):
        names = [alias.name for alias in node.names] if isinstance(node, (ast.Import, ast.ImportFrom)) else []
        parent = f"{'.' * node.level}{node.module or ''}." if isinstance(node, ast.ImportFrom) else ""
        for top, _, target in ((parent + each).partition(".") for each in names):
            graph[name] |= {file for file in (target, target.rpartition(".")[0]) if file in sources and file != name}
            here, there = (next((r for r in HEIGHT if f"{m}.".startswith(f"{r}.")), "none") for m in (name, target))
            down = here == there or HEIGHT.get(there, 99) < HEIGHT.get(here, -1)
            if not (down if top == "nns_plugin" else top in LIBRARIES.get(here, ())):
                found.append(f"{name}:{node.lineno} ({here}) imports {top}.{target}")
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        found.append(f"a circle of files: {' <- '.join(error.args[1])}")
    return found


UP = {"units": "def f():\n    import nns_plugin.models.a, yaml", "models.a": "from .errors import A", "x": "import re"}
CIRCLE = {
    "cli.a": "import nns_plugin.cli.b",
    "cli.b": "from nns_plugin.cli import c",
    "cli.c": "import nns_plugin.cli.a",
}


def test_imports_go_down() -> None:
    assert not (found := faults(SOURCES)), "\n".join(found)
    assert (len(faults(UP)), len(faults(CIRCLE))) == (4, 1)
