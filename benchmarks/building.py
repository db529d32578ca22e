"""Building a schedule must not take longer than simulating it: every strategy, at a large size."""

from __future__ import annotations

from statistics import median
from typing import Any

from benchmarks import cases
from benchmarks.report import Table, against, table_of, timed
from distsim import engine, exchanges
from distsim.check import check
from distsim.collectives import PERSONALISED, find
from distsim.lower import lower

LINEAR = frozenset({"chain", "double-tree", "parameter-server", "recursive-doubling", "tree"})
"""Strategies with n, or n log n, rows for n workers; most have n^2."""
COLLECTIVES = ("all-reduce", "broadcast", PERSONALISED)
"""Between them they have every builder; reduce-scatter, all-gather and reduce are halves of these."""


def measure(runs: int, quick: bool = False) -> list[Table]:
    """Measure every strategy at a large size."""
    rows = [
        _row(collective, strategy, 8 if quick else large(collective, strategy), runs)
        for collective in COLLECTIVES
        for strategy in exchanges.ALGORITHMS[collective]
    ]
    included = (
        "Medians. build: exchanges.build; simulate: what comes after it, that is check, lower (dependencies, routes, "
        "graph) and run (the engine). One switch, equal links, shared fairly. Wanted: build <= simulate."
    )
    return [table_of("Building against simulating", included, rows)]


def large(collective: str, strategy: str) -> int:
    """Return for how many workers a strategy is measured: the most that can be built, or about 2 million rows.

    A ring of the largest size, with 33.5 million, is in full_ring.py.
    """
    most = find(collective).max_workers
    return most or (exchanges.MAX_WORKERS if strategy in LINEAR else 1024)


def _row(collective: str, strategy: str, workers: int, runs: int) -> dict[str, Any]:
    seconds: dict[str, list[float]] = {}
    for _ in range(runs + 1):
        exchange = timed(seconds, "build", exchanges.build, strategy, workers, cases.PARAMS, collective)
        timed(seconds, "check", check, exchange)
        cluster = cases.switch(exchange.ranks)
        lowered = timed(seconds, "lower", lower, exchange, cluster, cases.ITEMSIZE)
        timed(seconds, "run", engine.run, lowered.graph)
    parts = {f"{part}_s": median(each[1:]) for part, each in seconds.items()}  # the first is the warm-up
    simulate_s = sum(median(seconds[part][1:]) for part in ("check", "lower", "run"))
    return {
        "strategy": strategy if collective == "all-reduce" else f"{strategy} ({collective})",
        "workers": workers,
        "rows": cases.rows(exchange),
        **parts,
        "ratio_simulate_to_build": simulate_s / parts["build_s"],
        "reached": against(1.0, simulate_s / parts["build_s"]),
        "warm-up_s": sum(each[0] for each in seconds.values()),
    }
