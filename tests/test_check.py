"""The checker: every strategy and other right collectives pass, and each wrong schedule gets its own message."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from helpers import (
    COLLECTIVES,
    Row,
    add,
    all_reduce,
    interleave,
    mix,
    random_schedules,
    recursive_doubling,
    rows_of,
    table,
)
from hypothesis import given, settings

from distsim import exchanges
from distsim.check import check, check_schedule, replay
from distsim.dependencies import dependencies
from distsim.errors import ScheduleError
from distsim.schedule import Exchange, Op, Schedule, Source

REDUCE, COPY = Op.REDUCE, Op.COPY
INPUT, WORK = Source.INPUT, Source.WORK


@pytest.mark.parametrize("strategy", exchanges.STRATEGIES)
@pytest.mark.parametrize("n", [*range(1, 34), 64, 100, 128])
def test_strategies_are_right(strategy: str, n: int) -> None:
    for p in {0, 1, n - 1, n + 1, 2 * n + 1}:
        check(exchanges.build(strategy, n, p))


@pytest.mark.parametrize("name", COLLECTIVES)
@pytest.mark.parametrize("params", [0, 1, 5, 16, 37])
def test_other_collectives_are_right(name: str, params: int) -> None:
    schedule = COLLECTIVES[name](4, params)
    assert schedule.rows or params < 2
    check_schedule(schedule)


@pytest.mark.parametrize("name", ["reduce-scatter", "all-gather", "broadcast", "reduce", "personalised all-to-all"])
@pytest.mark.parametrize("ranks", [1, 2, 3, 5, 6, 8])
def test_other_collectives_are_right_among_any_number(name: str, ranks: int) -> None:
    check_schedule(COLLECTIVES[name](ranks, ranks * ranks + 1))


def test_recursive_doubling_is_an_exchange() -> None:
    for ranks in (1, 2, 4, 8, 16):
        check(all_reduce("recursive-doubling", recursive_doubling(ranks)))


BOTH = [Row(0, 0, 1, 0, REDUCE, INPUT), Row(0, 1, 0, 0, REDUCE, INPUT)]
EVERY = [Row(0, a, b, 0, REDUCE, INPUT) for a in range(3) for b in range(3) if a != b]


def refuses(schedule: Schedule, message: str) -> None:
    with pytest.raises(ScheduleError, match=message):
        check_schedule(schedule)


def test_the_schedules_to_spoil_are_right() -> None:
    check_schedule(table(BOTH, ranks=2))
    check_schedule(table(EVERY, ranks=3))


def test_a_missing_contribution_is_named() -> None:
    refuses(table(BOTH[1:], ranks=2), "rank 1 ends with a wrong chunk 0: the contribution of rank 0 is missing")
    several = table([], ranks=6)
    refuses(several, "rank 0 .*rank 1 is missing; .*rank 2 is missing; .*; .*rank 4 is missing; and 1 more")


def test_a_contribution_counted_twice_is_named() -> None:
    refuses(table([*BOTH, BOTH[0]], ranks=2), "rank 1 ends with a wrong chunk 0: the contribution of rank 0 is there 2")
    later = BOTH[1]._replace(step=4)  # rank 1's input comes once more, after it has been added
    refuses(table([*BOTH, later], ranks=2), "rank 0 .*: the contribution of rank 1 is there 2 times")


def test_a_contribution_counted_2_to_the_64_times_is_none_too_many() -> None:
    """Doubling 64 times wraps the sum around to nothing: the checker's integers must not be fooled by it."""
    rows = [
        row._replace(step=step, source=WORK)
        for step in range(64)
        for row in (*BOTH,)  # both ranks double their sum at each step
    ]
    refuses(table(rows, ranks=2), "ends with a wrong chunk")


def test_a_rank_that_never_receives_is_named() -> None:
    schedule = table([], ranks=2, contributes=[[True], [False]])
    refuses(schedule, "rank 1 ends with a wrong chunk 0: it never receives anything")


