"""Simulated exchanges: closed forms on switches, hand-computed additions, bounds, and one order in all worlds."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from helpers import COLLECTIVES, all_reduce, random_schedules, rows_of
from hypothesis import given, settings
from hypothesis import strategies as st

from distsim import check as checker
from distsim import cluster as clusters
from distsim import engine, exchanges
from distsim.cluster import Cluster
from distsim.errors import ConfigError, ScheduleError
from distsim.lower import additions, lower
from distsim.schedule import ITEMSIZE, Dependencies, Exchange, Schedule, dependencies
from distsim.step import simulate

Floats = npt.NDArray[np.float64]
Index = npt.NDArray[np.int64]
STRATEGIES = list(exchanges.STRATEGIES)
L, B = 5e-6, 12.5e9
"""Latency and bandwidth of the default cluster."""


def exactly(value: float) -> Any:
    return pytest.approx(value, rel=1e-9, abs=0)


def link(
    bandwidth_Bps: float, latency_s: float, overhead_s: float | None = None, source: str = "a test"
) -> dict[str, Any]:
    """An entry of a cluster file's `links`."""
    entry: dict[str, Any] = {
        "bandwidth": clusters.bandwidth_quantity(bandwidth_Bps, source),
        "latency": clusters.time_quantity(latency_s, source),
    }
    return entry if overhead_s is None else {**entry, "overhead": clusters.time_quantity(overhead_s, source)}


def cluster(topology: dict[str, Any], links: dict[str, Any], reduce_Bps: float | None = None) -> Cluster:
    """Make a cluster as a user would: from the text of a file (JSON is YAML)."""
    file: dict[str, Any] = {"title": "t", "source": "s", "topology": topology, "links": links}
    if reduce_Bps is not None:
        file["reduce"] = {"bandwidth": clusters.bandwidth_quantity(reduce_Bps, "a test")}
    return clusters.parse(json.dumps(file), "test", "test.yaml")


def switch(devices: int, bandwidth_Bps: float, latency_s: float, **more: Any) -> Cluster:
    overhead_s = more.pop("overhead_s", None)
    topology = {"kind": "switch", "devices": devices, "link": "wire"}
    return cluster(topology, {"wire": link(bandwidth_Bps, latency_s, overhead_s)}, **more)


@pytest.mark.parametrize("n", [2, 3, 4, 7, 8])
@pytest.mark.parametrize("where", ["ideal", "ethernet_16x10g"])
@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
def test_closed_forms_on_a_switch(n: int, where: str, dtype: str) -> None:
    place = clusters.ideal(n + 1) if where == "ideal" else clusters.load(where)
    latency_s = float(place.latency_s.max())
    bandwidth_Bps = float(place.bandwidth_Bps.min())
    if where == "ideal":
        assert (latency_s, bandwidth_Bps) == (L, B)
    p = 1000 * n
    message_s = p * ITEMSIZE[dtype] / bandwidth_Bps
    wanted = {
        "ring": 2 * (n - 1) * (latency_s + message_s / n),
        "all-to-all": latency_s + (n - 1) * message_s,
        "parameter-server": 2 * latency_s + 2 * n * message_s,
    }
    for strategy, time_s in wanted.items():
        result = simulate(exchanges.build(strategy, n, p), place, dtype)
        assert result.time_s == exactly(time_s), strategy
        assert result.algbw_Bps == exactly(p * ITEMSIZE[dtype] / time_s)
        assert result.busbw_Bps == exactly(p * ITEMSIZE[dtype] / time_s * 2 * (n - 1) / n)
    ring = simulate(exchanges.build("ring", n, p), place, dtype)
    assert ring.peak_staging_bytes == p * ITEMSIZE[dtype] // n
    to_all = simulate(exchanges.build("all-to-all", n, p), place, dtype)
    assert to_all.peak_staging_bytes == (n - 1) * p * ITEMSIZE[dtype]
    assert ring.latency_bound_s == exactly(2 * (n - 1) * latency_s)
    assert ring.bandwidth_bound_s == exactly(2 * (n - 1) * message_s / n)
    server = simulate(exchanges.build("parameter-server", n, p), place, dtype)
    assert server.peak_staging_bytes == n * p * ITEMSIZE[dtype]
    assert server.latency_bound_s == exactly(2 * latency_s)
    assert server.bandwidth_bound_s == exactly(n * message_s)


