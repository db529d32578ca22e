"""Schedules to test with, and independent references for them, written from the design and not from the code."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from hypothesis import strategies as st

from distsim.dependencies import Dependencies
from distsim.schedule import Exchange, Op, Schedule, Source, split

WORD = 2**64


class Row(NamedTuple):
    """One transfer, as a plain tuple."""

    step: int
    src: int
    dst: int
    chunk: int
    op: int
    source: int


def rows_of(schedule: Schedule) -> list[Row]:
    """Return the table as tuples."""
    columns = (schedule.step, schedule.src, schedule.dst, schedule.chunk, schedule.op, schedule.source)
    return [Row(*row) for row in zip(*(column.tolist() for column in columns), strict=True)]


def table(
    rows: Sequence[Row],
    *,
    ranks: int,
    sizes: Sequence[int] = (1,),
    contributes: object = True,
    must_hold: object = True,
) -> Schedule:
    """Build a schedule from tuples."""
    columns = np.array(rows, dtype=np.int64).reshape(-1, 6).T
    return Schedule.of(
        ranks=ranks,
        chunk_elements=np.array(sizes, dtype=np.int64),
        step=columns[0],
        src=columns[1],
        dst=columns[2],
        chunk=columns[3],
        op=columns[4],
        source=columns[5],
        contributes=np.asarray(contributes, dtype=bool),
        must_hold=np.asarray(must_hold, dtype=bool),
    )


def all_reduce(strategy: str, schedule: Schedule) -> Exchange:
    """Wrap a schedule as an exchange in which every rank is a worker."""
    return Exchange(strategy=strategy, workers=schedule.ranks, gradients=schedule)


def recursive_doubling(ranks: int = 4, params: int = 5) -> Schedule:
    """All-reduce in log2(ranks) steps: at step s, rank r and r ^ 2^s add each other's running sums."""
    rows = [
        Row(step, rank, rank ^ (1 << step), 0, Op.REDUCE, Source.WORK)
        for step in range(ranks.bit_length() - 1)
        for rank in range(ranks)
    ]
    return table(rows, ranks=ranks, sizes=[params])


def reduce_scatter(ranks: int, params: int) -> Schedule:
    """Every rank sends its part of chunk c straight to rank c."""
    rows = [
        Row(0, src, dst, dst, Op.REDUCE, Source.INPUT) for src in range(ranks) for dst in range(ranks) if src != dst
    ]
    return table(rows, ranks=ranks, sizes=split(params, ranks).tolist(), must_hold=np.eye(ranks))


def all_gather(ranks: int, params: int) -> Schedule:
    """Rank c holds chunk c; all pass on around a ring what they received last."""
    rows = [
        Row(step, rank, (rank + 1) % ranks, (rank - step) % ranks, Op.COPY, Source.WORK)
        for step in range(ranks - 1)
        for rank in range(ranks)
    ]
    return table(rows, ranks=ranks, sizes=split(params, ranks).tolist(), contributes=np.eye(ranks))


def broadcast(ranks: int, params: int) -> Schedule:
    """Binomial tree from rank 0: who has the array at step s passes it on 2^s ranks further."""
    rows = [
        Row(step, src, src + (1 << step), 0, Op.COPY, Source.WORK)
        for step in range((ranks - 1).bit_length())
        for src in range(1 << step)
        if src + (1 << step) < ranks
    ]
    return table(rows, ranks=ranks, sizes=[params], contributes=np.arange(ranks)[:, None] == 0)


def reduce_to_zero(ranks: int, params: int) -> Schedule:
    """Binomial tree to rank 0: the broadcast backwards."""
    last = (ranks - 1).bit_length() - 1
    rows = [
        Row(last - row.step, row.dst, row.src, 0, Op.REDUCE, Source.WORK) for row in rows_of(broadcast(ranks, params))
    ]
    return table(rows, ranks=ranks, sizes=[params], must_hold=np.arange(ranks)[:, None] == 0)


def personalised(ranks: int, params: int) -> Schedule:
    """Personalised all-to-all: chunk src * ranks + dst goes from src to dst, and nowhere else."""
    src, dst = np.divmod(np.arange(ranks * ranks), ranks)
    each = np.arange(ranks)[:, None]
    rows = [
        Row(0, a, b, a * ranks + b, Op.COPY, Source.INPUT)
        for a, b in zip(src.tolist(), dst.tolist(), strict=True)
        if a != b
    ]
    sizes = split(params, ranks * ranks).tolist()
    return table(rows, ranks=ranks, sizes=sizes, contributes=each == src, must_hold=each == dst)


