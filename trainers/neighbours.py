"""Neighbour exchanges and additions, timed: what a machine does under the load that training puts on it.

All ranks pass messages to their neighbours at once, in chains of one and of several steps, with the executor
and the transport that training uses. A ping-pong between two ranks would predict nothing: on one host all
messages share its processors and memory.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from distsim.check import check_schedule
from distsim.schedule import Op, Schedule, Source
from trainers import workload
from trainers.exchange import ScheduleRunner
from trainers.timing import machine
from trainers.transport import Transport, synchronize

BUFFERS_BYTES = 48_000_000
"""Each rank's buffers are used in turn and come to at least this much, so that none is still in a cache."""


STEPS = (1, 6)
"""Lengths of the chains of exchanges: one tells what starting costs, the other what each further step costs."""


@dataclass(frozen=True, slots=True)
class Sample:
    """Times of one rank: start and end of each chain of `steps` exchanges, and seconds of each addition."""

    steps: int
    message_bytes: int
    exchanges: list[tuple[float, float]]
    additions_s: list[float]
    machine: str = ""
    """Whose clock the times are of."""


def neighbours(ranks: int, elements: int, steps: int) -> Schedule:
    """In each step every rank passes a message of `elements` elements on to the next rank, all at once."""
    step, rank = np.divmod(np.arange(steps * ranks), ranks)
    ours = np.eye(ranks, dtype=bool)
    return Schedule.of(
        ranks=ranks,
        chunk_elements=np.full(ranks, elements),
        step=step,
        src=rank,
        dst=(rank + 1) % ranks,
        chunk=(rank - step) % ranks,
        op=Op.COPY,
        source=Source.WORK,
        contributes=ours,
        must_hold=np.roll(ours, steps, axis=0),
    )


def training_pass(device: torch.device) -> Callable[[], None]:
    """Return a function that makes a forward and backward pass of the default language model."""
    work = workload.load("language-model", {}, seed=0, dtype="float32")
    model = work.model.to(device)
    batch = workload.to_device(work.collate([work.data[at] for at in range(4)]), device)

    def compute() -> None:
        model.zero_grad()
        torch.autograd.backward(work.loss(model, batch))
        synchronize(device)

    return compute


def sample(
    rank: int,
    ranks: int,
    transport: Transport,
    sizes: Sequence[int],
    rounds: int,
    device: torch.device,
) -> list[Sample]:
    """Exchange and add `rounds` times with messages of each of `sizes` float32 elements.

    Between exchanges every rank computes as in training, which leaves caches and processors to the exchange
    in another state than the exchange before it would: without, loopback appears up to a quarter faster.
    """
    compute = training_pass(device)
    samples = []
    for elements in sizes:
        count = max(2, -(-BUFFERS_BYTES // (4 * elements * ranks)))
        buffers = [torch.zeros(elements * ranks, device=device) for _ in range(count)]
        for steps in STEPS:
            schedule = neighbours(ranks, elements, steps)
            check_schedule(schedule)
            runner = ScheduleRunner(schedule, [rank], transport)
            exchanges, additions_s = [], []
            for turn in range(rounds):
                compute()
                transport.barrier()
                began = time.monotonic()
                runner.run({rank: buffers[turn % count]})
                synchronize(device)
                exchanges.append((began, time.monotonic()))
                transport.barrier()  # nobody computes on while others still exchange
            for turn in range(rounds):
                one, other = buffers[turn % count], buffers[(turn + 1) % count]
                transport.barrier()
                began = time.monotonic()
                one[:elements].add_(other[:elements])
                synchronize(device)
                additions_s.append(time.monotonic() - began)
            samples.append(Sample(steps, 4 * elements, exchanges, additions_s, machine()))
    return samples
