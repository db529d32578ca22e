"""`distsim sweep`: a grid of clusters, strategies, rank counts and sizes, into one table."""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distsim.commands import options
from distsim.errors import ConfigError

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from distsim.executors import Executor


def add(commands: Any) -> None:
    """Add the command."""
    parser = options.command(commands, "sweep", run, "simulate a grid on all cores; resumes where it was interrupted")
    clusters = "shipped names or YAML files, with commas (default: ideal, one ideal switch)"
    parser.add_argument("--clusters", metavar="LIST", default="ideal", help=clusters)
    strategies = f"with commas, of: auto, {options.strategies()}"
    parser.add_argument("--strategies", metavar="LIST", required=True, help=strategies)
    parser.add_argument("--ranks", metavar="LIST", required=True, help="rank counts, with commas: 2,4,8")
    parser.add_argument("--sizes", metavar="SIZES", required=True, help=options.SIZES)
    options.array(parser)
    out = "the table, a .csv or .parquet file; finished points are kept beside it in FILE.journal"
    parser.add_argument("--out", metavar="FILE", type=Path, required=True, help=out)
    parser.add_argument("--jobs", metavar="N", type=int, help="processes (default: one for each core)")
    ray = "run on this Ray cluster: HOST:PORT, auto, or local, which starts one for the time of the sweep"
    parser.add_argument("--ray", metavar="ADDRESS", help=ray)


def run(flags: argparse.Namespace) -> int:
    """Simulate what is missing of the grid; write the table; print what was done."""
    from distsim import executors, sweeps
    from distsim.units import format_time, parse_sizes

    if flags.jobs is not None and flags.ray is not None:
        raise ConfigError("expected --jobs or --ray, not both: Ray runs as many points as its cluster has cores")
    if flags.jobs is not None and flags.jobs < 1:
        raise ConfigError(f"--jobs must be at least 1, not {flags.jobs}")
    points = sweeps.grid(
        clusters=sweeps.names(flags.clusters),
        strategies=sweeps.names(flags.strategies),
        ranks=[_count(text) for text in flags.ranks.split(",")],
        sizes_bytes=parse_sizes(flags.sizes),
        dtype=flags.dtype,
        collective=flags.collective,
        sharing=flags.sharing,
        posting=flags.posting,
    )

    def start(missing: int) -> AbstractContextManager[Executor]:
        if flags.ray is not None:
            return executors.plugged_in("ray", flags.ray)
        return executors.processes(min(missing, flags.jobs or executors.cores()))

    began_s = time.monotonic()
    try:
        outcome = sweeps.complete(points, flags.out, start)
    except KeyboardInterrupt:
        kept = sweeps.journal_of(flags.out)
        print(f"\ndistsim: interrupted; {kept} keeps what is finished: the same command resumes", file=sys.stderr)
        raise
    errors = outcome.errors()
    counts = {"points": len(points), "simulated": len(points) - outcome.reused, "reused": outcome.reused}
    if flags.json:
        print(json.dumps({"out": str(flags.out), **counts, "errors": len(errors)}, indent=1))
    else:
        took = format_time(time.monotonic() - began_s)
        print(f"{flags.out}: {', '.join(f'{count:,} {name}' for name, count in counts.items())}, in {took}")
        if errors:
            print(f"{len(errors):,} do not fit, for example: {errors[0]}")
    if len(errors) == len(points):
        raise ConfigError("no point of the grid can be simulated; the column `error` says why")
    return 0


def _count(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise ConfigError(f"--ranks: {text!r} is no whole number; expected a list such as 2,4,8") from None
