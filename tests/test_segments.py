"""Segments: what a schedule does stays the same when its chunks are cut, whatever the schedule."""

from __future__ import annotations

import pytest
from helpers import COLLECTIVES, Row, random_schedules, right_schedules, rows_of
from hypothesis import given, settings
from hypothesis import strategies as st

from distsim import exchanges
from distsim.check import check, check_schedule
from distsim.errors import ScheduleError
from distsim.exchanges import segment
from distsim.schedule import Schedule


def verdict(schedule: Schedule) -> bool:
    """Whether the checker proves a schedule."""
    try:
        check_schedule(schedule)
    except ScheduleError:
        return False
    return True


def cut(size: int, k: int) -> list[int]:
    """Pieces of a chunk, dealt out one element after another."""
    pieces = [0] * k
    for element in range(size):
        pieces[element % k] += 1
    return pieces


@given(random_schedules(all_contribute=False), st.integers(1, 5))
@settings(max_examples=300)
def test_the_checkers_verdict_stays(schedule: Schedule, k: int) -> None:
    assert verdict(segment(schedule, k)) == verdict(schedule)


@given(right_schedules(), st.integers(1, 5))
@settings(max_examples=200)
def test_what_is_right_stays_right(schedule: Schedule, k: int) -> None:
    check_schedule(segment(schedule, k))


@given(random_schedules(all_contribute=False), st.integers(1, 5))
@settings(max_examples=200)
def test_pieces_follow_each_other_one_step_apart(schedule: Schedule, k: int) -> None:
    """Row by row and chunk by chunk, in plain loops: piece j of chunk c is chunk j * chunks + c."""
    pieces = segment(schedule, k)
    sizes = [cut(size, k) for size in schedule.chunk_elements.tolist()]
    assert pieces.chunk_elements.tolist() == [sizes[c][j] for j in range(k) for c in range(schedule.chunks)]
    assert sorted(rows_of(pieces)) == sorted(
        Row(row.step + j, row.src, row.dst, j * schedule.chunks + row.chunk, row.op, row.source)
        for row in rows_of(schedule)
        for j in range(k)
        if sizes[row.chunk][j]
    )
    for j in range(k):
        block = slice(j * schedule.chunks, (j + 1) * schedule.chunks)
        assert (pieces.contributes[:, block] == schedule.contributes).all()
        assert (pieces.must_hold[:, block] == schedule.must_hold).all()
    assert (pieces.ranks, pieces.params) == (schedule.ranks, schedule.params)


@pytest.mark.parametrize("name", COLLECTIVES)
def test_collectives_made_by_hand_stay_right(name: str) -> None:
    for k in (1, 2, 7):
        check_schedule(segment(COLLECTIVES[name](4, 37), k))


def test_one_piece_is_the_whole() -> None:
    ring = exchanges.build("ring", 3, 7).gradients
    assert segment(ring, 1).digest() == ring.digest()


@pytest.mark.parametrize("strategy", exchanges.STRATEGIES)
def test_the_option_is_the_transform(strategy: str) -> None:
    for n, p in ((1, 5), (4, 37), (6, 5)):
        plain, cut_up = exchanges.build(strategy, n, p), exchanges.build(f"{strategy}:segments=3", n, p)
        assert [segment(each, 3).digest() for each in plain.schedules()] == [
            each.digest() for each in cut_up.schedules()
        ]
        assert cut_up.params == p
        check(cut_up)


def test_a_chain_becomes_a_pipeline() -> None:
    """At step s, rank r sends piece s - r: after n - 2 + k steps all have passed."""
    chain = exchanges.build("chain:segments=5", 4, 20, "broadcast").gradients
    assert chain.steps == 4 - 2 + 5
    assert (chain.chunk == chain.step - chain.src).all()
    assert chain.traffic(1).message_sizes == {4: 15}


def test_flags_of_many_ranks_stay_small() -> None:
    part = exchanges.rows_of("ring:segments=4", 2**17, 2**30, [0])
    assert part.contributes.shape == (2**17, 2**19)
    assert set(part.contributes.strides) == {0}
