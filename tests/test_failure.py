"""A rank that fails: who waits, against a closed form and a naive closure; and schedules that wait in a circle."""

from __future__ import annotations

import re
from dataclasses import replace
from itertools import combinations
from typing import NamedTuple

import numpy as np
import pytest
from helpers import Row, all_reduce, right_schedules, rows_of, table, waits_by_the_rules
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from made_clusters import KINDS, flat, some_clusters

from distsim import engine, exchanges
from distsim.cli import main
from distsim.cluster import ideal
from distsim.errors import ConfigError, DeadlockError, RankFailed
from distsim.lower import Posting, lower
from distsim.schedule import Exchange, Op, Schedule, Source
from distsim.step import simulate
from distsim.taskgraph import Edges, TaskGraph


class Said(NamedTuple):
    """What a message about a failure says."""

    direct: set[tuple[int, str, int, int]]
    """(rank, "send" or "receive", chunk, step)."""
    behind: set[int]
    made: int
    transfers: int


def said(message: str) -> Said:
    """Read a message."""
    direct = set()
    for rank, waits in re.findall(r"^  rank (\d+) waits (to .*)$", message, re.MULTILINE):
        for does, chunk, step in re.findall(r"to (send|receive) chunk (\d+) (?:to|from) it at step (\d+)", waits):
            direct.add((int(rank), does, int(chunk), int(step)))
    behind = re.findall(r"^  behind them wait(?:s rank| \d+ ranks:) ([\d, ]+)$", message, re.MULTILINE)
    made, transfers = re.findall(r"^  ([\d,]+) of ([\d,]+) transfers were made", message, re.MULTILINE)[0]
    names = {int(rank) for rank in behind[0].split(", ")} if behind else set()
    return Said(direct, names, int(made.replace(",", "")), int(transfers.replace(",", "")))


def failing(exchange: Exchange, rank: int, step: int, posting: Posting = "eager") -> str:
    """Return the message of an exchange that cannot finish."""
    with pytest.raises(RankFailed) as caught:
        simulate(exchange, ideal(exchange.ranks), fail=(rank, step), posting=posting)
    return str(caught.value)


def test_a_ring_stops_at_the_rank_that_fails() -> None:
    assert failing(exchanges.build("ring", 8, 1000), 3, 5) == (
        "ring: rank 3 fails at step 5, and the exchange cannot finish:\n"
        "  rank 2 waits to send chunk 5 to it at step 5\n"
        "  rank 4 waits to receive chunk 6 from it at step 5\n"
        "  behind them wait 5 ranks: 0, 1, 5, 6, 7\n"
        "  61 of 112 transfers were made, the last of them by 55.44 us"
    )  # 11 messages in a row: rank 1 lies 6 further on and still sends at step 10, 500 bytes after 5 us each


@pytest.mark.parametrize("ranks", [3, 6])
def test_each_rank_of_a_ring_gets_as_far_as_its_distance(ranks: int) -> None:
    steps = 2 * (ranks - 1)
    for step in range(steps):
        found = said(failing(exchanges.build("ring", ranks, 60), 1, step))
        # The rank d further on still gets what was sent before, and sends d - 1 steps more; rank 0 sends to it.
        sends = [step] + [min(step + d, steps) for d in range(1, ranks - 1)] + [step]
        assert (found.made, found.transfers) == (sum(sends), ranks * steps)
        assert {(rank, does, at) for rank, does, _, at in found.direct} == {(0, "send", step), (2, "receive", step)}
        assert found.behind == {rank for rank in range(3, ranks) if step + rank - 2 < steps}


