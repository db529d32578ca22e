"""The executor on real tensors, all ranks in one process: any schedule, held against plain sums and plain replays."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import pytest
import torch
from helpers import COLLECTIVES, Row, recursive_doubling, table
from tensors import Values, assert_counts, assert_postcondition, assert_right, copies, executed, values_for
from transports import LateTransport

from distsim import exchanges
from distsim.schedule import Op, Source, split
from trainers.exchange import ScheduleRunner
from trainers.transport import Landing, LocalTransport, Send, Transport

SPECS = (
    *exchanges.STRATEGIES,
    "ring:channels=2,bidirectional=true",
    "tree:radix=3,segments=4",
    "double-tree:segments=3",
    "parameter-server:servers=2",
    "parameter-server:placement=colocated",
    "hierarchical:across=halving-doubling,inside=ring",
)


def transport(name: str, seed: int = 0) -> Transport:
    """A transport by name: `local`, or `late` and what it can."""
    if name == "local":
        return LocalTransport()
    return LateTransport(seed, adds="adds" in name, rounds="rounds" in name)


TRANSPORTS = ("local", "late", "late adds", "late rounds", "late adds rounds")
with_every_transport = pytest.mark.parametrize("name", TRANSPORTS)


@pytest.mark.parametrize("workers", (1, 2, 3, 5, 16, 64))
@pytest.mark.parametrize("strategy", SPECS)
def test_every_strategy_sums_and_counts_its_own_messages(strategy: str, workers: int) -> None:
    params = 3 * workers + 2 if workers > 1 else 7
    exchange = exchanges.build(strategy, workers, params)
    local = LocalTransport()
    for which, schedule in enumerate(exchange.schedules()):
        before = values_for(schedule, seed=workers)  # of the second: weights, of those who have updated
        after = copies(before)
        ScheduleRunner(schedule, range(exchange.ranks), local, which).run(after)
        assert_postcondition(schedule, before, after)
    assert_counts(local.log.counts, exchange.traffic(8))
    assert {which for which, *_ in local.log.counts} == {
        which for which, schedule in enumerate(exchange.schedules()) if schedule.rows
    }
    assert set(local.log.bytes_of) == set(local.log.sent_s) == set(local.log.received_s)
    assert sum(local.log.bytes_of.values()) == exchange.traffic(8).bytes


@with_every_transport
@pytest.mark.parametrize("strategy", SPECS)
def test_every_strategy_whatever_the_network_does(strategy: str, name: str) -> None:
    for workers in range(2, 9):
        exchange = exchanges.build(strategy, workers, 3 * workers + 2)
        for seed, schedule in enumerate(exchange.schedules()):
            assert_right(schedule, transport(name, seed), seed)


@pytest.mark.parametrize("strategy", exchanges.STRATEGIES)
def test_256_ranks(strategy: str) -> None:
    schedule = exchanges.build(strategy, 256, 60).gradients  # fewer than ranks: chunks without parameters are not sent
    assert_right(schedule, LocalTransport())


@pytest.mark.parametrize("params", (0, 1, 4, 13))
@pytest.mark.parametrize("strategy", exchanges.STRATEGIES)
def test_fewer_parameters_than_ranks_and_uneven_chunks(strategy: str, params: int) -> None:
    for name in TRANSPORTS:
        assert_right(exchanges.build(strategy, 5, params).gradients, transport(name))


@with_every_transport
@pytest.mark.parametrize(
    ("collective", "strategy"),
    [(collective, strategy) for collective, names in exchanges.ALGORITHMS.items() for strategy in names],
)
def test_every_algorithm_does_what_its_collective_is(collective: str, strategy: str, name: str) -> None:
    for ranks, segments in ((2, 1), (7, 2), (8, 3)):
        exchange = exchanges.build(f"{strategy}:segments={segments}", ranks, 131, collective)
        assert_right(exchange.gradients, transport(name, ranks))


@with_every_transport
@pytest.mark.parametrize("collective", COLLECTIVES)
def test_other_collectives_need_no_code_of_their_own(collective: str, name: str) -> None:
    assert_right(COLLECTIVES[collective](8, 131), transport(name))


def test_personalised_chunks_reach_their_receiver_and_nobody_else() -> None:
    schedule = COLLECTIVES["personalised all-to-all"](3, 18)
    values = {rank: torch.full((18,), float(rank), dtype=torch.float64) for rank in range(3)}
    ScheduleRunner(schedule, range(3), LocalTransport()).run(values)
    for rank, value in values.items():
        for chunk, part in enumerate(torch.split(value, 2)):
            sender, receiver = divmod(chunk, 3)
            assert part.tolist() == [float(sender if receiver == rank else rank)] * 2


@pytest.mark.parametrize("seed", range(10))
def test_recursive_doubling_with_late_reads_is_gated(seed: int) -> None:
    """Ranks send what they are about to overwrite: the apply has to wait for the send's end."""
    for name in TRANSPORTS:
        assert_right(recursive_doubling(8, 5), transport(name, seed))


@with_every_transport
def test_input_is_the_contribution_as_it_was(name: str) -> None:
    """Rank 1 has already added rank 0's value when it sends its input: rank 0 must get rank 1's value alone."""
    rows = [Row(0, 0, 1, 0, Op.REDUCE, Source.INPUT), Row(1, 1, 0, 0, Op.REDUCE, Source.INPUT)]
    values = {0: torch.tensor([1.0, 2.0]), 1: torch.tensor([10.0, 20.0])}
    ScheduleRunner(table(rows, ranks=2, sizes=[2]), range(2), transport(name)).run(values)
    assert values[0].tolist() == values[1].tolist() == [11.0, 22.0]


