"""Simulated exchanges: closed forms, hand-computed additions, hosts and rounds, and one order in all worlds."""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from helpers import COLLECTIVES, Row, all_reduce, random_schedules, rows_of, table
from hypothesis import given, settings
from made_clusters import cluster, flat, link
from test_lower import group_tasks, row_tasks

from distsim import check as checker
from distsim import cluster as clusters
from distsim import engine, exchanges
from distsim.dependencies import Dependencies, dependencies
from distsim.engine import Timeline
from distsim.errors import ConfigError, ScheduleError
from distsim.lower import Lowered, Posting, lower
from distsim.network import Sharing
from distsim.schedule import ITEMSIZE, Exchange, Op, Schedule, Source
from distsim.step import simulate

Floats = npt.NDArray[np.float64]
Index = npt.NDArray[np.int64]
STRATEGIES = list(exchanges.STRATEGIES)
SHARINGS: tuple[Sharing, ...] = ("fair", "fifo")
POSTINGS: tuple[Posting, ...] = ("eager", "rounds")
L, B = 5e-6, 12.5e9
"""Latency and bandwidth of the default cluster."""


def exactly(value: Any) -> Any:
    return pytest.approx(value, rel=1e-9, abs=0)


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


@pytest.mark.parametrize("sharing", SHARINGS)
def test_an_overhead_is_paid_for_every_message(sharing: Sharing) -> None:
    place = flat(5, 1e9, 1e-3, overhead_s=1e-4)
    p = 4_000_000  # 16 ms
    for strategy, time_s in {
        "ring": 6 * (1e-3 + 4e-3 + 1e-4),
        "all-to-all": 1e-3 + 3 * (16e-3 + 1e-4),
        # Workers and server pay on their way up to the switch. In turn, the last push waits for three on the
        # server's way down, which is held without overheads, and pays its own.
        "parameter-server": 2 * (1e-3 + 4 * 16e-3) + 4e-4 + (1e-4 if sharing == "fifo" else 0),
    }.items():
        assert simulate(exchanges.build(strategy, 4, p), place, sharing=sharing).time_s == exactly(time_s), strategy


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
    place = flat(4, 1e9 * params / 1e6, 1e-3, reduce_Bps=0.5e9 * params / 1e6)
    result = simulate(exchanges.build(strategy, n, params), place)
    assert result.time_s == exactly(time_ms / 1e3)


@pytest.mark.parametrize("posting", POSTINGS)
def test_arrays_that_arrive_together_are_added_one_after_the_other(posting: Posting) -> None:
    """Ranks 1 and 2 send rank 0 a chunk each, over links of their own: 1 + 4 ms; adding one takes 8 ms."""
    rows = [Row(0, 1, 0, 0, Op.REDUCE, Source.INPUT), Row(0, 2, 0, 1, Op.REDUCE, Source.INPUT)]
    place = flat(3, 1e9, 1e-3, kind="full", reduce_Bps=0.5e9)
    lowered = lower(all_reduce("two", table(rows, ranks=3, sizes=[10**6, 10**6])), place, 4, posting=posting)
    timeline = engine.run(lowered.graph)
    tasks = group_tasks(lowered.parts[0])
    assert timeline.start_s[tasks].tolist() == [exactly(5e-3), exactly(13e-3)]
    assert timeline.finish_s[tasks].tolist() == [exactly(13e-3), exactly(21e-3)]


def test_a_straggler_adds_and_posts_more_slowly() -> None:
    """Rank 1 takes twice as long for what it adds and three hosts' turns; see the times above and below."""
    slow = [{"device": "gpu1", "slowdown": 2}]
    place = flat(2, 1e9, 1e-3, reduce_Bps=0.5e9, host_s=1e-2, overrides=slow)
    # Each sends its array to the other: rank 0 posts in 10 ms, rank 1 in 20; 1 + 4 ms; rank 0 adds in 8, rank 1 in 16.
    result = simulate(exchanges.build("all-to-all", 2, 10**6), place)
    (part,) = result.lowered.parts
    by_rank = dict(zip(part.waits.dst.tolist(), result.timeline.finish_s[group_tasks(part)].tolist(), strict=True))
    assert by_rank == {0: exactly(20e-3 + 5e-3 + 8e-3), 1: exactly(10e-3 + 5e-3 + 16e-3)}


@pytest.mark.parametrize("n", [2, 3, 5])
def test_a_host_posts_one_message_after_the_other(n: int) -> None:
    """On links that are fast: n - 1 postings, the last message's time, and its latency."""
    host_s, message_s = 1e-3, 4e-6
    place = flat(n, 1e9, 1e-4, kind="full", host_s=host_s)
    result = simulate(exchanges.build("all-to-all", n, 1000), place)
    assert result.time_s == exactly((n - 1) * host_s + message_s + 1e-4)
    (part,) = result.lowered.parts
    for rank in range(n):
        starts = result.timeline.start_s[row_tasks(part)][part.schedule.src == rank]
        assert sorted(starts) == exactly([(turn + 1) * host_s for turn in range(n - 1)])
    # A ring posts once a step, when what it passes on is there.
    ring = simulate(exchanges.build("ring", n, 1000 * n), flat(n, 1e9, 1e-4, host_s=host_s))
    assert ring.time_s == exactly(2 * (n - 1) * (host_s + 1e-4 + message_s))


