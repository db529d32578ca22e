"""Loops that are interpreted for small work and compiled for large: one result, and who decides."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from distsim import cluster as clusters
from distsim import compiled, engine, exchanges
from distsim.compiled import COMPILE_FROM, call
from distsim.lower import Posting
from distsim.network import Sharing
from distsim.step import Simulation, simulate


class Columns(NamedTuple):
    """Two columns, as a loop is given them."""

    left: Any
    right: Any


def add_up(columns: Any, factor: float, out: Any) -> Any:
    """Return left + factor * right, and the greatest of them."""
    greatest = -np.inf
    for i in range(len(out)):
        out[i] = _combined(columns.left[i], columns.right[i], factor)
        greatest = max(greatest, out[i])
    return out, greatest


def _combined(left: Any, right: Any, factor: float) -> Any:
    return left + factor * right


def kind_of(column: Any) -> Any:
    """Return whether a loop was given a list."""
    return isinstance(column, list)


ONE = Columns(np.array([1.0, 2.0, 0.1]), np.array([10, 20, 30]))


@pytest.mark.parametrize("compile_it", [False, True])
def test_both_ways_give_the_same_values(compile_it: bool) -> None:
    out, greatest = call(add_up, 3, ONE, 0.5, np.zeros(3), compiled=compile_it)
    assert isinstance(out, np.ndarray) == compile_it
    assert np.asarray(out).tolist() == [6.0, 12.0, 15.1]
    assert greatest == 15.1


def test_helpers_of_the_same_module_are_compiled_along_and_stay_as_they_are() -> None:
    call(add_up, 3, ONE, 0.5, np.zeros(3), compiled=True)
    assert type(_combined).__name__ == type(add_up).__name__ == "function"
    assert add_up(Columns([1], [2]), 3, [0]) == ([7], 7)


@pytest.mark.parametrize(("work", "compile_it"), [(COMPILE_FROM - 1, False), (COMPILE_FROM, True)])
def test_the_size_decides(work: int, compile_it: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def noted(loop: Any) -> Any:
        asked.append(loop)
        return loop

    monkeypatch.setattr(compiled, "_compile", noted)
    assert call(kind_of, work, np.zeros(2)) == (not compile_it)
    assert asked == [kind_of] * compile_it


def test_an_interpreted_loop_leaves_the_callers_arrays_alone() -> None:
    out = np.zeros(3)
    call(add_up, 3, ONE, 0.5, out)
    assert out.tolist() == [0, 0, 0]


def test_without_a_folder_to_write_to_it_compiles_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    import numba

    njit, tried = numba.njit, []

    def no_folder(function: Any = None, *, cache: bool = False) -> Any:
        tried.append(cache)
        if cache:
            raise RuntimeError("cannot cache function: no locator available for file")
        return njit(function)

    def cached(*, cache: bool) -> Any:
        return lambda function: no_folder(function, cache=cache)

    monkeypatch.setattr(numba, "njit", lambda function=None, **more: cached(**more) if more else no_folder(function))
    compiled._compile.cache_clear()
    try:
        out, _ = call(add_up, 3, ONE, 0.5, np.zeros(3), compiled=True)
    finally:
        compiled._compile.cache_clear()
    assert out.tolist() == [6.0, 12.0, 15.1]
    assert tried == [True, False, True, False]  # the helper, then the loop


def test_nothing_small_loads_the_compiler() -> None:
    """Not the command line's help, and not a small simulation with all that it checks and prints."""
    code = """
import contextlib, io, sys
from distsim import exchanges
from distsim.cli import main
from distsim.cluster import ideal, load
from distsim.step import simulate
for posting in ("eager", "rounds"):
    for sharing in ("fair", "fifo"):
        assert simulate(exchanges.build("ring", 8, 10**6), ideal(8), sharing=sharing, posting=posting).time_s > 0
assert simulate(exchanges.build("parameter-server", 7, 10**6), load("dgx_h100")).time_s > 0
with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):
    main(["exchange", "ring", "--ranks", "8"])
assert "numba" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)


SIMULATED: list[tuple[str, str, str, Sharing, Posting]] = [
    ("ring", "all-reduce", "h100_2x8_ndr", "fair", "eager"),
    ("parameter-server:servers=2", "all-reduce", "h100_2x8_ndr", "fair", "rounds"),
    ("halving-doubling", "all-reduce", "laptop_loopback", "fifo", "rounds"),
    ("pairwise", "personalised-all-to-all", "dgx1_v100", "fair", "eager"),
]


@pytest.mark.parametrize(("strategy", "collective", "where", "sharing", "posting"), SIMULATED)
def test_a_whole_simulation_gives_the_same_bytes(
    strategy: str, collective: str, where: str, sharing: Sharing, posting: Posting, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every loop of it: routes, tables, proof, waits, graph, events, counts."""

    def simulated(limit: int) -> Simulation:
        for module in (compiled, engine):
            monkeypatch.setattr(module, "COMPILE_FROM", limit)
        exchange = exchanges.build(strategy, 6, 1001, collective)
        return simulate(exchange, clusters.load(where), sharing=sharing, posting=posting)

    one, other = simulated(10**9), simulated(0)
    assert one.timeline.start_s.tobytes() == other.timeline.start_s.tobytes()
    assert one.timeline.finish_s.tobytes() == other.timeline.finish_s.tobytes()
    assert one.traffic.links() == other.traffic.links()
    assert one.latency_bound_s == other.latency_bound_s
    assert one.link_load_s.tolist() == other.link_load_s.tolist()
    assert one.exchange.digest() == other.exchange.digest()


def test_only_one_module_imports_the_compiler() -> None:
    house = Path(compiled.__file__).parent
    importers = [path.name for path in house.rglob("*.py") if "import numba" in path.read_text("utf-8")]
    assert importers == ["compiled.py"]