def naive(rows: list[Row], ranks: int, rank: int, step: int) -> tuple[Said, bool]:
    """Find what never happens by going through all waits until nothing changes; and whether anything does not."""
    waits = waits_by_the_rules(rows)
    # Those from one rank to another leave in order: behind one that never leaves, none does.
    pairs = combinations(range(len(rows)), 2)
    in_line = {(("read", i), ("read", j)) for i, j in pairs if rows[i][1:3] == rows[j][1:3]}
    dead = {i for i, row in enumerate(rows) if row.step >= step and rank in (row.src, row.dst)}
    never = {("read", i) for i in dead}
    while True:
        more = {after for before, after in waits | in_line if before in never} - never
        if not more:
            break
        never |= more
    held_up = {after for before, after in waits if before in never and before != after}
    direct: dict[tuple[int, str], tuple[int, int]] = {}
    for i in sorted(dead):
        row = rows[i]
        if ("read", i) not in held_up:
            who = (row.dst, "receive") if row.src == rank else (row.src, "send")
            direct.setdefault(who, (row.chunk, row.step))
    waiting = {side for what, i in never if what == "read" for side in (rows[i].src, rows[i].dst)}
    waiting |= {rows[i].dst for what, i in never if what == "apply"}
    made = sum(("read", i) not in never for i in range(len(rows)))
    told = {(who, does, chunk, at) for (who, does), (chunk, at) in direct.items()}
    return Said(told, waiting - {rank} - {who for who, *_ in told}, made, len(rows)), bool(never)


@settings(max_examples=300)
@given(schedule=right_schedules(), data=st.data())
def test_who_waits_is_what_a_naive_closure_finds(schedule: Schedule, data: st.DataObject) -> None:
    exchange = all_reduce("drawn", replace(schedule, contributes=np.ones_like(schedule.contributes)))
    rank = data.draw(st.integers(0, exchange.ranks - 1))
    step = data.draw(st.integers(0, exchange.gradients.steps))
    where = data.draw(some_clusters(data.draw(st.sampled_from(KINDS))))
    assume(exchange.ranks <= len(where.devices))
    expected, stuck = naive(rows_of(exchange.gradients), exchange.ranks, rank, step)
    if stuck:
        with pytest.raises(RankFailed) as caught:
            simulate(exchange, where, fail=(rank, step))
        assert said(str(caught.value)) == expected
    else:
        assert simulate(exchange, where, fail=(rank, step)).time_s == simulate(exchange, where).time_s


def test_a_rank_with_nothing_left_to_do_is_not_missed() -> None:
    ring = exchanges.build("ring", 4, 1000)
    assert simulate(ring, ideal(4), fail=(2, 6)).time_s == simulate(ring, ideal(4)).time_s
    assert said(failing(ring, 2, 5)).made == 22  # all but what it sends and what it receives


def test_steps_of_the_parameters_count_on() -> None:
    server = exchanges.build("parameter-server", 3, 1000)
    found = said(failing(server, 0, 0))
    assert found == Said({(3, "receive", 0, 0)}, {1, 2}, 2, 6)
    assert said(failing(server, 0, 1)) == Said({(3, "send", 0, 1)}, set(), 5, 6)
    assert said(failing(server, 3, 1)) == Said({(rank, "receive", 0, 1) for rank in range(3)}, set(), 3, 6)
    simulate(server, ideal(4), fail=(0, 2))


@pytest.mark.parametrize("posting", ["eager", "rounds"])
def test_hosts_that_take_time_change_when_and_not_who(posting: Posting) -> None:
    ring = exchanges.build("ring", 5, 1000)
    plain = failing(ring, 3, 4, posting=posting)
    with pytest.raises(RankFailed) as caught:
        simulate(ring, flat(5, 12.5e9, 5e-6, host_s=1e-6), fail=(3, 4), posting=posting)
    assert said(str(caught.value)) == said(plain) and str(caught.value) != plain


def test_messages_of_several_chunks_are_named_by_all_of_them() -> None:
    message = failing(exchanges.build("halving-doubling", 8, 1000), 3, 0)
    assert re.search(r"^  rank 2 waits to (send|receive) chunks \d+-\d+ (to|from) it at step 0", message, re.MULTILINE)


def test_many_waiting_ranks_are_counted_and_not_all_named() -> None:
    lines = failing(exchanges.build("all-to-all", 40, 100), 7, 0).splitlines()
    assert len(lines) == 23 and lines[21] == "  and so do 19 more ranks"
    assert lines[1] == "  rank 0 waits to send chunk 0 to it at step 0 and to receive chunk 0 from it at step 0"
    lines = failing(exchanges.build("ring", 40, 100), 7, 0).splitlines()
    assert lines[3].startswith("  behind them wait 37 ranks: 0, 1, 2, ") and lines[3].endswith(", ...")


