"""`distsim check`: the proof of one strategy."""

from __future__ import annotations

import argparse
import json
from typing import Any

from distsim import exchanges
from distsim.commands import options


def add(commands: Any) -> None:
    """Add the command."""
    what = "prove that a strategy leaves every rank with every contribution exactly once"
    parser = options.command(commands, "check", run, what)
    parser.add_argument("strategy", metavar="STRATEGY", help=f"one of: {options.strategies()}")
    options.ranks(parser)
    options.collective(parser)
    parser.add_argument("--params", type=int, metavar="P", help="elements (default: enough for uneven chunks)")


def run(flags: argparse.Namespace) -> int:
    """Check an exchange; print what was proven."""
    from distsim.check import check

    params = flags.params if flags.params is not None else 2 * flags.ranks + 1
    exchange = exchanges.build(flags.strategy, flags.ranks, params, flags.collective)
    check(exchange)
    messages = sum(schedule.messages().count for schedule in exchange.schedules())
    if flags.json:
        values = {"strategy": exchange.strategy, "ranks": flags.ranks, "params": params, "messages": messages}
        print(json.dumps({**values, "proven": True, "digest": exchange.digest()}, indent=1))
        return 0
    print(f"{exchange.strategy}, {flags.ranks} ranks, {params:,} parameters: proven")
    if flags.collective == options.ALL_REDUCE:
        print(f"  {messages:,} messages; every rank ends with every contribution exactly once,")
        print("  and all ranks sum in the same order, so they agree to the bit")
    else:
        print(f"  {messages:,} messages; they do what {flags.collective} promises")
    print(f"  digest {exchange.digest()}")
    return 0
