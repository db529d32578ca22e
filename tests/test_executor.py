"""The executor on real tensors, all ranks in one process: any schedule, held against plain sums and plain replays."""

from __future__ import annotations

from collections import Counter, defaultdict, deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from helpers import COLLECTIVES, Row, random_schedules, recursive_doubling, right_schedules, rows_of, table
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from distsim import exchanges
from distsim.schedule import Op, Schedule, Source, split
from trainers.exchange import ScheduleRunner
from trainers.transport import LocalTransport, Message, Request, Transport

Values = dict[int, Tensor]


class LateTransport(Transport):
    """All ranks in one process, and every message is read as late as a network may: when a request is waited for.

    An executor that overwrites what is still being sent is caught here, which eager copies would hide.
    """

    def __init__(self) -> None:
        super().__init__()
        self._queues: defaultdict[tuple[int, int], deque[_Letter]] = defaultdict(deque)

    def barrier(self) -> None:
        return None

    def _start(self, sends: Sequence[Message], receives: Sequence[Message]) -> tuple[list[Request], list[Request]]:
        letters = [_Letter(message.tensor) for message in sends]
        for message, letter in zip(sends, letters, strict=True):
            self._queues[message.src, message.dst].append(letter)
        # Everybody's messages of a step are posted at once, so a receive finds its message already there.
        arriving = [
            _LateReceive(self._queues[message.src, message.dst].popleft(), message.tensor) for message in receives
        ]
        return list(letters), list(arriving)


@dataclass
class _Letter:
    tensor: Tensor
    read: list[Tensor] = field(default_factory=list)

    def wait(self) -> None:
        if not self.read:
            self.read.append(self.tensor.clone())


@dataclass
class _LateReceive:
    letter: _Letter
    target: Tensor

    def wait(self) -> None:
        self.letter.wait()
        self.target.copy_(self.letter.read[0])


def values_for(schedule: Schedule, seed: int = 0, dtype: torch.dtype = torch.float64) -> Values:
    """Random contributions; chunks to which a rank does not contribute hold NaN, which nobody may ever use."""
    random = torch.Generator().manual_seed(seed)
    params = int(schedule.chunk_elements.sum())
    values = {rank: torch.randn(params, generator=random, dtype=dtype) for rank in range(schedule.ranks)}
    for rank, value in values.items():
        value[~mask(schedule.contributes[rank], schedule)] = torch.nan
    return values


def mask(flags: np.ndarray, schedule: Schedule) -> Tensor:
    """Flags of chunks as flags of their elements."""
    return torch.from_numpy(np.repeat(flags, schedule.chunk_elements))


def copies(values: Values) -> Values:
    return {rank: value.clone() for rank, value in values.items()}


def assert_postcondition(schedule: Schedule, before: Values, after: Values) -> None:
    """Whoever must hold a chunk holds the plain sum of its contributions, and all hold the same bits."""
    total = torch.stack(list(before.values())).nansum(dim=0)
    scale = torch.stack(list(before.values())).abs().nansum(dim=0)
    values = torch.stack(list(after.values()))
    wanted = torch.stack([mask(schedule.must_hold[rank], schedule) for rank in range(schedule.ranks)])
    wrong = wanted & ~((values - total).abs() <= 1e-12 * scale)
    assert not bool(wrong.any()), f"(rank, element): {wrong.nonzero().tolist()[:5]}"
    bits = values.view(torch.int64)
    first_holder = wanted.to(torch.int8).argmax(dim=0)
    differs = wanted & (bits != bits.gather(0, first_holder[None, :]))
    assert not bool(differs.any()), f"(rank, element): {differs.nonzero().tolist()[:5]}"


