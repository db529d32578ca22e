"""The search of the exact planner: A* over what is resident, one loop for all models in which nothing overlaps.

Only schedules of one form are looked at; each schedule has one of that form that takes as long or less, and no
more memory at any moment:

- What is resident is dropped right after the last operation that reads it. So an operation may drop the a_(i-1)
  that it has read, and nothing else is ever dropped; an abar_i, which only B_i reads as such, stays until B_i, or
  is read back for its a_i alone.
- What is made and read by nobody is not made. A write counts as a reader, so what has just been made may be dropped
  at once where it can be written.
- A write needs no memory of its own, so it comes right after the first operation that makes a_i. Whether there was
  one need not be decided there: the first read of a_i pays for it. An abar_i is written when it is made, and its
  record is then good for nothing else.
- If a backward (or LOSS) could run now, needs no more memory than the schedule has had before, and leaves no more
  resident than there is now, it runs now: what would come before it can come after it.
- What can be read in no more time than computing it takes is read, not computed again.
- Of two states with the same in memory one is left out if the other, having paid for the writes that it lacks, is
  as early and has as low a peak.

A state is the phase (of the first forward, then of the backwards) and four sets of layers as bits. States are
reached in the order of (least possible time in the end, peak of memory so far): so the first that is complete has
the least time and, of the schedules with that time, the least peak.
"""

from __future__ import annotations

import math
from heapq import heappop, heappush
from typing import Any, NamedTuple

FORWARD, RECORD, LOSS, BACKWARD, READ, READ_SAVED = 0, 1, 2, 3, 5, 7  # of plan.Op; Numba knows no enumerations


class Problem(NamedTuple):
    """A chain, budget and rules. Columns have an entry for each of layers 0..L; what is impossible takes forever."""

    layers: int
    saved: bool
    """B_i reads abar_i and a_(i-1); otherwise a_(i-1) if `reads_input`, a_i if `reads_output`."""
    reads_input: bool
    reads_output: bool
    again: bool
    """Whether a forward may run more than once."""
    copies: bool
    """Whether anything can be written to disk."""
    budget: float
    floor: float
    """What each schedule's peak reaches in any case."""
    by_value: Any
    """Layers, those first whose abar_i saves the most time for its size."""
    size: Any
    whole: Any
    """Of abar_i."""
    forward_tmp: Any
    backward_tmp: Any
    forward: Any
    backward: Any
    write: Any
    read: Any
    write_saved: Any
    read_saved: Any


class States(NamedTuple):
    """What has been reached, a row for each state."""

    phase: Any
    """0..L: a_phase has been made; then L + 1 after LOSS, and one more after each backward."""
    resident: Any
    """Bit i: a_i is, bare or in abar_i."""
    whole: Any
    """Bit i: abar_i is."""
    copied: Any
    """Bit i: a_i is on disk and has been read before; its write is paid for."""
    copied_whole: Any
    """Bit i: abar_i is on disk."""
    time: Any
    peak: Any
    """Of the best way here."""
    before: Any
    """The state before it on that way, -1 for none."""
    op: Any
    layer: Any
    """The operation between the two."""
    next: Any
    """Another state of the same phase with the same in memory, -1 for none."""
    slots: Any
    """Hash table of rows, -1 where empty; its length is a power of two."""
    count: Any
    """One entry: how many states there are; more than there is room for where it was not enough."""


def search(problem: Problem, states: States) -> tuple[int, States]:
    """Return the row of the last state of the best schedule, and all states; -1 if there is none.

    The states end with a `count` beyond their room if there were too many: start over with more.
    """
    layers = problem.layers
    queue = [(0.0, 0.0, 0, 0.0, -1)]  # (least time in the end, peak, minus phase, time, row)
    queue.pop()
    _reach(problem, states, queue, -1, 0, 0, 0, 0, 0, 0.0, problem.floor, -1, 0)
    while queue and states.count[0] <= len(states.phase):
        _, _, _, time, row = heappop(queue)
        if time != states.time[row]:
            continue  # a better one has been found since
        phase = states.phase[row]
        if phase == 2 * layers + 1:
            return row, states
        memory = _memory(problem, phase, states.resident[row], states.whole[row])
        if not _advance(problem, states, queue, row, memory):
            for layer in range(1, min(phase + 1, layers) + 1 if phase <= layers else 2 * layers + 2 - phase):
                if not states.resident[row] >> layer & 1:
                    _make(problem, states, queue, row, memory, layer)
                    _bring_back(problem, states, queue, row, memory, layer)
    return -1, states


