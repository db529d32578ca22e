"""A ring of 4,096 ranks in full, 33.5 million transfers, in a process of its own that is measured from outside."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import time
from typing import Any

from benchmarks.report import Table, spread, table_of, timed
from distsim.allocator import keep_freed_memory
from distsim.errors import DistsimError
from distsim.units import format_bytes

WANTED_S = 10.0
WANTED_BYTES = 5_000_000_000


def measure(runs: int, quick: bool = False) -> list[Table]:
    """Start the process `runs` times; before, once with a ring that is just large enough to compile everything."""
    ranks = 16 if quick else 4096
    warm = start(16 if quick else 160)
    found = [start(ranks) for _ in range(runs)]
    peak_bytes = max(each["peak_bytes"] for each in found)
    seconds = {"all": [each["all_s"] for each in found]}
    for part in found[0]["parts"]:
        seconds[part] = [each["parts"][part] for each in found]
    seconds["the interpreter's start and end"] = [each["all_s"] - sum(each["parts"].values()) for each in found]
    seconds["(warm-up: a small ring)"] = [warm["all_s"]]
    rows: list[dict[str, Any]] = [
        {"part": part, **spread("time", each, "_s"), "peak_bytes": None, "wanted": None, "reached": None}
        for part, each in seconds.items()
    ]
    reached = rows[0]["time_s"] <= WANTED_S and peak_bytes <= WANTED_BYTES
    wanted = f"{WANTED_S:g} s, {format_bytes(WANTED_BYTES)}"
    rows[0].update(peak_bytes=peak_bytes, wanted=wanted, reached="yes" if reached else "NO")
    title = f"A full ring: {ranks:,} ranks, {found[0]['transfers']:,} transfers"
    included = (
        "Everything that simulating it in full takes, bounds included, from before Python starts until it has ended; "
        "no symmetry, links shared fairly. `distsim exchange` counts peak staging besides. peak: most resident memory "
        "as the kernel counts it, the worst of all runs."
    )
    return [table_of(title, included, rows)]


def start(ranks: int) -> dict[str, Any]:
    """Run `child` in a new process; return what it printed with its wall time and peak memory from outside.

    Linux counts a parent's memory at the start as the child's peak, too: run this before what takes much memory.
    """
    begin = time.perf_counter()
    command = [sys.executable, "-m", "benchmarks.full_ring", str(ranks)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        printed = process.stdout.read()
        _, status, usage = os.wait4(process.pid, 0)  # the same numbers as getrusage, of this child alone
        process.returncode = os.waitstatus_to_exitcode(status)
    all_s = time.perf_counter() - begin
    if process.returncode != 0:
        raise DistsimError(f"{' '.join(command)} ended with {process.returncode}; see above")
    unit = 1 if sys.platform == "darwin" else 1024
    result: dict[str, Any] = json.loads(printed)
    return {**result, "all_s": all_s, "peak_bytes": usage.ru_maxrss * unit}


def child(ranks: int) -> dict[str, Any]:
    """Do what `distsim.step.simulate` does, in full, and return the seconds of each part.

    Exchange and cluster are those of `cases`; the makespan must be that of the closed form.
    """
    parts: dict[str, list[float]] = {}
    timed(parts, "import", importlib.import_module, "distsim.step")
    keep_freed_memory()  # as the command line does
    from benchmarks import cases
    from distsim import bounds, chain, engine
    from distsim.check import check
    from distsim.dependencies import dependencies
    from distsim.lower import lower

    cluster = timed(parts, "cluster", cases.switch, ranks)
    exchange = timed(parts, "build", cases.ring, ranks)
    plans = [timed(parts, "dependencies", dependencies, exchange.gradients)]
    timed(parts, "check", lambda: check(exchange, plans=plans))
    lowered = timed(parts, "lower", lambda: lower(exchange, cluster, cases.ITEMSIZE, plans=plans))
    least_s = timed(parts, "bound: chain of latencies", chain.longest_chain_s, lowered.graph)
    makespan_s = timed(parts, "run", engine.run, lowered.graph).makespan_s
    traffic = timed(parts, "traffic", exchange.traffic, cases.ITEMSIZE)
    load_s = timed(parts, "bound: busiest link", bounds.link_load_s, traffic, cluster)
    any_s = timed(parts, "bound: any algorithm", bounds.any_algorithm_s, exchange, cases.ITEMSIZE, cluster)
    steps = 2 * (ranks - 1)
    closed_s = steps * (
        cluster.latency_s.sum() / ranks + cases.PARAMS * cases.ITEMSIZE / ranks / cluster.bandwidth_Bps[0]
    )
    assert max(least_s, load_s.max(), any_s) <= makespan_s * (1 + 1e-9)
    assert cases.PARAMS % ranks or abs(makespan_s - closed_s) <= 1e-9 * closed_s, (makespan_s, closed_s)
    return {
        "transfers": cases.rows(exchange),
        "makespan_s": makespan_s,
        "parts": {part: each[0] for part, each in parts.items()},
    }


if __name__ == "__main__":
    print(json.dumps(child(int(sys.argv[1]))))