def test_an_overhead_is_paid_for_every_message() -> None:
    place = switch(5, 1e9, 1e-3, overhead_s=1e-4)
    p = 4_000_000  # 16 ms
    for strategy, time_s in {
        "ring": 6 * (1e-3 + 4e-3 + 1e-4),
        "all-to-all": 1e-3 + 3 * (16e-3 + 1e-4),
        "parameter-server": 2 * (1e-3 + 4 * (16e-3 + 1e-4)),
    }.items():
        assert simulate(exchanges.build(strategy, 4, p), place).time_s == exactly(time_s), strategy


# 1 ms to begin a message, 4 ms to send the array of 1,000,000 float32 at 1 GB/s, 8 ms to add it at 0.5 GB/s.
ADDING: list[tuple[str, int, float]] = [
    # Two halves: 1 + 2 ms each way; the first one is added (4 ms) before it goes back.
    ("ring", 2, 2 * (1 + 2) + 4),
    # Thirds: 4 steps of 1 + 4/3 ms; after each of the first 2 steps 8/3 ms for adding.
    ("ring", 3, 4 * (1 + 4 / 3) + 2 * 8 / 3),
    # One array arrives (1 + 4 ms) and is added (8 ms).
    ("all-to-all", 2, 1 + 4 + 8),
    # Two arrays arrive one behind the other, and are added together: two additions.
    ("all-to-all", 3, 1 + 2 * 4 + 2 * 8),
    # The server has no gradient of its own: of two arrays one addition; copies back cost none.
    ("parameter-server", 2, (1 + 2 * 4) + 8 + (1 + 2 * 4)),
    ("parameter-server", 3, (1 + 3 * 4) + 2 * 8 + (1 + 3 * 4)),
    ("parameter-server", 1, (1 + 4) + 0 + (1 + 4)),
]


@pytest.mark.parametrize(("strategy", "n", "time_ms"), ADDING)
def test_additions_take_their_time(strategy: str, n: int, time_ms: float) -> None:
    params = 1_000_000 if n < 3 else 999_999
    place = switch(4, 1e9 * params / 1e6, 1e-3, reduce_Bps=0.5e9 * params / 1e6)
    result = simulate(exchanges.build(strategy, n, params), place)
    assert result.time_s == exactly(time_ms / 1e3)


def test_a_shared_bus_carries_one_message_at_a_time() -> None:
    place = cluster({"kind": "bus", "devices": 4, "link": "bus"}, {"bus": link(1e9, 1e-3)})
    p = 1_000_000  # 4 ms
    assert simulate(exchanges.build("all-to-all", 4, p), place).time_s == exactly(12 * 4e-3 + 1e-3)
    # 4 messages of 1 ms a step; the first of a step can go when the first of the last one has arrived.
    assert simulate(exchanges.build("ring", 4, p), place).time_s == exactly(6 * 4 * 1e-3 + 1e-3)


def test_updates_keep_parameters_back_until_all_gradients_are_in() -> None:
    result = simulate(exchanges.build("parameter-server", 3, 1000), clusters.ideal(4))
    push, pull = result.lowered.transfers
    applied = result.timeline.finish_s[result.lowered.applies[0]].max()
    assert result.timeline.finish_s[push].max() == applied
    assert result.timeline.start_s[pull].min() >= applied


def keeps_the_waits(schedule: Schedule, start: Floats, finish: Floats, rows: Index, groups: Index) -> bool:
    """Whether the times of a schedule's transfers and applies are those that its waits allow."""
    waits = dependencies(schedule)
    after, gates, follows = waits.after_group >= 0, waits.gates_group >= 0, waits.previous >= 0
    pairs = [
        (rows, groups[waits.group_of_row]),
        (groups[waits.after_group[after]], rows[after]),
        (rows[gates], groups[waits.gates_group[gates]]),
        (groups[waits.previous[follows]], groups[follows]),
    ]
    return all(bool((finish[first] <= start[second]).all()) for first, second in pairs)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_times_keep_the_waits(strategy: str) -> None:
    result = simulate(exchanges.build(strategy, 4, 11), clusters.load("dgx_h100"))
    start, finish = result.timeline.start_s, result.timeline.finish_s
    for schedule, rows, groups in zip(
        result.exchange.schedules(), result.lowered.transfers, result.lowered.applies, strict=True
    ):
        assert (finish[rows] > start[rows]).all()
        assert keeps_the_waits(schedule, start, finish, rows, groups)