def _advance(problem: Problem, states: States, queue: Any, row: int, memory: float) -> bool:
    """Take LOSS or the next backward if what it reads is resident; return whether there is no need to look further."""
    layers, size = problem.layers, problem.size
    phase, resident, whole = states.phase[row], states.resident[row], states.whole[row]
    if phase < layers:
        return False
    layer = layers if phase == layers else 2 * layers + 1 - phase
    has_input = layer == 1 or resident >> (layer - 1) & 1 == 1
    if phase == layers:
        op, ready, duration, used = LOSS, resident >> layer & 1 == 1, 0.0, memory + size[layer]
    else:
        if problem.saved:
            ready = whole >> layer & 1 == 1 and has_input
        else:
            ready = (has_input or not problem.reads_input) and (resident >> layer & 1 == 1 or not problem.reads_output)
        op, duration = BACKWARD, problem.backward[layer]
        used = memory + size[layer - 1] + problem.backward_tmp[layer]
    if not ready or used > problem.budget:
        return False
    copied, copied_whole = states.copied[row], states.copied_whole[row]
    time = states.time[row] + duration
    after = phase + 1
    _reach(problem, states, queue, row, after, resident, whole, copied, copied_whole, time, used, op, layer)
    # Of what LOSS or B_i has read, that which the next backward reads too may be dropped and made again.
    last_read = layer if op == LOSS else layer - 1
    if problem.reads_output and last_read >= 1 and (op == LOSS or problem.reads_input):
        left = resident & ~(1 << last_read)
        _reach(problem, states, queue, row, after, left, whole, copied, copied_whole, time, used, op, layer)
    kept, kept_whole, _, _ = _needed(problem, after, resident, whole, copied, copied_whole)
    return used <= states.peak[row] and _memory(problem, after, kept, kept_whole) <= memory


def _make(problem: Problem, states: States, queue: Any, row: int, memory: float, layer: int) -> None:
    """Run layer forward, with and without leaving all that its backward needs."""
    phase, resident, whole = states.phase[row], states.resident[row], states.whole[row]
    copied, copied_whole = states.copied[row], states.copied_whole[row]
    first, bit, below = layer == phase + 1 and phase < problem.layers, 1 << layer, 1 << (layer - 1)
    if not (first or problem.again) or (layer > 1 and not resident & below):
        return
    after = layer if first else phase
    can_drop_input = layer > 1 and not whole & below
    time, tmp = states.time[row] + problem.forward[layer], problem.forward_tmp[layer]

    used = memory + problem.size[layer] + tmp
    to_read = problem.read[layer] + (0.0 if copied & bit else problem.write[layer])
    bare = _bare(problem, phase)
    if layer <= bare and used <= problem.budget and (first or to_read > problem.forward[layer]):
        for keeps in range(2 if first and to_read < math.inf else 1):
            made = resident if keeps == 1 else resident | bit
            for drops in range(2 if can_drop_input else 1):
                left = made & ~below if drops else made
                _reach(
                    problem, states, queue, row, after, left, whole, copied, copied_whole, time, used, FORWARD, layer
                )

    used = memory + problem.whole[layer] + tmp
    if not problem.saved or used > problem.budget:
        return
    if copied_whole & bit and problem.read_saved[layer] <= problem.forward[layer]:
        return
    writes = not copied_whole & bit and problem.write_saved[layer] < math.inf
    for keeps in range(3 if writes else 1):  # abar_i; of the written one a_i; nothing
        made = resident if keeps == 2 else resident | bit
        made_whole = whole | bit if keeps == 0 else whole
        on_disk = copied_whole if keeps == 0 else copied_whole | bit
        end = time if keeps == 0 else time + problem.write_saved[layer]
        for drops in range(2 if can_drop_input else 1):
            left = made & ~below if drops else made
            _reach(problem, states, queue, row, after, left, made_whole, copied, on_disk, end, used, RECORD, layer)