def replayed(schedule: Schedule, before: Values) -> Values:
    """What a schedule does, step by step as the design says it: all reads of a step, then all its applies."""
    sizes = schedule.chunk_elements.tolist()
    inputs = {rank: [part.clone() for part in torch.split(value, sizes)] for rank, value in before.items()}
    work = {rank: [part.clone() for part in parts] for rank, parts in inputs.items()}
    steps: defaultdict[int, list[Row]] = defaultdict(list)
    for row in rows_of(schedule):
        steps[row.step].append(row)
    for _, rows in sorted(steps.items()):
        landing: defaultdict[tuple[int, int], list[tuple[int, Tensor]]] = defaultdict(list)
        for row in rows:
            value = (inputs if row.source == Source.INPUT else work)[row.src][row.chunk].clone()
            landing[row.dst, row.chunk].append((row.src, value))
        copied = {(row.dst, row.chunk) for row in rows if row.op == Op.COPY}
        for (dst, chunk), terms in landing.items():
            if (dst, chunk) not in copied:
                terms.append((dst, work[dst][chunk]))
            ordered = [value for _, value in sorted(terms, key=lambda term: term[0])]
            total = ordered[0]
            for value in ordered[1:]:
                total = total + value
            work[dst][chunk] = total
    return {rank: torch.cat(parts) for rank, parts in work.items()}


SPECS = (
    *exchanges.STRATEGIES,
    "ring:channels=2,bidirectional=true",
    "tree:radix=3,segments=4",
    "double-tree:segments=3",
    "parameter-server:servers=2",
    "parameter-server:placement=colocated",
    "hierarchical:across=halving-doubling,inside=ring",
)


@pytest.mark.parametrize("workers", (1, 2, 3, 5, 16, 64))
@pytest.mark.parametrize("strategy", SPECS)
def test_every_strategy_sums_and_counts_its_own_messages(strategy: str, workers: int) -> None:
    params = 3 * workers + 2 if workers > 1 else 7
    exchange = exchanges.build(strategy, workers, params)
    transport = LocalTransport()
    runners = [
        ScheduleRunner(part, range(exchange.ranks), transport, which) for which, part in enumerate(exchange.schedules())
    ]
    before = values_for(exchange.gradients, seed=workers)
    after = copies(before)
    runners[0].run(after)
    assert_postcondition(exchange.gradients, before, after)
    for runner in runners[1:]:  # weights: those who updated have them, the others whatever they had before
        weights = values_for(runner.schedule, seed=1)
        final = copies(weights)
        runner.run(final)
        assert_postcondition(runner.schedule, weights, final)
    assert_counts(transport.log.counts, exchange.traffic(8).links(), exchange.traffic(8).message_sizes)
    assert set(transport.log.bytes_of) == set(transport.log.received_s)
    assert sum(transport.log.bytes_of.values()) == exchange.traffic(8).bytes


def assert_counts(
    counts: Counter[tuple[int, int, int]], links: list[tuple[int, int, int, int]], sizes: dict[int, int]
) -> None:
    """Messages counted where they were sent, against those of the table."""
    seen: dict[tuple[int, int], list[int]] = {}
    by_size: Counter[int] = Counter()
    for (src, dst, size), count in counts.items():
        link = seen.setdefault((src, dst), [0, 0])
        link[0] += count
        link[1] += count * size
        by_size[size] += count
    assert sorted((*pair, *amount) for pair, amount in seen.items()) == links
    assert dict(by_size) == sizes


def test_a_ring_of_256_ranks() -> None:
    exchange = exchanges.build("ring", 256, 140)
    transport = LocalTransport()
    before = values_for(exchange.gradients)
    after = copies(before)
    ScheduleRunner(exchange.gradients, range(256), transport).run(after)
    assert_postcondition(exchange.gradients, before, after)
    assert transport.log.counts.total() == 140 * 2 * 255  # the other chunks are empty


@pytest.mark.parametrize("params", (0, 1, 4, 13))
@pytest.mark.parametrize("strategy", exchanges.STRATEGIES)
def test_fewer_parameters_than_ranks_and_uneven_chunks(strategy: str, params: int) -> None:
    exchange = exchanges.build(strategy, 5, params)
    transport = LateTransport()
    before = values_for(exchange.gradients)
    after = copies(before)
    ScheduleRunner(exchange.gradients, range(exchange.ranks), transport).run(after)
    assert_postcondition(exchange.gradients, before, after)
    traffic = exchange.gradients.traffic(8)
    assert_counts(transport.log.counts, traffic.links(), traffic.message_sizes)