def test_a_rank_cannot_send_what_it_does_not_have() -> None:
    rows = [Row(0, 1, 0, 0, COPY, WORK), Row(1, 0, 1, 0, COPY, WORK)]
    refuses(table(rows, ranks=2, contributes=[[True], [False]]), r"holds nothing to send: row 0 \(step 0: rank 1 cop")
    # What arrives in a step can be sent from the next one on, and is never the sender's own contribution.
    pass_on = [Row(0, 0, 1, 0, COPY, WORK), Row(1, 1, 2, 0, COPY, WORK)]
    only_0 = np.arange(3)[:, None] == 0
    check_schedule(table(pass_on, ranks=3, contributes=only_0))
    for early in (pass_on[1]._replace(step=0), pass_on[1]._replace(source=INPUT)):
        refuses(table([pass_on[0], early], ranks=3, contributes=only_0), "holds nothing to send: row 1")


def test_a_chunk_needs_a_contributor() -> None:
    schedule = table([], ranks=2, sizes=[1, 1], contributes=[[True, False]] * 2)
    refuses(schedule, "chunk 1 must be held, but no rank contributes to it")
    check_schedule(table(BOTH, ranks=2, sizes=[1, 0], contributes=[[True, False]] * 2))


def test_all_ranks_must_sum_in_the_same_order() -> None:
    """All-to-all with one row a step later: the sums are right, but rank 0 adds in another order."""
    late = [row._replace(step=1) if (row.src, row.dst) == (1, 0) else row for row in EVERY]
    refuses(table(late, ranks=3), "ranks 0 and 1 sum chunk 0 in different orders: in floating point")
    # Rank 2's contribution is the last one anyway, and two terms have only one order.
    check_schedule(table([row._replace(step=1) if row.src == 2 else row for row in EVERY], ranks=3))
    check_schedule(table([BOTH[0], BOTH[1]._replace(step=7)], ranks=2))


def test_work_of_the_same_step_is_not_read() -> None:
    """All reads of a step come before its applies, so a chain needs a step for each link."""
    chain = [Row(0, 0, 1, 0, REDUCE, WORK), Row(1, 1, 2, 0, REDUCE, WORK)]
    last = np.arange(3)[:, None] == 2
    check_schedule(table(chain, ranks=3, must_hold=last))
    refuses(table([row._replace(step=0) for row in chain], ranks=3, must_hold=last), "rank 0 is missing")


def test_input_is_the_contribution_whatever_happened_since() -> None:
    rows = [Row(0, 0, 1, 0, REDUCE, WORK), Row(1, 1, 0, 0, REDUCE, INPUT)]
    check_schedule(table(rows, ranks=2))
    refuses(table([rows[0], rows[1]._replace(source=WORK)], ranks=2), "rank 0 is there 2 times")


def test_a_copy_overwrites() -> None:
    rows = [Row(0, 0, 1, 0, REDUCE, WORK), Row(1, 1, 0, 0, COPY, WORK)]
    check_schedule(table(rows, ranks=2))
    refuses(table([rows[0]._replace(op=COPY), rows[1]], ranks=2), "the contribution of rank 1 is missing")


def test_only_the_postcondition_counts() -> None:
    check_schedule(table(BOTH[:1], ranks=2, must_hold=[[False], [True]]))


SERVER = exchanges.build("parameter-server", 2, 5)
assert SERVER.parameters is not None
PUSH, PULL = SERVER.gradients, SERVER.parameters


def flags(*ranks: int) -> np.ndarray[tuple[int, ...], np.dtype[np.bool_]]:
    """Return the flags of three ranks and one chunk."""
    return np.isin(np.arange(3), ranks)[:, None]


def shared(rows: list[Row], contributes: object, must_hold: object = True) -> Schedule:
    return table(rows, ranks=3, sizes=[5], contributes=contributes, must_hold=must_hold)


