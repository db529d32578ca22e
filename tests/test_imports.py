"""The import rules of the house, read from the source: imports run downward, and heavy packages stay out.

Every import statement counts, wherever it stands in a file: at the top, in a function, under `TYPE_CHECKING`;
so does `importlib.import_module("name")` with a literal name.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

import networkx as nx
import pytest

ROOT = Path(__file__).resolve().parent.parent
HOUSE = ("distsim", "trainers", "analysis", "benchmarks", "cluster_configs")

# distsim's modules and subpackages, lowest layer first; a module imports from its own layer and lower ones.
LAYERS: tuple[frozenset[str], ...] = (
    frozenset({"units", "errors", "files", "compiled", "allocator", "places", "version", "tables"}),
    frozenset({"yamlfile", "topologies", "routing", "validation", "clusterfile", "overrides", "cluster"})
    | frozenset({"collectives", "schedule", "dependencies", "messages", "traffic"}),
    frozenset({"check", "bounds", "exchanges", "formulas", "loop", "taskgraph", "engine", "chain"}),
    frozenset({"network", "symmetry", "lower", "failure", "step"}),
    frozenset({"critical", "trace", "record", "diff"}),
    frozenset({"api", "sweeps", "journal", "executors", "memory"}),
    frozenset({"commands", "cli", "__main__", "__init__"}),
)
# What each package may import besides itself and the standard library.
ALLOWED: dict[str, frozenset[str]] = {
    "distsim": frozenset(
        {"networkx", "numba", "numpy", "pyarrow", "pydantic", "pydantic_core", "tabulate", "tqdm", "yaml"}
    ),
    "trainers": frozenset({"distsim", "numpy", "pydantic", "ray", "tabulate", "torch", "tqdm", "yaml"}),
    "analysis": frozenset({"distsim", "matplotlib", "numpy", "tabulate"}),
    "benchmarks": frozenset(
        {"checkpoint_schedules", "distsim", "numpy", "safetensors", "scipy", "simpy", "torch", "trainers"}
    ),
    "cluster_configs": frozenset(),
}
RAY_FILES = "trainers/ray_*.py"  # the parameter server's home; the other strategies need no Ray
ANALYSIS_READS = frozenset({"distsim.record", "distsim.units", "distsim.errors"})


def dotted(path: Path, root: Path) -> str:
    """Return the import name of a source file; a package is named by its folder."""
    parts = list(path.relative_to(root).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported(path: Path, root: Path, names: frozenset[str]) -> Iterator[tuple[int, str]]:
    """Yield (line, module) for every import in a file; `from a import b` is `a.b` where `names` has it."""
    here = dotted(path, root).split(".")
    package = here if path.name == "__init__.py" else here[:-1]
    for node in ast.walk(ast.parse(path.read_text("utf-8"), str(path))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            origin = ".".join([*base, *([node.module] if node.module else [])])
            for alias in node.names:
                inner = f"{origin}.{alias.name}"
                yield node.lineno, inner if inner in names else origin
        elif isinstance(node, ast.Call) and node.args:
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            first = node.args[0]
            literal = isinstance(first, ast.Constant) and isinstance(first.value, str)
            if called in ("import_module", "__import__") and literal:
                assert isinstance(first, ast.Constant)
                yield node.lineno, str(first.value)


def layer_of(module: str) -> int | None:
    """Return the layer of a distsim module (`distsim.exchanges.ring` has that of `exchanges`), or None."""
    room = [*module.split("."), "__init__"][1]
    return next((level for level, rooms in enumerate(LAYERS) if room in rooms), None)


def breaks(file: str, module: str, target: str) -> str | None:
    """Return which rule `module`, in `file`, breaks by importing `target`, or None."""
    house, top = module.split(".")[0], target.split(".")[0]
    if top == house == "distsim":
        mine, theirs = layer_of(module), layer_of(target)
        if mine is not None and theirs is not None and theirs > mine:
            return f"{target} is in a higher layer"
        return None
    if house == "cluster_configs":
        return "cluster_configs holds data and imports nothing"
    if top == house or top in sys.stdlib_module_names:
        return None
    if top not in ALLOWED[house]:
        return f"{house} never imports {top}"
    if top == "ray" and not fnmatch(file, RAY_FILES):
        return f"only {RAY_FILES} import ray"
    if house == "analysis" and top == "distsim" and ".".join(target.split(".")[:2]) not in ANALYSIS_READS:
        return f"of distsim, analysis imports only {', '.join(sorted(ANALYSIS_READS))}"
    return None


def violations(root: Path) -> list[str]:
    """Return every broken import rule in the house under `root`, one line each."""
    files = {dotted(path, root): path for house in HOUSE for path in sorted((root / house).rglob("*.py"))}
    names = frozenset(files)
    found = [
        f"{path.relative_to(root)}: {module} is in no layer; give it one in LAYERS of tests/test_imports.py"
        for module, path in files.items()
        if module.split(".")[0] == "distsim" and layer_of(module) is None
    ]
    graph: nx.DiGraph[str] = nx.DiGraph()
    for module, path in files.items():
        file = path.relative_to(root).as_posix()
        for line, target in imported(path, root, names):
            if broken := breaks(file, module, target):
                found.append(f"{file}:{line}: {module} imports {target}: {broken}")
            while target and target not in names:
                target = target.rpartition(".")[0]
            if target:
                graph.add_edge(module, target)
    for cycle in nx.strongly_connected_components(graph):
        if len(cycle) > 1 or any(graph.has_edge(name, name) for name in cycle):
            found.append(f"import cycle: {' <-> '.join(sorted(cycle))}")
    return found


def test_house_keeps_its_import_rules() -> None:
    broken = violations(ROOT)
    assert not broken, "\n" + "\n".join(broken)


def test_every_room_in_the_table_exists() -> None:
    house = ROOT / "distsim"
    rooms = frozenset[str]().union(*LAYERS) - {"__main__"}
    missing = {room for room in rooms if not (house / f"{room}.py").is_file() and not (house / room).is_dir()}
    assert not missing, f"LAYERS names modules that do not exist: {sorted(missing)}"


CLEAN = {
    "distsim/__init__.py": "from distsim.engine import run\n",
    "distsim/units.py": "import math\n",
    "distsim/errors.py": "",
    "distsim/schedule.py": "import numpy as np\nfrom .errors import Wrong\nfrom distsim import units\n",
    "distsim/engine.py": "def compiled():\n    import numba\n",
    "distsim/exchanges/__init__.py": "from distsim.exchanges import ring\n",
    "distsim/exchanges/ring.py": "from ..schedule import Schedule\n",
    "distsim/record.py": "import json, os.path\n",
    "distsim/cli.py": "from distsim import engine, record\nimport importlib\nimportlib.import_module(name)\n",
    "trainers/__init__.py": "",
    "trainers/loop.py": "import torch.distributed as dist\nfrom distsim import cli\nfrom . import exchange\n",
    "trainers/exchange.py": "import tqdm\n",
    "trainers/ray_server.py": "import ray\n",
    "analysis/__init__.py": "",
    "analysis/plot.py": "import matplotlib.pyplot as plt\nfrom distsim import record, units\n",
    "cluster_configs/__init__.py": '"""Data."""\n',
}


def write_house(root: Path, **extra: str) -> None:
    """Write the clean house, with the text of some files replaced or added."""
    for name, text in {**CLEAN, **extra}.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, "utf-8")


def test_a_clean_house_has_no_violations(tmp_path: Path) -> None:
    write_house(tmp_path)
    assert violations(tmp_path) == []


@pytest.mark.parametrize(
    ("file", "text", "expected"),
    [
        ("distsim/units.py", "from distsim.schedule import Schedule\n", "higher layer"),
        ("distsim/units.py", "from . import schedule\n", "higher layer"),
        ("distsim/engine.py", "from distsim import run\n", "higher layer"),
        ("distsim/engine.py", "import distsim.record\n", "higher layer"),
        ("distsim/exchanges/ring.py", "from ..cli import main\n", "higher layer"),
        ("distsim/schedule.py", "if TYPE_CHECKING:\n    import distsim.cli\n", "higher layer"),
        ("distsim/engine.py", "def late():\n    import torch\n", "distsim never imports torch"),
        ("distsim/cli.py", "from ray import tune\n", "distsim never imports ray"),
        ("distsim/cli.py", "import matplotlib.pyplot as plt\n", "distsim never imports matplotlib"),
        ("distsim/cli.py", "import importlib\nimportlib.import_module('torch.nn')\n", "never imports torch"),
        ("distsim/cli.py", "__import__('trainers')\n", "distsim never imports trainers"),
        ("distsim/cli.py", "def late():\n    from analysis import plot\n", "distsim never imports analysis"),
        ("distsim/cli.py", "import cluster_configs\n", "distsim never imports cluster_configs"),
        ("distsim/cli.py", "import scipy\n", "distsim never imports scipy"),
        ("distsim/novelty.py", "", "is in no layer"),
        ("distsim/exchanges/ring.py", "from distsim.exchanges import NAMES\n", "import cycle"),
        ("distsim/units.py", "import distsim.errors\n", "import cycle"),
        ("trainers/loop.py", "import analysis.plot\n", "trainers never imports analysis"),
        ("trainers/loop.py", "def late():\n    import ray\n", "only trainers/ray_*.py import ray"),
        ("trainers/exchange.py", "from trainers import loop\n", "import cycle"),
        ("analysis/plot.py", "from distsim import engine\n", "of distsim, analysis imports only"),
        ("analysis/plot.py", "import distsim\n", "of distsim, analysis imports only"),
        ("analysis/plot.py", "import trainers.loop\n", "analysis never imports trainers"),
        ("analysis/plot.py", "import torch\n", "analysis never imports torch"),
        ("benchmarks/peers.py", "import ray\n", "benchmarks never imports ray"),
        ("distsim/cli.py", "import benchmarks\n", "distsim never imports benchmarks"),
        ("cluster_configs/__init__.py", "import os\n", "imports nothing"),
    ],
)
def test_planted_violations_are_caught(tmp_path: Path, file: str, text: str, expected: str) -> None:
    write_house(tmp_path, **{"distsim/errors.py": "from distsim import units\n", file: text})
    found = violations(tmp_path)
    module = dotted(Path(file), Path())
    assert any(expected in line and (file in line or module in line) for line in found), found
