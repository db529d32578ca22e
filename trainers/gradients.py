"""A step's gradient, of all micro-batches and ranks: what training updates with, and what trainers.accumulation tests.

A workload's loss is a sum over what counts (tokens, say). How much counted is known once all ranks have summed it, so
gradients are divided by it in the end: they are those of one large batch, however unequal its parts.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from distsim.errors import ConfigError
from trainers.buckets import Buckets
from trainers.exchanger import Handle, Reducer
from trainers.plan import NUMBERS
from trainers.precision import Precision
from trainers.transport import synchronize
from trainers.workload import Workload, to_device


class Summed(NamedTuple):
    """What all ranks have in their buckets, and what goes with it."""

    counted: float
    """How much counted, on all ranks."""
    loss_sum: float
    used: list[bool]
    """Per parameter: whether any rank has used it."""
    factor: float
    """What the buckets are to be multiplied by to hold the gradient of the mean."""
    exposed_s: float
    """How long this rank has waited for exchanges with nothing else to do."""


def expected_count(workload: Workload, samples: int) -> int:
    """Return about how much so many samples count: loss and gradients are divided by it until the count is known.

    The result does not depend on it, but half precision has no range for sums over thousands of tokens.
    """
    return samples * max(workload.count(workload.collate([workload.data[0]])), 1)


def summed(
    workload: Workload,
    batches: Sequence[Any],
    expected: int,
    buckets: Buckets,
    handles: list[Handle],
    reducer: Reducer,
    precision: Precision,
    *,
    overlap: bool,
) -> Summed:
    """Compute and exchange a step's gradients; `batches` are this rank's, and may be none.

    `handles` gets one for each bucket that `buckets` hands over. Without overlap there are barriers around the
    exchanges, which make their times their own.

    Raises: ConfigError if the workload's loss is no scalar.
    """
    device = buckets.parameters[0].device
    count = sum(workload.count(batch) for batch in batches)
    losses = torch.zeros((), dtype=torch.float64, device=device)
    reducer.begin()
    buckets.begin()
    for left, batch in zip(reversed(range(len(batches))), batches, strict=True):
        if left == 0 and overlap:
            buckets.expect_last()
        with precision.autocast():
            loss = workload.loss(workload.model, to_device(batch, device))
        if not isinstance(loss, Tensor) or loss.dim():
            raise ConfigError("the workload's loss must return a sum, a tensor without dimensions")
        torch.autograd.backward(loss * (precision.scale / expected))
        losses += loss.detach()

    if not overlap:
        synchronize(device)
        reducer.barrier()
    waits = time.monotonic()
    buckets.finish()
    total, loss_sum, *used = reducer.sum(NUMBERS, [count, float(losses), *map(float, buckets.used)])()
    for handle in handles:
        handle.wait()
    handles.clear()
    exposed_s = time.monotonic() - waits
    if not overlap:
        reducer.barrier()  # nobody computes on while others still exchange: processes may share cores
    factor = expected / precision.scale / max(total, 1.0)
    return Summed(total, loss_sum, [bool(flag) for flag in used], factor, exposed_s)