@pytest.mark.parametrize("posting", POSTINGS)
@pytest.mark.parametrize(("strategy", "time_ms"), [("halving-doubling", 39.387), ("ring", 39.501)])
def test_a_gibibyte_on_64_hosts_around_a_switch(strategy: str, time_ms: float, posting: Posting) -> None:
    """By hand: 50 GiB/s a host, two hops of 500 ns: 12 and 126 rounds of 1 us, and 2 * 63/64 of 20 ms."""
    wire = {"wire": link(50 * 2**30, 500e-9, per_hop=True)}
    place = cluster({"kind": "switch", "devices": 64, "link": "wire"}, wire)
    result = simulate(exchanges.build(strategy, 64, 2**28), place, sharing="fair", posting=posting)
    rounds = {"halving-doubling": 2 * 6, "ring": 2 * 63}[strategy]
    assert result.time_s == exactly(rounds * 1e-6 + 2 * 63 / 64 * 20e-3)
    assert round(result.time_s * 1e3, 3) == time_ms


def test_a_shared_bus() -> None:
    place = flat(4, 1e9, 1e-3, kind="bus")
    p = 1_000_000  # 4 ms
    for sharing in SHARINGS:
        to_all = simulate(exchanges.build("all-to-all", 4, p), place, sharing=sharing)
        assert to_all.time_s == exactly(12 * 4e-3 + 1e-3)
    # 4 messages of 1 ms a step. Together they arrive after 4 + 1 ms, and only then does the next step begin; one
    # after the other, the first of a step can go when the first of the last one has arrived.
    assert simulate(exchanges.build("ring", 4, p), place, sharing="fair").time_s == exactly(6 * (4 * 1e-3 + 1e-3))
    assert simulate(exchanges.build("ring", 4, p), place, sharing="fifo").time_s == exactly(6 * 4 * 1e-3 + 1e-3)


def finished(lowered: Lowered, timeline: Timeline, which: int) -> dict[int, float]:
    """When the last apply at each rank is over."""
    part = lowered.parts[which]
    over: dict[int, float] = {}
    for rank, time_s in zip(part.waits.dst.tolist(), timeline.finish_s[group_tasks(part)].tolist(), strict=True):
        over[rank] = max(over.get(rank, 0.0), time_s)
    return over


@pytest.mark.parametrize("sharing", SHARINGS)
@pytest.mark.parametrize("strategy", ["parameter-server", "parameter-server:servers=3"])
def test_a_server_shares_parameters_when_its_own_gradients_are_all_in(strategy: str, sharing: Sharing) -> None:
    """Each server by itself: the one whose link is slow holds the others' workers up only for its own part."""
    slow = [{"from": "switch", "to": "gpu3", "slowdown": 4}]
    result = simulate(exchanges.build(strategy, 3, 3000), flat(6, 1e9, 1e-5, overrides=slow), sharing=sharing)
    updated = finished(result.lowered, result.timeline, 0)
    pull = result.lowered.parts[1]
    starts: dict[int, float] = {}
    start_s = result.timeline.start_s[row_tasks(pull)].tolist()
    for rank, time_s in zip(pull.schedule.src.tolist(), start_s, strict=True):
        starts[rank] = min(starts.get(rank, np.inf), time_s)
    assert set(starts) == set(updated)
    assert starts == updated  # the first goes at once: nothing else holds the server's link
    assert (max(updated.values()) > 2 * min(updated.values())) == (len(updated) > 1)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("params", [0, 1, 5])
@pytest.mark.parametrize("n", [1, 2, 5])
def test_small_and_empty_exchanges(strategy: str, params: int, n: int) -> None:
    result = simulate(exchanges.build(strategy, n, params), clusters.ideal(n + 1))
    assert (result.time_s > 0) == (result.traffic.messages > 0)
    assert (result.algbw_Bps is None) == (result.busbw_Bps is None) == (result.traffic.messages == 0)
    if not result.traffic.messages:
        assert result.latency_bound_s == result.bandwidth_bound_s == result.any_algorithm_bound_s == 0.0


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
    """By when the replay looks up where a group lands, which it first does when it applies the group."""
    order: list[int] = []

    class Noted(list[int]):
        def __getitem__(self, group: Any) -> Any:
            order.append(group)
            return super().__getitem__(group)

    def interpreted(loop: Any, work: int, *arguments: Any) -> Any:
        names = inspect.signature(loop).parameters
        listed = [a.tolist() if isinstance(a, np.ndarray) else a for a in arguments]
        return loop(*(Noted(a) if name == "dst" else a for name, a in zip(names, listed, strict=True)))

    values = np.zeros((schedule.ranks, schedule.chunks), dtype=np.uint64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checker, "call", interpreted)
        checker.replay(schedule, dependencies(schedule), values)
    return list(dict.fromkeys(order))


def order_of_engine(schedule: Schedule) -> list[int]:
    """By the time at which each apply is over, on a cluster where every message and every addition takes time."""
    place = flat(schedule.ranks, 1e6, 1e-6, reduce_Bps=1e6)
    lowered = lower(all_reduce("fixture", schedule), place, 4, sharing="fifo")
    finish_s = engine.run(lowered.graph).finish_s[group_tasks(lowered.parts[0])]
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
    held, work, _ = (
        np.repeat(part, schedule.chunk_elements, axis=1)
        for part in checker.replay(schedule, dependencies(schedule), words)
    )
    for rank, tensor in tensors.items():
        assert np.array_equal(tensor.numpy().view(np.uint64)[held[rank]], work[rank][held[rank]])
    return order


def test_one_exchange_in_all_worlds_counts_the_same() -> None:
    exchange: Exchange = exchanges.build("ring", 5, 12)
    result = simulate(exchange, clusters.ideal(5))
    traffic = exchange.traffic(4)
    assert result.traffic.links() == traffic.links()
    assert result.lowered.parts[0].messages.count == traffic.messages == 40
