"""Flags that several commands have; each means the same everywhere."""

from __future__ import annotations

import argparse
from typing import Any

from distsim import exchanges
from distsim.errors import ConfigError
from distsim.schedule import ITEMSIZE

ALL_REDUCE = "all-reduce"
SIZES = "bytes of the array: FIRST:LAST:xFACTOR, FIRST:LAST:+STEP, or sizes with commas; 8B:16GiB:x2"


def command(commands: Any, name: str, function: Any, summary: str) -> argparse.ArgumentParser:
    """Add a command with `--json`."""
    parser: argparse.ArgumentParser = commands.add_parser(name, help=summary, description=summary)
    parser.set_defaults(command=function)
    parser.add_argument("--json", action="store_true", help="print nothing but JSON on stdout")
    return parser


def ranks(parser: argparse.ArgumentParser) -> None:
    """Add `--ranks`."""
    workers = "ranks; for the parameter server its workers, the server is one device more"
    parser.add_argument("--ranks", type=int, required=True, metavar="N", help=workers)


def array(parser: argparse.ArgumentParser) -> None:
    """Add what is exchanged, besides its size, and how links are shared."""
    parser.add_argument("--dtype", choices=ITEMSIZE, default="float32", help="of an element (default float32)")
    collective(parser)
    parser.add_argument("--sharing", choices=("fair", "fifo"), help="of links (default: what the cluster's file says)")
    rounds = "hand over messages when they are ready (default), or a step's only once the step before is over"
    parser.add_argument("--posting", choices=("eager", "rounds"), default="eager", help=rounds)


def whole(parser: argparse.ArgumentParser) -> None:
    """Add `--whole`."""
    parser.add_argument("--whole", action="store_true", help="simulate every transfer, symmetric or not")


def collective(parser: argparse.ArgumentParser) -> None:
    """Add `--collective`."""
    names = ", ".join(exchanges.COLLECTIVES)
    parser.add_argument("--collective", metavar="NAME", default=ALL_REDUCE, help=f"{names} (default {ALL_REDUCE})")


def cluster(parser: argparse.ArgumentParser) -> None:
    """Add `--cluster`."""
    parser.add_argument("--cluster", metavar="FILE", help="shipped name or YAML file (default: one ideal switch)")


def csv(parser: argparse.ArgumentParser) -> None:
    """Add `--csv`."""
    where = "write CSV, in SI units, to this file, or to stdout in place of the table if no file is named"
    parser.add_argument("--csv", metavar="FILE", nargs="?", const="-", help=where)


def check_output(flags: argparse.Namespace) -> None:
    """Refuse two outputs on one stdout."""
    if flags.json and flags.csv == "-":
        raise ConfigError("--json and --csv both go to stdout; give --csv a file: --csv FILE")


def strategies() -> str:
    """Return the names of all strategies, for a help text; not every one can do every collective."""
    return ", ".join(dict.fromkeys(name for known in exchanges.ALGORITHMS.values() for name in known))
