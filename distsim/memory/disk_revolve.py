"""Checkpoint slots in memory and on disk: the schedule of n equal steps that takes the least time.

The model is that of `revolve`, with slots in memory that cost nothing and slots on disk (None: as many as wanted) that
cost `write` and `read`; nothing overlaps. The optimum over all schedules, whatever they store, overwrite, copy and
read again, is one in which checkpoints on disk lie before all those in memory:

- If x_b is on disk while an earlier x_a is in memory, let them change places from the time that x_b is stored: x_a
  has been written instead, and is read once when x_b is done with, which is no more than x_b's own write and reads.
- So a segment of l steps with all memory slots free and d disk slots free, x_0 in the buffer, takes

      A(l, d) = min( M(l), write + E(l, d - 1) )             M(l): in memory alone, the binomial optimum
      E(l, d) = min( M(l), min over j of  forward × j + A(l - j, d) + read + E(j, d) )

  where in E x_0 is also on disk. The steps after x_j are reversed first; then x_0 is read again.

With `reads="once"` what is read is no longer on disk, so that E(j, d) becomes A(j, d + 1).

Multi-level checkpointing: Aupy, Herrmann, Hovland and Robert, "Optimal multistage algorithm for adjoint computation",
SIAM Journal on Scientific Computing 38, 2016 (disk without a limit); Herrmann and Pallez, "H-Revolve", ACM
Transactions on Mathematical Software 46, 2020. The tests hold the optimum against a search over all states.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from distsim.errors import ConfigError, nearest
from distsim.memory import revolve
from distsim.memory.revolve import Action, SlotPlan
from distsim.units import shown

Reads = Literal["any", "once"]
MOST = 2000
"""Steps: time grows with their square times the disk slots."""


class _Table(NamedTuple):
    """Splits by length of a segment and number of free disk slots, and whether its start is written to disk."""

    split: npt.NDArray[np.int32]
    """(n + 1, d): of E, the j of the minimum; 0 where memory alone is best."""
    writes: npt.NDArray[np.bool_]
    """(n + 1, d): of A with one slot more."""


def disk_slots(
    steps: int,
    memory: int,
    disk: int | None,
    forward: float,
    reverse: float,
    write: float,
    read: float,
    reads: Reads = "any",
) -> SlotPlan:
    """Plan the least `SlotPlan.cost(forward, reverse, write, read)`; where disk gains nothing, memory is used.

    `memory` and `disk` are numbers of slots; `forward` is the time of an advance, `reverse` that of a reversed step
    with its recorded forward. `reads="once"` reads each copy on disk at most once.

    Raises: ConfigError if a number makes no sense, or if there is no slot for more than one step.
    """
    _check(steps, memory, disk, reads)
    for what, value in (("forward", forward), ("reverse", reverse), ("write", write), ("read", read)):
        if not 0 <= value <= 1e200:
            raise ConfigError(f"the cost of a {what}: expected a number from 0 to 1e200, not {value!r}")
    once = reads == "once"
    # x_(n-1) is never of use in a slot, and often far fewer states are: then the limit makes no difference.
    for limit in (None,) if disk is None else (None, min(disk, steps - 1)):
        least, table = _tables(steps, memory, limit, forward, write, read, once)
        actions = list(_actions(steps, memory, limit, table, once))
        if disk is None or all(each.at < disk for each in actions if each.kind == "write"):
            break
    plan = revolve.replay(steps, memory, disk, actions, once=once)
    assert np.isclose(plan.cost(forward, 0.0, write, read), least, rtol=1e-9), "the schedule costs what was planned"
    return plan


def _tables(
    steps: int, memory: int, limit: int | None, forward: float, write: float, read: float, once: bool
) -> tuple[float, _Table]:
    """Return A(n, d) without reversals, and the choices that lead to it."""
    columns = 1 if limit is None else limit  # without a limit, one slot less is as many
    in_memory = np.full(steps + 1, np.inf)
    in_memory[1] = 0.0
    if memory:
        in_memory[2:] = [forward * revolve.advances(length, memory) for length in range(2, steps + 1)]
    # A by free slots, from 0; `free` and `more` are its views by the slots free in E, and by one more.
    start = np.repeat(in_memory[:, None], 1 if limit is None else limit + 1, axis=1)
    free, more = (start, start) if limit is None else (start[:, :-1], start[:, 1:])
    held = np.repeat(in_memory[:, None], columns, axis=1)
    split = np.zeros((steps + 1, columns), np.int32)
    writes = np.zeros((steps + 1, columns), np.bool_)
    after = more if once else held
    for length in range(2, steps + 1 if columns else 0):
        places = np.arange(1, length)
        times = (forward * places + read)[:, None] + free[length - 1 : 0 : -1] + after[1:length]
        best = times.argmin(axis=0)
        time = times[best, np.arange(columns)]
        split[length] = np.where(time < in_memory[length], best + 1, 0)
        held[length] = np.minimum(time, in_memory[length])
        writes[length] = write + held[length] < in_memory[length]
        more[length] = np.minimum(write + held[length], in_memory[length])
    return float(start[steps, -1]), _Table(split, writes)


def _actions(steps: int, memory: int, limit: int | None, table: _Table, once: bool) -> Iterator[Action]:
    # Segments still to be reversed, the next one last: the states around it, how many disk slots are taken, and
    # whether the state at its start is in the last of these; then that is read first, unless it is in the buffer.
    todo = [(0, steps, 0, False)]
    while todo:
        first, last, taken, on_disk = todo.pop()
        if on_disk:
            yield Action("read", taken - 1)
            if once:
                taken, on_disk = taken - 1, False
        length = last - first
        if not on_disk and (limit is None or taken < limit):
            on_disk = bool(table.writes[length, 0 if limit is None else limit - taken - 1])
            if on_disk:
                yield Action("write", taken)
                taken += 1
        middle = int(table.split[length, 0 if limit is None else limit - taken]) if on_disk else 0
        if not middle:
            yield from revolve.binomial(first, last, memory)
            continue
        yield Action("advance", first, first + middle)
        todo += [(first, first + middle, taken, True), (first + middle, last, taken, False)]


def _check(steps: int, memory: int, limit: int | None, reads: str) -> None:
    if not 1 <= steps <= MOST:
        raise ConfigError(f"steps: expected a whole number from 1 to {MOST}, not {shown(steps)}")
    for what, value in (("memory", memory), ("disk", 0 if limit is None else limit)):
        if value < 0:
            raise ConfigError(f"slots in {what}: expected a whole number from 0, not {shown(value)}")
    if steps > 1 and not memory and limit == 0:
        raise ConfigError(f"{steps} steps need at least 1 slot, in memory or on disk; there are none")
    if reads not in ("any", "once"):
        raise ConfigError(f"unknown reads {shown(reads)}{nearest(reads, ('any', 'once'))}")
