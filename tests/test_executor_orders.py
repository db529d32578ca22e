"""The executor in every order that a network may choose: random schedules, long lines, one rank in a thread."""

from __future__ import annotations

import queue
import sys
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from helpers import COLLECTIVES, Row, random_schedules, right_schedules, table
from hypothesis import given, settings
from hypothesis import strategies as st
from tensors import Values, assert_postcondition, assert_right, copies, executed, replayed, values_for
from transports import LateTransport, ThreadTransport, as_bytes

from distsim import exchanges
from distsim.exchanges import segment
from distsim.schedule import Op, Schedule, Source
from trainers.exchange import ScheduleRunner
from trainers.transport import LocalTransport, Transport

transports = st.one_of(
    st.builds(LocalTransport),
    st.builds(LateTransport, st.integers(0, 2**32), adds=st.booleans(), rounds=st.booleans()),
)


def assert_same_bits(expected: Values, found: Values) -> None:
    """Equal to the bit, NaN included."""
    for rank, value in expected.items():
        assert as_bytes(value) == as_bytes(found[rank]), (rank, value, found[rank])


@given(right_schedules(), transports)
@settings(max_examples=300)
def test_random_trees_leave_everybody_with_the_sum(schedule: Schedule, transport: Transport) -> None:
    assert_right(schedule, transport)


@given(right_schedules(), st.integers(2, 4), transports)
@settings(max_examples=150)
def test_random_trees_in_segments(schedule: Schedule, pieces: int, transport: Transport) -> None:
    assert_right(segment(schedule, pieces), transport)


@given(random_schedules(max_rows=24), transports)
@settings(max_examples=600)
def test_any_schedule_right_or_wrong_does_what_its_rows_say_to_the_bit(
    schedule: Schedule, transport: Transport
) -> None:
    before, after = executed(schedule, transport)
    assert_same_bits(replayed(schedule, before), after)


@given(random_schedules(max_rows=24), st.integers(0, 2**32), st.booleans(), st.booleans())
@settings(max_examples=200)
def test_no_run_leaves_anything_behind_for_the_next(schedule: Schedule, seed: int, adds: bool, rounds: bool) -> None:
    """In place on the same tensors, each run goes on from where the last one ended."""
    runner = ScheduleRunner(schedule, range(schedule.ranks), LateTransport(seed, adds=adds, rounds=rounds))
    values = values_for(schedule)
    for _ in range(3):
        expected = replayed(schedule, copies(values))
        runner.run(values)
        assert_same_bits(expected, values)


@given(random_schedules(max_rows=24), transports)
@settings(max_examples=200)
def test_applies_come_in_step_order_at_every_place(schedule: Schedule, transport: Transport) -> None:
    runner = ScheduleRunner(schedule, range(schedule.ranks), transport)
    applied = runner.run(values_for(schedule))
    assert sorted(applied) == list(range(runner.waits.groups))
    places: defaultdict[tuple[int, int], list[int]] = defaultdict(list)
    for group in applied:
        place = int(runner.waits.dst[group]), int(runner.waits.chunk[group])
        places[place].append(int(runner.waits.step[group]))
    assert all(steps == sorted(steps) for steps in places.values())


@st.composite
def coalesced_schedules(draw: st.DrawFn) -> Schedule:
    """Draw a schedule of neighbouring chunks, some of which travel together."""
    ranks, chunks = draw(st.integers(2, 3)), 4
    rows: list[Row] = []
    for step in range(draw(st.integers(1, 4))):
        op, source = draw(st.sampled_from(list(Op))), draw(st.sampled_from(list(Source)))
        src = draw(st.integers(0, ranks - 1))
        dst = (src + draw(st.integers(1, ranks - 1))) % ranks
        first = draw(st.integers(0, chunks - 1))
        last = draw(st.integers(first, chunks - 1))
        rows += [Row(step, src, dst, chunk, op, source) for chunk in range(first, last + 1)]
        if draw(st.booleans()):  # the way back, of part of it: it reads what the others overwrite
            rows += [Row(step, dst, src, chunk, op, Source.WORK) for chunk in range(first, last)]
    one = table(rows, ranks=ranks, sizes=[2, 1, 3, 1])
    columns = {name: getattr(one, name) for name in ("step", "src", "dst", "chunk", "op", "source")}
    return Schedule.of(ranks=ranks, chunk_elements=np.array([2, 1, 3, 1]), coalesced=True, **columns)


