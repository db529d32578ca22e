"""Planning memory: whole fronts, an integer programme, 200 layers, persistent plans and checkpoint_schedules.

No side is faster for planning something worse: what the plans take is compared as well, and every plan is replayed.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any, Literal

import numpy as np

from benchmarks.report import Table, against, in_turns, table_of, timed
from distsim.errors import ConfigError, DistsimError
from distsim.memory import disk_revolve, exact, fast, overlapped, persistent, revolve
from distsim.memory.chain import Chain
from distsim.memory.plan import InfeasibleBudget, MemoryPlan, Point
from distsim.memory.replay import Overlap, replay
from distsim.memory.simple import store_all

Model = Literal["recompute", "saved", "offload"]
WANTED_S = 2.0
"""How long the command may take for 200 layers."""
UNEQUAL: tuple[Model, Model] = ("recompute", "saved")
"""Models of tables in which nothing is offloaded."""
PARTS = (0.0, 0.01, 0.05, 0.2, 0.5)
"""Budgets of 200 layers: how far from the least that a persistent plan can have to what keeping everything needs."""
LIMIT_S = 40.0
"""Given to the integer programme for one plan."""
COSTS = (1.0, 2.0, 5.0, 2.0)
"""Of equal steps: an advance, a reversal, a write to disk, a read."""


def measure(runs: int, quick: bool = False) -> list[Table]:
    """Measure all planners beside others; fronts, the integer programme and 200 layers once, the rest `runs` times."""
    for package in ("scipy", "checkpoint_schedules"):
        if find_spec(package) is None:
            raise ConfigError(
                f"the benchmark `memory-planning` needs {package}; install it with `pip install 'distsim[dev]'`"
            )
    return [
        _fronts(4 if quick else 12, 1 if quick else 2),
        beside_programme((3, 4) if quick else (8, 12, 16, 20, 24), 4 if quick else 12, runs),
        _long(8 if quick else 200, PARTS[::4] if quick else PARTS),
        _small(5 if quick else 8, 3 if quick else 20),
        beside_library(quick, runs),
    ]


def random_chain(layers: int, model: Model, seed: int) -> Chain:
    """Make a chain of unequal layers, in whole numbers; `offload` copies one unit of size in one of time."""
    random = np.random.default_rng(seed)
    forward, backward = (random.integers(1, most, layers).astype(float) for most in (31, 61))
    size = random.integers(1, 21, layers + 1).astype(float)
    saved = np.maximum(random.integers(5, 41, layers).astype(float), size[1:]) if model == "saved" else None
    copies = size[1:] if model == "offload" else None
    return Chain(forward=forward, backward=backward, size=size, saved=saved, write=copies, read=copies)


def _time(chain: Chain, plan: MemoryPlan, budget: float, overlap: Overlap = "none") -> float:
    return replay(chain, plan, budget, overlap).time


def _between(chain: Chain, part: float) -> float:
    """Return a budget from the least that a persistent plan can have to what keeping everything needs."""
    try:
        persistent.optimal(chain, 0.0)
    except InfeasibleBudget as error:
        least = error.least
    most = replay(chain, store_all(chain)).peak_memory
    return math.floor(least + part * (most - least))


# --- whole fronts ------------------------------------------------------------------------------------------------


def _fronts(layers: int, chains: int) -> Table:
    """Plan whole fronts to the optimum, in each model."""
    models: list[tuple[str, Model, Overlap]] = [
        ("recompute", "recompute", "none"),
        ("recompute, saved intermediates", "saved", "none"),
        ("recompute and offload, no overlap", "offload", "none"),
        ("recompute and offload, two engines", "offload", "half"),
        ("recompute and offload, three engines", "offload", "full"),
    ]
    rows = []
    for name, model, overlap in models:
        seconds: dict[str, list[float]] = {}
        points = 0
        for seed in range(chains):
            chain = random_chain(layers, model, seed)
            if not seed:
                timed(seconds, "warm-up", _planned, chain, _between(chain, 0.3), overlap)
            front = timed(seconds, "front", _front, chain, overlap)
            points += len(front)
            for budget, time, plan in front:
                assert math.isclose(_time(chain, plan, budget, overlap), time, rel_tol=1e-12)
            for point in {front[0].budget, front[len(front) // 2].budget}:
                timed(seconds, "plan", _planned, chain, point, overlap)
        rows.append(
            {
                "model": name,
                "chains": chains,
                "points": points,
                "front_s": median(seconds["front"]),
                "front_most_s": max(seconds["front"]),
                "per_point_s": sum(seconds["front"]) / points,
                "one_plan_s": median(seconds["plan"]),
                "one_plan_most_s": max(seconds["plan"]),
                "warm-up_s": seconds["warm-up"][0],
            }
        )
    included = (
        "Random chains. front: all points of time against budget, each with its plan; one plan: for one budget alone, "
        "the least and the middle one of each front. Before, one plan is made uncounted, the warm-up, which compiles."
    )
    return table_of(f"Optimal plans of {layers} layers", included, rows)


def _front(chain: Chain, overlap: Overlap) -> list[Point]:
    return exact.front(chain) if overlap == "none" else overlapped.front(chain, overlap)


def _planned(chain: Chain, budget: float, overlap: Overlap) -> MemoryPlan:
    return exact.optimal(chain, budget) if overlap == "none" else overlapped.optimal(chain, budget, overlap)


# --- beside an integer programme ---------------------------------------------------------------------------------


def beside_programme(lengths: tuple[int, ...], exact_up_to: int, runs: int) -> Table:
    """Plan the same chains and budgets by the integer programme and by ours."""
    rows = []
    for layers in lengths:
        chain = random_chain(layers, "recompute", 0)
        for part in (0.1, 0.4):
            rows.append(_against_programme(chain, _between(chain, part), layers <= exact_up_to, runs))
    included = (
        "An integer programme in the style of Checkmate, once each, solved by HiGHS to the optimum or for "
        f"{LIMIT_S:g} s (then not proven), against our planners, medians of runs. Last: the times that were found, in "
        "units of the chain. One stage of the programme runs a layer once, so exact may be below it, never above."
    )
    return table_of("Planners beside an integer programme", included, rows)


def _against_programme(chain: Chain, budget: float, exactly: bool, runs: int) -> dict[str, Any]:
    from benchmarks.checkmate import checkmate

    seconds: dict[str, list[float]] = {}
    found = timed(seconds, "milp", lambda: checkmate(chain, budget, time_limit_s=LIMIT_S))
    (milp_s,) = seconds["milp"]
    sides = {"fast": lambda: _time(chain, fast.plan(chain, budget), budget)}
    if exactly:
        sides["exact"] = lambda: _time(chain, exact.optimal(chain, budget), budget)
    turns = in_turns(sides, runs)
    ours = {name: median(each) for name, each in turns.seconds.items()}
    optimum = turns.result.get("exact")
    if optimum is not None:
        assert found is None or optimum <= found + 1e-6, f"{optimum} is not the optimum: {found} is less"
        assert optimum <= turns.result["fast"], turns.result
    return {
        "layers": chain.layers,
        "budget": budget,
        "milp_s": milp_s,
        "exact_s": ours.get("exact"),
        "fast_s": ours["fast"],
        "ratio_milp_to_exact": milp_s / ours["exact"] if exactly else None,
        "ratio_milp_to_fast": milp_s / ours["fast"],
        "milp": None if found is None else _whole(found),
        "proven": "yes" if milp_s < LIMIT_S else "NO",
        "exact": None if optimum is None else _whole(optimum),
        "fast": _whole(turns.result["fast"]),
    }


def _whole(time: float) -> int:
    """Return what must be a whole number, and what a solver gives to a few digits, as one."""
    assert abs(time - round(time)) < 1e-3, time
    return round(time)


# --- hundreds of layers ------------------------------------------------------------------------------------------


def _long(layers: int, parts: tuple[float, ...]) -> Table:
    """Plan long chains by the command and within this process, beside the best persistent plan."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for model in UNEQUAL:
            chain = random_chain(layers, model, 0)
            file = Path(folder, f"{model}.json")
            file.write_text(chain.to_json(), "utf-8")
            command(file, _between(chain, parts[-1]))  # compiles what has not been
            fast.plan(chain, _between(chain, parts[-1]))
            for part in parts:
                budget = _between(chain, part)
                seconds: dict[str, list[float]] = {}
                printed = timed(seconds, "command", command, file, budget)
                plan = timed(seconds, "fast", fast.plan, chain, budget)
                other = timed(seconds, "persistent", persistent.optimal, chain, budget)
                time, slower = _time(chain, plan, budget), _time(chain, other, budget)
                assert time == printed["time"] and time <= slower, (time, printed["time"], slower)
                rows.append(
                    {
                        "model": model,
                        "budget": budget,
                        **{f"{name}_s": each[0] for name, each in seconds.items()},
                        "reached": against(-WANTED_S, -seconds["command"][0]),
                        "over_keeping_all_percent": _percent(time, chain.plain_time),
                        "persistent_over_fast_percent": _percent(slower, time),
                        "gap_percent": round(100 * printed["gap"], 2),
                    }
                )
    included = (
        "command: all of `distsim memory CHAIN.json --policy fast --budget B --json`, Python's start and the lower "
        "bound included, compiled code from Numba's cache; fast, persistent: the planners alone. Once each, after one "
        "uncounted. gap: by how much at most the plan is above the optimum, proven. Wanted: a command under "
        f"{WANTED_S:g} s."
    )
    return table_of(f"Plans of {layers} layers", included, rows)