@settings(max_examples=200)
@given(random_schedules(), st.sampled_from([0.0, 1e-6, 1e-4]), st.sampled_from([None, 1e5, 1e6]))
def test_times_of_any_schedule_keep_the_waits(schedule: Schedule, latency_s: float, reduce_Bps: float | None) -> None:
    """Right or wrong, so that each wait decides something: those of the strategies often follow from others."""
    lowered = lower(all_reduce("any", schedule), switch(schedule.ranks, 1e6, latency_s, reduce_Bps=reduce_Bps), 4)
    timeline = engine.run(lowered.graph)
    rows, groups = lowered.transfers[0], lowered.applies[0]
    assert keeps_the_waits(schedule, timeline.start_s, timeline.finish_s, rows, groups)
    assert lowered.graph.tasks == len(rows) + len(groups)
    held_s = schedule.elements() * 4 / 1e6
    assert timeline.finish_s[rows] - timeline.start_s[rows] == pytest.approx(held_s + latency_s)


def test_additions_counts_terms_less_one() -> None:
    for strategy, wanted in {"ring": [[1] * 6 + [0] * 6], "all-to-all": [[2, 2, 2]]}.items():
        schedule = exchanges.build(strategy, 3, 7).gradients
        assert sorted(additions(dependencies(schedule)).tolist(), reverse=True) == wanted[0]
    push, pull = exchanges.build("parameter-server", 3, 7).schedules()
    assert additions(dependencies(push)).tolist() == [2]
    assert additions(dependencies(pull)).tolist() == [0, 0, 0]


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("params", [0, 1, 5])
@pytest.mark.parametrize("n", [1, 2, 5])
def test_small_and_empty_exchanges(strategy: str, params: int, n: int) -> None:
    result = simulate(exchanges.build(strategy, n, params), clusters.ideal(n + 1))
    assert (result.time_s > 0) == (result.traffic.messages > 0)
    assert (result.algbw_Bps is None) == (result.busbw_Bps is None) == (result.traffic.messages == 0)
    if not result.traffic.messages:
        assert result.latency_bound_s == result.bandwidth_bound_s == result.any_algorithm_bound_s == 0.0


QUANTITY = st.floats(1e-3, 1e3, allow_nan=False)


@st.composite
def some_clusters(draw: st.DrawFn) -> Cluster:
    """Draw a cluster of any kind with any numbers, of 4 to 6 devices or more."""

    def some_link() -> dict[str, Any]:
        overhead_s = draw(st.one_of(st.none(), st.floats(0, 1e-3)))
        return link(draw(QUANTITY) * 1e9, draw(st.floats(0, 1e-3)), overhead_s)

    links = {"a": some_link(), "b": some_link(), "c": some_link()}
    kind = draw(st.sampled_from(["switch", "bus", "nodes", "edges"]))
    topology: dict[str, Any]
    if kind in ("switch", "bus"):
        topology = {"kind": kind, "devices": draw(st.integers(4, 6)), "link": "a"}
    elif kind == "nodes":
        per_node = draw(st.integers(1, 3))
        topology = {"kind": kind, "nodes": 4, "devices_per_node": per_node, "nic": "a"}
        topology["nics_per_node"] = draw(st.integers(1, per_node))
        if per_node > 1:
            topology["inside"] = "b"
        if draw(st.booleans()):
            topology["pcie"] = "c"
    else:  # a ring of devices, so that some are on the way of others, and some chords
        names = [f"d{i}" for i in range(5)]
        ends = [(i, (i + 1) % 5) for i in range(5)] + [(i, (i + 2) % 5) for i in range(5) if draw(st.booleans())]
        edges = [
            {"from": names[a], "to": names[b], "link": draw(st.sampled_from("abc")), "both": draw(st.booleans())}
            for a, b in ends
        ]
        topology = {"kind": kind, "devices": names, "edges": edges}
    text = json.dumps(topology)
    used = {name: entry for name, entry in links.items() if f'"{name}"' in text}
    return cluster(topology, used, draw(st.one_of(st.none(), QUANTITY.map(lambda number: number * 1e9))))