COLLECTIVES: dict[str, Callable[[int, int], Schedule]] = {
    "recursive doubling": recursive_doubling,
    "reduce-scatter": reduce_scatter,
    "all-gather": all_gather,
    "broadcast": broadcast,
    "reduce": reduce_to_zero,
    "personalised all-to-all": personalised,
}


@st.composite
def random_schedules(draw: st.DrawFn, *, max_rows: int = 14, all_contribute: bool = True) -> Schedule:
    """Draw any well-formed schedule, right or wrong, some of its chunks without parameters."""
    ranks = draw(st.integers(1, 4))
    sizes = draw(st.lists(st.integers(0, 3), min_size=1, max_size=3))
    some_row = st.tuples(
        st.integers(0, 4),
        st.integers(0, ranks - 1),
        st.integers(0, ranks - 1),
        st.integers(0, len(sizes) - 1),
        st.sampled_from([Op.REDUCE, Op.REDUCE, Op.COPY]),
        st.sampled_from([Source.WORK, Source.WORK, Source.INPUT]),
    )
    rows: list[Row] = []
    for row in map(Row._make, draw(st.lists(some_row, max_size=max_rows))):
        beside = [other for other in rows if (other.step, other.dst, other.chunk) == (row.step, row.dst, row.chunk)]
        if row.src != row.dst and not any(Op.COPY in (row.op, other.op) for other in beside):
            rows.append(row)
    shape = (ranks, len(sizes))
    flags = st.lists(st.booleans(), min_size=ranks * len(sizes), max_size=ranks * len(sizes))
    contributes = True if all_contribute else np.reshape(draw(flags), shape)
    return table(rows, ranks=ranks, sizes=sizes, contributes=contributes, must_hold=np.reshape(draw(flags), shape))


@st.composite
def right_schedules(draw: st.DrawFn) -> Schedule:
    """Draw a correct all-reduce: for each chunk a random tree to a random root, and another one back from it.

    Some ranks contribute nothing (but pass on what they get), some do not want the sum.
    """
    ranks = draw(st.integers(1, 7))
    sizes = draw(st.lists(st.integers(0, 4), min_size=1, max_size=3))
    contributes = np.ones((ranks, len(sizes)), dtype=bool)
    rows: list[Row] = []
    for chunk in range(len(sizes)):
        order = draw(st.permutations(range(ranks)))
        parent = {order[i]: order[draw(st.integers(0, i - 1))] for i in range(1, ranks)}
        sent_at: dict[int, int] = {}
        for rank in reversed(order[1:]):  # children come after their parents in `order`
            heard = [sent_at[child] for child in parent if parent[child] == rank]
            sent_at[rank] = max(heard, default=-1) + 1 + draw(st.integers(0, 2))
            gives: bool = draw(st.booleans())
            contributes[rank, chunk] = gives or not heard
            running: bool = draw(st.booleans())  # a rank that has heard nothing may send either value
            source = Source.WORK if heard or running else Source.INPUT
            rows.append(Row(sent_at[rank], rank, parent[rank], chunk, Op.REDUCE, source))
        root_gives: bool = draw(st.booleans())
        contributes[order[0], chunk] = root_gives or ranks == 1
        ready = {order[0]: max(sent_at.values(), default=-1) + 1}
        for rank in draw(st.permutations(order[1:])):
            source_rank = draw(st.sampled_from(sorted(ready)))
            step = ready[source_rank] + draw(st.integers(0, 2))
            rows.append(Row(step, source_rank, rank, chunk, Op.COPY, Source.WORK))
            ready[rank] = step + 1
    return table(draw(st.permutations(rows)), ranks=ranks, sizes=sizes, contributes=contributes)


Event = tuple[str, int]
"""("read", row) or ("apply", row)."""


