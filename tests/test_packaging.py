"""The wheel carries what it must, runs from an empty folder, and needs neither torch, Ray nor matplotlib."""

from __future__ import annotations

import configparser
import email
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
HOUSE = ("distsim", "trainers", "analysis", "cluster_configs")
HEAVY = ("torch", "ray", "matplotlib")
CLUSTERS = sorted(path.stem for path in (ROOT / "cluster_configs").glob("*.yaml"))

# Imports every module of distsim found at argv[1], and fails at the first that brings a heavy package along.
IMPORT_ALL = f"""
import importlib, pkgutil, sys
sys.path[:0] = sys.argv[1:]
import distsim
names = ["distsim", *(found.name for found in pkgutil.walk_packages(distsim.__path__, "distsim."))]
for name in names:
    if not name.endswith("__main__"):
        importlib.import_module(name)
        heavy = sorted(set({HEAVY!r}) & set(sys.modules))
        assert not heavy, f"importing {{name}} imported {{heavy}}"
print(distsim.__file__)
print(*names)
"""

# Runs `distsim clusters` from the wheel unpacked at argv[1], where heavy packages cannot be imported at all.
CLUSTERS_WITHOUT_HEAVY = f"""
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {HEAVY!r}:
            raise ModuleNotFoundError(f"{{name}} is blocked in this test", name=name)
sys.meta_path.insert(0, Blocker())
sys.path.insert(0, sys.argv.pop(1))
import distsim.cli
print(distsim.cli.__file__)
sys.argv[:] = ["distsim", "clusters"]
sys.exit(distsim.cli.main())
"""


def run(*command: str | Path, cwd: Path) -> str:
    """Run a command in `cwd` without our Python settings and return its stdout; show all if it fails."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    done = subprocess.run(
        command, cwd=cwd, env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{command} ended with {done.returncode}:\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the sdist from a copy of the sources, and the wheel from nothing but that sdist."""
    work = tmp_path_factory.mktemp("build")
    source = work / "source"
    for house in HOUSE:
        shutil.copytree(ROOT / house, source / house, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    build = "import sys; from setuptools import build_meta; build_meta.build_sdist(sys.argv[1])"
    run(sys.executable, "-c", build, work / "sdist", cwd=source)
    (sdist,) = (work / "sdist").glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        archive.extractall(work / "unpacked", filter="data")
    (unpacked,) = (work / "unpacked").iterdir()
    shutil.rmtree(source)
    pip = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index"]
    run(*pip, "--wheel-dir", work / "wheel", ".", cwd=unpacked)
    (built,) = (work / "wheel").glob("*.whl")
    return built


@pytest.fixture(scope="module")
def unpacked_wheel(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel's files in a folder of their own, as pip would lay them out."""
    folder = tmp_path_factory.mktemp("site")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


def metadata_file(unpacked_wheel: Path, name: str) -> Path:
    """Return one of the files in the wheel's .dist-info folder."""
    (folder,) = unpacked_wheel.glob("distsim-*.dist-info")
    return folder / name


def test_wheel_holds_the_whole_house_and_nothing_else(unpacked_wheel: Path) -> None:
    expected = {
        path.relative_to(ROOT).as_posix()
        for house in HOUSE
        for pattern in ("*.py", "*.yaml", "py.typed")
        for path in (ROOT / house).rglob(pattern)
    }
    shipped = {
        path.relative_to(unpacked_wheel).as_posix()
        for path in unpacked_wheel.rglob("*")
        if path.is_file() and not path.relative_to(unpacked_wheel).parts[0].endswith(".dist-info")
    }
    assert shipped == expected
    assert {"distsim/py.typed", "trainers/py.typed", "analysis/py.typed"} <= shipped
    assert CLUSTERS, "no cluster configuration is shipped"
    assert {f"cluster_configs/{name}.yaml" for name in CLUSTERS} <= shipped


def test_wheel_offers_the_command_and_the_licence(unpacked_wheel: Path) -> None:
    entry_points = configparser.ConfigParser()
    entry_points.read(metadata_file(unpacked_wheel, "entry_points.txt"), "utf-8")
    assert entry_points["console_scripts"]["distsim"] == "distsim.cli:main"
    licence = metadata_file(unpacked_wheel, "licenses/LICENSE").read_text("utf-8")
    assert licence == (ROOT / "LICENSE").read_text("utf-8")


def test_wheel_asks_for_torch_ray_and_matplotlib_only_in_extras(unpacked_wheel: Path) -> None:
    described = email.message_from_string(metadata_file(unpacked_wheel, "METADATA").read_text("utf-8"))
    assert described["Requires-Python"] == ">=3.11"
    required = described.get_all("Requires-Dist", [])
    always = [line for line in required if "extra ==" not in line]
    assert any(line.startswith("numpy") for line in always)
    assert not [line for line in always if line.startswith(HEAVY)]
    for package, extra in (("torch", "train"), ("ray", "train"), ("matplotlib", "plot")):
        assert [line for line in required if line.startswith(package) and f'extra == "{extra}"' in line]


def test_importing_distsim_imports_nothing_heavy(tmp_path: Path) -> None:
    names = run(sys.executable, "-c", IMPORT_ALL, ROOT, cwd=tmp_path).splitlines()[-1].split()
    assert {"distsim", "distsim.cli", "distsim.engine", "distsim.exchanges.ring"} <= set(names)


def test_unpacked_wheel_runs_from_an_empty_folder(unpacked_wheel: Path, tmp_path: Path) -> None:
    where, _ = run(sys.executable, "-c", IMPORT_ALL, unpacked_wheel, cwd=tmp_path).splitlines()
    assert Path(where).is_relative_to(unpacked_wheel)
    said = run(sys.executable, "-c", CLUSTERS_WITHOUT_HEAVY, unpacked_wheel, cwd=tmp_path)
    where, *listed = said.splitlines()
    assert Path(where).is_relative_to(unpacked_wheel)
    assert [name for name in CLUSTERS if name not in "\n".join(listed)] == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_wheel_installs_alone_and_runs_from_an_empty_folder(wheel: Path, tmp_path: Path) -> None:
    venv, empty = tmp_path / "venv", tmp_path / "empty"
    empty.mkdir()
    run(sys.executable, "-m", "venv", venv, cwd=tmp_path)
    python = venv / "bin" / "python"
    run(python, "-m", "pip", "install", wheel, "--constraint", ROOT / "constraints.txt", cwd=tmp_path)
    listed = run(venv / "bin" / "distsim", "clusters", cwd=empty)
    assert [name for name in CLUSTERS if name not in listed] == []
    find = "import sys; from importlib.util import find_spec as f; print([n for n in sys.argv[1:] if f(n)])"
    assert run(python, "-c", find, *HEAVY, cwd=empty).strip() == "[]"
    assert list(empty.iterdir()) == []