@pytest.mark.parametrize(
    ("exchange", "message"),
    [
        (replace(SERVER, parameters=None), "some worker never gets the gradients, and no parameters are shared"),
        (
            replace(SERVER, parameters=replace(PULL, must_hold=flags(0, 2))),
            "some worker never gets the updated parameters",
        ),
        (
            replace(SERVER, parameters=shared([Row(0, 0, r, 0, COPY, INPUT) for r in (1, 2)], flags(0))),
            "parameters are shared by a rank that has not updated them",
        ),
        (
            replace(
                SERVER,
                gradients=replace(PUSH, must_hold=flags(2)),
                parameters=replace(PULL, chunk_elements=np.array([4])),
            ),
            "gradients and parameters are cut into different chunks",
        ),
        (
            Exchange(
                strategy="summed",
                workers=3,
                gradients=exchanges.build("all-to-all", 3, 5).gradients,
                parameters=exchanges.build("all-to-all", 3, 5).gradients,
            ),
            "each chunk of parameters must come from exactly one rank: weights are not summed",
        ),
        (
            replace(SERVER, parameters=exchanges.build("parameter-server", 3, 5).parameters),
            "gradients go among 3 ranks, parameters among 4",
        ),
        (replace(SERVER, workers=4), "an exchange of 4 workers cannot run on 3 ranks"),
        (replace(SERVER, workers=0), "an exchange of 0 workers"),
        (replace(SERVER, workers=3), "worker 2 does not contribute to chunk 0 of the gradients"),
        (replace(SERVER, workers=1), "rank 1, a server, contributes to chunk 0 of the gradients"),
        (
            replace(SERVER, gradients=shared(rows_of(PUSH)[:1], flags(0), flags(2))),
            "worker 1 does not contribute",
        ),
        (
            replace(SERVER, gradients=shared(rows_of(PUSH)[:1], flags(0, 1), flags(2))),
            "rank 2 ends with a wrong chunk 0: the contribution of rank 1 is missing",
        ),
        (replace(SERVER, parameters=shared(rows_of(PULL)[:1], flags(2))), "rank 1 .*: it never receives anything"),
    ],
)
def test_wrongly_linked_exchanges_are_refused(exchange: Exchange, message: str) -> None:
    check(SERVER)
    with pytest.raises(ScheduleError, match=message):
        check(exchange)


def test_a_sharded_server_among_the_workers_is_right() -> None:
    """Each worker is the server of its own chunk: nothing in the checker knows what a server is."""
    n, sizes = 3, [2, 2, 1]
    push = [Row(0, a, b, b, REDUCE, INPUT) for a in range(n) for b in range(n) if a != b]
    pull = [Row(0, b, a, b, COPY, INPUT) for a in range(n) for b in range(n) if a != b]
    own = np.eye(n, dtype=bool)
    exchange = Exchange(
        strategy="sharded",
        workers=n,
        gradients=table(push, ranks=n, sizes=sizes, must_hold=own),
        parameters=table(pull, ranks=n, sizes=sizes, contributes=own),
    )
    check(exchange)
    assert exchange.updates().all()


@settings(max_examples=150)
@given(random_schedules(all_contribute=False))
def test_the_verdict_is_that_of_a_plain_interpreter(schedule: Schedule) -> None:
    """Count contributions one by one, in plain Python; no numbers are drawn, so nothing can collide."""
    work: list[list[dict[int, int] | None]] = [
        [{rank: 1} if there else None for there in line] for rank, line in enumerate(schedule.contributes.tolist())
    ]
    inputs = [list(line) for line in work]
    right = True
    for step in range(schedule.steps):
        rows = [row for row in rows_of(schedule) if row.step == step]
        sent = [(inputs if row.source == INPUT else work)[row.src][row.chunk] for row in rows]
        for row, value in zip(rows, sent, strict=True):
            right &= value is not None
            own = work[row.dst][row.chunk] if row.op == REDUCE else None
            total = dict(own or {})
            for rank, times in (value or {}).items():
                total[rank] = total.get(rank, 0) + times
            work[row.dst][row.chunk] = total
    for rank, chunk in np.argwhere(schedule.must_hold & (schedule.chunk_elements > 0)).tolist():
        wanted = {source: 1 for source in range(schedule.ranks) if schedule.contributes[source, chunk]}
        right &= bool(wanted) and work[rank][chunk] == wanted
    try:
        check_schedule(schedule)
    except ScheduleError as error:
        assert not right or "in different orders" in str(error)
    else:
        assert right


def test_replay_agrees_with_the_python_references() -> None:
    ring = exchanges.build("ring", 4, 9).gradients
    waits = dependencies(ring)
    values = np.random.default_rng(3).integers(0, 2**64, size=(4, 4), dtype=np.uint64)
    held, work, mixed = replay(ring, waits, values)
    assert held.all()
    assert interleave(ring, waits, values.tolist(), add, seed=1, gated=True).work == work.tolist()
    assert interleave(ring, waits, values.tolist(), mix, seed=1, gated=True).work == mixed.tolist()