def command(file: Path, budget: float) -> dict[str, Any]:
    """Plan in a process of its own and return what it prints; DistsimError if that fails."""
    shell = [sys.executable, "-m", "distsim.cli", "memory", str(file), "--policy", "fast", "--budget", str(budget)]
    done = subprocess.run([*shell, "--json"], capture_output=True, text=True)
    if done.returncode:
        raise DistsimError(f"{' '.join(shell)} ended with {done.returncode}: {done.stderr.strip()}")
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def _percent(time: float, base: float) -> float:
    return round(100 * (time / base - 1), 2)


# --- where persistent plans are not optimal ----------------------------------------------------------------------


def _small(layers: int, chains: int) -> Table:
    """Count how often the fast planner finds the optimum that persistent plans miss."""
    rows = []
    for model in UNEQUAL:
        budgets = infeasible = 0
        over: list[tuple[float, float]] = []  # of budgets where persistent plans are off: theirs, and fast ones'
        for seed in range(chains):
            chain = random_chain(layers, model, seed)
            for budget, optimum, _ in exact.front(chain):
                budgets += 1
                try:
                    slower = _time(chain, persistent.optimal(chain, budget), budget)
                except InfeasibleBudget:
                    infeasible += 1
                    continue
                if slower >= 1.03 * optimum:
                    time = _time(chain, fast.plan(chain, budget), budget)
                    assert optimum <= time <= slower, (model, seed, budget, optimum, time, slower)
                    over.append((slower / optimum, time / optimum))
        rows.append(
            {
                "model": model,
                "chains": chains,
                "budgets": budgets,
                "infeasible": infeasible,
                "at_least_3_percent_off": len(over),
                "fast_is_better": sum(ours < theirs for theirs, ours in over),
                "fast_is_optimal": sum(ours == 1 for _, ours in over),
                "persistent_most_off_percent": _percent(max((theirs for theirs, _ in over), default=1.0), 1.0),
                "fast_most_off_percent": _percent(max((ours for _, ours in over), default=1.0), 1.0),
            }
        )
    included = (
        "All budgets of the exact fronts of random chains; infeasible: no persistent plan fits into the budget. "
        "The figures after that are of the budgets at which the best persistent plan is 3 % above the optimum or more."
    )
    return table_of(f"Fast plans of {layers} layers where persistent ones are off", included, rows)


