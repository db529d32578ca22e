"""What must wait for what in a schedule: derived here, once, for checker, engine and trainers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from distsim.compiled import call
from distsim.places import numbers, places
from distsim.schedule import Bools, Ints, Op, Schedule, Source


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Dependencies:
    """What each transfer and each apply waits for; rows are transfers, groups are applies.

    A group is all that lands at one (step, dst, chunk): one copy, or the reduces that are summed together in
    ascending rank with the receiver's own value in its place. Groups are in the order of their first rows.
    """

    after_group: Ints
    """Per row: the group whose apply must be over before the row reads its value, -1 for none."""
    group_of_row: Ints
    """Per row: the group that applies it."""
    gates_group: Ints
    """Per row: the group that overwrites what this row reads and so waits for the read's end, -1 for none."""
    member_ptr: Ints
    members: Ints
    """Rows of group g in ascending sender: members[member_ptr[g]:member_ptr[g + 1]]."""
    previous: Ints
    """Per group: the group that is applied at the same (dst, chunk) before it, -1 for none."""
    step: Ints
    dst: Ints
    chunk: Ints
    op: npt.NDArray[np.int8]
    """Per group: where and how it is applied."""
    joins_own: Bools
    """Per group: whether the receiver has a value of its own by then that joins the sum; never for a copy."""

    @property
    def groups(self) -> int:
        """Number of applies."""
        return len(self.step)

    def rows_of(self, group: int) -> Ints:
        """Rows of a group in ascending sender."""
        return self.members[self.member_ptr[group] : self.member_ptr[group + 1]]


class Landings(NamedTuple):
    """Where each row's data lands, where that is not what the row says: in a part of a schedule (symmetry.py)."""

    dst: Ints
    chunk: Ints


def dependencies(schedule: Schedule, landings: Landings | None = None) -> Dependencies:
    """Derive what must wait for what, by the rules that random interleavings have shown to be enough.

    1. A `work` read waits for every apply at (src, chunk) of an earlier step; a step's reads come before its
       applies.
    2. An apply waits for every `work` read of (dst, chunk) of the same or an earlier step.
    3. Applies at one (dst, chunk) run in step order, the arrivals of one step together.

    Messages of an ordered pair of ranks match in row order. Every wait points backwards in (step, read
    before apply), so with staging for what has arrived nothing can deadlock. It takes one pass forwards and
    one backwards over the rows. `landings` replaces the rows' `dst` and the chunk there.
    """
    at = landings or Landings(schedule.dst, schedule.chunk)
    rows = schedule.rows
    (reads, lands), count = places(schedule.chunks, (schedule.src, schedule.chunk), (at.dst, at.chunk))
    after, group_of_row, gates, first, previous = call(
        _derive,
        rows,
        schedule.step,
        reads,
        lands,
        schedule.source == Source.WORK,
        np.full(count, -1, np.int32),
        *(np.empty(rows, np.int32) for _ in range(5)),
    )
    group_of_row = np.asarray(group_of_row, np.int32)
    first, previous = np.asarray(first, np.int32), np.asarray(previous, np.int32)
    if len(first) == rows:  # every row is a group of its own: the same numbers, and no copies of columns
        member_ptr = numbers(rows + 1)
        members = group_of_row = member_ptr[:-1]
        step, dst, chunk, op = schedule.step, at.dst, at.chunk, schedule.op
    else:
        members = np.lexsort((schedule.src, group_of_row)).astype(np.int32)
        member_ptr = np.concatenate(([0], np.cumsum(np.bincount(group_of_row)))).astype(np.int32)
        step, dst, chunk, op = (column[first] for column in (schedule.step, at.dst, at.chunk, schedule.op))
    has_own = previous >= 0
    has_own |= schedule.contributes[dst, chunk]
    return Dependencies(
        after_group=np.asarray(after, np.int32),
        group_of_row=group_of_row,
        gates_group=np.asarray(gates, np.int32),
        member_ptr=member_ptr,
        members=members,
        previous=previous,
        step=step,
        dst=dst,
        chunk=chunk,
        op=op,
        joins_own=(op == Op.REDUCE) & has_own,
    )


def _derive(
    step: Any,
    reads: Any,
    lands: Any,
    work: Any,
    last: Any,
    after: Any,
    group_of_row: Any,
    gates: Any,
    first: Any,
    previous: Any,
) -> Any:
    """Go through the steps, once forwards and once backwards; `last` is, per place, the group seen last, -1 for none.

    Returns `after_group`, `group_of_row` and `gates_group` per row, and per group its first row and `previous`.
    """
    rows, groups, low = len(step), 0, 0
    while low < rows:
        high = low
        while high < rows and step[high] == step[low]:  # a step's reads come before its applies
            after[high] = last[reads[high]] if work[high] else -1
            high += 1
        begun = groups
        for row in range(low, high):
            group = last[lands[row]]
            if group < begun:  # of an earlier step, or none
                previous[groups], first[groups] = group, row
                last[lands[row]] = group = groups
                groups += 1
            group_of_row[row] = group
        low = high
    for place in range(len(last)):
        last[place] = -1
    high = rows
    while high > 0:
        low = high
        while low > 0 and step[low - 1] == step[high - 1]:
            low -= 1
            last[lands[low]] = group_of_row[low]
        for row in range(low, high):
            gates[row] = last[reads[row]] if work[row] else -1
        high = low
    return after, group_of_row, gates, first[:groups], previous[:groups]