@settings(max_examples=250)
@given(some_clusters(), st.sampled_from(STRATEGIES), st.integers(1, 5), st.integers(0, 10**7))
def test_no_result_beats_its_bounds(place: Cluster, strategy: str, n: int, params: int) -> None:
    n = min(n, len(place.devices) - 1)
    result = simulate(exchanges.build(strategy, n, params), place)  # which asserts it, too
    ptr, links = place.routes(result.traffic.link_src, result.traffic.link_dst)
    busiest = np.zeros(len(place.bandwidth_Bps))
    for first, last, (_, _, _, sent) in zip(ptr[:-1], ptr[1:], result.traffic.links(), strict=True):
        busiest[links[first:last]] += sent / place.bandwidth_Bps[links[first:last]]
    assert result.time_s >= busiest.max() * (1 - 1e-9)
    for bound in (result.latency_bound_s, result.bandwidth_bound_s, result.any_algorithm_bound_s):
        assert 0 <= bound <= result.time_s * (1 + 1e-9)
    again = simulate(exchanges.build(strategy, n, params), place)
    assert again.timeline.finish_s.tobytes() == result.timeline.finish_s.tobytes()


def test_a_slow_chord_does_not_bound_those_who_go_around_it() -> None:
    ends = [("d0", "d1"), ("d1", "d2"), ("d2", "d3"), ("d3", "d0")]
    edges = [{"from": a, "to": b, "link": "ring", "both": True} for a, b in ends]
    edges.append({"from": "d0", "to": "d2", "link": "chord", "both": True})
    topology = {"kind": "edges", "devices": ["d0", "d1", "d2", "d3"], "edges": edges}
    place = cluster(topology, {"ring": link(1e9, 2e-6), "chord": link(1e9, 1e-3)})
    assert simulate(exchanges.build("ring", 4, 1000), place).any_algorithm_bound_s == pytest.approx(4e-6)


def test_too_few_devices() -> None:
    with pytest.raises(ConfigError, match=r"cluster dgx_h100 has 8 devices, but ring with 9 workers needs 9; use"):
        simulate(exchanges.build("ring", 9, 1), clusters.load("dgx_h100"))
    with pytest.raises(ConfigError, match=r"8 devices, but parameter-server with 8 workers and 1 server needs 9"):
        simulate(exchanges.build("parameter-server", 8, 1), clusters.load("dgx_h100"))
    assert simulate(exchanges.build("parameter-server", 7, 1), clusters.load("dgx_h100")).time_s > 0


def test_a_wrong_schedule_is_not_simulated() -> None:
    wrong = all_reduce("half", COLLECTIVES["reduce"](4, 8))
    with pytest.raises(ScheduleError, match="some worker never gets the gradients"):
        simulate(wrong, clusters.ideal(4))


def fixtures() -> list[Any]:
    found = [
        pytest.param(schedule, id=f"{strategy}-{n}-{which}")
        for strategy in STRATEGIES
        for n in (2, 3, 5)
        for which, schedule in enumerate(exchanges.build(strategy, n, 2 * n + 1).schedules())
    ]
    return found + [pytest.param(build(4, 37), id=name) for name, build in COLLECTIVES.items()]


@pytest.mark.parametrize("schedule", fixtures())
def test_checker_engine_and_executor_apply_in_one_order(schedule: Schedule) -> None:
    waits = dependencies(schedule)
    orders = {
        "checker": order_of_checker(schedule),
        "engine": order_of_engine(schedule),
        "executor": order_of_executor(schedule),
    }
    for who, order in orders.items():
        assert sorted(order) == list(range(waits.groups)), who
        assert respects(order, schedule), who
    places = {(int(rank), int(chunk)) for rank, chunk in zip(waits.dst, waits.chunk, strict=True)}
    for rank, chunk in places:
        here = {
            who: [group for group in order if (waits.dst[group], waits.chunk[group]) == (rank, chunk)]
            for who, order in orders.items()
        }
        assert here["checker"] == here["engine"] == here["executor"], (rank, chunk)