@given(coalesced_schedules(), transports)
@settings(max_examples=300)
def test_messages_of_several_chunks(schedule: Schedule, transport: Transport) -> None:
    before, after = executed(schedule, transport)
    assert_same_bits(replayed(schedule, before), after)
    assert transport.log.counts.total() == schedule.messages().count <= schedule.rows


@pytest.mark.parametrize("adds", (False, True))
@pytest.mark.parametrize("strategy", exchanges.STRATEGIES)
def test_a_rank_alone_in_its_process_does_the_same(strategy: str, adds: bool) -> None:
    """Each rank has a thread, a runner and a transport of its own; the bits are those of a replay."""
    schedule = exchanges.build(strategy, 5, 23).gradients
    before = values_for(schedule)
    after = copies(before)
    boxes: list[queue.Queue[tuple[int, torch.Tensor]]] = [queue.Queue() for _ in range(schedule.ranks)]

    def one(rank: int) -> None:
        transport = ThreadTransport(rank, boxes, adds=adds)
        ScheduleRunner(schedule, [rank], transport).run({rank: after[rank]})

    with ThreadPoolExecutor(schedule.ranks) as pool:
        list(pool.map(one, range(schedule.ranks), timeout=60))
    assert_postcondition(schedule, before, after)
    assert_same_bits(replayed(schedule, before), after)


@pytest.mark.parametrize("held_back", (False, True))
@pytest.mark.parametrize("transport", (LocalTransport, LateTransport))
def test_thousands_of_messages_of_one_pair(transport: type[Transport], held_back: bool) -> None:
    """All 5,000 may leave at once, or as soon as the first in line has its value from rank 2."""
    count = 5000
    assert count > 2 * sys.getrecursionlimit()
    rows = [Row(1, 0, 1, chunk, Op.REDUCE, Source.INPUT) for chunk in range(count)]
    if held_back:
        rows[0] = rows[0]._replace(source=Source.WORK)
        rows.insert(0, Row(0, 2, 0, 0, Op.REDUCE, Source.INPUT))
    schedule = table(rows, ranks=3, sizes=[1] * count)
    before, after = executed(schedule, transport())
    first_only = torch.arange(count) == 0
    from_2 = torch.where(first_only & held_back, before[2], 0.0)
    assert torch.equal(after[0], before[0] + from_2)
    assert torch.equal(after[1], (before[0] + from_2) + before[1])


@pytest.mark.parametrize("held_back", (False, True))
def test_thousands_of_applies_at_one_place(held_back: bool) -> None:
    """Rank 0 sends 3,000 values into one place of rank 1; they wait if rank 2's is due first and comes last."""
    rows = [Row(step, 0, 1, 0, Op.REDUCE, Source.INPUT) for step in range(1, 3001)]
    if held_back:
        rows.insert(0, Row(0, 2, 1, 0, Op.REDUCE, Source.INPUT))
    values = {0: torch.tensor([1.0]), 1: torch.tensor([10.0]), 2: torch.tensor([100.0])}
    runner = ScheduleRunner(table(rows, ranks=3), range(3), HoldsBack())
    assert runner.run(values) == list(range(len(rows)))
    assert values[1].item() == 3010 + 100 * held_back
    if held_back:
        assert runner.staging_bytes >= 3000 * 4


class HoldsBack(LateTransport):
    """Nothing arrives from rank 2 while anything is under way from rank 0 to rank 1."""

    def _go_on(self, pair: tuple[int, int]) -> None:
        if pair == (2, 1) and self._letters[0, 1]:
            return
        super()._go_on(pair)
        if pair == (0, 1) and not self._letters[pair]:
            super()._go_on((2, 1))


def test_thousands_of_values_passed_on() -> None:
    """A value goes 3,000 times back and forth between two ranks: each step waits for the one before."""
    rows = [Row(step, step % 2, 1 - step % 2, 0, Op.COPY, Source.WORK) for step in range(3000)]
    schedule = table(rows, ranks=2)
    for transport in (LocalTransport(), LateTransport()):
        before, after = executed(schedule, transport)
        assert after[0].item() == after[1].item() == before[0].item()


@pytest.mark.parametrize("collective", COLLECTIVES)
def test_a_hundred_orders_of_one_exchange(collective: str) -> None:
    schedule = COLLECTIVES[collective](4, 17)
    expected = replayed(schedule, values_for(schedule))
    for seed in range(100):
        _, after = executed(schedule, LateTransport(seed, adds=seed % 2 == 0))
        assert_same_bits(expected, after)
