"""`python -m benchmarks`: run benchmarks and print tables."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict

from benchmarks import (
    building,
    full_ring,
    gpt2,
    links,
    memory_execution,
    memory_planning,
    offload,
    peers,
    report,
    speed,
    symmetric,
    training,
    transports,
)
from benchmarks.report import Table
from distsim.errors import DistsimError

BENCHMARKS: dict[str, Callable[[int, bool], list[Table]]] = {
    "full-ring": full_ring.measure,  # first: it measures memory, and a small parent leaves no trace in it
    "speed": speed.measure,
    "peers": peers.measure,
    "symmetry": symmetric.measure,
    "building": building.measure,
    "transports": transports.measure,
    "training": training.measure,
    "links": links.measure,
    "gpt2": gpt2.measure,
    "offload": offload.measure,
    "memory-planning": memory_planning.measure,
    "memory-execution": memory_execution.measure,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmarks that are named, by default all; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Measure distsim, beside others.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"which: {', '.join(BENCHMARKS)}; all by default")
    parser.add_argument("--runs", type=int, default=5, help="counted runs of each (default 5)")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: shows that it works, not how fast it is")
    parser.add_argument("--json", action="store_true", help="print JSON in SI units instead of tables")
    flags = parser.parse_args(argv)
    for name in flags.names:
        if name not in BENCHMARKS:
            parser.error(f"unknown benchmark {name!r}; expected some of: {', '.join(BENCHMARKS)}")
    if flags.runs < 1:
        parser.error(f"--runs must be at least 1, not {flags.runs}")
    machine = {**report.machine(), "core": report.one_core(), "runs": flags.runs}
    if not flags.json:
        print("\n".join(f"{name}: {value}" for name, value in machine.items()), flush=True)
    tables = []
    before, started = os.times(), time.perf_counter()
    try:
        for name in flags.names or BENCHMARKS:
            for table in BENCHMARKS[name](flags.runs, flags.quick):
                tables.append(table)
                if not flags.json:
                    print(f"\n{table}", flush=True)
    except DistsimError as error:
        print(f"benchmarks: error: {error}", file=sys.stderr)
        return 2
    worked_s = sum(os.times()[:4]) - sum(before[:4])  # user and system time, ours and the children's
    machine["core_ours"] = round(worked_s / (time.perf_counter() - started), 2)
    if flags.json:
        print(json.dumps({"machine": machine, "tables": [asdict(table) for table in tables]}, indent=1))
    else:
        print(f"\nThe core was ours for {machine['core_ours']:.0%} of the time.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
