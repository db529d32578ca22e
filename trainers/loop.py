"""The training loop, read top to bottom: forward and backward, exchange gradients, update, share parameters.

It is the same for every strategy. A rank computes if it is a worker, updates if the exchange leaves it with
the complete gradient, and takes part in both schedules either way.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from distsim.errors import DistsimError
from distsim.schedule import Exchange
from trainers.config import RunConfig
from trainers.data import Text
from trainers.exchange import ScheduleRunner
from trainers.fingerprint import model_digest
from trainers.timing import machine
from trainers.transport import Transport, synchronize
from trainers.workloads import language_model


@dataclass(slots=True)
class RankResult:
    """What one rank has done and seen."""

    losses: list[float] = field(default_factory=list)
    """Loss of each step on this worker's share of the batch; empty on servers."""
    exchange_s: list[tuple[float, float, float]] = field(default_factory=list)
    """Of each step's exchange: start and end on the machine's monotonic clock, and the update in between."""
    step_s: list[float] = field(default_factory=list)
    counts: dict[tuple[int, int, int], int] = field(default_factory=dict)
    """Messages that this rank has sent, by (src, dst, bytes)."""
    sent: dict[tuple[int, int], tuple[float, int]] = field(default_factory=dict)
    received: dict[tuple[int, int], float] = field(default_factory=dict)
    """The last exchange's messages by (schedule, row): time and bytes when sent, time when received."""
    machine: str = ""
    """Whose clock the times are of."""
    staging_bytes: int = 0
    model_digest: str = ""


@dataclass(frozen=True, slots=True)
class FlatModel:
    """A model whose parameters, and whose gradients, lie in one flat tensor each."""

    model: nn.Module
    parameters: Tensor
    gradients: Tensor

    @staticmethod
    def of(model: nn.Module) -> FlatModel:
        """Move a model's parameters and gradients into flat storage; shape (params,) each."""
        leaves = list(model.parameters())
        total = sum(leaf.numel() for leaf in leaves)
        flat = torch.empty(total, dtype=leaves[0].dtype, device=leaves[0].device)
        gradients = torch.zeros_like(flat)
        first = 0
        for leaf in leaves:
            here = slice(first, first + leaf.numel())
            flat[here] = leaf.detach().flatten()
            leaf.data = flat[here].view_as(leaf)
            leaf.grad = gradients[here].view_as(leaf)
            first += leaf.numel()
        return FlatModel(model, flat, gradients)


def train(
    config: RunConfig,
    text: Text,
    model: nn.Module,
    exchange: Exchange,
    rank: int,
    transport: Transport,
    reduce_gradients: Callable[[Tensor], None] | None = None,
    report: Callable[[int, float | None], None] = lambda steps, loss: None,
) -> RankResult:
    """Train `model` in place as rank `rank` of an exchange; return this rank's part of the record.

    `reduce_gradients` replaces the gradients' schedule by a library's own all-reduce. `report` gets the number
    of finished steps and the last loss. Barriers around every exchange make its time its own.

    Raises: DistsimError if the loss is not finite.
    """
    flat = FlatModel.of(model)
    works, updates = rank < exchange.workers, bool(exchange.updates()[rank])
    runners = [ScheduleRunner(part, [rank], transport, which) for which, part in enumerate(exchange.schedules())]
    optimizer = torch.optim.SGD(model.parameters(), lr=config.learning_rate, momentum=config.momentum)
    result = RankResult(machine=machine())

    for step in range(config.steps):
        began = time.monotonic()
        flat.gradients.zero_()
        if works:
            tokens = language_model.batch(config, text, step, rank).to(flat.parameters.device)
            loss = language_model.loss(model, tokens)
            torch.autograd.backward(loss)
            result.losses.append(float(loss.detach()))
            if not result.losses[-1] < float("inf"):
                raise DistsimError(
                    f"step {step}: the loss on rank {rank} is {result.losses[-1]}; lower the learning rate"
                )

        synchronize(flat.parameters.device)
        transport.log.restart()
        transport.barrier()
        exchange_began = time.monotonic()
        if reduce_gradients is None:
            runners[0].run({rank: flat.gradients})
        else:
            reduce_gradients(flat.gradients)
        synchronize(flat.parameters.device)
        update_began = exchange_ended = time.monotonic()
        if updates:
            flat.gradients.div_(exchange.workers)
            optimizer.step()
            synchronize(flat.parameters.device)
        update_ended = time.monotonic()
        for runner in runners[1:]:
            runner.run({rank: flat.parameters})
            synchronize(flat.parameters.device)
            exchange_ended = time.monotonic()

        transport.barrier()  # nobody computes on while others still exchange: processes may share cores
        between = update_ended - update_began if exchange_ended > update_ended else 0.0
        result.exchange_s.append((exchange_began, exchange_ended, between))
        result.step_s.append(time.monotonic() - began)
        report(step + 1, result.losses[-1] if works else None)

    log = transport.log
    result.counts = dict(log.counts)
    result.sent = {row: (log.sent_s[row], log.bytes_of[row]) for row in log.sent_s}
    result.received = dict(log.received_s)
    result.staging_bytes = sum(runner.staging_bytes for runner in runners)
    result.model_digest = model_digest(model)
    return result
