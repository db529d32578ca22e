"""For a training loop of one's own: gradients are exchanged as backward computes them, by any strategy.

exchange = trainers.attach(model, strategy="ring")
for inputs, targets in data:
    optimizer.zero_grad()
    loss = loss_function(exchange(inputs), targets)
    loss.backward()         # when it returns, gradients are the mean over all ranks
    optimizer.step()
exchange.close()
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from distsim.check import check
from distsim.errors import ConfigError, DistsimError
from distsim.record import digest
from trainers.buckets import Buckets
from trainers.exchanger import Exchanger, Handle
from trainers.group import ProcessGroup
from trainers.plan import NUMBERS, plan, trainable

_serial = itertools.count()


def attach(
    model: nn.Module,
    strategy: str = "ring",
    *,
    bucket_mb: float = 25.0,
    overlap: bool = True,
    transport: str = "auto",
) -> Attached:
    """Exchange a model's gradients in every backward pass from now on; all ranks call it alike.

    It needs torchrun's environment; a process group that is there already is used, otherwise one is made. All ranks
    get rank 0's parameters and buffers. `bucket_mb` is the most that a bucket has, in 1e6 bytes; without `overlap`
    the exchange begins when backward is over; `transport` is tcp, torch (gloo or NCCL), or auto.

    Raises: ConfigError if models or settings differ between ranks, or for what is wrong with the strategy.
    """
    return Attached(model, strategy, bucket_mb, overlap, transport)


class Attached:
    """A model whose gradients are exchanged; call it as the model."""

    def __init__(self, model: nn.Module, strategy: str, bucket_mb: float, overlap: bool, transport: str) -> None:
        self.model = model
        parameters = trainable(model)
        device = next(model.parameters(), torch.empty(0)).device
        if "RANK" not in os.environ and not dist.is_initialized():
            raise ConfigError("attach runs under torchrun, one process a rank: torchrun --nproc-per-node 4 script.py")
        self._group = ProcessGroup(device, f"attach {next(_serial)}")
        self.plan = plan(parameters, strategy, self._group.world_size, bucket_mb, overlap)
        if self.plan.has_servers:
            raise ConfigError(
                f"{strategy} updates on servers, which an own loop's optimizer is not; name an all-reduce"
            )
        for each in self.plan.exchanges:
            check(each)
        self._group.agree(
            {
                "strategy": self.plan.strategy,
                "bucket_mb": str(bucket_mb),
                "overlap": str(overlap),
                "transport": transport,
                "device": device.type,
                **{f"parameter {name}": _kind(each) for name, each in model.named_parameters()},
                **{f"buffer {name}": _kind(each) for name, each in model.named_buffers()},
                "schedule (digest)": digest(self.plan.exchanges),
            }
        )
        self._owns_group = not dist.is_initialized()
        if self._owns_group:
            self._group.start()
        with torch.no_grad():
            for tensor in (*model.parameters(), *model.buffers()):
                dist.broadcast(tensor, 0)
        self.exchanger = Exchanger(self.plan, self._group.rank, self._group.lanes(transport, overlap), device)
        self._handles: list[Handle] = []
        self._buckets = Buckets(parameters, self.plan, self._hand_over, self._comes_by, 1 / self.plan.workers)
        self._overlap, self._syncs, self._called, self._under_way = overlap, True, False, False
        self._count: float | None = None

    def __call__(self, *inputs: Any, **named: Any) -> Any:
        """Call the model.

        Raises: DistsimError if the last backward pass has failed: what it had begun to exchange cannot be taken back.
        """
        if self._under_way:
            raise DistsimError("the last backward pass has failed midway, and ranks may be out of step: start anew")
        self._called = True
        return self.model(*inputs, **named)

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Only accumulate in the backward passes of this block, for gradients of several micro-batches."""
        before, self._syncs = self._syncs, False
        try:
            yield
        finally:
            self._syncs = before

    def weigh(self, count: float) -> None:
        """Say how much (how many tokens, say) a micro-batch's loss is the SUM of, before its backward pass.

        Gradients are then divided by the count of all micro-batches and ranks, which makes them those of one large
        batch. Without it they are the mean of the ranks' gradients.
        """
        self._count = (self._count or 0.0) + count

    def close(self) -> None:
        """Stop exchanging, and end what attach has started; after a failed backward pass, without the other ranks."""
        self._buckets.close()
        failed = self._under_way or bool(self._handles)
        if self._owns_group and dist.is_initialized() and not failed:
            dist.barrier()
        self.exchanger.close(failed)
        if self._owns_group and dist.is_initialized():
            dist.destroy_process_group()

    def _hand_over(self, number: int, gradients: Tensor) -> None:
        self._handles.append(self.exchanger.reduce(number, gradients))

    def _comes_by(self) -> None:
        """Backward has come by a parameter; by the first one of a pass: see to what is to be done at its end."""
        if not self._under_way and self._syncs:
            if not self._called:
                raise DistsimError(
                    "a backward pass without a call of what attach returned since the last one: call that, not the "
                    "model itself; put all backward passes of a step but the last into no_sync(); and use "
                    "torch.utils.checkpoint with use_reentrant=False, since otherwise each segment is such a pass"
                )
            self._under_way, self._called = True, False
            if self._overlap:
                self._buckets.expect_last()
            torch.autograd.Variable._execution_engine.queue_callback(self._finish)

    def _finish(self) -> None:
        """Backward is over: wait for the sums and divide them."""
        self._buckets.finish()
        weight = 1.0 if self._count is None else self._count
        total, _, *used = self.exchanger.sum(NUMBERS, [weight, 0.0, *map(float, self._buckets.used)])()
        for handle in self._handles:
            handle.wait()
        self._handles.clear()
        self._buckets.scale(self.plan.workers / total if total else 1.0)
        self._buckets.drop([bool(flag) for flag in used])
        self._buckets.used = [False] * len(used)
        self._count, self._under_way = None, False


def _kind(tensor: Tensor) -> str:
    trained = " with a gradient" if tensor.requires_grad else ""
    return f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}{trained}"
