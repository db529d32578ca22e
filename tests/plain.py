"""Plain PyTorch training in one process, on the union of all ranks' batches: what the trainers are held against.

It shares a workload's model, data and collation with the trainers, and nothing else: its order of samples, its loss
(the mean over all valid tokens of a step), its clipping and its optimizers are written here or are PyTorch's own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from trainers.workload import Samples, Workload

NO_TARGET = -100
Floats = npt.NDArray[np.floating[Any]]


@dataclass
class Trained:
    """What plain training has come to, step by step."""

    parameters: Floats = field(default_factory=lambda: np.zeros(0))
    losses: list[float] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    """Of the gradient, before it is clipped."""
    rates: list[float] = field(default_factory=list)
    unused: list[set[int]] = field(default_factory=list)
    """Parameters that have no gradient, by their place in the model."""
    skipped: list[bool] = field(default_factory=list)
    """Whether the gradient scaler has left the step out."""
    evaluations: list[float] = field(default_factory=list)


def sgd(rate: float = 0.2, momentum: float = 0.9) -> Callable[[Iterable[nn.Parameter]], Optimizer]:
    return lambda parameters: torch.optim.SGD(parameters, lr=rate, momentum=momentum)


def train(
    build: Callable[[], Workload],
    samples: int,
    steps: int,
    *,
    seed: int,
    optimizer: Callable[[Iterable[nn.Parameter]], Optimizer] | None = None,
    schedule: Callable[[Optimizer], LRScheduler] | None = None,
    uneven: str = "join",
    clip: float = math.inf,
    dtype: torch.dtype = torch.float64,
    autocast: torch.dtype | None = None,
    parts: int = 1,
    evaluate_every: int = 0,
) -> Trained:
    """Train for `steps` steps of `samples` samples each.

    With `parts`, a step's samples go through the model in so many equal parts: in half precision each pass rounds
    its gradient, so that only the same parts give the same result.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        work = build()
    model = work.model.to(dtype)
    parameters = list(model.parameters())
    chosen = (optimizer or sgd())(parameters)
    rates = schedule(chosen) if schedule is not None else None
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16, enabled=autocast is torch.float16)
    seen, epoch, waiting = Trained(), 0, np.zeros(0, dtype=np.int64)

    for step in range(steps):
        if len(waiting) < (samples if uneven == "drop" else 1):
            waiting = np.random.default_rng((seed, epoch)).permutation(len(work.data))
            epoch += 1
        taken, waiting = waiting[:samples], waiting[samples:]
        batches = [work.collate([work.data[int(at)] for at in part]) for part in np.split(taken, parts)]
        counts = [int((targets != NO_TARGET).sum()) for _, targets in batches]

        chosen.zero_grad()
        loss = 0.0
        for batch, count in zip(batches, counts, strict=True):
            with torch.autocast("cpu", autocast) if autocast is not None else nullcontext():
                mean = mean_loss(model, batch, dtype)
            weighed = mean * (count / sum(counts))  # once the mean, if there is but one part
            torch.autograd.backward(scaler.scale(weighed))
            loss += float(weighed.detach())
        scaler.unscale_(chosen)
        norm = math.sqrt(sum(float(each.grad.square().sum()) for each in parameters if each.grad is not None))
        if norm > clip:
            for each in parameters:
                if each.grad is not None:
                    each.grad *= clip / norm
        seen.rates.append(chosen.param_groups[0]["lr"])
        seen.unused.append({place for place, each in enumerate(parameters) if each.grad is None})
        before = scaler.get_scale()
        scaler.step(chosen)
        scaler.update()
        if rates is not None:
            rates.step()

        seen.losses.append(loss)
        seen.counts.append(sum(counts))
        seen.norms.append(norm)
        seen.skipped.append(scaler.get_scale() < before)
        if evaluate_every and (step + 1) % evaluate_every == 0 and work.evaluation is not None:
            seen.evaluations.append(evaluation(model, work, work.evaluation, dtype))

    seen.parameters = torch.nn.utils.parameters_to_vector(parameters).detach().numpy()
    return seen


def mean_loss(model: nn.Module, batch: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """Return the mean cross-entropy over all targets that are none of the padding's."""
    inputs, targets = batch
    logits = model(inputs).flatten(0, 1).to(dtype)
    return functional.cross_entropy(logits, targets.flatten(), ignore_index=NO_TARGET, reduction="mean")


@torch.no_grad()
def evaluation(model: nn.Module, work: Workload, samples: Samples, dtype: torch.dtype) -> float:
    """Return the mean loss over all samples at once."""
    model.eval()
    mean = float(mean_loss(model, work.collate([samples[at] for at in range(len(samples))]), dtype))
    model.train()
    return mean
