"""Batch normalisation, and what to put in its place where a batch comes in parts.

nn.BatchNorm takes mean and variance over the samples that are there: those of one rank's micro-batch, so that ranks and
accumulation change what is computed. `to_synchronised` takes them over the micro-batches that all ranks have at that
moment, as one large batch would (micro-batches that follow one another still do not see each other); `to_group_norm`
takes them over each sample by itself, which no way of splitting changes.

Both change modules where they are, by giving them another class, as torch's own parametrizations do: parameters, hooks,
training mode and whoever refers to a module stay.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import parametrize

from distsim.errors import ConfigError
from trainers.config import RunConfig
from trainers.data import Order
from trainers.workload import Workload

Model = TypeVar("Model", bound=nn.Module)
Gather = Callable[[Tensor], Tensor]
"""Of a few numbers of this rank, shape (n,): those of all ranks, shape (ranks, n), float64 on the CPU."""

BUFFERS = {"running_mean", "running_var", "num_batches_tracked"}


def apply(config: RunConfig, workload: Workload) -> None:
    """Refuse a `--batch-norm` that cannot be, before the ranks meet; for `group` change the workload's model.

    With `sync` the model is to be given to `to_synchronised` once the ranks are connected.

    Raises: ConfigError if the model has no batch normalisation, or one that is not torch's own; or if the ranks would
    not all run equally many micro-batches, so that one waited for others' statistics for ever.
    """
    if config.batch_norm == "keep":
        return
    try:
        if not batch_norms(workload.model):
            raise ConfigError("the model has no batch normalisation; leave it out")
        if config.batch_norm == "group":
            to_group_norm(workload.model)
        else:
            _check_even(config, len(workload.data))
    except ConfigError as error:
        raise ConfigError(f"--batch-norm {config.batch_norm}: {error}") from None


def batch_norms(model: nn.Module) -> dict[str, _BatchNorm]:
    """Return a model's batch normalisations by name, each of them once.

    Raises: ConfigError naming one whose class computes something else than torch's, or that has no size yet.
    """
    found = {name: module for name, module in model.named_modules() if isinstance(module, _BatchNorm)}
    for name, norm in found.items():
        if isinstance(norm, nn.modules.lazy.LazyModuleMixin):
            raise ConfigError(f"{_called(name, norm)} has no size before the model has run once")
        if type(norm).forward not in _FORWARDS or parametrize.is_parametrized(norm):
            raise ConfigError(f"{_called(name, norm)} has a forward or parameters of its own, which would be lost")
    return found


def to_group_norm(model: Model, groups: int = 1) -> Model:
    """Make every batch normalisation an nn.GroupNorm of `groups` groups; return the model, which may be one itself.

    Weights and biases are the same parameters as before. Running statistics are gone: evaluation does what training
    does.

    Raises: ConfigError if the groups do not divide a module's channels, and what `batch_norms` raises.
    """
    found = batch_norms(model)
    for name, norm in found.items():
        if groups < 1 or norm.num_features % groups:
            what = _called(name, norm)
            raise ConfigError(f"{groups} groups do not divide the {norm.num_features} channels of {what}")
    for norm in found.values():
        own: dict[str, Any] = vars(norm)
        own |= {"num_groups": groups, "num_channels": own.pop("num_features")}
        for gone in ("momentum", "track_running_stats", "process_group", "gather"):
            own.pop(gone, None)
        for buffer in BUFFERS & norm._buffers.keys():
            delattr(norm, buffer)
        norm.__class__ = nn.GroupNorm  # type: ignore[assignment]
    return model


def to_synchronised(model: Model, group: dist.ProcessGroup | None = None) -> Model:
    """Make every batch normalisation take its statistics over all ranks of `group`, by default all there are.

    To be called by all of them, when they are connected; without a process group, or alone in one, nothing changes.
    From then on they must run the same of these modules in the same order, forward and backward, as often as each
    other: a rank that leaves one out keeps the others waiting. Gradients of weights and biases are those of this rank's
    samples, to be summed like all others. Evaluation uses the running statistics and tells nobody.

    The statistics have connections of their own, over gloo also where gradients go over NCCL, of which several groups
    must not be busy at the same time. (torch's nn.SyncBatchNorm refuses tensors on the CPU.)

    Raises: ConfigError as `batch_norms` does.
    """
    found = batch_norms(model)
    gather = _gather_of(group)
    for norm in found.values():
        kind: Any = type(norm)
        norm.__class__ = _synchronised(kind)
        norm.gather = gather  # type: ignore[assignment]
    return model


def _gather_of(group: dist.ProcessGroup | None) -> Gather | None:
    """Connect the ranks of `group` anew; None if there is nobody else."""
    if not dist.is_initialized() or dist.get_world_size(group) < 2:
        return None
    if group is None:
        own = dist.new_group(backend="gloo")
    else:
        own = dist.new_group(dist.get_process_group_ranks(group), backend="gloo", use_local_synchronization=True)

    def gather(numbers: Tensor) -> Tensor:  # a function, for copies of a model to share: groups cannot be copied
        mine = numbers.to("cpu", torch.float64)
        everybodys = [torch.empty_like(mine) for _ in range(own.size())]
        dist.all_gather(everybodys, mine, group=own)
        return torch.stack(everybodys)

    return gather


class _Synchronised(_BatchNorm):
    """What a synchronised batch normalisation does; its class is made of this one and the one that it had before."""

    gather: Gather | None

    def forward(self, inputs: Tensor) -> Tensor:
        """Normalise (batch, channels, ...) over all ranks' samples; in evaluation, or alone, as torch does it."""
        if self.gather is None or not self.training:
            return _BatchNorm.forward(self, inputs)
        self._check_input_dim(inputs)  # type: ignore[no-untyped-call]
        mean, squares, total = combined(inputs.detach(), self.gather)
        if self.track_running_stats:
            self._track(mean, squares / (total - 1))
        kind = torch.promote_types(inputs.dtype, torch.float32)
        affine = [None if each is None else each.to(kind) for each in (self.weight, self.bias)]
        statistics = [each.to(inputs.device, kind) for each in (mean, squares / total)]
        normalised: Tensor = _Normalise.apply(  # type: ignore[no-untyped-call]
            inputs, *affine, *statistics, self.eps, total, self.gather
        )
        return normalised

    @torch.no_grad()
    def _track(self, mean: Tensor, variance: Tensor) -> None:
        """Bring the running statistics up to date, as nn.BatchNorm does: its variance is the unbiased one."""
        share = self.momentum or 0.0
        if self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            share = 1.0 / float(self.num_batches_tracked) if self.momentum is None else share
        for running, now in ((self.running_mean, mean), (self.running_var, variance)):
            if running is not None:
                running.mul_(1 - share).add_(now.to(running.device, running.dtype), alpha=share)


_FORWARDS = (_BatchNorm.forward, nn.SyncBatchNorm.forward, _Synchronised.forward)


@cache
def _synchronised(kind: Any) -> Any:
    """Return the synchronised class that is a `kind` as well: it takes inputs of the same dimensions."""
    return kind if issubclass(kind, _Synchronised) else type(f"Synchronised{kind.__name__}", (_Synchronised, kind), {})


def combined(inputs: Tensor, gather: Gather) -> tuple[Tensor, Tensor, int]:
    """Return the mean of each channel over all ranks' samples, the sum of squared deviations from it, and the count.

    Inputs are (batch, channels, ...); a batch may be empty. Mean and squared deviations of each rank are combined as
    in Chan, Golub and LeVeque, "Updating formulae and a pairwise algorithm for computing sample variances" (1979):
    the difference of mean square and squared mean has no digits left where a mean is large. All ranks sum in the same
    order, so that all have the same bits.

    Raises: ValueError as nn.BatchNorm does for a single value per channel, here on all ranks together.
    """
    channels, count = inputs.shape[1], inputs.numel() // inputs.shape[1]
    here = torch.zeros(1 + 2 * channels, dtype=torch.float64)
    if count:
        exact = inputs.to(torch.promote_types(inputs.dtype, torch.float32))
        mean, variance = torch.batch_norm_update_stats(exact, None, None, 0.0)  # in two passes, each over all at once
        here = torch.cat([mean.new_tensor([count], dtype=torch.float64), mean.double(), variance.double() * count])
    there = gather(here)
    counts, means, squares = there[:, :1], there[:, 1 : 1 + channels], there[:, 1 + channels :]
    total = int(counts.sum())
    if total < 2:
        raise ValueError(f"Expected more than 1 value per channel when training, got {total} on all ranks together")
    mean = (counts * means).sum(0) / total
    return mean, (squares + counts * (means - mean).square()).sum(0), total


class _Normalise(Function):
    """(inputs - mean) / sqrt(variance + eps) * weight + bias, with mean and variance of all ranks' inputs."""

    @staticmethod
    def forward(
        ctx: Any,
        inputs: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        mean: Tensor,
        variance: Tensor,
        eps: float,
        total: int,
        gather: Gather,
    ) -> Tensor:
        ctx.save_for_backward(inputs, weight, mean, variance)
        ctx.eps, ctx.total, ctx.gather = eps, total, gather
        return torch.batch_norm(inputs, weight, bias, mean, variance, False, 0.0, eps, False)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        inputs, weight, mean, variance = ctx.saved_tensors
        products, sums = torch.zeros_like(mean), torch.zeros_like(mean)
        if inputs.numel():  # with given statistics torch's backward makes the sums over this rank's samples
            _, products, sums = torch.ops.aten.native_batch_norm_backward(
                gradient, inputs, weight, mean, variance, None, None, False, ctx.eps, (False, True, True)
            )
        of_inputs = None
        if ctx.needs_input_grad[0]:
            means = (ctx.gather(torch.cat([sums, products])).sum(0) / ctx.total).to(mean.device, mean.dtype)
            shape = (1, -1, *[1] * (inputs.dim() - 2))
            mean_sum, mean_product = (each.view(shape) for each in means.chunk(2))
            scale = (variance + ctx.eps).rsqrt()
            deviation = inputs - mean.view(shape)
            deviation *= -mean_product * scale.view(shape)
            deviation += gradient
            deviation -= mean_sum
            deviation *= (scale if weight is None else scale * weight).view(shape)
            of_inputs = deviation.to(inputs.dtype)
        of_weight = products if ctx.needs_input_grad[1] else None
        of_bias = sums if ctx.needs_input_grad[2] else None
        return of_inputs, of_weight, of_bias, None, None, None, None, None


def _check_even(config: RunConfig, samples: int) -> None:
    """Raises: ConfigError if in a step of this run some ranks have more micro-batches than others."""
    order = Order(
        samples=samples,
        workers=config.workers,
        batch_size=config.batch_size,
        accumulate=config.accumulate,
        uneven=config.uneven,
        seed=config.seed,
    )
    last = order.steps_per_epoch - 1  # of an epoch: the only one that may be smaller
    parts = [sum(map(len, order.micro_batches(last, worker))) for worker in range(config.workers)]
    batches = {-(-part // config.batch_size) for part in parts}
    if last < config.steps and len(batches) > 1:
        raise ConfigError(
            f"step {last} has the epoch's last {sum(parts)} samples, of which some workers have more micro-batches "
            f"({max(batches)}) than others ({min(batches)}), whose statistics they would wait for; use --uneven drop"
        )


def _called(name: str, module: nn.Module) -> str:
    return f"{name or 'the model'} ({type(module).__name__})"