# --- equal steps beside checkpoint_schedules ---------------------------------------------------------------------


def beside_library(quick: bool, runs: int) -> Table:
    """Plan equal steps with slots in memory and on disk, by ours and by checkpoint_schedules."""
    import checkpoint_schedules as library  # type: ignore[import-untyped]

    memory_alone = ((10, 2), (12, 3)) if quick else ((50, 5), (200, 8), (500, 10))
    with_disk = ((10, 2, 2),) if quick else ((30, 2, 4), (100, 3, 6), (300, 4, 10))
    costs = dict(zip(("uf", "ub", "wd", "rd"), COSTS, strict=True))
    rows = []
    for steps, memory in memory_alone:
        ours = partial(revolve.slots, steps, memory)
        for theirs in (
            partial(library.Revolve, steps, memory),
            partial(library.MultistageCheckpointSchedule, steps, memory, 0),
        ):
            rows.append(_schedules(ours, theirs, (steps, memory, 0), runs))
    for steps, memory, disk in with_disk:
        ours = partial(disk_revolve.disk_slots, steps, memory, disk, *COSTS)
        for theirs in (
            partial(library.HRevolve, steps, memory, disk, **costs),
            partial(library.MultistageCheckpointSchedule, steps, memory, disk),
        ):
            rows.append(_schedules(ours, theirs, (steps, memory, disk), runs))
        ours = partial(disk_revolve.disk_slots, steps, memory, None, *COSTS)
        for theirs in (
            partial(library.DiskRevolve, steps, memory, **costs),
            partial(library.PeriodicDiskRevolve, steps, memory, **costs),
        ):
            rows.append(_schedules(ours, theirs, (steps, memory, None), runs))
    included = (
        "Equal steps with slots in memory and on disk. cost: of all actions: advances (1 each), reversals (2), writes "
        "to disk (5), reads (2). Times: until all actions are listed. Ratios: the library to ours."
    )
    return table_of("Slots beside checkpoint_schedules", included, rows)


