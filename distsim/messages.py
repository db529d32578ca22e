"""Messages: which rows of a schedule travel together.

In a coalesced schedule, neighbouring rows of one step that carry neighbouring chunks from one rank to another, in
the same way, are one message: their chunks lie side by side in the array, so that they can be sent, and are
counted, as one piece. In all others each row is a message.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from distsim.places import numbers

Ints = npt.NDArray[np.int32]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Messages:
    """The messages of a schedule, numbered in row order."""

    of_row: Ints
    """Per row: its message."""
    first: Ints
    """Per message: its first row; the others follow it."""

    @property
    def count(self) -> int:
        """Number of messages."""
        return len(self.first)

    @property
    def last(self) -> Ints:
        """Per message: its last row."""
        return self.first if self.single else np.append(self.first[1:], np.int32(len(self.of_row))) - np.int32(1)

    @property
    def single(self) -> bool:
        """Whether every row is a message of its own."""
        return len(self.first) == len(self.of_row)

    def totals(self, elements: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Add up a column of the rows for each message, shape (count,)."""
        return elements if self.single else np.add.reduceat(elements, self.first)


def each_row(rows: int) -> Messages:
    """Return the messages of a schedule in which every row travels alone."""
    return Messages(of_row=numbers(rows), first=numbers(rows))


def coalesced(chunk: Ints, others: Sequence[npt.NDArray[np.integer]]) -> Messages:
    """Join rows to the one before where `chunk` follows on and all `others` stay the same."""
    joins = chunk[1:] == chunk[:-1] + 1
    for column in others:
        joins &= column[1:] == column[:-1]
    if not joins.any():
        return each_row(len(chunk))
    begins = np.concatenate(([True], ~joins))
    return Messages(
        of_row=np.cumsum(begins, dtype=np.int32) - np.int32(1), first=np.flatnonzero(begins).astype(np.int32)
    )
