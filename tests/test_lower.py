"""Lowering: what each task waits for, against the design's rules; hosts and rounds; the names of tasks."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import networkx as nx
import numpy as np
import numpy.typing as npt
import pytest
from graphs import waiters_of
from helpers import Row, all_reduce, random_schedules, rows_of, table, waits_by_the_rules
from hypothesis import given, settings
from hypothesis import strategies as st
from made_clusters import flat

from distsim import cluster as clusters
from distsim import engine, exchanges
from distsim.dependencies import dependencies
from distsim.engine import Timeline
from distsim.lower import Part, Posting, additions, lower
from distsim.network import Sharing
from distsim.schedule import Op, Schedule, Source
from distsim.step import simulate
from distsim.taskgraph import TaskGraph

SHARINGS: tuple[Sharing, ...] = ("fair", "fifo")
POSTINGS: tuple[Posting, ...] = ("eager", "rounds")


def row_tasks(part: Part) -> npt.NDArray[np.int64]:
    """The task of each row: that of its message."""
    return np.arange(part.sends.start, part.sends.stop)[part.messages.of_row]


def group_tasks(part: Part) -> npt.NDArray[np.int64]:
    """The task of each apply."""
    return part.groups.astype(np.int64)


def keeps_the_waits(part: Part, timeline: Timeline) -> bool:
    """Whether the times of a schedule's transfers and applies are those that its waits allow."""
    waits, start, finish = part.waits, timeline.start_s, timeline.finish_s
    rows, groups = row_tasks(part), group_tasks(part)
    after, gates, follows = waits.after_group >= 0, waits.gates_group >= 0, waits.previous >= 0
    pairs = [
        (rows, groups[waits.group_of_row]),
        (groups[waits.after_group[after]], rows[after]),
        (rows[gates], groups[waits.gates_group[gates]]),
        (groups[waits.previous[follows]], groups[follows]),
    ]
    # What a lone message brings is applied as it arrives: its apply has no task of its own.
    return all(bool(((finish[first] <= start[second]) | (first == second)).all()) for first, second in pairs)


@pytest.mark.parametrize("strategy", exchanges.STRATEGIES)
@pytest.mark.parametrize("posting", POSTINGS)
def test_times_keep_the_waits(strategy: str, posting: Posting) -> None:
    result = simulate(exchanges.build(strategy, 4, 11), clusters.load("dgx_h100"), posting=posting)
    for part in result.lowered.parts:
        rows = row_tasks(part)
        assert (result.timeline.finish_s[rows] > result.timeline.start_s[rows]).all()
        assert keeps_the_waits(part, result.timeline)


@settings(max_examples=200)
@given(
    random_schedules(),
    st.sampled_from([0.0, 1e-6, 1e-4]),
    st.sampled_from([None, 1e5, 1e6]),
    st.sampled_from(SHARINGS),
    st.sampled_from(POSTINGS),
)
def test_times_of_any_schedule_keep_the_waits(
    schedule: Schedule, latency_s: float, reduce_Bps: float | None, sharing: Sharing, posting: Posting
) -> None:
    """Right or wrong, so that each wait decides something: those of the strategies often follow from others."""
    place = flat(schedule.ranks, 1e6, latency_s, reduce_Bps=reduce_Bps)
    lowered = lower(all_reduce("any", schedule), place, 4, sharing=sharing, posting=posting)
    timeline = engine.run(lowered.graph)
    (part,) = lowered.parts
    assert keeps_the_waits(part, timeline)
    rows = row_tasks(part)
    alone_s = schedule.elements() * 4 / 1e6 + latency_s
    taken_s = timeline.finish_s[rows] - timeline.start_s[rows]
    if sharing == "fifo":
        assert taken_s == pytest.approx(alone_s)
    assert (taken_s >= alone_s * (1 - 1e-9)).all()


def neighbours(schedule: Schedule) -> Schedule:
    """Put rows side by side that can travel together, and let them."""
    rows = sorted(rows_of(schedule), key=lambda row: (row.step, row.src, row.dst, row.op, row.source, row.chunk))
    columns = {"sizes": schedule.chunk_elements.tolist(), "contributes": schedule.contributes}
    return replace(table(rows, ranks=schedule.ranks, **columns), coalesced=True)


@settings(max_examples=200)
@given(random_schedules(max_rows=24))
def test_neighbouring_rows_of_neighbouring_chunks_are_one_message(schedule: Schedule) -> None:
    schedule = neighbours(schedule)
    (part,) = lower(all_reduce("any", schedule), flat(schedule.ranks, 1e6, 1e-6), 4).parts
    messages: list[list[int]] = []
    rows = rows_of(schedule)
    for i, row in enumerate(rows):
        if not i or row != rows[i - 1]._replace(chunk=rows[i - 1].chunk + 1):
            messages.append([])
        messages[-1].append(i)
    assert row_tasks(part).tolist() == [number for number, some in enumerate(messages) for _ in some]
    assert schedule.traffic(4).messages == len(messages)
    sizes = [sum(4 * int(schedule.chunk_elements[rows[i].chunk]) for i in some) for some in messages]
    assert schedule.traffic(4).message_sizes == Counter(sizes)


def closure(graph: TaskGraph) -> nx.DiGraph[int]:
    """Who waits for whom, straight away or through others; joins between messages and applies stand aside."""
    edges: nx.DiGraph[int] = nx.DiGraph()
    edges.add_nodes_from(range(graph.tasks))
    for task in range(graph.tasks):
        edges.add_edges_from((task, waiter) for waiter in waiters_of(graph, task))
    return nx.transitive_closure(edges)