def test_nothing_was_made_where_the_first_step_fails() -> None:
    assert failing(exchanges.build("ring", 2, 10), 0, 0).splitlines()[-1] == "  0 of 4 transfers were made"


def test_a_rank_or_step_that_is_not_there() -> None:
    ring = exchanges.build("ring", 4, 100)
    with pytest.raises(ConfigError, match=r"rank 4 cannot fail: ring has ranks 0\.\.3"):
        simulate(ring, ideal(4), fail=(4, 0))
    with pytest.raises(ConfigError, match=r"cannot fail at step -1; steps count from 0"):
        simulate(ring, ideal(4), fail=(0, -1))


def test_the_command_fails_with_the_message(capsys: pytest.CaptureFixture[str]) -> None:
    command = "exchange ring --ranks 8 --params 1000"
    assert main(f"{command} --fail 3@5".split()) == 2
    out, err = capsys.readouterr()
    assert out == "" and err == f"distsim: error: {failing(exchanges.build('ring', 8, 1000), 3, 5)}\n"
    assert main(command.split()) == 0
    whole = capsys.readouterr().out
    assert main(f"{command} --fail 3@14".split()) == 0
    out, err = capsys.readouterr()
    assert out == whole and "rank 3 has nothing to do from step 14 on" in err


@pytest.mark.parametrize("text", ["3", "@", "3@", "-1@2", "a@b", "3@5@7", "1e3@5", "9999999999@1"])
def test_what_fails_has_to_be_a_rank_and_a_step(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["exchange", "ring", "--ranks", "8", "--params", "1000", f"--fail={text}"]) == 2
    assert "expected a rank and a step, such as 3@5" in capsys.readouterr().err


def blocking(exchange: Exchange) -> TaskGraph:
    """Lower an exchange as it runs where each rank first sends and then receives, and a send waits for its receive.

    Nothing is taken in before the own message of the same step has been taken: so message i waits for the one that
    its receiver sends in that step.
    """
    lowered = lower(exchange, ideal(exchange.ranks), 4)
    graph, (part,) = lowered.graph, lowered.parts
    rows = rows_of(part.schedule)
    sent = {(row.step, row.src): i for i, row in enumerate(rows)}
    waits = [(sent[row.step, row.dst], i) for i, row in enumerate(rows) if (row.step, row.dst) in sent]
    first, after = np.array(waits).T
    before = np.repeat(np.arange(graph.tasks), np.diff(graph.next_ptr))
    return TaskGraph.of(
        amount=graph.amount,
        route=graph.route,
        resources=graph.resources,
        routes=graph.routes,
        edges=[Edges(before, graph.following), Edges(first, after)],
        joins=graph.tasks - len(graph.amount),
        describe=graph.describe,
    )


def test_a_circle_of_waits_is_shown_with_step_rank_peer_and_chunk() -> None:
    with pytest.raises(DeadlockError) as caught:
        engine.run(blocking(exchanges.build("ring", 3, 30)))
    lines = str(caught.value).splitlines()
    assert "of them wait in a circle" in lines[0] and len(lines) == 4
    pattern = r"gradients: sending row \d+ \(step 0: rank (\d) reduces into rank (\d), chunk (\d), from work\)"
    found = [re.fullmatch(rf"  {pattern} waits for {pattern}", line) for line in lines[1:]]
    peers = [tuple(map(int, each.groups())) for each in found if each]
    assert sorted(peers) == sorted((r, (r + 1) % 3, r, (r + 1) % 3, (r + 2) % 3, (r + 1) % 3) for r in range(3))


def test_a_chain_that_sends_first_has_no_circle() -> None:
    rows = [Row(0, 0, 1, 0, Op.REDUCE, Source.WORK), Row(0, 1, 2, 0, Op.REDUCE, Source.WORK)]
    exchange = all_reduce("chain", table(rows, ranks=3))
    assert engine.run(blocking(exchange)).makespan_s > 0