def test_work_is_the_running_value() -> None:
    rows = [Row(0, 0, 1, 0, Op.REDUCE, Source.INPUT), Row(1, 1, 0, 0, Op.REDUCE, Source.WORK)]
    values = {0: torch.tensor([1.0]), 1: torch.tensor([10.0])}
    ScheduleRunner(table(rows, ranks=2), range(2), LocalTransport()).run(values)
    assert (values[0].item(), values[1].item()) == (12.0, 11.0)


@with_every_transport
def test_the_reduces_of_a_step_are_summed_in_ascending_rank(name: str) -> None:
    """1e16 + 1 is 1e16 in float64, so the order of summation decides what comes out."""
    given = [1e16, 1.0, -1e16, 1.0]
    rows = [Row(0, src, 1, 0, Op.REDUCE, Source.INPUT) for src in (3, 0, 2)]
    for seed in range(10):
        values = {rank: torch.tensor([value], dtype=torch.float64) for rank, value in enumerate(given)}
        ScheduleRunner(table(rows, ranks=4), range(4), transport(name, seed)).run(values)
        assert values[1].item() == ((1e16 + 1.0) - 1e16) + 1.0 == 1.0


@pytest.mark.parametrize("strategy", exchanges.STRATEGIES)
def test_staging_is_used_again_and_later_runs_are_right_too(strategy: str) -> None:
    """At worst all arrivals of a run are staged at once; eight runs need no more than that one."""
    schedule = exchanges.build(strategy, 6, 40).gradients
    late = LateTransport()
    runner = ScheduleRunner(schedule, range(schedule.ranks), late)
    values: Values = {}
    for seed in range(8):
        before = values_for(schedule, seed)
        if seed % 2:  # in the tensors of the last run, or in new ones
            for rank, value in before.items():
                values[rank].copy_(value)
        else:
            values = copies(before)
        runner.run(values)
        assert_postcondition(schedule, before, values)
        assert 0 < runner.staging_bytes <= schedule.traffic(8).bytes
    assert late.log.counts.total() == 8 * schedule.traffic(8).messages


@pytest.mark.parametrize("strategy", exchanges.STRATEGIES)
def test_the_same_arrivals_need_the_same_staging(strategy: str) -> None:
    schedule = exchanges.build(strategy, 6, 40).gradients
    runner = ScheduleRunner(schedule, range(schedule.ranks), LocalTransport())
    assert runner.staging_bytes == 0
    sizes = []
    for seed in range(3):
        runner.run(values_for(schedule, seed))
        sizes.append(runner.staging_bytes)
    assert len(set(sizes)) == 1


class Watched(LocalTransport):
    """Notes where each message lands."""

    def __init__(self, adds: bool) -> None:
        super().__init__()
        self.adds = adds
        self.landings: list[tuple[int, Landing]] = []

    def _send(self, sends: Sequence[Send]) -> None:
        for message in sends:
            receive = self._expected[message.src, message.dst].popleft()
            landing = receive.land(receive.message)
            (landing.tensor.add_ if landing.adds else landing.tensor.copy_)(message.tensor)
            self.landings.append((receive.dst, landing))
            self._ended += [message, receive]


@pytest.mark.parametrize("adds", (True, False))
def test_a_ring_lands_where_its_arrivals_belong(adds: bool) -> None:
    """Each is alone in its apply, and what it overwrites has left long ago: only who cannot add needs staging."""
    schedule = exchanges.build("ring", 4, 40).gradients
    watched = Watched(adds)
    runner = ScheduleRunner(schedule, range(4), watched)
    values = values_for(schedule)
    runner.run(values)
    inside = Counter(
        (0 <= landing.tensor.data_ptr() - values[dst].data_ptr() < 40 * 8, landing.adds)
        for dst, landing in watched.landings
    )
    assert inside == {(True, False): 12, (adds, adds): 12}  # copies and reduces
    assert runner.staging_bytes == 0 if adds else 0 < runner.staging_bytes <= 2 * 4 * 10 * 8


def test_chunks_lie_one_behind_another() -> None:
    """The third of four uneven chunks is sent, and nothing around it changes."""
    sizes = split(11, 4).tolist()
    assert sizes == [3, 3, 3, 2]
    row = Row(0, 0, 1, 2, Op.COPY, Source.INPUT)
    values = {0: torch.arange(11.0), 1: torch.zeros(11)}
    ScheduleRunner(table([row], ranks=2, sizes=sizes), range(2), LocalTransport()).run(values)
    assert values[1].tolist() == [0, 0, 0, 0, 0, 0, 6, 7, 8, 0, 0]


def test_float32_stays_float32() -> None:
    schedule = exchanges.build("ring", 3, 7).gradients
    values = values_for(schedule, dtype=torch.float32)
    local = LocalTransport()
    ScheduleRunner(schedule, range(3), local).run(values)
    assert {value.dtype for value in values.values()} == {torch.float32}
    assert sum(size * count for (*_, size), count in local.log.counts.items()) == schedule.traffic(4).bytes


def test_one_runner_takes_values_of_another_type() -> None:
    """Staging of the first run's type must not be used in the second."""
    schedule = exchanges.build("all-to-all", 4, 9).gradients
    runner = ScheduleRunner(schedule, range(4), LocalTransport())
    runner.run(values_for(schedule, dtype=torch.float32))
    before = values_for(schedule)
    after = copies(before)
    runner.run(after)
    assert_postcondition(schedule, before, after)


def test_a_run_of_no_messages() -> None:
    schedule = exchanges.build("ring", 1, 5).gradients
    before, after = executed(schedule, LateTransport())
    assert torch.equal(before[0], after[0])
