"""The command line `distsim`. Tables on stdout, `--json` instead if asked, everything else on stderr."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NoReturn

from distsim import __version__, exchanges
from distsim.errors import ConfigError, DistsimError, TooFewDevices
from distsim.schedule import ITEMSIZE

if TYPE_CHECKING:  # what takes long to import is imported by the commands that need it
    from distsim.cluster import Cluster
    from distsim.step import Simulation


class Parser(argparse.ArgumentParser):
    """An argument parser whose complaints are errors like all others: one message, exit code 2."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"allow_abbrev": False, **options})

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message} (see `{self.prog} --help`)")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; return its exit code: 0, 1 where a comparison fails, 2 for a user's mistake."""
    try:
        try:
            flags = _parser().parse_args(argv)
            code: int = flags.command(flags)
        finally:  # `--help` and `--version` leave by SystemExit
            if sys.stdout is not None:  # closed by the caller
                sys.stdout.flush()
        return code
    except DistsimError as error:
        print(f"distsim: error: {error}", file=sys.stderr)
        return 2
    except MemoryError:
        print("distsim: error: not enough memory for a schedule of that size; use fewer ranks", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader, `head` for example, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:  # a full disk behind stdout
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        print(f"distsim: error: cannot write the output: {error.strerror}", file=sys.stderr)
        return 2


def _parser() -> Parser:
    parser = Parser(prog="distsim", description="Check and simulate the gradient exchanges of training.")
    parser.add_argument("--version", action="version", version=f"distsim {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    names = ", ".join(exchanges.STRATEGIES)

    def add(name: str, function: Any, summary: str) -> argparse.ArgumentParser:
        command: argparse.ArgumentParser = commands.add_parser(name, help=summary, description=summary)
        command.set_defaults(command=function)
        command.add_argument("--json", action="store_true", help="print nothing but JSON on stdout")
        return command

    exchange = add("exchange", _exchange, "simulate one strategy: counts, sizes, time, lower bounds")
    compare = add("compare", _compare, "simulate all strategies side by side")
    check = add("check", _check, "prove that a strategy leaves every rank with every contribution exactly once")
    for command in (exchange, check):
        command.add_argument("strategy", metavar="STRATEGY", help=f"one of: {names}")
    for command in (exchange, compare, check):
        workers = "ranks; for the parameter server its workers, the server is one device more"
        command.add_argument("--ranks", type=int, required=True, metavar="N", help=workers)
    for command in (exchange, compare):
        command.add_argument("--params", type=int, required=True, metavar="P", help="elements of the gradient")
        command.add_argument("--dtype", choices=ITEMSIZE, default="float32", help="of an element (default float32)")
        cluster = "shipped name or YAML file (default: one ideal switch)"
        command.add_argument("--cluster", metavar="FILE", help=cluster)
    exchange.add_argument("--record", metavar="FILE", help="write the run record, with every message, to this file")
    check.add_argument("--params", type=int, metavar="P", help="elements (default: enough for uneven chunks)")

    add("clusters", _clusters, "list the shipped cluster configurations")
    diff = add("diff", _diff, "compare two run records; exit code 1 if their counts differ")
    diff.add_argument("first", metavar="A.json")
    diff.add_argument("second", metavar="B.json")
    return parser


def _exchange(flags: argparse.Namespace) -> int:
    simulation = _simulate(flags.strategy, flags)
    if flags.record is not None:
        from pathlib import Path

        from distsim import record

        record.write(record.from_simulation(simulation), Path(flags.record))
    if flags.json:
        print(json.dumps(_values(simulation), indent=1))
        return 0
    from distsim.tables import table
    from distsim.units import format_bytes, format_time

    traffic, exchange = simulation.traffic, simulation.exchange
    sizes = [f"{count:,} x {size:,} B" for size, count in traffic.message_sizes.items()]
    rows = [
        ("messages", f"{traffic.messages:,}"),
        ("message sizes", ", ".join(sizes[:4]) + (f" and {len(sizes) - 4} more" if len(sizes) > 4 else "") or "none"),
        ("bytes", f"{traffic.bytes:,} ({format_bytes(traffic.bytes)})"),
        ("time", format_time(simulation.time_s)),
        ("  bound: chain of latencies", format_time(simulation.latency_bound_s)),
        ("  bound: busiest link", format_time(simulation.bandwidth_bound_s)),
        ("  bound: any algorithm", format_time(simulation.any_algorithm_bound_s)),
        ("algbw", _bandwidth(simulation.algbw_Bps)),
        ("busbw", _bandwidth(simulation.busbw_Bps)),
        ("peak staging of a rank", format_bytes(simulation.peak_staging_bytes)),
    ]
    print(f"{exchange.strategy}: {_setting(simulation.cluster, flags)}\n")
    print(table(("one exchange", ""), rows))
    return 0


def _compare(flags: argparse.Namespace) -> int:
    simulations: list[Simulation] = []
    misfits: dict[str, str] = {}
    for strategy in exchanges.STRATEGIES:
        try:
            simulations.append(_simulate(strategy, flags))
        except TooFewDevices as error:
            misfits[strategy] = str(error)
    if not simulations:
        raise ConfigError(next(iter(misfits.values())))
    if flags.json:
        failed = [{"strategy": strategy, "ranks": flags.ranks, "error": why} for strategy, why in misfits.items()]
        print(json.dumps([*map(_values, simulations), *failed], indent=1))
        return 0
    from distsim.tables import table
    from distsim.units import format_bytes, format_time

    headers = ("strategy", "messages", "largest", "bytes", "time", "latency bound", "bandwidth bound", "algbw", "busbw")
    rows = [
        (
            simulation.exchange.strategy,
            f"{simulation.traffic.messages:,}",
            format_bytes(max(simulation.traffic.message_sizes, default=0)),
            format_bytes(simulation.traffic.bytes),
            format_time(simulation.time_s),
            format_time(simulation.latency_bound_s),
            format_time(simulation.bandwidth_bound_s),
            _bandwidth(simulation.algbw_Bps),
            _bandwidth(simulation.busbw_Bps),
        )
        for simulation in simulations
    ]
    print(f"{_setting(simulations[0].cluster, flags)}\n")
    print(table(headers, rows))
    for strategy, why in misfits.items():
        print(f"{strategy}: does not fit: {why}")
    least = max(one.any_algorithm_bound_s for one in simulations if one.exchange.ranks == one.exchange.workers)
    print(f"\nany algorithm on these {flags.ranks} devices needs at least {format_time(least)}")
    return 0


def _check(flags: argparse.Namespace) -> int:
    from distsim.check import check

    params = flags.params if flags.params is not None else 2 * flags.ranks + 1
    exchange = exchanges.build(flags.strategy, flags.ranks, params)
    check(exchange)
    transfers = sum(schedule.messages for schedule in exchange.schedules())
    if flags.json:
        values = {"strategy": exchange.strategy, "ranks": flags.ranks, "params": params, "messages": transfers}
        print(json.dumps({**values, "proven": True, "digest": exchange.digest()}, indent=1))
        return 0
    print(f"{exchange.strategy}, {flags.ranks} ranks, {params:,} parameters: proven")
    print(f"  {transfers:,} transfers; every rank ends with every contribution exactly once,")
    print("  and all ranks sum in the same order, so they agree to the bit")
    print(f"  digest {exchange.digest()}")
    return 0


def _clusters(flags: argparse.Namespace) -> int:
    from distsim.cluster import load, shipped

    clusters = [load(name) for name in shipped()]
    if flags.json:
        values = [{"name": one.name, "devices": len(one.devices), "title": one.title} for one in clusters]
        print(json.dumps(values, indent=1))
        return 0
    for one in clusters:
        print(f"{one.name:<20} {len(one.devices):>5} devices  {one.title}")
    return 0


def _diff(flags: argparse.Namespace) -> int:
    from dataclasses import asdict
    from pathlib import Path

    from distsim import record
    from distsim.diff import agree, diff
    from distsim.tables import table

    first, second = record.read(Path(flags.first)), record.read(Path(flags.second))
    lines = diff(first, second)
    if flags.json:
        print(json.dumps({"agree": agree(lines), "lines": [asdict(line) for line in lines]}, indent=1))
    else:
        print(f"{first.strategy}: {first.workers} workers, {first.params:,} parameters, per exchange\n")
        headers = ("", f"A ({first.origin})", f"B ({second.origin})", "")
        print(table(headers, [(line.name, line.first, line.second, line.verdict) for line in lines]))
    return 0 if agree(lines) else 1


def _simulate(strategy: str, flags: argparse.Namespace) -> Simulation:
    from distsim.cluster import ideal, load
    from distsim.step import simulate

    exchange = exchanges.build(strategy, flags.ranks, flags.params)
    cluster = load(flags.cluster) if flags.cluster is not None else ideal(exchange.ranks)
    transfers = sum(schedule.messages for schedule in exchange.schedules())
    if transfers > 500_000:
        print(f"distsim: {strategy}: checking and simulating {transfers:,} transfers ...", file=sys.stderr)
    return simulate(exchange, cluster, flags.dtype)


def _values(simulation: Simulation) -> dict[str, Any]:
    """The JSON object of one simulated exchange; SI units."""
    traffic = simulation.traffic
    return {
        "strategy": simulation.exchange.strategy,
        "ranks": simulation.exchange.workers,
        "params": simulation.exchange.params,
        "dtype": simulation.dtype,
        "cluster": simulation.cluster.name,
        "cluster_title": simulation.cluster.title,
        "messages": traffic.messages,
        "message_sizes": traffic.message_sizes,
        "bytes": traffic.bytes,
        "time_s": simulation.time_s,
        "latency_bound_s": simulation.latency_bound_s,
        "bandwidth_bound_s": simulation.bandwidth_bound_s,
        "any_algorithm_bound_s": simulation.any_algorithm_bound_s,
        "algbw_Bps": simulation.algbw_Bps,
        "busbw_Bps": simulation.busbw_Bps,
        "peak_staging_bytes": simulation.peak_staging_bytes,
    }


def _setting(cluster: Cluster, flags: argparse.Namespace) -> str:
    return f"{flags.ranks} ranks, {flags.params:,} parameters ({flags.dtype}) on {cluster.name}: {cluster.title}"


def _bandwidth(Bps: float | None) -> str:
    from distsim.units import format_bandwidth

    return "none: nothing is sent" if Bps is None else format_bandwidth(Bps)


if __name__ == "__main__":
    sys.exit(main())
