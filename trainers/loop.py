"""The training loop, read top to bottom: gather micro-batches, sum their gradients, clip, check, update, share, log.

It is the same for every strategy. A rank computes if it is a worker, updates if the exchange leaves it with summed
gradients, and takes part in every exchange either way.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from distsim import exchanges
from distsim.errors import ConfigError
from trainers import optimizers
from trainers.buckets import Buckets, flat_parameters
from trainers.config import RunConfig
from trainers.data import Order
from trainers.exchanger import Handle, Reducer
from trainers.fingerprint import model_digest
from trainers.gradients import expected_count, summed
from trainers.plan import EVALUATION, NORM, Plan, trainable
from trainers.precision import Precision
from trainers.timing import machine
from trainers.transport import MessageLog, synchronize
from trainers.workload import Samples, Workload, to_device


@dataclass(slots=True)
class RankResult:
    """What one rank has done and seen."""

    losses: list[float] = field(default_factory=list)
    """Of each step: the mean over all that was counted on all workers."""
    spans: list[list[tuple[float, float]]] = field(default_factory=list)
    """Of each step, per schedule: start and end on the machine's monotonic clock."""
    step_s: list[float] = field(default_factory=list)
    exposed_s: list[float] = field(default_factory=list)
    """Of each step: how long the rank has waited for exchanges with nothing else to do."""
    log: MessageLog | None = None
    """The messages that this rank has sent and, of the last step, received; None where a library hides them."""
    last: dict[str, Any] = field(default_factory=dict)
    """What is to be said of the last step: loss, times, and what this rank has sent."""
    machine: str = ""
    """Whose clock the times are of."""
    staging_bytes: int = 0
    model_digest: str = ""

    def note(self, reducer: Reducer, loss: float, step_s: float, exposed_s: float) -> None:
        """A step is over."""
        spans = [reducer.spans[which] for which in sorted(reducer.spans)]
        sent = None if reducer.log is None else reducer.log.bytes_of.values()
        self.losses.append(loss)
        self.step_s.append(step_s)
        self.exposed_s.append(exposed_s)
        self.spans.append(spans)
        self.last = {
            "loss": loss,
            "step_s": step_s,
            "exchange_s": sum(end - start for start, end in spans),
            "exposed_s": exposed_s,
            "messages": None if sent is None else len(sent),
            "bytes": None if sent is None else sum(sent),
        }


ELEMENTWISE = (
    *("SGD", "Adam", "AdamW", "Adamax", "NAdam", "RAdam"),
    *("RMSprop", "Rprop", "Adagrad", "Adadelta", "ASGD"),
)
"""Optimizers that update each element by itself."""


def check(config: RunConfig, workload: Workload) -> None:
    """Refuse what `train` would refuse, before the ranks meet.

    Raises: ConfigError for an optimizer, a schedule of its learning rate or an order of samples that cannot be, or
    an optimizer that several servers cannot share.
    """
    optimizer = optimizers.build(config.optimizer, trainable(workload.model))
    optimizers.learning_rates(config.schedule, optimizer, config.steps)
    _order(config, workload)
    name, exchange = config.optimizer.partition(":")[0], exchanges.build(config.strategy, config.workers, 4096)
    if exchange.parameters is not None and exchange.updates().sum() > 1 and name not in ELEMENTWISE:
        raise ConfigError(
            f"--optimizer {name} with {config.strategy}: each of several servers has parts of tensors, and this "
            f"optimizer may look at whole ones; use one server, or one of {', '.join(ELEMENTWISE)}"
        )