def waits_by_the_rules(rows: Sequence[Row]) -> set[tuple[Event, Event]]:
    """Every pair (before, after) that DESIGN.md's rules of the schedule ask for, row by row.

    The rows of one (step, dst, chunk) are applied as one, which shows as a pair in both directions.
    """
    pairs: set[tuple[Event, Event]] = set()
    for i, row in enumerate(rows):
        pairs.add((("read", i), ("apply", i)))
        for j, other in enumerate(rows):
            # 1. A work read waits for every apply into (src, chunk) of an earlier step.
            into_source = (other.dst, other.chunk) == (row.src, row.chunk)
            if row.source == Source.WORK and into_source and other.step < row.step:
                pairs.add((("apply", j), ("read", i)))
            # 2. An apply waits for every work read of (dst, chunk) of the same or an earlier step.
            of_target = (other.src, other.chunk) == (row.dst, row.chunk)
            if other.source == Source.WORK and of_target and other.step <= row.step:
                pairs.add((("read", j), ("apply", i)))
            # 3. Applies to one (dst, chunk) run in step order, those of one step together.
            same_target = (other.dst, other.chunk) == (row.dst, row.chunk)
            if same_target and i != j and other.step <= row.step:
                pairs.add((("apply", j), ("apply", i)))
    return pairs


Combine = Callable[[int, int], int]


def add(left: int, right: int) -> int:
    """Add 64-bit words, wrapping around."""
    return (left + right) % WORD


def mix(left: int, right: int) -> int:
    """Combine 64-bit words so that the order of summation shows: the checker's own combiner."""
    word = (left + right) % WORD
    word = ((word ^ (word >> 30)) * 0xBF58476D1CE4E5B9) % WORD
    word = ((word ^ (word >> 27)) * 0x94D049BB133111EB) % WORD
    return word ^ (word >> 31)


@dataclass(frozen=True)
class Memory:
    """What an execution left behind."""

    work: list[list[int | None]]
    """Running values by rank and chunk."""
    torn: int
    """Reads during which the value changed."""


def interleave(
    schedule: Schedule, waits: Dependencies, values: Sequence[Sequence[int]], combine: Combine, seed: int, gated: bool
) -> Memory:
    """Execute a schedule on memory, in a random order of all that `waits` leaves open.

    A transfer starts, reads its source at any time until it ends, and ends: its data is then staged. An
    apply changes memory at once. With `gated` off the applies ignore `gates_group`.
    """
    chance = random.Random(seed)
    rows = rows_of(schedule)
    contributes = schedule.contributes.tolist()
    work: list[list[int | None]] = [
        [value if there else None for value, there in zip(*pair, strict=True)]
        for pair in zip(values, contributes, strict=True)
    ]
    inputs = [list(line) for line in work]

    # Nodes: start of row i, end of row i, apply of group g.
    count = len(rows)
    before: list[list[int]] = [[] for _ in range(2 * count + waits.groups)]
    for i in range(count):
        before[count + i].append(i)
        before[2 * count + int(waits.group_of_row[i])].append(count + i)
        if waits.after_group[i] >= 0:
            before[i].append(2 * count + int(waits.after_group[i]))
        if gated and waits.gates_group[i] >= 0:
            before[2 * count + int(waits.gates_group[i])].append(count + i)
    for group in range(waits.groups):
        if waits.previous[group] >= 0:
            before[2 * count + group].append(2 * count + int(waits.previous[group]))

    def source(i: int) -> int | None:
        return (inputs if rows[i].source == Source.INPUT else work)[rows[i].src][rows[i].chunk]

    staged: dict[int, int | None] = {}
    torn = 0
    done: set[int] = set()
    while len(done) < len(before):
        ready = [node for node, needed in enumerate(before) if node not in done and done.issuperset(needed)]
        assert ready, "the waits go round in a circle"
        node = chance.choice(ready)
        done.add(node)
        if node < count:
            staged[node] = source(node)
        elif node < 2 * count:
            i = node - count
            torn += staged[i] != source(i)
            if chance.random() < 0.5:  # the read happened just before the end and not at the start
                staged[i] = source(i)
        else:
            group = node - 2 * count
            members = waits.rows_of(group).tolist()
            rank, chunk = rows[members[0]].dst, rows[members[0]].chunk
            work[rank][chunk] = landed(rows, members, work[rank][chunk], staged, combine)
    return Memory(work=work, torn=torn)


def landed(
    rows: Sequence[Row],
    members: Sequence[int],
    own: int | None,
    staged: dict[int, int | None],
    combine: Combine,
) -> int | None:
    """Return the value after all rows of one (step, dst, chunk) were applied to `own`."""
    if rows[members[0]].op == Op.COPY:
        return staged[members[0]]
    terms = [(rows[i].src, staged[i]) for i in members]
    if own is not None:
        terms.append((rows[members[0]].dst, own))
    terms.sort(key=lambda term: term[0])
    total = terms[0][1]
    for _, term in terms[1:]:
        total = None if total is None or term is None else combine(total, term)
    return total