@settings(max_examples=150)
@given(random_schedules())
def test_checker_and_executor_agree_on_any_schedule(schedule: Schedule) -> None:
    orders = order_of_checker(schedule), order_of_executor(schedule)
    assert all(respects(order, schedule) for order in orders)
    assert sorted(orders[0]) == sorted(orders[1])


def respects(order: list[int], schedule: Schedule) -> bool:
    """Whether an order of applies is one that the waits allow."""
    place = {group: i for i, group in enumerate(order)}
    return all(place[before] < place[after] for before, after in group_waits(schedule, dependencies(schedule)))


def group_waits(schedule: Schedule, waits: Dependencies) -> list[tuple[int, int]]:
    """Pairs of applies (before, after), as the waits of the rows between them say."""
    pairs = [(int(before), group) for group, before in enumerate(waits.previous) if before >= 0]
    for row in range(len(rows_of(schedule))):
        before = int(waits.after_group[row])
        if before >= 0:
            pairs += [(before, int(waits.group_of_row[row]))]
            if waits.gates_group[row] >= 0:
                pairs += [(before, int(waits.gates_group[row]))]
    return pairs


def order_of_checker(schedule: Schedule) -> list[int]:
    order: list[int] = []
    apply = checker._apply

    def noted(schedule: Schedule, waits: Dependencies, groups: Any, *rest: Any) -> Any:
        order.extend(groups.tolist())
        return apply(schedule, waits, groups, *rest)

    values = np.zeros((schedule.ranks, schedule.chunks), dtype=np.uint64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checker, "_apply", noted)
        checker.replay(schedule, dependencies(schedule), values, np.add)
    return order


def order_of_engine(schedule: Schedule) -> list[int]:
    """By the time at which each apply is over, on a cluster where every message and every addition takes time."""
    place = switch(schedule.ranks, 1e6, 1e-6, reduce_Bps=1e6)
    lowered = lower(all_reduce("fixture", schedule), place, 4)
    finish_s = engine.run(lowered.graph).finish_s[lowered.applies[0]]
    waits = dependencies(schedule)
    follows = np.flatnonzero(waits.previous >= 0)
    assert (finish_s[waits.previous[follows]] < finish_s[follows]).all()  # so that no tie decides here
    order: list[int] = np.argsort(finish_s, kind="stable").tolist()
    return order


def order_of_executor(schedule: Schedule) -> list[int]:
    """Run on integers, whose wrap-around sums must be those of the checker to the bit."""
    torch = pytest.importorskip("torch")
    from trainers.exchange import ScheduleRunner
    from trainers.transport import LocalTransport

    words = np.random.default_rng(0).integers(0, 2**64, size=(schedule.ranks, schedule.chunks), dtype=np.uint64)
    flat = np.repeat(words, schedule.chunk_elements, axis=1).view(np.int64)
    tensors = {rank: torch.from_numpy(flat[rank].copy()) for rank in range(schedule.ranks)}
    runner = ScheduleRunner(schedule, range(schedule.ranks), LocalTransport())
    order: list[int] = runner.run(tensors)
    work, held = (
        np.repeat(part, schedule.chunk_elements, axis=1)
        for part in checker.replay(schedule, dependencies(schedule), words, np.add)
    )
    for rank, tensor in tensors.items():
        assert np.array_equal(tensor.numpy().view(np.uint64)[held[rank]], work[rank][held[rank]])
    return order


def test_one_exchange_in_all_worlds_counts_the_same() -> None:
    exchange: Exchange = exchanges.build("ring", 5, 12)
    result = simulate(exchange, clusters.ideal(5))
    traffic = exchange.traffic(4)
    assert result.traffic.links() == traffic.links()
    assert len(result.lowered.transfers[0]) == traffic.messages == 40
