"""Schedule: malformed tables, digest, traffic, and the waits against the design's rules and random orders."""

from __future__ import annotations

from collections import Counter
from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest
from helpers import (
    Row,
    all_gather,
    random_schedules,
    recursive_doubling,
    rows_of,
    table,
)
from hypothesis import given
from hypothesis import strategies as st

from distsim import exchanges
from distsim.dependencies import dependencies
from distsim.errors import ScheduleError
from distsim.schedule import COLUMNS, Op, Schedule, Source, split

PING = Row(0, 0, 1, 0, Op.REDUCE, Source.WORK)


def alter(schedule: Schedule, changes: dict[str, Any]) -> Schedule:
    return replace(schedule, **changes)


def columns(**changed: Any) -> dict[str, Any]:
    """Return the columns of a table of three rows for `Schedule`, some of them changed."""
    good: dict[str, Any] = {
        "ranks": 2,
        "chunk_elements": np.array([2, 1]),
        "step": np.array([0, 0, 1], dtype=np.int32),
        "src": np.array([0, 1, 0], dtype=np.int32),
        "dst": np.array([1, 0, 1], dtype=np.int32),
        "chunk": np.array([0, 1, 1], dtype=np.int32),
        "op": np.array([0, 0, 1], dtype=np.int8),
        "source": np.array([1, 1, 1], dtype=np.int8),
        "contributes": np.ones((2, 2), dtype=bool),
        "must_hold": np.ones((2, 2), dtype=bool),
    }
    return {**good, **changed}


def int32(*values: int) -> np.ndarray[Any, np.dtype[np.int32]]:
    return np.array(values, dtype=np.int32)


def test_the_table_to_spoil_is_sound() -> None:
    assert Schedule(**columns()).rows == 3


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"src": int32(0, 1)}, r"column src has shape \(2,\), step has \(3,\)"),
        ({"op": np.zeros(4, dtype=np.int8)}, "column op has shape"),
        ({"ranks": 0}, "at least 1 rank, not 0"),
        ({"ranks": -1}, "at least 1 rank, not -1"),
        ({"contributes": np.ones((2, 3), dtype=bool)}, r"contributes must have shape \(ranks, chunks\) = \(2, 2\)"),
        ({"must_hold": np.ones(2, dtype=bool)}, "must_hold must have shape"),
        ({"src": int32(0, 2, 0)}, r"src outside 0\.\.1: row 1 \(step 0: rank 2 reduces into rank 0, chunk 1"),
        ({"src": int32(-1, 1, 0)}, r"src outside 0\.\.1: row 0"),
        ({"dst": int32(1, 0, 2)}, r"dst outside 0\.\.1: row 2 \(step 1: rank 0 copies to rank 2, chunk 1, from work"),
        ({"dst": int32(1, 0, -1)}, r"dst outside 0\.\.1"),
        ({"chunk": int32(0, 2, 1)}, r"chunk outside 0\.\.1"),
        ({"chunk": int32(0, -1, 1)}, r"chunk outside 0\.\.1"),
        ({"op": np.array([0, 2, 1], dtype=np.int8)}, r"op outside 0\.\.1"),
        ({"op": np.array([0, -1, 1], dtype=np.int8)}, r"op outside 0\.\.1"),
        ({"source": np.array([2, 0, 1], dtype=np.int8)}, r"source outside 0\.\.1"),
        ({"step": int32(-1, 0, 1)}, "negative step: row 0"),
        ({"step": int32(0, 2, 1)}, "rows out of step order: row 2"),
        ({"src": int32(1, 1, 0)}, "a rank sends to itself: row 0"),
        ({"chunk_elements": np.array([2, 0])}, "a chunk without parameters is sent: row 1"),
        ({"chunk_elements": np.array([2, -1])}, "none of them negative"),
        ({"chunk_elements": np.array([2.0, 1.0])}, "64-bit integers"),
        ({"chunk_elements": np.array([[2, 1]])}, "chunk_elements must be a row"),
        (
            {"step": int32(0, 0, 0), "src": int32(0, 1, 0), "dst": int32(1, 0, 1), "chunk": int32(0, 0, 0)},
            "a copy lands beside another transfer: row 2",
        ),
    ],
)
def test_malformed_tables_are_refused(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ScheduleError, match=message):
        Schedule(**columns(**changed))


