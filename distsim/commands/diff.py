"""`distsim diff`: two run records, side by side."""

from __future__ import annotations

import argparse
import json
from typing import Any

from distsim.commands import options


def add(commands: Any) -> None:
    """Add the command."""
    parser = options.command(commands, "diff", run, "compare two run records; exit code 1 if their counts differ")
    parser.add_argument("first", metavar="A.json")
    parser.add_argument("second", metavar="B.json")


def run(flags: argparse.Namespace) -> int:
    """Print the lines of a comparison."""
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
