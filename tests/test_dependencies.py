"""Dependencies: the waits against the design's rules and random orders, however far apart ranks and steps are."""

from __future__ import annotations

import tracemalloc
from typing import Any

import numpy as np
import pytest
from helpers import (
    COLLECTIVES,
    Combine,
    Event,
    Row,
    add,
    all_reduce,
    interleave,
    mix,
    random_schedules,
    recursive_doubling,
    rows_of,
    table,
    waits_by_the_rules,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from distsim import compiled, exchanges
from distsim.check import replay
from distsim.cluster import ideal
from distsim.dependencies import Dependencies, dependencies
from distsim.engine import run
from distsim.errors import ScheduleError
from distsim.lower import Posting, lower
from distsim.places import places
from distsim.schedule import Op, Schedule, Source

PING = Row(0, 0, 1, 0, Op.REDUCE, Source.WORK)
POSTINGS: tuple[Posting, ...] = ("eager", "rounds")


def reachable(pairs: set[tuple[Event, Event]]) -> set[tuple[Event, Event]]:
    """Close a relation transitively."""
    following: dict[Event, set[Event]] = {}
    for before, after in pairs:
        following.setdefault(before, set()).add(after)
    closed = set()
    for first in following:
        stack, seen = [first], set[Event]()
        while stack:
            for after in following.get(stack.pop(), set()) - seen:
                seen.add(after)
                stack.append(after)
        closed |= {(first, after) for after in seen}
    return closed


def derived(waits: Dependencies, rows: int) -> set[tuple[Event, Event]]:
    """The waits that `dependencies` gives, between events of rows."""
    pairs: set[tuple[Event, Event]] = set()
    for row in range(rows):
        after, gates = int(waits.after_group[row]), int(waits.gates_group[row])
        pairs.add((("read", row), ("apply", row)))
        if after >= 0:
            pairs |= {(("apply", int(member)), ("read", row)) for member in waits.rows_of(after)}
        if gates >= 0:
            pairs |= {(("read", row), ("apply", int(member))) for member in waits.rows_of(gates)}
    for group in range(waits.groups):
        members = waits.rows_of(group).tolist()
        pairs |= {(("apply", a), ("apply", b)) for a in members for b in members if a != b}
        if waits.previous[group] >= 0:
            before = waits.rows_of(int(waits.previous[group])).tolist()
            pairs |= {(("apply", a), ("apply", b)) for a in before for b in members}
    return pairs


@settings(max_examples=300)
@given(random_schedules())
def test_dependencies_are_those_of_the_rules(schedule: Schedule) -> None:
    rows = rows_of(schedule)
    waits = dependencies(schedule)
    # Groups: each row is in the one of its (step, dst, chunk), in ascending sender.
    assert sorted(waits.members.tolist()) == list(range(len(rows)))
    for group in range(waits.groups):
        members = [rows[row] for row in waits.rows_of(group)]
        place = (waits.step[group], waits.dst[group], waits.chunk[group], waits.op[group])
        assert {(row.step, row.dst, row.chunk, row.op) for row in members} == {place}
        assert [row.src for row in members] == sorted(row.src for row in members)
    for i, row in enumerate(rows):
        assert i in waits.rows_of(int(waits.group_of_row[i]))
        alike = [j for j, other in enumerate(rows) if (*other[:1], *other[2:4]) == (*row[:1], *row[2:4])]
        assert sorted(waits.rows_of(int(waits.group_of_row[i])).tolist()) == alike
    # Waits: each derived one is asked for by the rules, and each that they ask for follows from the derived.
    asked, given_ = waits_by_the_rules(rows), derived(waits, len(rows))
    assert given_ <= asked
    assert asked <= reachable(given_)
    # And no two of one (dst, chunk) follow the same one: `previous` is a chain.
    followed = waits.previous[waits.previous >= 0].tolist()
    assert len(followed) == len(set(followed))


@pytest.mark.parametrize("strategy", exchanges.STRATEGIES)
@pytest.mark.parametrize("n", [1, 2, 3, 5])
def test_dependencies_of_the_strategies_are_those_of_the_rules(strategy: str, n: int) -> None:
    for schedule in exchanges.build(strategy, n, 2 * n + 1).schedules():
        asked = waits_by_the_rules(rows_of(schedule))
        given_ = derived(dependencies(schedule), schedule.rows)
        assert given_ <= asked <= reachable(given_)


def first_rows(waits: Dependencies) -> list[int]:
    return [int(waits.rows_of(group).min()) for group in range(waits.groups)]


@settings(max_examples=200)
@given(random_schedules(max_rows=24))
def test_groups_are_numbered_by_their_first_rows(schedule: Schedule) -> None:
    first = first_rows(dependencies(schedule))
    assert first == sorted(first)


def spread(schedule: Schedule, ranks: int, chunks: int) -> Schedule:
    """Take a schedule's ranks and chunks far apart, so that hardly any of the places (rank, chunk) are used."""
    sizes = np.zeros(chunks * schedule.chunks, dtype=np.int64)
    sizes[::chunks] = schedule.chunk_elements
    contributes = np.zeros((ranks, schedule.chunks), dtype=bool)
    contributes[:: ranks // schedule.ranks][: schedule.ranks] = schedule.contributes
    return Schedule.of(
        ranks=ranks,
        chunk_elements=sizes,
        step=schedule.step,
        src=schedule.src * (ranks // schedule.ranks),
        dst=schedule.dst * (ranks // schedule.ranks),
        chunk=schedule.chunk * chunks,
        op=schedule.op,
        source=schedule.source,
        contributes=np.repeat(contributes, chunks, axis=1),
    )


def waits_of(waits: Dependencies) -> list[list[int]]:
    names = (
        "after_group",
        "group_of_row",
        "gates_group",
        "member_ptr",
        "members",
        "previous",
        "step",
        "op",
        "joins_own",
    )
    return [getattr(waits, name).tolist() for name in names]


@settings(max_examples=50)
@given(random_schedules(all_contribute=False))
def test_waits_are_the_same_where_ranks_and_chunks_are_far_apart(schedule: Schedule) -> None:
    """Places are numbered without gaps when there are too many of them: 1.2 million here and more, for 14 rows."""
    assert 4000 * schedule.ranks * 300 * schedule.chunks > max(1 << 20, 4 * schedule.rows)
    wide = spread(schedule, 4000 * schedule.ranks, 300)
    assert waits_of(dependencies(wide)) == waits_of(dependencies(schedule))
    assert wide.traffic(4).message_sizes == schedule.traffic(4).message_sizes
    assert [link[2:] for link in wide.traffic(4).links()] == [link[2:] for link in schedule.traffic(4).links()]


@given(st.data())
def test_places_are_different_numbers_for_different_pairs(data: st.DataObject) -> None:
    """Without gaps or with them, in order of rank and then of the other; columns of any length, none included."""
    chunks = data.draw(st.sampled_from([1, 3, 2**20, 2**31 - 1]))
    ranks = data.draw(st.sampled_from([2, 2**12, 2**31 - 1]))
    pair = st.tuples(st.integers(0, ranks - 1), st.integers(0, chunks - 1))
    tables = data.draw(st.lists(st.lists(pair, max_size=6), min_size=1, max_size=3))
    named, count = places(chunks, *((np.array([a for a, _ in t], np.int32), np.array([b for _, b in t], np.int32))
                                    for t in tables))  # fmt: skip
    pairs, numbers = [pair for t in tables for pair in t], [int(number) for column in named for number in column]
    assert [len(column) for column in named] == [len(t) for t in tables]
    assert all(column.dtype == np.int32 for column in named)
    assert all(0 <= number < count for number in numbers)
    ranked = sorted(set(zip(pairs, numbers, strict=True)))
    assert len(ranked) == len(set(pairs)) == len(set(numbers))
    assert [number for _, number in ranked] == sorted(set(numbers))


@settings(max_examples=100)
@given(random_schedules(max_rows=24, all_contribute=False))
def test_compiled_and_interpreted_loops_agree(schedule: Schedule) -> None:
    """Waits, the checker's replay and the counts of traffic: all that runs over the rows."""
    values = np.random.default_rng(0).integers(0, 2**64, size=(schedule.ranks, schedule.chunks), dtype=np.uint64)
    found = []
    for limit in (0, 10**9):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(compiled, "COMPILE_FROM", limit)
            waits = dependencies(schedule)
            try:
                outcome: list[Any] = [part.tolist() for part in replay(schedule, waits, values)]
            except ScheduleError as error:
                outcome = [str(error)]
            found.append((waits_of(waits), outcome, schedule.traffic(4).links(), schedule.traffic(4).message_sizes))
    assert found[0] == found[1]


def test_a_step_may_be_any_number() -> None:
    """Gaps between steps cost nothing: no interpreter has time or memory for steps that have no rows."""
    tracemalloc.start()
    for last in (2**31 - 2, 2**31 - 1):
        schedule = table([PING, PING._replace(step=last, src=1, dst=0, op=Op.COPY)], ranks=2)
        waits = dependencies(schedule)
        assert (waits.after_group.tolist(), waits.step[waits.after_group[1]]) == ([-1, waits.group_of_row[0]], 0)
        held, work, _ = replay(schedule, waits, np.array([[1], [2]], dtype=np.uint64))
        assert held.all()
        assert work.tolist() == [[3], [3]]
        for posting in POSTINGS:
            lowered = lower(all_reduce("far", schedule), ideal(2), 4, posting=posting)
            assert run(lowered.graph).makespan_s == pytest.approx(2 * (5e-6 + 4 / 12.5e9), rel=1e-12)
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak_bytes < 2**27


def agrees(schedule: Schedule, seed: int, *, gated: bool = True) -> bool:
    """Whether one random order gives the checker's result, exactly and with the same order of summation."""
    waits = dependencies(schedule)
    values = np.random.default_rng(seed).integers(0, 2**64, size=(schedule.ranks, schedule.chunks), dtype=np.uint64)
    held, *results = replay(schedule, waits, values)
    combiners: list[Combine] = [add, mix]
    for ours, work in zip(combiners, results, strict=True):
        memory = interleave(schedule, waits, values.tolist(), ours, seed, gated)
        wanted = [
            [value if there else None for value, there in zip(*pair, strict=True)]
            for pair in zip(work.tolist(), held.tolist(), strict=True)
        ]
        if memory.torn or memory.work != wanted:
            return False
    return True


@settings(max_examples=200)
@given(random_schedules(), st.integers(0, 2**32))
def test_any_order_gives_the_same_result(schedule: Schedule, seed: int) -> None:
    assert agrees(schedule, seed)


@pytest.mark.parametrize("strategy", exchanges.STRATEGIES)
@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_any_order_of_a_strategy_gives_the_same_result(strategy: str, n: int) -> None:
    for schedule in exchanges.build(strategy, n, n + 1).schedules():
        assert all(agrees(schedule, seed) for seed in range(15))


@pytest.mark.parametrize("name", COLLECTIVES)
def test_any_order_of_other_collectives_gives_the_same_result(name: str) -> None:
    assert all(agrees(COLLECTIVES[name](4, 18), seed) for seed in range(15))


def test_without_gates_some_order_corrupts_data() -> None:
    """The test above can fail: applies that do not wait for reads break what sends running values both ways."""
    both_ways = [Row(0, a, b, 0, Op.REDUCE, Source.WORK) for a in range(3) for b in range(3) if a != b]
    for schedule in (recursive_doubling(), table(both_ways, ranks=3)):
        assert (dependencies(schedule).gates_group >= 0).any()
        assert not all(agrees(schedule, seed, gated=False) for seed in range(20))
        assert all(agrees(schedule, seed) for seed in range(20))