@settings(max_examples=200)
@given(random_schedules(max_rows=10), st.sampled_from(POSTINGS), st.booleans(), st.booleans())
def test_a_lowered_schedule_waits_as_the_rules_say(
    schedule: Schedule, posting: Posting, adds: bool, coalesced: bool
) -> None:
    """Messages and applies wait for what the rules ask for, row by row, and for nothing else.

    In rounds, a message waits besides for all that its sender and its receiver send and receive in earlier steps.
    Rows that travel together wait together.
    """
    if coalesced:
        schedule = neighbours(schedule)
    rows = rows_of(schedule)
    place = flat(schedule.ranks, 1e6, 1e-6, reduce_Bps=1e6 if adds else None)
    lowered = lower(all_reduce("any", schedule), place, 4, posting=posting)
    (part,) = lowered.parts
    tasks = {"read": row_tasks(part).tolist(), "apply": group_tasks(part)[part.waits.group_of_row].tolist()}
    wanted: nx.DiGraph[int] = nx.DiGraph()
    wanted.add_nodes_from(range(part.messages.count + part.waits.groups))
    for (before, i), (after, j) in waits_by_the_rules(rows):
        if tasks[before][i] != tasks[after][j]:  # the rows of one apply are one task
            wanted.add_edge(tasks[before][i], tasks[after][j])
    if posting == "rounds":
        for i, row in enumerate(rows):
            for j, other in enumerate(rows):
                if other.step < row.step and {row.src, row.dst} & {other.src, other.dst}:
                    wanted.add_edge(tasks["read"][j], tasks["read"][i])
    nodes = sorted({*tasks["read"], *tasks["apply"]})
    found, asked = closure(lowered.graph), nx.transitive_closure(wanted)
    for one in nodes:
        assert set(found[one]) & set(nodes) == set(asked[one]) & set(nodes), lowered.graph.describe(one)


def test_in_rounds_a_rank_is_held_up_by_what_eager_messages_overtake() -> None:
    """Rank 0 sends 1 ms and 4 ms at step 0; its 1 ms of step 1 depends on neither, over another link.

    Eager: all at once. In rounds: step 1 begins when both of step 0 have arrived.
    """
    rows = [
        Row(0, 0, 1, 0, Op.REDUCE, Source.INPUT),
        Row(0, 0, 2, 1, Op.REDUCE, Source.INPUT),
        Row(1, 0, 3, 0, Op.REDUCE, Source.INPUT),
        Row(2, 3, 2, 0, Op.REDUCE, Source.INPUT),
    ]
    schedule = table(rows, ranks=4, sizes=[250_000, 1_000_000])
    ends = {}
    for posting in POSTINGS:
        lowered = lower(all_reduce("four", schedule), flat(4, 1e9, 1e-4, kind="full"), 4, posting=posting)
        ends[posting] = engine.run(lowered.graph).finish_s[row_tasks(lowered.parts[0])].tolist()
    assert ends["eager"] == pytest.approx([1.1e-3, 4.1e-3, 1.1e-3, 1.1e-3])
    assert ends["rounds"] == pytest.approx([1.1e-3, 4.1e-3, 5.2e-3, 6.3e-3])


@pytest.mark.parametrize("servers", [1, 3])
def test_rounds_go_on_from_gradients_to_parameters(servers: int) -> None:
    """No rank takes part in sharing parameters before all of its own gradients are sent and received."""
    exchange = exchanges.build(f"parameter-server:servers={servers}", 3, 3000)
    slow = [{"from": "switch", "to": "gpu3", "slowdown": 4}]
    for posting in POSTINGS:
        lowered = lower(exchange, flat(6, 1e9, 1e-5, overrides=slow), 4, posting=posting)
        found = closure(lowered.graph)
        push, pull = lowered.parts
        early = [
            (one, other)
            for one, before in zip(row_tasks(push).tolist(), rows_of(push.schedule), strict=True)
            for other, after in zip(row_tasks(pull).tolist(), rows_of(pull.schedule), strict=True)
            if {before.src, before.dst} & {after.src, after.dst} and other not in found[one]
        ]
        assert bool(early) == (posting == "eager" and servers > 1)


def test_names_of_tasks_say_what_waits() -> None:
    place = flat(4, 1e9, 1e-3, reduce_Bps=1e9, host_s=1e-6)
    lowered = lower(exchanges.build("parameter-server", 3, 3), place, 4, posting="rounds")
    names = [lowered.graph.describe(task) for task in range(lowered.graph.tasks)]
    assert names[0] == "gradients: sending row 0 (step 0: rank 0 reduces into rank 3, chunk 0, from input)"
    assert names[3] == "parameters: sending row 0 (step 0: rank 3 copies to rank 0, chunk 0, from input)"
    assert names[6] == "gradients: posting row 0 (step 0: rank 0 reduces into rank 3, chunk 0, from input)"
    assert "gradients: applying at step 0, rank 3, chunk 0" in names
    assert "gradients: updating rank 3" in names
    assert "a step of rank 3" in names
    assert [lowered.network.resources.describe(each) for each in (0, 4, 8, 12)] == [
        "link gpu0 -> switch",
        "link switch -> gpu0",
        "processor of rank 0",
        "host of rank 0",
    ]


def test_additions_counts_terms_less_one() -> None:
    for strategy, wanted in {"ring": [[1] * 6 + [0] * 6], "all-to-all": [[2, 2, 2]]}.items():
        schedule = exchanges.build(strategy, 3, 7).gradients
        assert sorted(additions(dependencies(schedule)).tolist(), reverse=True) == wanted[0]
    push, pull = exchanges.build("parameter-server", 3, 7).schedules()
    assert additions(dependencies(push)).tolist() == [2]
    assert additions(dependencies(pull)).tolist() == [0, 0, 0]
