"""Checkpoint slots: the binomial schedule of n equal steps and s slots, and the one checker of slot schedules.

A chain of states x_0..x_n; step i makes x_i of x_(i-1). One state is in the working buffer; slots, in memory or on
disk, hold copies of others. Reversing step i needs x_(i-1) in the buffer: it runs the step once more, recorded, and
then its backward, and leaves nothing in the buffer. Steps are reversed from n down to 1. Those that are run only to
get on are advances, and the fewest are wanted.

Griewank and Walther, "Algorithm 799: revolve", ACM Transactions on Mathematical Software 26, 2000: with s slots, that
of x_0 among them, C(s+r, s) steps can be reversed so that none is advanced more than r times, and n steps take

    t(n, s) = r n - C(s+r, r-1)    with the smallest r such that C(s+r, s) >= n.

Actions are written `advance 0 3` (x_0 to x_3), `store 1`, `restore 1` (the buffer to memory slot 1, and back),
`write 0`, `read 0` (the same with disk slot 0), `reverse 4` (step 4).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import accumulate
from math import comb
from typing import Literal, NamedTuple

from distsim.errors import ConfigError
from distsim.memory.chain import Chain
from distsim.memory.plan import Op, PlanError, Row
from distsim.units import shown

Kind = Literal["advance", "store", "restore", "write", "read", "reverse"]
MOST = 1_000_000
"""Steps of a schedule that is written down."""


class Action(NamedTuple):
    """One action of a slot schedule; `to` is of advances only."""

    kind: Kind
    at: int
    """State from which to advance, slot, or step to reverse."""
    to: int = 0

    def text(self) -> str:
        """Return the action as it is written: `advance 0 3`, `store 1`, `reverse 4`."""
        return f"{self.kind} {self.at} {self.to}" if self.kind == "advance" else f"{self.kind} {self.at}"


@dataclass(frozen=True, kw_only=True, slots=True)
class SlotPlan:
    """A schedule that has been replayed, and what it does."""

    steps: int
    memory_slots: int
    disk_slots: int | None
    """None: as many as are used."""
    actions: tuple[Action, ...]
    advances: int
    """Steps that are run only to get on."""
    repetitions: int
    """How often the step that is advanced most often is."""
    stores: int
    loads: int
    """To and from slots in memory."""
    writes: int
    reads: int
    """To and from slots on disk."""

    @property
    def forwards(self) -> int:
        """Forward steps of both kinds: advances, and one recorded step for each that is reversed."""
        return self.advances + self.steps

    def cost(self, forward: float, reverse: float, write: float = 0.0, read: float = 0.0) -> float:
        """Return the time, nothing overlapping: of an advance, of a reversal with its recorded step, of disk copies."""
        return forward * self.advances + reverse * self.steps + write * self.writes + read * self.reads

    def text(self) -> str:
        """Return the actions with commas between them: `store 0, advance 0 1, reverse 2, restore 0, reverse 1`."""
        return ", ".join(each.text() for each in self.actions)


def repetitions(steps: int, slots: int) -> int:
    """Return r: how often the binomial schedule advances a step at most. For `slots` of 1 and more."""
    if slots == 1:
        return steps - 1
    number, reach = 0, 1
    while reach < steps:
        number += 1
        reach = reach * (slots + number) // number
    return number


def advances(steps: int, slots: int) -> int:
    """Return t(n, s), the fewest advances with which so many slots in memory reverse the steps.

    Raises: ConfigError if `steps` is less than 1, or `slots` less than 1 with more than one step.
    """
    _check(steps, slots)
    if steps == 1:
        return 0
    number = repetitions(steps, slots)
    return number * steps - comb(slots + number, number - 1)


def slots(steps: int, count: int) -> SlotPlan:
    """Plan the fewest advances with `count` slots in memory, and of these schedules one with the fewest stores.

    Raises: ConfigError as `advances`, and for more steps than `MOST`.
    """
    _check(steps, count)
    return replay(steps, count, 0, binomial(0, steps, count))


def binomial(first: int, last: int, count: int) -> Iterator[Action]:
    """Yield what reverses steps first+1..last with memory slots 0..count-1, x_first being in the buffer alone."""
    # Segments still to be reversed, the next one last: the states around it, and how many slots are taken. The state
    # at its start is in the last slot taken if it is to be restored, and otherwise in the buffer alone.
    todo = [(first, last, 0, False)]
    while todo:
        start, end, taken, stored = todo.pop()
        if stored:
            yield Action("restore", taken - 1)
        if end - start == 1:
            yield Action("reverse", end)
            continue
        if not stored:
            yield Action("store", taken)
            taken += 1
        middle = start + _split(end - start, count - taken + 1)
        yield Action("advance", start, middle)
        todo += [(start, middle, taken, True), (middle, end, taken, False)]


def _split(steps: int, count: int) -> int:
    """Return where the first checkpoint after the start belongs, for the fewest advances and then the fewest stores.

    With b(s, r) = C(s+r, s), it leaves b(s-1, r-1) + b(s-2, r-1) steps after it, if so many are before it that they
    are b(s, r-2) at least and b(s, r-1) at most; otherwise that many are (Griewank and Walther, section 3).
    """
    if count == 1:
        return steps - 1
    number = repetitions(steps, count)
    right = comb(count + number - 2, count - 1) + comb(count + number - 3, count - 2)
    return min(comb(count + number - 1, count), max(1, comb(count + number - 2, count), steps - right))


def replay(
    steps: int, memory_slots: int, disk_slots: int | None, actions: Iterable[Action], *, once: bool = False
) -> SlotPlan:
    """Run through a schedule; return it with its counts.

    `once`: what is read from disk is no longer there.

    Raises: PlanError naming the action: what it advances, stores or reverses is not in the buffer, the slot does not
    exist or is empty, steps are reversed out of order, or some are not.
    """
    levels: dict[str, dict[int, int]] = {"memory": {}, "disk": {}}
    limits = {"memory": memory_slots, "disk": disk_slots}
    buffer: int | None = 0
    left = steps
    counts: dict[Kind, int] = dict.fromkeys(("advance", "store", "restore", "write", "read", "reverse"), 0)
    changes = [0] * (steps + 1)  # how much oftener than the one before each step is advanced
    listed = tuple(actions)
    for number, action in enumerate(listed, 1):
        kind, at, to = action

        def wrong(what: str, number: int = number, action: Action = action) -> PlanError:
            return PlanError(f"action {number}, {action.text()}: {what}")

        holds = "nothing is in the buffer" if buffer is None else f"x_{buffer} is in the buffer"
        counts[kind] += 1
        if kind == "advance":
            if buffer != at:
                raise wrong(holds)
            if not at < to < left:
                raise wrong(f"expected to advance from x_{at}, and to x_{left - 1} at most")
            changes[at] += 1
            changes[to] -= 1
            buffer = to
        elif kind == "reverse":
            if at != left:
                raise wrong(f"step {left} is the next to reverse" if left else "all steps have been reversed")
            if buffer != at - 1:
                raise wrong(holds)
            buffer, left = None, left - 1
        else:
            level = "memory" if kind in ("store", "restore") else "disk"
            held, limit = levels[level], limits[level]
            if at < 0 or (limit is not None and at >= limit):
                raise wrong(f"{level} has {limit} slots, numbered from 0")
            if kind in ("store", "write"):
                if buffer is None:
                    raise wrong(holds)
                held[at] = buffer
            else:
                if at not in held:
                    raise wrong(f"slot {at} of {level} is empty")
                buffer = held.pop(at) if once and level == "disk" else held[at]
    if left:
        raise PlanError(f"the schedule ends before step {left} is reversed")
    runs = list(accumulate(changes))
    return SlotPlan(
        steps=steps,
        memory_slots=memory_slots,
        disk_slots=disk_slots,
        actions=listed,
        advances=sum(runs),
        repetitions=max(runs),
        stores=counts["store"],
        loads=counts["restore"],
        writes=counts["write"],
        reads=counts["read"],
    )


def rows(plan: SlotPlan, chain: Chain) -> list[Row]:
    """Return a slot schedule as the rows of a memory plan, for `plan.with_drops`; a chain layer is a step.

    A state in a slot is an activation that stays resident, so that storing and restoring are no operations; a_0 always
    does, and is never copied to disk. A reversal is a recording forward and the backward, without saved intermediates
    a forward where the backward needs the output, and else the backward alone. Loss follows the last layer.

    Raises: ConfigError if the chain has another number of layers.
    """
    if chain.layers != plan.steps:
        raise ConfigError(f"a schedule of {plan.steps} steps does not fit a chain of {chain.layers} layers")
    found: list[Row] = []
    on_disk: dict[int, int] = {}
    buffer = 0
    in_memory: dict[int, int] = {}
    for kind, at, to in plan.actions:
        if kind == "advance":
            found += [(Op.FORWARD, layer) for layer in range(at + 1, to + 1)]
            buffer = to
        elif kind == "store":
            in_memory[at] = buffer
        elif kind == "restore":
            buffer = in_memory[at]
        elif kind == "write":
            on_disk[at] = buffer
            if buffer:
                found.append((Op.WRITE, buffer))
        elif kind == "read":
            buffer = on_disk[at]
            if buffer:
                found.append((Op.READ, buffer))
        else:
            if chain.saved is not None:
                found.append((Op.RECORD, at))
            elif at == chain.layers or chain.needs != "input":
                found.append((Op.FORWARD, at))
            if at == chain.layers:
                found.append((Op.LOSS, at))
            found.append((Op.BACKWARD, at))
    return found


def _check(steps: int, count: int) -> None:
    if not 1 <= steps <= MOST:
        raise ConfigError(f"steps: expected a whole number from 1 to {MOST}, not {shown(steps)}")
    if count < min(1, steps - 1):
        raise ConfigError(f"slots: expected a whole number from 1 for {steps} steps, not {shown(count)}")
