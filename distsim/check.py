"""The checker: proves that a schedule leaves every rank with every contribution exactly once.

The schedule is replayed on random 64-bit integers with wrap-around sums: exact, and a contribution counted
twice or lost changes the sum (a wrong schedule passes with probability about 2^-64). A second replay, with
a combiner that commutes but does not associate (as floating-point addition does), proves that all holders of
a chunk have summed it in the same order, so that ranks agree to the bit.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from distsim.errors import ScheduleError
from distsim.schedule import Dependencies, Exchange, Schedule, Source, dependencies

Words = npt.NDArray[np.uint64]
Combine = Callable[[Words, Words], Words]


def check(exchange: Exchange, seed: int = 0) -> None:
    """Prove both schedules of an exchange, and that the second shares just what the first has updated.

    Raises: ScheduleError naming the schedule, rank, chunk and contribution that are wrong.
    """
    check_schedule(exchange.gradients, seed)
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
    check_schedule(final, seed)
    if not np.array_equal(final.chunk_elements, exchange.gradients.chunk_elements):
        raise ScheduleError("gradients and parameters are cut into different chunks")
    if (final.contributes & ~exchange.gradients.must_hold)[:, sized].any():
        raise ScheduleError("parameters are shared by a rank that has not updated them")
    if (final.contributes.sum(axis=0)[sized] != 1).any():
        raise ScheduleError("each chunk of parameters must come from exactly one rank: weights are not summed")
    if not final.must_hold[workers, sized].all():
        raise ScheduleError("some worker never gets the updated parameters")


def check_schedule(schedule: Schedule, seed: int = 0) -> None:
    """Prove one schedule against its postcondition.

    Raises: ScheduleError naming the first rank and chunk that end wrong, and how.
    """
    random = np.random.default_rng(seed)
    shape = (schedule.ranks, schedule.chunks)
    values = random.integers(0, 2**64, size=shape, dtype=np.uint64)
    needed = schedule.must_hold & (schedule.chunk_elements > 0)
    lonely = needed.any(axis=0) & ~schedule.contributes.any(axis=0)
    if lonely.any():
        raise ScheduleError(f"chunk {int(np.argmax(lonely))} must be held, but no rank contributes to it")

    waits = dependencies(schedule)
    work, held = replay(schedule, waits, values, np.add)
    expected = np.where(schedule.contributes, values, np.uint64(0)).sum(axis=0, dtype=np.uint64)
    wrong = needed & ~(held & (work == expected))
    if wrong.any():
        rank, chunk = (int(index) for index in np.argwhere(wrong)[0])
        raise ScheduleError(f"rank {rank} ends with a wrong chunk {chunk}: {_explain(schedule, rank, chunk)}")

    rounded, _ = replay(schedule, waits, values, _mix)
    first = np.argmax(needed, axis=0)
    differs = needed & (rounded != rounded[first, np.arange(schedule.chunks)])
    if differs.any():
        rank, chunk = (int(index) for index in np.argwhere(differs)[0])
        raise ScheduleError(
            f"ranks {first[chunk]} and {rank} sum chunk {chunk} in different orders: "
            "in floating point they would not agree to the bit"
        )


def replay(
    schedule: Schedule, waits: Dependencies, contributions: Words, combine: Combine
) -> tuple[Words, npt.NDArray[np.bool_]]:
    """Run the schedule step by step on `contributions`, shape (ranks, chunks, ...).

    Returns the running values afterwards and which of them exist at all, shape (ranks, chunks).
    Raises: ScheduleError if a rank sends what it does not have.
    """
    work = contributions.copy()
    held = schedule.contributes.copy()
    steps, first = np.unique(schedule.step, return_index=True)
    row_ptr = np.append(first, schedule.messages)
    by_step = np.argsort(waits.step, kind="stable")
    group_ptr = np.append(np.searchsorted(waits.step[by_step], steps), waits.groups)
    staged = np.empty((schedule.messages, *contributions.shape[2:]), dtype=np.uint64)
    for step in range(len(steps)):
        rows = slice(row_ptr[step], row_ptr[step + 1])
        src, chunk, own = schedule.src[rows], schedule.chunk[rows], schedule.source[rows] == Source.INPUT
        absent = ~np.where(own, schedule.contributes[src, chunk], held[src, chunk])
        if absent.any():
            row = int(row_ptr[step] + np.argmax(absent))
            raise ScheduleError(f"the sender holds nothing to send: {schedule.describe(row)}")
        staged[rows] = work[src, chunk]
        staged[rows][own] = contributions[src[own], chunk[own]]
        groups = by_step[group_ptr[step] : group_ptr[step + 1]]
        at = waits.dst[groups], waits.chunk[groups]
        work[at] = _apply(schedule, waits, groups, staged, work[at], combine)
        held[at] = True
    return work, held


def _apply(
    schedule: Schedule,
    waits: Dependencies,
    groups: npt.NDArray[np.int64],
    staged: Words,
    own: Words,
    combine: Combine,
) -> Words:
    """Fold each group's arrivals in ascending rank, the receiver's own value in its place; copies stand alone."""
    first, last = waits.member_ptr[groups], waits.member_ptr[groups + 1]
    rows = waits.members[_ranges(first, last)]
    joins = waits.joins_own[groups]
    of_group = np.concatenate((np.repeat(np.arange(len(groups)), last - first), np.flatnonzero(joins)))
    rank = np.concatenate((schedule.src[rows], waits.dst[groups[joins]]))
    order = np.lexsort((rank, of_group))
    terms = np.concatenate((staged[rows], own[joins]))[order]
    counts = np.bincount(of_group, minlength=len(groups))
    start = np.cumsum(counts) - counts
    total: Words = terms[start]
    for position in range(1, int(counts.max(initial=0))):
        more = np.flatnonzero(counts > position)
        total[more] = combine(total[more], terms[start[more] + position])
    return total


def _ranges(first: npt.NDArray[np.int32], last: npt.NDArray[np.int32]) -> npt.NDArray[np.int64]:
    """Concatenate the ranges first[i]..last[i]."""
    sizes = (last - first).astype(np.int64)
    ends = np.cumsum(sizes)
    return np.asarray(np.arange(int(sizes.sum())) + np.repeat(first - (ends - sizes), sizes))


def _mix(left: Words, right: Words) -> Words:
    """Combine so that order shows: commutative, not associative (the finaliser of SplitMix64 on the sum)."""
    word = left + right
    word = (word ^ (word >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    word = (word ^ (word >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return word ^ (word >> np.uint64(31))


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
    units = np.eye(schedule.ranks, dtype=np.uint64)[:, None, :]
    work, held = replay(alone, dependencies(alone), units, np.add)
    if not held[rank, 0]:
        return "it never receives anything"
    wanted = alone.contributes[:, 0].astype(np.uint64)
    faults = [
        f"the contribution of rank {source} is there {work[rank, 0, source]} times"
        if work[rank, 0, source]
        else f"the contribution of rank {source} is missing"
        for source in np.flatnonzero(work[rank, 0] != wanted)
    ]
    return "; ".join(faults[:4]) + (f"; and {len(faults) - 4} more" if len(faults) > 4 else "")
