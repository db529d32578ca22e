"""The critical path: closed forms, every second accounted for, the right link named; how busy resources are."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from graphs import graph, waiters_of
from helpers import all_reduce, right_schedules
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from made_clusters import KINDS, cluster, flat, link, some_clusters

from distsim import chain, critical, engine, exchanges
from distsim.cli import main
from distsim.cluster import Cluster, ideal, load
from distsim.lower import Posting
from distsim.network import Sharing
from distsim.schedule import Exchange
from distsim.step import Simulation, simulate, simulate_representatives

L, B = 5e-6, 12.5e9
"""Latency and bandwidth of the ideal switch."""


def near(value: float) -> Any:
    return pytest.approx(value, rel=1e-9, abs=1e-18)


def by_cause(simulation: Simulation) -> dict[str, float]:
    """Seconds of each cause."""
    sums: dict[str, float] = defaultdict(float)
    for segment in critical.critical_path(simulation):
        sums[segment.cause] += segment.seconds
    return dict(sums)


@pytest.mark.parametrize("ranks", [2, 3, 8])
@pytest.mark.parametrize("sharing", ["fair", "fifo"])
def test_a_ring_on_a_switch_is_bandwidth_and_latency(ranks: int, sharing: Sharing) -> None:
    result = simulate(exchanges.build("ring", ranks, 1000 * ranks), ideal(ranks), sharing=sharing)
    steps = 2 * (ranks - 1)
    assert by_cause(result) == {"transfer": near(steps * 4000 / B), "latency": near(steps * L)}
    parts = [segment for segment in critical.critical_path(result) if segment.cause == "transfer"]
    assert sum(segment.tasks for segment in parts) == steps
    assert {segment.resource for segment in parts} <= {f"device{rank} -> switch" for rank in range(ranks)}
    assert all(segment.ranks == (int(segment.resource[len("device")]),) for segment in parts)


@pytest.mark.parametrize(("sharing", "cause"), [("fair", "sharing"), ("fifo", "queueing")])
def test_a_parameter_server_waits_for_the_links_of_its_server(sharing: Sharing, cause: str) -> None:
    workers, params = 5, 10_000
    result = simulate(exchanges.build("parameter-server", workers, params), ideal(workers + 1), sharing=sharing)
    one_s = params * 4 / B
    assert by_cause(result) == {
        cause: near(2 * (workers - 1) * one_s),
        "transfer": near(2 * one_s),
        "latency": near(2 * L),
    }
    waits = [segment for segment in critical.critical_path(result) if segment.cause == cause]
    assert {segment.resource for segment in waits} == {"device5 -> switch", "switch -> device5"}
    for segment in waits:
        assert segment.crowd == near(workers if cause == "sharing" else workers - 1)
    first = critical.explain(result).splitlines()[1]
    assert "waits for 2 links" in first and "device5" in first
    assert ("shared by 5 messages at a time" if cause == "sharing" else "where 4 go first") in first


def test_a_slow_link_is_named() -> None:
    where = flat(6, 10e9, 1e-6, overrides=[{"from": "gpu4", "to": "switch", "slowdown": 20}])
    segments = critical.critical_path(simulate(exchanges.build("ring", 6, 6_000_000), where))
    assert segments[0].resource == "gpu4 -> switch" and segments[0].ranks == (4,)
    assert sum(segment.share for segment in segments if segment.resource == "gpu4 -> switch") > 0.9
    assert "gpu4 -> switch" in critical.words(segments)[0]


def test_a_shared_nic_is_named() -> None:
    node = {"kind": "switch", "devices": 4, "link": "nvlink"}
    shape = {"kind": "nodes", "nodes": 2, "node": node, "nics": 1, "fabric": {"kind": "switch", "link": "nic"}}
    where = cluster(shape, {"nvlink": link(400e9, 0.0), "nic": link(10e9, 0.0)})
    result = simulate(exchanges.build("all-to-all", 8, 1_000_000), where)
    one_s = 4e6 / 10e9  # 4 devices send to 4 others, over one NIC
    assert by_cause(result) == {"sharing": near(15 * one_s), "transfer": near(one_s)}
    (waits,) = (segment for segment in critical.critical_path(result) if segment.cause == "sharing")
    assert waits.crowd == near(16) and waits.share == near(15 / 16)
    assert waits.resource in ("node0.nic0.out -> switch", "node1.nic0.out -> switch")
    node_number = waits.resource[4]
    assert critical.words([waits])[0].split(None, 4)[4] == (
        f"waits for NIC 0 of node {node_number} ({waits.resource}), shared by 16 messages at a time"
    )


def test_overheads_additions_and_hosts_are_causes_of_their_own() -> None:
    bandwidth, latency, overhead, adds, host = 1e9, 3e-6, 2e-6, 5e9, 7e-6
    where = flat(2, bandwidth, latency, overhead, reduce_Bps=adds, host_s=host)
    result = simulate(exchanges.build("ring", 2, 2000), where)
    size = 4000
    assert by_cause(result) == {
        "posting": near(2 * host),
        "overhead": near(2 * overhead),
        "transfer": near(2 * size / bandwidth),
        "latency": near(2 * latency),
        "adding": near(size / adds),
    }
    segments = {segment.cause: segment for segment in critical.critical_path(result)}
    assert segments["adding"].resource == f"processor of rank {segments['adding'].ranks[0]}"
    assert segments["posting"].resource.startswith("host of rank ")
    text = "\n".join(critical.words(critical.critical_path(result)))
    for words in ("adds 1 time on processor of rank", "hands over", "overhead of 2 messages in a row"):
        assert words in text


def test_nothing_takes_time_for_one_rank() -> None:
    alone = simulate(exchanges.build("ring", 1, 10), ideal(1))
    assert critical.critical_path(alone) == [] and critical.busiest(alone) == []
    assert critical.explain(alone) == "where the time went: nothing takes time"


def test_ties_are_resolved_by_the_lowest_number() -> None:
    tasks = graph([1, 1, 1, 1, 1], [[0], [1], [2], [3], [4]], [(2, 3), (0, 3), (1, 3), (2, 4), (1, 4)])
    assert chain.path(tasks, engine.run(tasks)) == [0, 3]
    assert chain.path(graph([], []), engine.run(graph([], []))) == []


@st.composite
def simulations(draw: st.DrawFn) -> Simulation:
    """Draw a correct exchange on any cluster, run in any way."""
    if draw(st.booleans()):
        drawn = draw(right_schedules())
        exchange = all_reduce("drawn", replace(drawn, contributes=np.ones_like(drawn.contributes)))
    else:
        strategy = draw(st.sampled_from(list(exchanges.STRATEGIES)))
        exchange = exchanges.build(strategy, draw(st.sampled_from([2, 3, 4])), draw(st.integers(1, 10_000)))
    where = draw(some_clusters(draw(st.sampled_from(KINDS))))
    assume(exchange.ranks <= len(where.devices))
    postings: list[Posting] = ["eager", "rounds"]
    sharings: list[Sharing] = ["fair", "fifo"]
    return simulate(exchange, where, sharing=draw(st.sampled_from(sharings)), posting=draw(st.sampled_from(postings)))


@settings(max_examples=300)
@given(result=simulations())
def test_every_second_of_a_path_without_gaps_is_accounted_for(result: Simulation) -> None:
    tasks, timeline = result.lowered.graph, result.timeline
    segments = critical.critical_path(result)
    assert math.fsum(segment.seconds for segment in segments) == pytest.approx(result.time_s, rel=1e-12, abs=0)
    assert all(segment.seconds > 0 for segment in segments)
    if not tasks.tasks:
        return
    path = chain.path(tasks, timeline)
    assert timeline.finish_s[path[-1]] == result.time_s and tasks.waits[path[0]] == 0
    until: defaultdict[int, list[tuple[float, int]]] = defaultdict(list)
    for task in range(tasks.tasks):
        for waiter in waiters_of(tasks, task):
            until[waiter].append((float(timeline.finish_s[task]), task))
    for task in np.flatnonzero(tasks.next_in_line >= 0).tolist():  # the next in line does not wait for the latency
        let_go_s = timeline.finish_s[task] - tasks.routes.latency_s[tasks.route[task]]
        until[int(tasks.next_in_line[task])].append((float(let_go_s), task))
    for earlier, later in pairwise(path):
        last = max(time for time, _ in until[later])
        assert earlier == min(task for time, task in until[later] if time == last)
    unseen = {task for task, after in pairwise(path) if timeline.start_s[after] < timeline.finish_s[task]}
    messages = [
        task
        for task in path
        if task < len(tasks.amount) and tasks.route[task] < _messages_end(result) and task not in unseen
    ]
    latency = sum(float(tasks.routes.latency_s[tasks.route[task]]) for task in messages)
    assert by_cause(result).get("latency", 0.0) == pytest.approx(latency, rel=1e-9, abs=1e-18)
    held = [_alone_s(result, task) for task in path if task < len(tasks.amount)]
    full_speed = sum(seconds for cause, seconds in by_cause(result).items() if cause not in WAITING | {"latency"})
    assert full_speed == pytest.approx(math.fsum(held), rel=1e-6, abs=1e-9 * result.time_s)


WAITING = {"sharing", "queueing"}


def _messages_end(result: Simulation) -> int:
    return result.lowered.network.processor_route


def _alone_s(result: Simulation, task: int) -> float:
    """How long a task would hold its slowest resource if it were alone."""
    tasks = result.lowered.graph
    path = tasks.routes.resources[tasks.routes.ptr[tasks.route[task]] : tasks.routes.ptr[tasks.route[task] + 1]]
    resources = tasks.resources
    return max(float(tasks.amount[task] / resources.capacity[each] + resources.overhead_s[each]) for each in path)


@settings(max_examples=200)
@given(result=simulations())
def test_waiting_has_a_crowd_and_nothing_else_has(result: Simulation) -> None:
    for segment in critical.critical_path(result):
        if segment.cause == "sharing":
            assert segment.crowd > 1
        elif segment.cause == "queueing":
            assert segment.crowd >= 1
        else:
            assert segment.crowd == 0
        if segment.cause in ("adding", "posting"):
            assert segment.ranks == (int(segment.resource.rpartition(" ")[2]),)


@settings(max_examples=100)
@given(result=simulations())
def test_busiest_links_are_those_of_a_naive_count(result: Simulation) -> None:
    where, sized = result.cluster, 4
    load_s: dict[str, float] = defaultdict(float)
    for schedule in result.exchange.schedules():
        each = schedule.messages()
        for first, last in zip(each.first.tolist(), each.last.tolist(), strict=True):
            size = sum(int(schedule.chunk_elements[chunk]) for chunk in schedule.chunk[first : last + 1]) * sized
            _, links = where.routes([schedule.src[first]], [schedule.dst[first]])
            for each_link in links.tolist():
                name = where.link_name(each_link)
                load_s[name] += size / where.bandwidth_Bps[each_link] + where.overhead_s[each_link]
    found = critical.busiest(result, 1000)
    for usage in found:
        if "->" not in usage.resource:
            continue
        assert usage.busy_s == pytest.approx(load_s[usage.resource], rel=1e-9)
        assert usage.utilization == pytest.approx(usage.busy_s / result.time_s, rel=1e-9)
        assert usage.utilization <= usage.occupied * (1 + 1e-9) + 1e-12 and usage.occupied <= 1 + 1e-9
    assert sum(1 + usage.alike for usage in found) >= len(load_s)
    assert all(early.busy_s > late.busy_s for early, late in pairwise(found))


def test_a_link_in_use_is_not_always_busy() -> None:
    workers, params = 4, 1_000_000
    result = simulate(exchanges.build("parameter-server", workers, params), ideal(workers + 1))
    server, worker = critical.busiest(result)
    one_s = params * 4 / B
    assert (server.alike, worker.alike) == (1, 2 * workers - 1)
    assert server.utilization == near(workers * one_s / result.time_s) == server.occupied
    assert worker.utilization == near(one_s / result.time_s)
    assert worker.occupied == near(workers * one_s / result.time_s)


@pytest.mark.parametrize(
    ("strategy", "name"), [(s, c) for s in ("ring", "all-to-all") for c in ("h100_2x8_ndr", "laptop_loopback")]
)
def test_representatives_give_the_same_path_as_the_whole(strategy: str, name: str) -> None:
    where: Cluster = load(name)
    ranks = len(where.devices)
    whole = simulate(exchanges.build(strategy, ranks, 1_600_000), where)
    some = simulate_representatives(strategy, ranks, 1_600_000, where)
    assert some.copies > 1
    assert by_cause(some) == {cause: pytest.approx(seconds, rel=1e-6) for cause, seconds in by_cause(whole).items()}
    crowds = [
        sum(segment.crowd * segment.seconds for segment in critical.critical_path(each)) for each in (whole, some)
    ]
    assert crowds[0] == pytest.approx(crowds[1], rel=1e-6)
    assert [usage.utilization for usage in critical.busiest(whole)] == pytest.approx(
        [usage.utilization for usage in critical.busiest(some)]
    )
    assert [usage.alike for usage in critical.busiest(whole)] == [usage.alike for usage in critical.busiest(some)]


def test_the_command_says_and_writes_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    command = "exchange parameter-server --ranks 4 --params 1000000"
    assert main(command.split()) == 0
    result = simulate(exchanges.build("parameter-server", 4, 1_000_000), ideal(5))
    assert capsys.readouterr().out.rstrip("\n").endswith(critical.explain(result))
    assert main([*command.split(), "--json"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert {key: values[key] for key in ("critical_path", "busiest")} == json.loads(
        json.dumps(critical.as_values(result))
    )
    assert sum(segment["seconds"] for segment in values["critical_path"]) == near(values["time_s"])
    assert sum(segment["share"] for segment in values["critical_path"]) == near(1)


def test_many_tasks_are_compiled_to_the_same_path() -> None:
    exchange: Exchange = exchanges.build("ring", 64, 64_000)
    result = simulate(exchange, ideal(64))
    tasks, timeline = result.lowered.graph, result.timeline
    last = np.full(tasks.tasks, -1)
    for task in range(tasks.tasks):
        for waiter in waiters_of(tasks, task):
            if last[waiter] < 0 or timeline.finish_s[task] > timeline.finish_s[last[waiter]]:
                last[waiter] = task
    wanted = [int(np.argmax(timeline.finish_s))]
    while last[wanted[0]] >= 0:
        wanted.insert(0, int(last[wanted[0]]))
    assert tasks.tasks + len(tasks.following) > 20_000 and chain.path(tasks, timeline) == wanted


@pytest.mark.parametrize(("slowdown", "alike"), [(1.3, [0, 10]), (1.0005, [11])])
def test_resources_as_busy_as_one_another_count_as_one(slowdown: float, alike: list[int]) -> None:
    where = flat(6, 10e9, 1e-6, overrides=[{"from": "gpu4", "to": "switch", "slowdown": slowdown}])
    found = critical.busiest(simulate(exchanges.build("ring", 6, 6_000_000), where))
    assert [usage.alike for usage in found] == alike
    assert (found[0].resource == "gpu4 -> switch") == (len(alike) > 1)