def _bring_back(problem: Problem, states: States, queue: Any, row: int, memory: float, layer: int) -> None:
    """Read what has been made before from disk."""
    phase, resident, whole = states.phase[row], states.resident[row], states.whole[row]
    copied, copied_whole, time = states.copied[row], states.copied_whole[row], states.time[row]
    bit = 1 << layer
    if phase < layer and phase < problem.layers:
        return
    resident |= bit
    end = time + problem.read[layer] + (0.0 if copied & bit else problem.write[layer])
    used = memory + problem.size[layer]
    if layer <= _bare(problem, phase) and end < math.inf and used <= problem.budget:
        paid = copied | bit if problem.write[layer] > 0 else copied
        _reach(problem, states, queue, row, phase, resident, whole, paid, copied_whole, end, used, READ, layer)
    end, used = time + problem.read_saved[layer], memory + problem.whole[layer]
    if copied_whole & bit and used <= problem.budget:
        for keeps in range(2 if layer <= _bare(problem, phase) else 1):  # abar_i; of it a_i
            left = whole if keeps else whole | bit
            _reach(
                problem, states, queue, row, phase, resident, left, copied, copied_whole, end, used, READ_SAVED, layer
            )


def _bare(problem: Problem, phase: int) -> int:
    """Return the last layer whose activation by itself anything still reads."""
    if phase <= problem.layers:
        return problem.layers
    layer = 2 * problem.layers + 1 - phase
    return layer if problem.reads_output else layer - 1


def _needed(
    problem: Problem, phase: int, resident: int, whole: int, copied: int, copied_whole: int
) -> tuple[int, int, int, int]:
    """Return the four sets without what nothing reads any more."""
    if phase <= problem.layers:
        return resident, whole, copied, copied_whole & ~whole
    some = (1 << (_bare(problem, phase) + 1)) - 1
    more = (1 << (2 * problem.layers + 2 - phase)) - 1
    whole &= more
    return resident & some | whole, whole, copied & some, copied_whole & more & ~whole


def _memory(problem: Problem, phase: int, resident: int, whole: int) -> float:
    """Return what is resident between two operations: a_0, activations, the gradient."""
    memory: float = problem.size[0]
    if phase > problem.layers:
        memory += problem.size[2 * problem.layers + 1 - phase]
    for layer in range(1, problem.layers + 1):
        if whole >> layer & 1:
            memory += problem.whole[layer]
        elif resident >> layer & 1:
            memory += problem.size[layer]
    return memory


def _to_go(problem: Problem, phase: int, resident: int, whole: int, copied: int, copied_whole: int) -> float:
    """Return a time that is needed in any case: the backwards, and each thing that they read made or read once."""
    layers = problem.layers
    last = layers if phase <= layers else 2 * layers + 1 - phase
    total = 0.0
    for layer in range(1, last + 1):
        total += problem.backward[layer]
        bit = 1 << layer
        if problem.saved:
            there = whole & bit
            from_disk = problem.read_saved[layer] if copied_whole & bit else math.inf
        else:
            there = resident & bit or (layer == last and phase > layers and not problem.reads_output)
            from_disk = problem.read[layer] + (0.0 if copied & bit else problem.write[layer])
        if not there:
            made = problem.forward[layer]
            if phase <= layers and layer > phase:
                total += made
            else:
                total += min(made, from_disk) if problem.again else from_disk
    return total + _once_more(problem, phase, resident, whole) if problem.saved else total


