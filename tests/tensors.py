"""Values for schedules to work on, and what must have become of them: plain sums, and plain replays of the rows."""

from __future__ import annotations

from collections import Counter, defaultdict

import numpy as np
import torch
from helpers import Row, rows_of
from torch import Tensor

from distsim.schedule import Op, Schedule, Source
from distsim.traffic import Traffic
from trainers.exchange import ScheduleRunner
from trainers.transport import Transport

Values = dict[int, Tensor]


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


def executed(schedule: Schedule, transport: Transport, seed: int = 0) -> tuple[Values, Values]:
    """Run a schedule once, all ranks in one process; return the values before and after."""
    before = values_for(schedule, seed)
    after = copies(before)
    ScheduleRunner(schedule, range(schedule.ranks), transport).run(after)
    return before, after


def assert_right(schedule: Schedule, transport: Transport, seed: int = 0) -> None:
    """Run a schedule once: it keeps its promise and sends the messages of its table, and no others."""
    before, after = executed(schedule, transport, seed)
    assert_postcondition(schedule, before, after)
    assert_counts(transport.log.counts, schedule.traffic(8))


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


def assert_counts(counts: Counter[tuple[int, int, int, int]], traffic: Traffic) -> None:
    """Messages counted where they were sent, against those of the table."""
    seen: dict[tuple[int, int], list[int]] = {}
    by_size: Counter[int] = Counter()
    for (_, src, dst, size), count in counts.items():
        link = seen.setdefault((src, dst), [0, 0])
        link[0] += count
        link[1] += count * size
        by_size[size] += count
    assert sorted((*pair, *amount) for pair, amount in seen.items()) == traffic.links()
    assert dict(by_size) == traffic.message_sizes


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
        has_own = schedule.contributes | landed_before(schedule, rows[0].step)
        for (dst, chunk), terms in landing.items():
            if (dst, chunk) not in copied and has_own[dst, chunk]:
                terms.append((dst, work[dst][chunk]))
            ordered = [value for _, value in sorted(terms, key=lambda term: term[0])]
            total = ordered[0]
            for value in ordered[1:]:
                total = total + value
            work[dst][chunk] = total
    return {rank: torch.cat(parts) for rank, parts in work.items()}


def landed_before(schedule: Schedule, step: int) -> np.ndarray:
    """Where something has landed in earlier steps, shape (ranks, chunks)."""
    landed = np.zeros(schedule.contributes.shape, dtype=bool)
    for row in rows_of(schedule):
        if row.step < step:
            landed[row.dst, row.chunk] = True
    return landed
