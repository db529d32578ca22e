"""`python -m analysis DIR`: the run records of a folder as a table and a figure."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from analysis.comparison import comparison_table, read_pairs
from analysis.figure import draw
from distsim.errors import ConfigError, DistsimError


def main(argv: list[str] | None = None) -> int:
    """Print the table, write the figure beside the records; return the exit code."""
    flags = argparse.ArgumentParser(prog="analysis", description=__doc__)
    flags.add_argument("folder", type=Path, metavar="DIR", help="holds NAME.simulated.json and NAME.measured.json")
    folder: Path = flags.parse_args(argv).folder
    try:
        pairs = read_pairs(folder)
        if not pairs:
            raise ConfigError(f"{folder}: no NAME.simulated.json with a NAME.measured.json beside it")
        print(comparison_table(pairs))
        draw(pairs, folder / "comparison.png")
        print(f"\nfigure and records: {folder}")
    except DistsimError as error:
        print(f"analysis: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