def train(
    config: RunConfig,
    workload: Workload,
    plan: Plan,
    rank: int,
    reducer: Reducer,
    on_step: Callable[..., None],
    on_evaluation: Callable[..., None],
) -> RankResult:
    """Train the workload's model in place as rank `rank` of a plan; return this rank's part of the record.

    `on_step` and `on_evaluation` are told of each, as `Metrics.step` and `Metrics.evaluation` are. Without overlap
    there are barriers around a step's exchanges, which make their times their own.

    Raises: ConfigError, on all ranks alike, if loss or gradient is not finite and loss scaling cannot help.
    """
    model, parameters = workload.model, trainable(workload.model)
    device = parameters[0].device
    if config.compile:
        model.compile()
    optimizer = optimizers.build(config.optimizer, parameters)
    rates = optimizers.learning_rates(config.schedule, optimizer, config.steps)
    precision = Precision(config.precision, device)
    order = _order(config, workload)
    handles: list[Handle] = []
    buckets = Buckets(parameters, plan, lambda number, bucket: handles.append(reducer.reduce(number, bucket)))
    flat = flat_parameters(parameters, plan) if plan.has_servers else []
    works, updates = rank < plan.workers, bool(plan.exchanges[0].updates()[rank])
    expected = expected_count(workload, config.workers * config.batch_size * config.accumulate)
    torch.manual_seed(_seed(config.seed, rank))  # of dropout, which is to differ between ranks
    result, updated = RankResult(machine=machine()), 0

    for step in range(config.steps):
        began = time.monotonic()
        batches = _gather(workload, order.micro_batches(step, rank) if works else [])
        got = summed(workload, batches, expected, buckets, handles, reducer, precision, overlap=config.overlap)
        norm = gradient_norm(buckets.gradients, plan, rank, reducer) * got.factor
        finite = math.isfinite(norm) and math.isfinite(got.loss_sum)
        if not finite and precision.scale <= 1.0:
            what = "gradient" if math.isfinite(got.loss_sum) else "loss"
            raise ConfigError(f"step {step}: the {what} is not finite; lower the learning rate or set --clip-norm")
        precision.update(finite)

        # The rate for the log, on all ranks: only those that update step their schedule.
        rate = rates.base_lrs[0] * rates.lr_lambdas[0](updated)
        if finite and got.counted:
            updated += 1
            if updates:
                clip = min(1.0, (config.clip_norm or math.inf) / norm) if norm else 1.0
                buckets.scale(got.factor * clip)
                buckets.drop(got.used)
                optimizer.step()
                rates.step()
        waits = time.monotonic()  # where servers have updated, the workers get their parameters now
        for handle in [reducer.share(number, part) for number, part in enumerate(flat)]:
            handle.wait()
        exposed_s = got.exposed_s + time.monotonic() - waits

        synchronize(device)
        if flat and not config.overlap:
            reducer.barrier()
        result.note(reducer, got.loss_sum / max(got.counted, 1.0), time.monotonic() - began, exposed_s)
        on_step(step, count=int(got.counted), learning_rate=rate, grad_norm=norm, skipped=not finite, **result.last)
        if config.evaluate_every and (step + 1) % config.evaluate_every == 0 and workload.evaluation is not None:
            on_evaluation(step, **evaluate(config, workload, workload.evaluation, rank, reducer, precision))

    result.log, result.staging_bytes = reducer.log, reducer.staging_bytes
    result.model_digest = model_digest(model)
    buckets.close()
    return result


def gradient_norm(gradients: Sequence[Tensor], plan: Plan, rank: int, reducer: Reducer) -> float:
    """Return the Euclidean norm of the summed gradient, all of it, the same on all ranks.

    Where servers hold parts of it, each adds the squares of its own.
    """
    if not plan.has_servers:
        return math.sqrt(sum(float(torch.linalg.vector_norm(part)) ** 2 for part in gradients))
    squares = 0.0
    for part, exchange in zip(gradients, plan.exchanges, strict=False):
        schedule = exchange.gradients
        held = torch.from_numpy(schedule.must_hold[rank].repeat(schedule.chunk_elements)).to(part.device)
        squares += float(torch.linalg.vector_norm(part[held])) ** 2
    return math.sqrt(reducer.sum(NORM, [squares])()[0])


@torch.no_grad()
def evaluate(
    config: RunConfig,
    workload: Workload,
    samples: Samples,
    rank: int,
    reducer: Reducer,
    precision: Precision,
) -> dict[str, Any]:
    """Return the mean loss over `samples`, shared out among the workers, and over how much it was taken."""
    device = next(workload.model.parameters()).device
    mine = range(rank, len(samples), config.workers) if rank < config.workers else range(0)
    count, losses = 0, torch.zeros((), dtype=torch.float64, device=device)
    modes = [(module, module.training) for module in workload.model.modules()]
    workload.model.eval()
    for first in range(0, len(mine), config.batch_size):
        batch = workload.collate([samples[at] for at in mine[first : first + config.batch_size]])
        count += workload.count(batch)
        with precision.autocast():
            losses += workload.loss(workload.model, to_device(batch, device))
    for module, training in modes:
        module.training = training
    total, loss_sum = reducer.sum(EVALUATION, [count, float(losses)])()
    return {"loss": loss_sum / max(total, 1.0), "count": int(total)}


def _seed(seed: int, rank: int) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed} {rank}".encode()).digest()[:8], "big") >> 1


def _gather(workload: Workload, chosen: Sequence[npt.NDArray[np.int64]]) -> list[Any]:
    """Return a step's micro-batches, which at an epoch's end may be fewer than usual, or none."""
    return [workload.collate([workload.data[int(at)] for at in indexes]) for indexes in chosen if len(indexes)]


def _order(config: RunConfig, workload: Workload) -> Order:
    return Order(
        samples=len(workload.data),
        workers=config.workers,
        batch_size=config.batch_size,
        accumulate=config.accumulate,
        uneven=config.uneven,
        seed=config.seed,
    )