@pytest.mark.parametrize("transport_class", (LocalTransport, LateTransport))
@pytest.mark.parametrize(
    ("collective", "strategy"),
    [(collective, strategy) for collective, names in exchanges.ALGORITHMS.items() for strategy in names],
)
def test_every_algorithm_does_what_its_collective_is(
    collective: str, strategy: str, transport_class: type[Transport]
) -> None:
    for ranks, segments in ((7, 1), (8, 3)):
        exchange = exchanges.build(f"{strategy}:segments={segments}", ranks, 131, collective)
        schedule, transport = exchange.gradients, transport_class()
        before = values_for(schedule)
        after = copies(before)
        ScheduleRunner(schedule, range(schedule.ranks), transport).run(after)
        assert_postcondition(schedule, before, after)
        assert_counts(transport.log.counts, schedule.traffic(8).links(), schedule.traffic(8).message_sizes)


@pytest.mark.parametrize("transport_class", (LocalTransport, LateTransport))
@pytest.mark.parametrize("collective", COLLECTIVES)
def test_other_collectives_need_no_code_of_their_own(collective: str, transport_class: type[Transport]) -> None:
    schedule = COLLECTIVES[collective](8, 131)
    transport = transport_class()
    before = values_for(schedule)
    after = copies(before)
    ScheduleRunner(schedule, range(8), transport).run(after)
    assert_postcondition(schedule, before, after)
    assert_counts(transport.log.counts, schedule.traffic(8).links(), schedule.traffic(8).message_sizes)


def test_personalised_chunks_reach_their_receiver_and_nobody_else() -> None:
    schedule = COLLECTIVES["personalised all-to-all"](3, 18)
    values = {rank: torch.full((18,), float(rank), dtype=torch.float64) for rank in range(3)}
    ScheduleRunner(schedule, range(3), LocalTransport()).run(values)
    for rank, value in values.items():
        for chunk, part in enumerate(torch.split(value, 2)):
            sender, receiver = divmod(chunk, 3)
            assert part.tolist() == [float(sender if receiver == rank else rank)] * 2


def test_recursive_doubling_with_late_reads_is_gated() -> None:
    """Ranks send what they are about to overwrite: the apply has to wait for the send's end."""
    schedule = recursive_doubling(8, 5)
    before = values_for(schedule)
    after = copies(before)
    ScheduleRunner(schedule, range(8), LateTransport()).run(after)
    assert_postcondition(schedule, before, after)


@pytest.mark.parametrize("transport_class", (LocalTransport, LateTransport))
def test_input_is_the_contribution_as_it_was(transport_class: type[Transport]) -> None:
    """Rank 1 has already added rank 0's value when it sends its input: rank 0 must get rank 1's value alone."""
    rows = [Row(0, 0, 1, 0, Op.REDUCE, Source.INPUT), Row(1, 1, 0, 0, Op.REDUCE, Source.INPUT)]
    values = {0: torch.tensor([1.0, 2.0]), 1: torch.tensor([10.0, 20.0])}
    ScheduleRunner(table(rows, ranks=2, sizes=[2]), range(2), transport_class()).run(values)
    assert values[0].tolist() == values[1].tolist() == [11.0, 22.0]


def test_work_is_the_running_value() -> None:
    rows = [Row(0, 0, 1, 0, Op.REDUCE, Source.INPUT), Row(1, 1, 0, 0, Op.REDUCE, Source.WORK)]
    values = {0: torch.tensor([1.0]), 1: torch.tensor([10.0])}
    ScheduleRunner(table(rows, ranks=2), range(2), LocalTransport()).run(values)
    assert (values[0].item(), values[1].item()) == (12.0, 11.0)