@pytest.mark.parametrize("beside", [Op.REDUCE, Op.COPY])
def test_a_copy_lands_alone(beside: Op) -> None:
    rows = [Row(1, 0, 2, 0, Op.COPY, Source.WORK), Row(1, 1, 2, 0, beside, Source.WORK)]
    with pytest.raises(ScheduleError, match="a copy lands beside another transfer"):
        table(rows, ranks=3)
    for moved in ({"step": 2}, {"dst": 0}, {"chunk": 1}):
        assert table([rows[0], rows[1]._replace(**moved)], ranks=3, sizes=[1, 1]).rows == 2


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("src", 2**32, "column src holds numbers beyond"),  # would wrap around to rank 0
        ("dst", -(2**32) + 1, "column dst holds numbers beyond"),
        ("step", 2**31, "column step holds numbers beyond"),
        ("op", 256, "column op holds numbers beyond 127"),
        ("step", 0.5, "column step must hold whole numbers, not float64"),
        ("chunk", 5, r"a chunk outside 0\.\.0"),
        ("chunk", -1, r"a chunk outside 0\.\.0"),
    ],
)
def test_columns_are_not_bent_to_fit(column: str, value: float, message: str) -> None:
    row: dict[str, Any] = {**PING._asdict(), column: value}
    with pytest.raises(ScheduleError, match=message):
        Schedule.of(ranks=2, chunk_elements=np.array([1]), **row)


def test_flags_of_the_wrong_shape_are_refused() -> None:
    with pytest.raises(ScheduleError, match=r"must_hold has shape \(3,\), wanted \(ranks, chunks\) = \(2, 1\)"):
        table([PING], ranks=2, must_hold=[True, True, True])


def test_rows_are_sorted_by_step_and_keep_their_order_within_it() -> None:
    rows = [Row(step, src, (src + 1) % 4, 0, Op.REDUCE, Source.WORK) for step, src in ((2, 0), (0, 3), (2, 1), (0, 0))]
    assert rows_of(table(rows, ranks=4)) == [rows[1], rows[3], rows[0], rows[2]]


def test_chunks_without_parameters_are_not_sent() -> None:
    rows = [PING._replace(chunk=chunk, step=chunk) for chunk in range(3)]
    schedule = table(rows, ranks=2, sizes=[2, 0, 1])
    assert rows_of(schedule) == [rows[0], rows[2]]
    assert (schedule.rows, schedule.params, schedule.chunks, schedule.steps) == (2, 3, 3, 3)
    assert schedule.traffic(4).message_sizes == {8: 1, 4: 1}


@pytest.mark.parametrize("ranks", [1, 3])
def test_a_schedule_may_send_nothing(ranks: int) -> None:
    nothing: dict[str, Any] = {name: [] for name in COLUMNS}
    schedule = Schedule.of(ranks=ranks, chunk_elements=np.array([4]), **nothing)
    assert (schedule.rows, schedule.steps, schedule.params) == (0, 0, 4)
    traffic = schedule.traffic(8)
    assert (traffic.messages, traffic.bytes, traffic.message_sizes, traffic.links()) == (0, 0, {}, [])
    assert traffic.sent_messages().tolist() == [0] * ranks
    assert dependencies(schedule).groups == 0


def test_everything_is_read_only_and_frozen() -> None:
    for schedule in (exchanges.build("ring", 3, 7).gradients, Schedule(**columns()), recursive_doubling()):
        for field in fields(schedule):
            value = getattr(schedule, field.name)
            if isinstance(value, np.ndarray):
                with pytest.raises(ValueError, match="read-only"):
                    value[...] = 0
            with pytest.raises(AttributeError):
                setattr(schedule, field.name, value)


def test_the_callers_arrays_stay_the_callers() -> None:
    sizes, holds = np.array([2, 1]), np.ones((2, 2), dtype=bool)
    schedule = Schedule.of(ranks=2, chunk_elements=sizes, must_hold=holds, **{**PING._asdict(), "step": np.array([0])})
    digest = schedule.digest()
    sizes[0], holds[0, 0] = 7, False
    assert schedule.digest() == digest
    assert schedule.chunk_elements.tolist() == [2, 1]


def test_digest_is_the_same_everywhere() -> None:
    """A literal: another version, machine or byte order that gives another digest breaks running clusters."""
    assert exchanges.build("ring", 3, 7).gradients.digest() == (
        "059507397e154040b4ffacd52f543ebdcf6ce36340e25fba0e0ba3bfdc216cf9"
    )
    assert exchanges.build("parameter-server", 2, 5).digest() == (
        "31dd2aba28440932ff3d2867d48f28e9ae61548c4d531db903a221ea00d0a9e3"
    )


