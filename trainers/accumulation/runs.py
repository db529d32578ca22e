"""Runs of one model on one effective batch, all from the same state: the full batch, and its micro-batches."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from distsim.errors import ConfigError
from distsim.units import shown
from trainers.accumulation.effective import Batch, Pair, Part, parts
from trainers.accumulation.loops import LoopRun, run_loop
from trainers.accumulation.outcome import Outcome
from trainers.accumulation.probes import Watch
from trainers.accumulation.ranks import Ranks
from trainers.accumulation.substituted import Substituted
from trainers.buckets import Buckets
from trainers.exchanger import Handle
from trainers.gradients import summed
from trainers.plan import plan, trainable
from trainers.precision import Precision
from trainers.workload import Workload, explained

STRATEGY, BUCKET_MB = "ring", 25.0
"""How several ranks exchange gradients here; equivalence does not depend on it."""


class Piece(NamedTuple):
    """What the model itself returned for one micro-batch."""

    part: Part
    outputs: tuple[Tensor, ...]


class Accumulated(NamedTuple):
    """A step in micro-batches: this rank's outputs, and everybody's loss and gradients."""

    pieces: list[Piece] | None
    """None where it cannot be told which outputs are of which micro-batch."""
    loss: float | None
    gradients: dict[str, Tensor]


class Subject:
    """A workload's model in one number format. Each run begins with the same buffers and the same random numbers."""

    def __init__(self, workload: Workload, steps: Sequence[Batch], dtype: torch.dtype, ranks: Ranks, seed: int) -> None:
        """Cast the model; it stays so. `steps` are the effective batches of one step after another."""
        self.workload, self.steps, self.dtype, self.ranks, self.seed = workload, steps, dtype, ranks, seed
        self.model = workload.model.to(ranks.device, dtype)
        self.samples = len(steps[0].samples)
        self._buffers = {name: buffer.clone() for name, buffer in self.model.named_buffers()}
        self._precision = Precision("full", ranks.device)

    @contextmanager
    def fresh(self, pair: Pair | None = None) -> Iterator[None]:
        """Reset what a run may have changed, before it and after it.

        Micro-batches get other random numbers than the full batch: with the same ones a single dropout layer could
        draw the same mask row by row, as it never would in training.
        """
        self._reset()
        if pair is not None and (pair.steps > 1 or self.ranks.size > 1):
            _seed(self.seed + 1 + self.ranks.rank)
        try:
            yield
        finally:
            self._reset()

    def full(self, step: int = 0, watch: Watch | None = None) -> Outcome:
        """Run a step's full batch, by nothing but autograd.

        Raises: ConfigError if the workload's own code fails, or gives numbers that are none.
        """
        batch = self.steps[step]
        data = batch.collated(batch.whole, self.dtype)
        what = f"the full batch in {str(self.dtype).removeprefix('torch.')}"
        with self.fresh(), explained(what), self._outputs() as seen:
            if watch is not None:
                watch.begin()
            if not (count := self.counted(data)):
                raise ConfigError("nothing counts in it: the workload's count of it is 0")
            value = self._backward(data, count)
            gradients = self._gradients()
            if not (math.isfinite(value) and all(bool(each.isfinite().all()) for each in gradients.values())):
                raise ConfigError("its loss or its gradients are not finite")
            return Outcome(outputs=tuple(seen), loss=value, gradients=gradients)

    def accumulated(self, pair: Pair) -> Accumulated:
        """Run the first step's micro-batches as the trainers do, and exchange if there are other ranks."""
        mine, batches = self.micro_batches(pair)
        following, pieces = iter(mine), list[Piece]()

        def loss(model: nn.Module, data: Any) -> Tensor:
            part = next(following)
            with self._outputs() as seen:
                value = self.workload.loss(model, data)
            pieces.append(Piece(part, tuple(seen)))
            return value

        parameters = trainable(self.model)
        exchanges = plan(parameters, STRATEGY, self.ranks.size, BUCKET_MB)
        handles: list[Handle] = []
        with self.fresh(pair), self.ranks.reducer(exchanges) as reducer:
            buckets = Buckets(parameters, exchanges, lambda number, flat: handles.append(reducer.reduce(number, flat)))
            try:
                got = summed(
                    replace(self.workload, loss=loss),
                    batches,
                    self.samples,
                    buckets,
                    handles,
                    reducer,
                    self._precision,
                    overlap=False,
                )
                buckets.scale(got.factor)
                return Accumulated(pieces, got.loss_sum / max(got.counted, 1.0), self._gradients())
            finally:
                buckets.close()

    def local(
        self, pair: Pair, step: int = 0, watch: Watch | None = None, sight: Substituted | None = None
    ) -> Accumulated:
        """Run all ranks' micro-batches of a step here, by autograd alone; `watch` has this `sight`, if any.

        Raises: ConfigError if the workload's own code fails.
        """
        ranks = self.ranks.size
        cut = sorted(part for rank in range(ranks) for part in parts(pair, self.samples, ranks, rank))
        batches = [self.steps[step].collated(part, self.dtype) for part in cut]
        counts = [self.counted(data) for data in batches]
        total, value = max(sum(counts), 1), 0.0
        with self.fresh(pair), explained("micro-batches"):
            for part, data, count in zip(cut, batches, counts, strict=True):
                if watch is not None and sight is not None:
                    watch.begin()
                    sight.begin(*part, count)
                value += self._backward(data, total)
            return Accumulated(None, value, self._gradients())

    def own_loop(self, pair: Pair) -> tuple[LoopRun, list[Accumulated]]:
        """Run the workload's own loop over two steps; a step is there for each time that it has called `step()`."""
        made = [self.micro_batches(pair, step) for step in range(len(self.steps))]
        with self.fresh(pair), self._outputs() as seen:
            run = run_loop(self.workload, [data for _, batches in made for data in batches], pair.steps)
        each, rest = divmod(len(seen), sum(len(mine) for mine, _ in made))
        groups = iter([tuple(seen[at : at + each]) for at in range(0, len(seen), each)] if each and not rest else [])
        found = []
        for step, gradients in enumerate(run.steps):
            mine = made[step][0] if step < len(made) else []
            pieces = [Piece(part, next(groups)) for part in mine] if each and not rest else None
            whole = {
                name: torch.zeros_like(parameter) if (gradient := gradients.get(name)) is None else gradient
                for name, parameter in self._trained().items()
            }
            loss = run.losses[step] if run.losses is not None and step < len(run.losses) else None
            found.append(Accumulated(pieces, loss, whole))
        return run, found

    def micro_batches(self, pair: Pair, step: int = 0) -> tuple[list[Part], list[Any]]:
        """Return this rank's micro-batches of a step, and which samples they have."""
        mine = parts(pair, self.samples, self.ranks.size, self.ranks.rank)
        return mine, [self.steps[step].collated(part, self.dtype) for part in mine]

    def alone(self, data: Any) -> tuple[float, dict[str, Tensor]]:
        """Return the mean over one micro-batch, and its gradient, computed by itself."""
        with self.fresh(), explained("a micro-batch"):
            return self._backward(data, max(self.counted(data), 1)), self._gradients()

    def counted(self, data: Any) -> int:
        """Return how much counts in a batch; ConfigError for what is no number of things."""
        with explained("the workload's count"):
            count = self.workload.count(data)
        if not isinstance(count, int) or isinstance(count, bool) or count < 0:
            raise ConfigError(f"the workload's count of a batch must be a whole number, not {shown(count)}")
        return count

    def _backward(self, data: Any, divided_by: int) -> float:
        loss = self.workload.loss(self.model, data)
        if not isinstance(loss, Tensor) or loss.dim() or not loss.requires_grad:
            of = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
            what = of if not isinstance(loss, Tensor) or loss.dim() else "one that depends on no parameter"
            raise ConfigError(f"the workload's loss must return a scalar tensor that has a gradient, not {what}")
        loss = loss / divided_by
        loss.backward()  # type: ignore[no-untyped-call]
        return float(loss.detach())

    def _reset(self) -> None:
        with torch.no_grad():
            for name, buffer in self.model.named_buffers():
                buffer.copy_(self._buffers[name])
        for parameter in self.model.parameters():
            parameter.grad = None
        _seed(self.seed)

    def _gradients(self) -> dict[str, Tensor]:
        """Copies, since a view into a bucket does not outlive the run."""
        return {
            name: torch.zeros_like(each) if each.grad is None else each.grad.detach().to_dense().clone()
            for name, each in self._trained().items()
        }

    def _trained(self) -> dict[str, nn.Parameter]:
        return {name: each for name, each in self.model.named_parameters() if each.requires_grad}

    @contextmanager
    def _outputs(self) -> Iterator[list[Tensor]]:
        """Collect what the model itself returns, call after call."""
        seen: list[Tensor] = []

        def keep(module: nn.Module, inputs: object, output: Any) -> None:
            leaves = tree_leaves(output)
            seen.extend(
                leaf.detach().clone() for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point()
            )

        hook = self.model.register_forward_hook(keep)
        try:
            yield seen
        finally:
            hook.remove()


def _seed(seed: int) -> None:
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)


def averaged(workload: Workload) -> Workload:
    """Return the workload as most loops have it: each micro-batch's mean counts alike, however much it is a mean of."""

    def loss(model: nn.Module, batch: Any) -> Tensor:
        return workload.loss(model, batch) / workload.count(batch)

    return replace(workload, loss=loss, count=lambda batch: 1)
