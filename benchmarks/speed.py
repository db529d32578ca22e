"""How many transfers the engine runs in a second."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from benchmarks import cases
from benchmarks.report import Table, against, in_turns, spread, table_of
from distsim import engine
from distsim.cluster import Cluster
from distsim.lower import Posting, lower
from distsim.network import Sharing
from distsim.schedule import Exchange


class Case(NamedTuple):
    """One row of the table."""

    what: str
    exchange: Exchange
    cluster: Cluster
    sharing: Sharing
    posting: Posting = "eager"
    compiled: bool | None = None
    """As the engine's: None leaves it to the size."""
    wanted_per_s: float | None = None


def measure(runs: int, quick: bool = False) -> list[Table]:
    """Measure the engine alone: rings, all-to-all in shifted rounds, and all-to-all with every message at once."""
    included = (
        "The engine alone (engine.run), without building, checking and lowering, and without symmetry. Unequal: each "
        "link has a bandwidth of its own. Loop: by default the engine interprets small graphs and compiles large "
        "ones; compiled: also the small ones. The first run, the warm-up, is not counted."
    )
    few, many = (16, 16) if quick else (256, 1024)
    sizes = (8, 16) if quick else (64, 128, 256)
    rows = [_row(case, runs) for case in (*_rings(many), *_rounds(few, many))]
    crowded = [_row(case, runs) for ranks in sizes for case in _at_once(ranks, both=ranks == sizes[0])]
    return [
        table_of("Speed of the engine", included, rows),
        table_of("Speed of the engine, every message at once, shared fairly", included, crowded),
    ]


def _rings(ranks: int) -> list[Case]:
    exchange, cluster = cases.ring(ranks), cases.ring_of_links(ranks)
    name = f"ring, {ranks:,} ranks"
    return [
        Case(name, exchange, cluster, "fifo", wanted_per_s=10e6),
        Case(name, exchange, cluster, "fair", wanted_per_s=5e6),
        Case(f"{name}, unequal", exchange, cases.unequal(cluster), "fifo"),
        Case(f"{name}, unequal", exchange, cases.unequal(cluster), "fair"),
    ]


def _rounds(*sizes: int) -> list[Case]:
    return [
        Case(
            f"all-to-all in rounds, {ranks:,} ranks, unequal",
            cases.shifts(ranks),
            cases.unequal(cases.switch(ranks)),
            "fair",
            posting="rounds",
            wanted_per_s=4e6,
        )
        for ranks in sizes
    ]


def _at_once(ranks: int, both: bool) -> list[Case]:
    """Return the cases of one size, compiled; with `both`, also with the loop that the engine takes by default."""
    exchange = cases.all_at_once(ranks)
    makers: tuple[tuple[str, Callable[[int], Cluster]], ...] = (
        ("switch", cases.switch),
        ("fat tree 4:1", cases.fat_tree),
    )
    found = []
    for name, make in makers:
        for suffix, cluster in (("", make(ranks)), (", unequal", cases.unequal(make(ranks)))):
            for compiled in (True, None) if both else (True,):
                found.append(Case(f"{ranks} ranks, {name}{suffix}", exchange, cluster, "fair", compiled=compiled))
    return found


def _row(case: Case, runs: int) -> dict[str, Any]:
    graph = lower(case.exchange, case.cluster, cases.ITEMSIZE, sharing=case.sharing, posting=case.posting).graph
    sides = {"engine": lambda: engine.run(graph, compiled=case.compiled).makespan_s}
    seconds, first_s, _ = in_turns(sides, runs)
    count = cases.rows(case.exchange)
    rates = spread("rate", [count / each for each in seconds["engine"]], "_per_s")
    return {
        "exchange": case.what,
        "sharing": case.sharing,
        "loop": "compiled" if case.compiled else "default",
        "transfers": count,
        **rates,
        "wanted_per_s": case.wanted_per_s,
        "reached": against(case.wanted_per_s, rates["rate_per_s"]) if case.wanted_per_s else None,
        "warm-up_s": first_s["engine"],
    }