def test_digest_changes_with_everything() -> None:
    base = columns()
    schedule = Schedule(**base)
    flipped = np.array([[True, True], [False, True]])
    variants = [
        replace(schedule, ranks=3, contributes=np.ones((3, 2), dtype=bool), must_hold=np.ones((3, 2), dtype=bool)),
        replace(schedule, chunk_elements=np.array([1, 2])),
        alter(schedule, {"chunk_elements": np.array([2, 1, 4]), **dict.fromkeys(FLAGS, np.ones((2, 3), dtype=bool))}),
        replace(schedule, step=int32(0, 1, 1)),
        replace(schedule, src=int32(1, 1, 0), dst=int32(0, 0, 1)),
        replace(schedule, dst=int32(1, 0, 1)[::-1].copy(), src=int32(0, 1, 0)[::-1].copy(), chunk=int32(0, 1, 0)),
        replace(schedule, chunk=int32(1, 1, 1)),
        replace(schedule, op=np.array([0, 0, 0], dtype=np.int8)),
        replace(schedule, source=np.array([1, 0, 1], dtype=np.int8)),
        replace(schedule, contributes=flipped),
        replace(schedule, must_hold=flipped),
        alter(schedule, {name: base[name][:2].copy() for name in COLUMNS}),
        Schedule(**columns(**{name: base[name][[1, 0, 2]] for name in COLUMNS})),  # the order of rows counts
    ]
    digests = {schedule.digest(), *(variant.digest() for variant in variants)}
    assert len(digests) == 1 + len(variants)
    assert Schedule(**columns()).digest() == schedule.digest()


FLAGS = ("contributes", "must_hold")


def test_digest_of_an_exchange_changes_with_its_parts() -> None:
    server = exchanges.build("parameter-server", 2, 5)
    variants = [
        server,
        replace(server, strategy="another"),
        replace(server, workers=3),
        replace(server, parameters=None),
        replace(server, gradients=exchanges.build("parameter-server", 2, 6).gradients),
    ]
    assert len({variant.digest() for variant in variants}) == len(variants)


@given(st.integers(0, 10**6), st.integers(1, 200))
def test_split_is_even_and_complete(params: int, chunks: int) -> None:
    sizes = split(params, chunks).tolist()
    assert len(sizes) == chunks
    assert sum(sizes) == params
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] - sizes[-1] <= 1


def test_split_examples() -> None:
    assert split(7, 3).tolist() == [3, 2, 2]
    assert split(2, 3).tolist() == [1, 1, 0]
    assert split(0, 2).tolist() == [0, 0]


@given(random_schedules(), st.sampled_from([1, 2, 4, 8]))
def test_traffic_counts_every_row(schedule: Schedule, itemsize: int) -> None:
    rows = [(row, int(schedule.chunk_elements[row.chunk]) * itemsize) for row in rows_of(schedule)]
    traffic = schedule.traffic(itemsize)
    links = Counter((row.src, row.dst) for row, _ in rows)
    assert traffic.messages == len(rows)
    assert traffic.bytes == sum(size for _, size in rows)
    assert traffic.message_sizes == Counter(size for _, size in rows)
    assert list(traffic.message_sizes) == sorted(traffic.message_sizes)
    assert traffic.links() == [
        (src, dst, links[src, dst], sum(size for row, size in rows if (row.src, row.dst) == (src, dst)))
        for src, dst in sorted(links)
    ]
    for rank in range(schedule.ranks):
        assert traffic.sent_messages()[rank] == sum(row.src == rank for row, _ in rows)
        assert traffic.sent_bytes()[rank] == sum(size for row, size in rows if row.src == rank)
        assert traffic.received_bytes()[rank] == sum(size for row, size in rows if row.dst == rank)


def test_traffic_beyond_64_bits_is_exact() -> None:
    exchange = exchanges.build("all-to-all", 600, 2**47)
    assert exchange.traffic(8).bytes == 600 * 599 * 2**50 > 2**63


def test_describe_says_what_a_row_does() -> None:
    ring = exchanges.build("ring", 3, 7).gradients
    assert ring.describe(0) == "row 0 (step 0: rank 0 reduces into rank 1, chunk 0, from work)"
    pull = exchanges.build("parameter-server", 2, 7).parameters
    assert pull is not None
    assert pull.describe(1) == "row 1 (step 0: rank 2 copies to rank 1, chunk 0, from input)"
    assert all_gather(2, 2).describe(1) == "row 1 (step 0: rank 1 copies to rank 0, chunk 1, from work)"