def _schedules(
    ours: Callable[[], revolve.SlotPlan], theirs: partial[Any], problem: tuple[int, int, int | None], runs: int
) -> dict[str, Any]:
    steps, memory, disk = problem
    name = theirs.func.__name__
    sides = {"ours": lambda: ours().cost(*COSTS), "library": lambda: _cost_of_library(theirs, steps)}
    turns = in_turns(sides, runs)
    cost = turns.result
    assert cost["ours"] <= cost["library"], f"{name} of {problem}: {cost}"
    seconds = {side: median(each) for side, each in turns.seconds.items()}
    return {
        "schedule": name,
        "steps": steps,
        "memory_slots": memory,
        "disk_slots": "any" if disk is None else str(disk),
        "cost": _whole(cost["ours"]),
        "cost_of_library": _whole(cost["library"]),
        "ratio_cost": cost["library"] / cost["ours"],
        "ours_s": seconds["ours"],
        "library_s": seconds["library"],
        "ratio_time": seconds["library"] / seconds["ours"],
    }


def _cost_of_library(schedule: Callable[[], Any], steps: int) -> float:
    """Return what the actions of one of the library's schedules cost; its forwards include those that are recorded."""
    import checkpoint_schedules as library

    disk = library.StorageType.DISK
    advance, reverse, write, read = COSTS
    cost = steps * (reverse - advance)
    with contextlib.redirect_stdout(io.StringIO()):  # PeriodicDiskRevolve prints its period
        for action in schedule():
            if isinstance(action, library.Forward):
                cost += advance * (action.n1 - action.n0)
                cost += write * (action.write_ics and action.storage == disk)
            elif isinstance(action, library.Copy | library.Move):
                cost += read * (action.from_storage == disk)
    return float(cost)
