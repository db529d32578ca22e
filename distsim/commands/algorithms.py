"""`distsim algorithms`: all strategies of all collectives, with their options, formulas and sources."""

from __future__ import annotations

import argparse
import json
from typing import Any

from distsim import exchanges, formulas
from distsim.commands import options
from distsim.commands.algorithms_data import OPTIONS, SOURCES, option_rows, pairs, values
from distsim.errors import ConfigError

SYMBOLS = (
    "n ranks, an array of p elements or S bytes, latency a, bandwidth B of each device's link each way; "
    "time = latencies x a + arrays x S/B"
)


def add(commands: Any) -> None:
    """Add the command."""
    what = "list the strategies of every collective: options, formulas, sources"
    parser = options.command(commands, "algorithms", run, what)
    page = "print docs/algorithms.md, in which formulas are held against simulations (takes seconds)"
    parser.add_argument("--markdown", action="store_true", help=page)


def run(flags: argparse.Namespace) -> int:
    """Print tables, JSON, or the page of the documentation."""
    if flags.json and flags.markdown:
        raise ConfigError("--json and --markdown both go to stdout; expected one of them")
    if flags.markdown:
        from distsim.commands import algorithms_page

        print(algorithms_page.page(), end="")
    elif flags.json:
        print(json.dumps([values(*pair) for pair in pairs()], indent=1))
    else:
        print(_tables())
    return 0


def _tables() -> str:
    """Return the tables for a terminal."""
    from distsim.tables import table

    headers = ("messages", "largest", "latencies", "arrays", "time", "holds for", "posting")
    keys = ("messages", "largest_message", "latencies", "arrays", "time", "time_holds_for", "posting")
    parts = [SYMBOLS]
    for collective, known in exchanges.ALGORITHMS.items():
        each = [values(collective, strategy) for strategy in known]
        parts.append(table((collective, *headers), [[one["strategy"], *(one[key] for key in keys)] for one in each]))
    parts.append("\n".join(f"{name}: {meaning.replace('`', '')}" for name, (_, meaning) in formulas.NAMES.items()))
    parts.append(table(("options of", "option", "type", "default"), option_rows()))
    parts.append("\n".join(f"{name}: {meaning.replace('`', '')}" for name, meaning in OPTIONS.items()))
    parts.append("\n".join(f"{strategy}: {source}" for strategy, source in SOURCES.items()))
    return "\n\n".join(parts)
