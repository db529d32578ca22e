"""`distsim exchange`: one strategy, or the fastest, at one size or over a range of sizes."""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distsim.commands import options
from distsim.errors import ConfigError
from distsim.units import shown

if TYPE_CHECKING:
    from distsim.api import Result


def add(commands: Any) -> None:
    """Add the command."""
    parser = options.command(commands, "exchange", run, "simulate one strategy: counts, sizes, time, lower bounds")
    names = f"auto, which is the fastest at each size, or one of: {options.strategies()}"
    parser.add_argument("strategy", metavar="STRATEGY", nargs="?", help=names)
    parser.add_argument("--algorithm", metavar="STRATEGY", help="the same as STRATEGY without this flag")
    options.ranks(parser)
    size = parser.add_mutually_exclusive_group(required=True)
    size.add_argument("--params", type=int, metavar="P", help="elements of the array")
    size.add_argument("--sizes", metavar="SIZES", help=f"{options.SIZES}; prints the columns of nccl-tests")
    options.array(parser)
    options.whole(parser)
    options.cluster(parser)
    options.csv(parser)
    parser.add_argument("--record", metavar="FILE", help="write the run record, with every message, to this file")
    opens = "write a trace of every message, which ui.perfetto.dev opens, to this file; NAME.gz is compressed"
    parser.add_argument("--trace", metavar="FILE", help=opens)
    stops = "this rank stops before its transfers of this step: say who waits for it"
    parser.add_argument("--fail", metavar="RANK@STEP", help=stops)


def run(flags: argparse.Namespace) -> int:
    """Simulate; print a table of one exchange, or a row for each size."""
    from distsim import critical
    from distsim.files import write_whole
    from distsim.units import parse_sizes

    options.check_output(flags)
    if (flags.strategy is None) == (flags.algorithm is None):
        valid = f"auto, {options.strategies()}"
        raise ConfigError(f"expected one strategy, as STRATEGY or as --algorithm STRATEGY; valid: {valid}")
    flags.strategy = flags.strategy or flags.algorithm
    sizes = None if flags.sizes is None else parse_sizes(flags.sizes)
    for flag in ("record", "trace", "fail"):
        if getattr(flags, flag) is not None and sizes is not None and len(sizes) > 1:
            raise ConfigError(f"--{flag} takes one exchange, but --sizes has {len(sizes)}; give one size or --params")
    fail = _rank_and_step(flags.fail)
    flags.whole = flags.whole or not flags.record == flags.trace == flags.fail  # they want every message

    results: list[Result] = []
    csv_to_screen = flags.csv == "-"
    if csv_to_screen:
        print(_csv(None), end="", flush=True)
    for result in _results(flags, sizes):
        if fail is not None:
            _survive(result, *fail)
        if csv_to_screen:
            print(_csv(result), end="", flush=True)
        elif sizes is not None and not flags.json:
            if not results:
                print(_headers(result, flags.strategy), flush=True)
            print(_row(result, flags.strategy), flush=True)
        results.append(result)
    if flags.record is not None:
        from distsim import record

        record.write(record.from_simulation(results[0].simulation), Path(flags.record))
    if flags.trace is not None:
        _trace(results[0], Path(flags.trace))
    if flags.csv is not None and not csv_to_screen:
        write_whole(Path(flags.csv), "".join(map(_csv, (None, *results))))
    average_Bps = average_busbw_Bps(results)
    if flags.json and sizes is None:
        print(json.dumps({**results[0].values(), **critical.as_values(results[0].simulation)}, indent=1))
    elif flags.json:
        print(json.dumps({"sizes": [one.values() for one in results], "average_busbw_Bps": average_Bps}, indent=1))
    elif csv_to_screen:
        pass
    elif sizes is None:
        print(results[0])
    else:
        average = "none, nothing is sent" if average_Bps is None else f"{average_Bps / 1e9:.2f} GB/s"
        print(f"# Avg bus bandwidth: {average}")
    return 0