def test_the_reduces_of_a_step_are_summed_in_ascending_rank() -> None:
    """1e16 + 1 is 1e16 in float64, so the order of summation decides what comes out."""
    values = {0: torch.tensor([1e16], dtype=torch.float64), 1: torch.tensor([1.0], dtype=torch.float64)}
    values |= {2: torch.tensor([-1e16], dtype=torch.float64), 3: torch.tensor([1.0], dtype=torch.float64)}
    rows = [Row(0, src, 1, 0, Op.REDUCE, Source.INPUT) for src in (3, 0, 2)]
    ScheduleRunner(table(rows, ranks=4), range(4), LocalTransport()).run(values)
    assert values[1].item() == ((1e16 + 1.0) - 1e16) + 1.0 == 1.0


@pytest.mark.parametrize("strategy", exchanges.STRATEGIES)
def test_staging_is_used_again_and_the_second_run_is_right_too(strategy: str) -> None:
    schedule = exchanges.build(strategy, 6, 40).gradients
    transport = LateTransport()
    runner = ScheduleRunner(schedule, range(schedule.ranks), transport)
    sizes = []
    for seed in range(3):
        before = values_for(schedule, seed)
        after = copies(before)
        runner.run(after)
        assert_postcondition(schedule, before, after)
        sizes.append(runner.staging_bytes)
    assert sizes[0] > 0
    assert len(set(sizes)) == 1
    assert transport.log.counts.total() == 3 * schedule.traffic(8).messages


def test_a_ring_stages_two_chunks_a_rank_at_most() -> None:
    schedule = exchanges.build("ring", 4, 40).gradients
    runner = ScheduleRunner(schedule, range(4), LocalTransport())
    assert runner.staging_bytes == 0
    runner.run(values_for(schedule))
    assert runner.staging_bytes <= 2 * 4 * 10 * 8  # at most one arriving while another is being applied


@given(schedule=right_schedules(), late=st.booleans())
@settings(max_examples=300)
def test_random_trees_leave_everybody_with_the_sum(schedule: Schedule, late: bool) -> None:
    transport = LateTransport() if late else LocalTransport()
    before = values_for(schedule)
    after = copies(before)
    ScheduleRunner(schedule, range(schedule.ranks), transport).run(after)
    assert_postcondition(schedule, before, after)
    assert_counts(transport.log.counts, schedule.traffic(8).links(), schedule.traffic(8).message_sizes)


@given(schedule=random_schedules(max_rows=20), late=st.booleans())
@settings(max_examples=500)
def test_any_schedule_right_or_wrong_does_what_its_rows_say_to_the_bit(schedule: Schedule, late: bool) -> None:
    before = values_for(schedule)
    after = copies(before)
    ScheduleRunner(schedule, range(schedule.ranks), LateTransport() if late else LocalTransport()).run(after)
    for rank, value in replayed(schedule, before).items():
        assert value.numpy().tobytes() == after[rank].numpy().tobytes()


@given(schedule=random_schedules(max_rows=20))
@settings(max_examples=60)
def test_applies_come_in_step_order_at_every_place(schedule: Schedule) -> None:
    runner = ScheduleRunner(schedule, range(schedule.ranks), LocalTransport())
    applied = runner.run(values_for(schedule))
    assert sorted(applied) == list(range(runner.waits.groups))
    places: defaultdict[tuple[int, int], list[int]] = defaultdict(list)
    for group in applied:
        place = int(runner.waits.dst[group]), int(runner.waits.chunk[group])
        places[place].append(int(runner.waits.step[group]))
    assert all(steps == sorted(steps) for steps in places.values())


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
    transport = LocalTransport()
    ScheduleRunner(schedule, range(3), transport).run(values)
    assert {value.dtype for value in values.values()} == {torch.float32}
    assert sum(size * count for (_, _, size), count in transport.log.counts.items()) == schedule.traffic(4).bytes