def _once_more(problem: Problem, phase: int, resident: int, whole: int) -> float:
    """Return a time that is needed beside running each layer once of which abar_i is not there; forever if it is
    certain that a backward does not fit, because each abar_i stays until its own.

    If abar_i and a_(i-1) are not there, all layers between what is and i run before B_i, and those again later whose
    abar does not fit beside B_i. The best that fits is at most what would be with fractions of layers. Gaps between
    what is resident have no layers in common.
    """
    layers, size = problem.layers, problem.size
    made = phase if phase <= layers else 2 * layers + 1 - phase
    kept, total, gap, most = 0.0, 0.0, 0, 0.0
    for layer in range(1, layers + 1 if phase <= layers else made + 1):
        there = layer == 1 or resident >> (layer - 1) & 1
        below = size[layer - 1] if layer > 1 and not whole >> (layer - 1) & 1 else 0.0
        room = problem.budget - kept - problem.whole[layer]
        room -= size[0] + size[layer] + size[layer - 1] + problem.backward_tmp[layer]
        if room < below:
            return math.inf
        if whole >> layer & 1:
            kept += problem.whole[layer]
        elif layer <= made and not there and not problem.copies:
            first = layer - 1
            while first > 1 and not resident >> (first - 1) & 1:
                first -= 1
            again = 0.0
            for other in problem.by_value:
                if first <= other < layer:
                    weight = problem.whole[other]
                    if weight > room:
                        again += problem.forward[other] * (1 - room / weight)
                    room = max(0.0, room - weight)
            # Those of one gap run the same layers: the one that needs most counts.
            if first != gap:
                total, gap, most = total + most, first, 0.0
            most = max(most, again * (1 - 1e-9))  # rounding must not make it too much
    return total + most


def _reach(
    problem: Problem,
    states: States,
    queue: Any,
    before: int,
    phase: int,
    resident: int,
    whole: int,
    copied: int,
    copied_whole: int,
    time: float,
    used: float,
    op: int,
    layer: int,
) -> None:
    """Note a way to a state, if it is the best so far."""
    resident, whole, copied, copied_whole = _needed(problem, phase, resident, whole, copied, copied_whole)
    peak = used if before < 0 else max(used, states.peak[before])
    mixed = phase * 0x9E3779B1 + resident * 0x85EBCA6B + whole * 0xC2B2AE35
    mixed ^= mixed >> 15
    mixed = mixed * 0x2C1B3C6D
    mixed ^= mixed >> 13
    last = len(states.slots) - 1
    slot = mixed & last
    row = states.slots[slot]
    while row >= 0 and not (
        states.phase[row] == phase and states.resident[row] == resident and states.whole[row] == whole
    ):
        slot = (slot + 1) & last
        row = states.slots[slot]
    head = row
    while row >= 0:  # those with the same in memory, and something else on disk
        if _as_good(problem, states, row, time, peak, copied, copied_whole):
            return
        row = states.next[row]
    to_go = _to_go(problem, phase, resident, whole, copied, copied_whole)
    row = states.count[0]
    if to_go == math.inf:
        return
    states.count[0] += 1
    if row >= len(states.phase):
        return
    states.phase[row], states.resident[row], states.whole[row] = phase, resident, whole
    states.copied[row], states.copied_whole[row] = copied, copied_whole
    states.time[row], states.peak[row] = time, peak
    states.before[row], states.op[row], states.layer[row] = before, op, layer
    states.slots[slot], states.next[row] = row, head
    heappush(queue, (time + to_go, peak, -phase, time, row))
    one_before = row
    while head >= 0:
        after = states.next[head]
        if _as_good(
            problem, states, row, states.time[head], states.peak[head], states.copied[head], states.copied_whole[head]
        ):
            states.time[head] = -1.0
            states.next[one_before] = after
        else:
            one_before = head
        head = after


def _as_good(
    problem: Problem, states: States, row: int, time: float, peak: float, copied: int, copied_whole: int
) -> bool:
    """Whether a state is as good as one with the same in memory: if need be it pays for writes that the other has."""
    if copied_whole & ~states.copied_whole[row]:
        return False
    owed: float = states.time[row]
    missing = copied & ~states.copied[row]
    if missing and owed <= time:
        for layer in range(1, problem.layers + 1):
            if missing >> layer & 1:
                owed += problem.write[layer]
    return bool(owed < time or (owed == time and states.peak[row] <= peak))
