"""`distsim compare`: all strategies side by side."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from distsim.commands import options


def add(commands: Any) -> None:
    """Add the command."""
    parser = options.command(commands, "compare", run, "simulate all strategies side by side")
    options.ranks(parser)
    size = parser.add_mutually_exclusive_group(required=True)
    size.add_argument("--params", type=int, metavar="P", help="elements of the gradient")
    size.add_argument("--size", metavar="SIZE", help='bytes of the gradient, such as "100 MB" or 1GiB')
    options.array(parser)
    options.whole(parser)
    options.cluster(parser)
    options.csv(parser)


def run(flags: argparse.Namespace) -> int:
    """Print a row for each strategy, and why others do not fit."""
    from distsim import api
    from distsim.files import write_whole
    from distsim.tables import csv_text, table
    from distsim.units import format_bytes, format_time

    options.check_output(flags)
    settings = ("ranks", "params", "size", "cluster", "dtype", "collective", "sharing", "posting", "whole")
    results, misfits = api.simulate_all(**{name: getattr(flags, name) for name in settings})
    failed = [{"strategy": strategy, "ranks": flags.ranks, "error": why} for strategy, why in misfits.items()]
    if flags.csv is not None:
        text = csv_text(api.columns([*(one.row() for one in results.values()), *failed], {**api.TYPES, "error": str}))
        if flags.csv == "-":
            print(text, end="")
            return 0
        write_whole(Path(flags.csv), text)
    if flags.json:
        print(json.dumps([*(one.values() for one in results.values()), *failed], indent=1))
        return 0
    headers = ("strategy", "messages", "largest", "bytes", "time", "latency bound", "bandwidth bound", "algbw", "busbw")
    simulations = [result.simulation for result in results.values()]
    rows = [
        (
            simulation.exchange.strategy,
            f"{simulation.traffic.messages:,}",
            format_bytes(max(simulation.traffic.message_sizes, default=0)),
            format_bytes(simulation.traffic.bytes),
            format_time(simulation.time_s),
            format_time(simulation.latency_bound_s),
            format_time(simulation.bandwidth_bound_s),
            api.bandwidth(simulation.algbw_Bps),
            api.bandwidth(simulation.busbw_Bps),
        )
        for simulation in simulations
    ]
    print(f"{next(iter(results.values())).setting()}\n")
    print(table(headers, rows))
    for strategy, why in misfits.items():
        print(f"{strategy}: does not fit: {why}")
    bounds = [one.any_algorithm_bound_s for one in simulations if one.exchange.ranks == one.exchange.workers]
    if bounds:
        print(f"\nany algorithm on these {flags.ranks} devices needs at least {format_time(max(bounds))}")
    return 0
