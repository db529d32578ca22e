"""Tables for a terminal."""

from __future__ import annotations

from collections.abc import Sequence

from tabulate import tabulate


def table(headers: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Lay out rows under headers: the first column to the left, all others to the right."""
    align = ["left"] + ["right"] * (len(headers) - 1)
    cells = [["" if cell is None else str(cell) for cell in row] for row in rows]
    return tabulate(cells, headers=headers, tablefmt="simple", colalign=align, disable_numparse=True)