def _results(flags: argparse.Namespace, sizes: list[int] | None) -> Iterator[Result]:
    from distsim import api

    # Loaded once; the ideal one has as many devices as the strategy needs.
    cluster = None if flags.cluster is None else api.find_cluster(flags.cluster, 1)
    settings = {name: getattr(flags, name) for name in ("ranks", "dtype", "collective", "sharing", "posting", "whole")}
    if sizes is None:
        yield api.simulate(flags.strategy, params=flags.params, cluster=cluster, **settings)
    for size in sizes or ():
        yield api.simulate(flags.strategy, size=size, cluster=cluster, **settings)


def _rank_and_step(text: str | None) -> tuple[int, int] | None:
    """Return what `--fail` says."""
    if text is None:
        return None
    found = re.fullmatch(r"(\d{1,9})@(\d{1,9})", text, re.ASCII)
    if found is None:
        raise ConfigError(f"--fail {shown(text)}: expected a rank and a step, such as 3@5: rank 3 fails at step 5")
    return int(found[1]), int(found[2])


def _survive(result: Result, rank: int, step: int) -> None:
    """Run the exchange again without the rank from that step on; what cannot finish is an error."""
    from distsim import failure

    simulation = result.simulation
    if simulation.copies > 1:
        raise ConfigError(
            f"--fail needs every transfer, and each of this simulation stands for {simulation.copies}; "
            "expected fewer ranks"
        )
    failure.survive(simulation.exchange, simulation.lowered, rank, step)
    done = f"rank {rank} has nothing to do from step {step} on: the exchange finishes as if it had not failed"
    print(f"distsim: {done}", file=sys.stderr)


def _trace(result: Result, path: Path) -> None:
    from distsim import trace

    if result.simulation.traffic.messages > 50_000:
        print(f"distsim: writing {result.simulation.traffic.messages:,} messages to {path} ...", file=sys.stderr)
    trace.write(result.simulation, path)


def average_busbw_Bps(results: list[Result]) -> float | None:
    """Return the mean of the bus bandwidths, as nccl-tests prints it last; None where nothing was sent."""
    found = [one.simulation.busbw_Bps for one in results if one.simulation.busbw_Bps is not None]
    return sum(found) / len(found) if found else None


def _csv(result: Result | None) -> str:
    """Return a line of CSV, or that of the headers."""
    from distsim.api import TYPES
    from distsim.tables import csv_line

    return csv_line(list(TYPES) if result is None else list(result.row().values()))


REDUCING = ("all-reduce", "reduce-scatter", "reduce")
COLUMNS = "{:>13} {:>14} {:>9} {:>6}  {:<{width}} {:>12} {:>8} {:>8}"


def _width(strategy: str, collective: str) -> int:
    from distsim import api

    return max(9, *(map(len, api.known(collective)) if strategy == api.AUTO else [len(strategy)]))


def _headers(first: Result, strategy: str) -> str:
    """Return the headers of nccl-tests' columns, with the strategy in place of the root; `#` begins a comment."""
    names = ("size", "count", "type", "redop", "strategy", "time", "algbw", "busbw")
    units = ("(B)", "(elements)", "", "", "", "(us)", "(GB/s)", "(GB/s)")
    exchange, cluster = first.simulation.exchange, first.simulation.cluster
    title = f"# {exchange.collective} on {exchange.workers} ranks of {cluster.name}: {cluster.title}"
    lines = (COLUMNS.format(*cells, width=_width(strategy, exchange.collective)) for cells in (names, units))
    return "\n".join((title, *(f"#{line[1:].rstrip()}" for line in lines)))


def _row(result: Result, strategy: str) -> str:
    """Return one line in nccl-tests' columns: microseconds, and 1 GB/s is 1e9 B/s."""
    simulation = result.simulation
    exchange = simulation.exchange
    speeds = ("-" if Bps is None else f"{Bps / 1e9:.2f}" for Bps in (simulation.algbw_Bps, simulation.busbw_Bps))
    redop = "sum" if exchange.collective in REDUCING else "none"
    cells = (result.size_bytes, exchange.params, simulation.dtype, redop, exchange.strategy)
    return COLUMNS.format(
        *cells, f"{simulation.time_s * 1e6:.2f}", *speeds, width=_width(strategy, exchange.collective)
    )
