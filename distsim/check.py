"""The checker: proves that a schedule leaves every rank with every contribution exactly once.

The schedule is replayed on random 64-bit integers with wrap-around sums: exact, and a contribution counted
twice or lost changes the sum (a wrong schedule passes with probability about 2^-64). Beside it goes a replay
with a combiner that commutes but does not associate (as floating-point addition does): it proves that all
holders of a chunk have summed it in the same order, so that ranks agree to the bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from distsim.collectives import Flags, find
from distsim.compiled import call
from distsim.dependencies import Dependencies, dependencies
from distsim.errors import ScheduleError
from distsim.schedule import Exchange, Schedule, Source

Words = npt.NDArray[np.uint64]
WORD = 0xFFFF_FFFF_FFFF_FFFF


def check(exchange: Exchange, seed: int = 0, plans: Sequence[Dependencies] | None = None) -> None:
    """Prove both schedules of an exchange, and that the second shares just what the first has updated.

    Of another collective than all-reduce: prove that its one schedule does what the collective is defined to do.
    `plans` are the schedules' dependencies, where they are known already.

    Raises: ScheduleError naming the schedule, rank, chunk and contribution that are wrong.
    """
    if exchange.collective != "all-reduce":
        _check_collective(exchange, seed, plans)
        return
    check_schedule(exchange.gradients, seed, plans[0] if plans else None)
    workers = slice(0, exchange.workers)
    sized = exchange.gradients.chunk_elements > 0
    final = exchange.parameters
    if not 1 <= exchange.workers <= exchange.ranks:
        raise ScheduleError(f"an exchange of {exchange.workers} workers cannot run on {exchange.ranks} ranks")
    is_worker = np.arange(exchange.ranks) < exchange.workers
    strange = (exchange.gradients.contributes != is_worker[:, None]) & sized
    if strange.any():
        rank, chunk = (int(index) for index in np.argwhere(strange)[0])
        who = f"worker {rank} does not contribute" if is_worker[rank] else f"rank {rank}, a server, contributes"
        raise ScheduleError(f"{who} to chunk {chunk} of the gradients")
    if final is None:
        if not exchange.gradients.must_hold[workers, sized].all():
            raise ScheduleError("some worker never gets the gradients, and no parameters are shared")
        return
    if final.ranks != exchange.ranks:
        raise ScheduleError(f"gradients go among {exchange.ranks} ranks, parameters among {final.ranks}")
    check_schedule(final, seed, plans[1] if plans else None)
    if not np.array_equal(final.chunk_elements, exchange.gradients.chunk_elements):
        raise ScheduleError("gradients and parameters are cut into different chunks")
    if (final.contributes & ~exchange.gradients.must_hold)[:, sized].any():
        raise ScheduleError("parameters are shared by a rank that has not updated them")
    if (final.contributes.sum(axis=0)[sized] != 1).any():
        raise ScheduleError("each chunk of parameters must come from exactly one rank: weights are not summed")
    if not final.must_hold[workers, sized].all():
        raise ScheduleError("some worker never gets the updated parameters")


def _check_collective(exchange: Exchange, seed: int, plans: Sequence[Dependencies] | None) -> None:
    """Prove a collective that is no training step against its definition.

    Raises: ScheduleError naming what differs from the definition, or as `check_schedule` does.
    """
    schedule, name = exchange.gradients, exchange.collective
    if exchange.parameters is not None:
        raise ScheduleError(f"{name} is no training step: it shares no parameters")
    if exchange.workers != exchange.ranks:
        raise ScheduleError(f"{name} of {exchange.workers} workers goes among {exchange.ranks} ranks")
    definition = find(name)
    sized = schedule.chunk_elements > 0
    for what in ("contributes", "must_hold"):
        wanted: Flags = getattr(definition, what)
        differs = (getattr(schedule, what) != wanted(schedule.ranks, schedule.chunks)) & sized
        if differs.any():
            rank, chunk = (int(index) for index in np.argwhere(differs)[0])
            verb = "contribute to" if what == "contributes" else "have to hold"
            should = "does not" if getattr(schedule, what)[rank, chunk] else "does"
            raise ScheduleError(f"in {name} of {schedule.ranks} ranks, rank {rank} {should} {verb} chunk {chunk}")
    check_schedule(schedule, seed, plans[0] if plans else None)


def check_schedule(schedule: Schedule, seed: int = 0, waits: Dependencies | None = None) -> None:
    """Prove one schedule against its postcondition; `waits` are its dependencies, where they are known already.

    Raises: ScheduleError naming the first rank and chunk that end wrong, and how.
    """
    random = np.random.default_rng(seed)
    shape = (schedule.ranks, schedule.chunks)
    values = random.integers(0, 2**64, size=shape, dtype=np.uint64)
    needed = schedule.must_hold & (schedule.chunk_elements > 0)
    lonely = needed.any(axis=0) & ~schedule.contributes.any(axis=0)
    if lonely.any():
        raise ScheduleError(f"chunk {int(np.argmax(lonely))} must be held, but no rank contributes to it")

    waits = waits or dependencies(schedule)
    held, work, mixed = replay(schedule, waits, values)
    expected = np.where(schedule.contributes, values, np.uint64(0)).sum(axis=0, dtype=np.uint64)
    wrong = needed & ~(held & (work == expected))
    if wrong.any():
        rank, chunk = (int(index) for index in np.argwhere(wrong)[0])
        raise ScheduleError(f"rank {rank} ends with a wrong chunk {chunk}: {_explain(schedule, rank, chunk)}")
    first = np.argmax(needed, axis=0)
    differs = needed & (mixed != mixed[first, np.arange(schedule.chunks)])
    if differs.any():
        rank, chunk = (int(index) for index in np.argwhere(differs)[0])
        raise ScheduleError(
            f"ranks {first[chunk]} and {rank} sum chunk {chunk} in different orders: "
            "in floating point they would not agree to the bit"
        )


def replay(schedule: Schedule, waits: Dependencies, contributions: Words) -> tuple[npt.NDArray[np.bool_], Words, Words]:
    """Run the schedule step by step on `contributions`, shape (ranks, chunks).

    Returns which running values exist afterwards, the values, and the values had they been combined so that
    order shows; shape (ranks, chunks) each.
    Raises: ScheduleError if a rank sends what it does not have.
    """
    begins = np.flatnonzero(np.diff(schedule.step, prepend=np.int32(-1)))
    widest = int(np.diff(begins, append=schedule.rows).max(initial=1))  # rows of a step, of which few may have any
    own = np.ascontiguousarray(contributions).reshape(-1)
    has = np.array(schedule.contributes).reshape(-1)
    held, work, mixed, bad = call(
        _replay,
        schedule.rows,
        schedule.chunks,
        schedule.step,
        schedule.src,
        schedule.chunk,
        schedule.source == Source.INPUT,
        waits.group_of_row,
        waits.member_ptr,
        waits.members,
        waits.dst,
        waits.joins_own,
        own,
        has,
        has.copy(),
        own.copy(),
        own.copy(),
        np.zeros(widest, np.uint64),
        np.zeros(widest, np.uint64),
    )
    if bad >= 0:
        raise ScheduleError(f"the sender holds nothing to send: {schedule.describe(int(bad))}")
    shape = contributions.shape
    return (
        np.asarray(held, np.bool_).reshape(shape),
        np.asarray(work, np.uint64).reshape(shape),
        np.asarray(mixed, np.uint64).reshape(shape),
    )


def _replay(
    chunks: int,
    step: Any,
    src: Any,
    chunk: Any,
    own_row: Any,
    group_of_row: Any,
    member_ptr: Any,
    members: Any,
    dst: Any,
    joins_own: Any,
    own: Any,
    has: Any,
    held: Any,
    work: Any,
    mixed: Any,
    staged: Any,
    staged_mixed: Any,
) -> Any:
    """Stage all that a step sends, then apply it: arrivals in ascending rank, the receiver's own in its place.

    Returns what `replay` does, and the first row whose sender has nothing to send, -1 for none.
    """
    low, rows = 0, len(step)
    while low < rows:
        high = low
        while high < rows and step[high] == step[low]:
            place = src[high] * chunks + chunk[high]
            if own_row[high]:
                if not has[place]:
                    return held, work, mixed, high
                staged[high - low] = own[place]
                staged_mixed[high - low] = own[place]
            else:
                if not held[place]:
                    return held, work, mixed, high
                staged[high - low] = work[place]
                staged_mixed[high - low] = mixed[place]
            high += 1
        done = -1
        for first_row in range(low, high):
            group = group_of_row[first_row]
            if group <= done:  # groups come in the order of their first rows
                continue
            done = group
            place = dst[group] * chunks + chunk[first_row]
            first, last = member_ptr[group], member_ptr[group + 1]
            waiting = joins_own[group]
            total, order = work[place], mixed[place]
            begun = False
            for i in range(first, last + 1):
                # The receiver's own value comes before the first sender of a higher rank, or last.
                if waiting and (i == last or src[members[i]] > dst[group]):
                    waiting = False
                    if begun:
                        total = _add(total, work[place])
                        order = _mix(order, mixed[place])
                    else:
                        total, order, begun = work[place], mixed[place], True
                if i == last:
                    break
                arrival = members[i] - low
                if begun:
                    total = _add(total, staged[arrival])
                    order = _mix(order, staged_mixed[arrival])
                else:
                    total, order, begun = staged[arrival], staged_mixed[arrival], True
            held[place], work[place], mixed[place] = True, total, order
        low = high
    return held, work, mixed, -1


def _add(left: Any, right: Any) -> Any:
    """Add 64-bit words, wrapping around."""
    return (left + right) & WORD


def _mix(left: Any, right: Any) -> Any:
    """Combine so that order shows: commutative, not associative (the finaliser of SplitMix64 on the sum)."""
    word = (left + right) & WORD
    word = ((word ^ (word >> 30)) * 0xBF58476D1CE4E5B9) & WORD
    word = ((word ^ (word >> 27)) * 0x94D049BB133111EB) & WORD
    return word ^ (word >> 31)


def _explain(schedule: Schedule, rank: int, chunk: int) -> str:
    """Say which contributions a rank's chunk has lost or counted several times, by counting each apart."""
    rows = schedule.chunk == chunk
    alone = Schedule.of(
        ranks=schedule.ranks,
        chunk_elements=schedule.chunk_elements[[chunk]],
        step=schedule.step[rows],
        src=schedule.src[rows],
        dst=schedule.dst[rows],
        chunk=0,
        op=schedule.op[rows],
        source=schedule.source[rows],
        contributes=schedule.contributes[:, [chunk]],
        must_hold=schedule.must_hold[:, [chunk]],
    )
    waits = dependencies(alone)
    counts = np.zeros(schedule.ranks, dtype=np.uint64)
    for source in range(0, schedule.ranks, 8):  # a byte for each of eight contributors
        some = np.arange(source, min(source + 8, schedule.ranks))
        units = np.zeros((schedule.ranks, 1), dtype=np.uint64)
        units[some, 0] = np.uint64(1) << np.uint64(8) * (some - source).astype(np.uint64)
        held, work, _ = replay(alone, waits, units)
        if not held[rank, 0]:
            return "it never receives anything"
        counts[some] = np.frombuffer(work[rank, 0].astype("<u8").tobytes(), np.uint8)[: len(some)]
    wanted = alone.contributes[:, 0].astype(np.uint64)
    faults = [
        f"the contribution of rank {source} is there {counts[source]} times"
        if counts[source]
        else f"the contribution of rank {source} is missing"
        for source in np.flatnonzero(counts != wanted)
    ]
    return "; ".join(faults[:4]) + (f"; and {len(faults) - 4} more" if len(faults) > 4 else "")
