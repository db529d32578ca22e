"""Accumulation loops as people write them, right and wrong, and a net and batches to run them on."""

# mypy: allow-untyped-calls
# (backward() has no types)

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from trainers.accumulation.bookkeeping import Finding, explain, sketch
from trainers.accumulation.loops import LoopRun, run_loop
from trainers.workload import Workload

Loop = Callable[[nn.Module, Optimizer, Sequence[Any], int], object]
Batch = tuple[Tensor, Tensor]


class Net(nn.Module):
    """Tokens to classes, with an output that only a part of the parameters have to do with."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 6)
        self.hidden = nn.Linear(6, 8)
        self.head = nn.Linear(8, 5)
        self.side = nn.Linear(6, 1)

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        embedded = self.embedding(tokens)
        return self.head(torch.tanh(self.hidden(embedded))), self.side(embedded).squeeze(-1)


def batches_of(sizes: Sequence[int], seed: int = 0) -> list[Batch]:
    generator = torch.Generator().manual_seed(seed)
    return [
        (torch.randint(11, (size,), generator=generator), torch.randint(5, (size,), generator=generator))
        for size in sizes
    ]


def mean(model: nn.Module, batch: Batch) -> Tensor:
    """The loss that users write."""
    classes, side = model(batch[0])
    loss: Tensor = nn.functional.cross_entropy(classes, batch[1]) + (side**2).mean()
    return loss


def total(model: nn.Module, batch: Batch) -> Tensor:
    return mean(model, batch) * len(batch[0])


class Case(NamedTuple):
    run: LoopRun
    findings: list[Finding]

    @property
    def said(self) -> str:
        return " | ".join(each.reason for each in self.findings)


def case(
    loop: Loop,
    sizes: Sequence[int] = (3,) * 8,
    dtype: torch.dtype = torch.float64,
    batches: Sequence[Batch] | None = None,
    with_losses: bool = False,
    prepare: Callable[[nn.Module], object] = lambda model: None,
) -> Case:
    """Run a loop on two steps of half of the micro-batches each, and have it explained by their own gradients."""
    torch.manual_seed(5)
    model = Net().to(dtype)
    prepare(model)
    given = list(batches or batches_of(sizes))
    parts, losses = [], []
    for batch in given:
        model.zero_grad()
        loss = mean(model, batch)
        loss.backward()
        losses.append(float(loss.detach()))
        trained = {name: each for name, each in model.named_parameters() if each.requires_grad}
        parts.append(sketch({name: each.grad for name, each in trained.items()}))
    run = run_loop(Workload(model=model, data=[0], loss=total, loop=loop), given, len(given) // 2)
    counts = [len(batch[0]) for batch in given]
    return Case(run, explain(run, parts, counts, len(given) // 2, losses=losses if with_losses else None))


def explained(
    weights: Sequence[float],
    parts: Sequence[Tensor],
    counts: Sequence[int],
    samples: Sequence[int] | None = None,
    beside: float | Tensor = 0.0,
) -> str:
    """What is said of a loop that sums the gradients `parts` of its only parameter so, and adds something to them."""
    steps = len(parts) // 2
    weighed = torch.stack([weight * part for weight, part in zip(weights, parts, strict=True)])
    totals = (weighed[:steps].sum(0) + beside, weighed[steps:].sum(0) + beside)
    run = LoopRun(steps=({"w": totals[0]}, {"w": totals[1]}), calls=2, losses=None)
    found = explain(run, [sketch({"w": each}) for each in parts], counts, steps, samples=samples)
    return " | ".join(each.reason for each in found)


def norms(run: LoopRun) -> list[float]:
    """Of what the calls of `step()` were given."""
    return [math.hypot(*(float(each.norm()) for each in step.values() if each is not None)) for step in run.steps]


def scaled(factor: Callable[[Batch, list[Batch], int], float]) -> Loop:
    """A loop that is right but for what it multiplies its mean with: a function of batch, its step and M."""

    def loop(model: nn.Module, optimizer: Optimizer, batches: Sequence[Batch], accumulate: int) -> None:
        for i, batch in enumerate(batches):
            step = list(batches[i // accumulate * accumulate :][:accumulate])
            (mean(model, batch) * factor(batch, step, accumulate)).backward()
            if (i + 1) % accumulate == 0:
                optimizer.step()
                optimizer.zero_grad()

    return loop


def count(step: list[Batch]) -> int:
    return sum(len(tokens) for tokens, _ in step)


def stepping(
    step: Callable[[int, int], bool], zero: Callable[[int, int], bool], before: Callable[[int, int], bool] | None = None
) -> Loop:
    """A loop that divides by the steps, and calls `step()`, then `zero_grad()` where these say so."""

    def loop(model: nn.Module, optimizer: Optimizer, batches: Sequence[Batch], accumulate: int) -> None:
        for i, batch in enumerate(batches):
            if before is not None and before(i, accumulate):
                optimizer.zero_grad()
            (mean(model, batch) / accumulate).backward()
            if step(i, accumulate):
                optimizer.step()
            if zero(i, accumulate):
                optimizer.zero_grad()

    return loop


def end(i: int, accumulate: int) -> bool:
    return (i + 1) % accumulate == 0


def never(i: int, accumulate: int) -> bool:
    return False


def always(i: int, accumulate: int) -> bool:
    return True


right = scaled(lambda batch, step, m: len(batch[0]) / count(step))
tutorial = stepping(end, end)


def clipping(at_end: float | None = None, after_each: float | None = None, divide: bool = True) -> Loop:
    def loop(model: nn.Module, optimizer: Optimizer, batches: Sequence[Batch], accumulate: int) -> None:
        for i, batch in enumerate(batches):
            (mean(model, batch) / (accumulate if divide else 1)).backward()
            if after_each is not None:
                nn.utils.clip_grad_norm_(model.parameters(), after_each)
            if (i + 1) % accumulate == 0:
                if at_end is not None:
                    nn.utils.clip_grad_norm_(model.parameters(), at_end)
                optimizer.step()
                optimizer.zero_grad()

    return loop


def by_hand(format: torch.dtype, divide: bool = True) -> Loop:
    """A loop that keeps its sums itself, in a format of its own."""

    def loop(model: nn.Module, optimizer: Optimizer, batches: Sequence[Batch], accumulate: int) -> None:
        parameters = list(model.parameters())
        for start in range(0, len(batches), accumulate):
            sums = [torch.zeros_like(each, dtype=format) for each in parameters]
            for batch in batches[start : start + accumulate]:
                gradients = torch.autograd.grad(mean(model, batch) / (accumulate if divide else 1), parameters)
                sums = [so_far + each.to(format) for so_far, each in zip(sums, gradients, strict=True)]
            for parameter, each in zip(parameters, sums, strict=True):
                parameter.grad = each.to(parameter.dtype)
            optimizer.step()

    return loop


def clipped_alone(model: nn.Module, optimizer: Optimizer, batches: Sequence[Batch], accumulate: int) -> None:
    """Each micro-batch's gradient is clipped before it is added to the others."""
    parameters = list(model.parameters())
    for start in range(0, len(batches), accumulate):
        sums = [torch.zeros_like(each) for each in parameters]
        for batch in batches[start : start + accumulate]:
            gradients = torch.autograd.grad(mean(model, batch), parameters)
            norm = math.hypot(*(float(each.norm()) for each in gradients))
            for so_far, each in zip(sums, gradients, strict=True):
                so_far += each * min(1.0, 1.7 / norm) / accumulate
        for parameter, each in zip(parameters, sums, strict=True):
            parameter.grad = each
        optimizer.step()


def scaler(unscaled: bool) -> Loop:
    def loop(model: nn.Module, optimizer: Optimizer, batches: Sequence[Batch], accumulate: int) -> None:
        scaling = torch.amp.GradScaler("cpu")
        for i, batch in enumerate(batches):
            scaling.scale(mean(model, batch) / accumulate).backward()
            if (i + 1) % accumulate == 0:
                if unscaled:
                    scaling.step(optimizer)
                    scaling.update()
                else:
                    optimizer.step()
                optimizer.zero_grad()

    return loop


def using(order: Callable[[int, int], list[int]]) -> Loop:
    """A loop that uses some of a step's micro-batches, in an order of its own."""

    def loop(model: nn.Module, optimizer: Optimizer, batches: Sequence[Batch], accumulate: int) -> None:
        for step in range(len(batches) // accumulate):
            for place in order(step, accumulate):
                (mean(model, batches[step * accumulate + place]) / accumulate).backward()
            optimizer.step()
            optimizer.zero_grad()

    return loop


def changed(loss: Callable[[nn.Module, Batch, bool], Tensor]) -> Loop:
    """A loop with a loss of its own: of model, batch, and whether it is the step's last one."""

    def loop(model: nn.Module, optimizer: Optimizer, batches: Sequence[Batch], accumulate: int) -> None:
        for i, batch in enumerate(batches):
            (loss(model, batch, end(i, accumulate)) / accumulate).backward()
            if end(i, accumulate):
                optimizer.step()
                optimizer.zero_grad()

    return loop


def half_detached(model: nn.Module, batch: Batch, last: bool) -> Tensor:
    classes, side = model(batch[0])
    loss: Tensor = nn.functional.cross_entropy(classes, batch[1]) + ((side if last else side.detach()) ** 2).mean()
    return loss


def all_elsewhere(model: nn.Module, batch: Batch, last: bool) -> Tensor:
    """All but the last with other labels."""
    return mean(model, batch if last else (batch[0], (batch[1] + 1) % 5))


def frozen(model: nn.Module, optimizer: Optimizer, batches: Sequence[Batch], accumulate: int) -> None:
    model.get_submodule("embedding").requires_grad_(False)
    tutorial(model, optimizer, batches, accumulate)


def no_side(model: nn.Module, batch: Batch, last: bool) -> Tensor:
    return nn.functional.cross_entropy(model(batch[0])[0], batch[1])


def hooked(model: nn.Module, optimizer: Optimizer, batches: Sequence[Batch], accumulate: int) -> None:
    handle = model.get_parameter("head.bias").register_hook(lambda gradient: gradient * 2)
    tutorial(model, optimizer, batches, accumulate)
    handle.remove()


def closures(model: nn.Module, optimizer: Optimizer, batches: Sequence[Batch], accumulate: int) -> None:
    for start in range(0, len(batches), accumulate):

        def closure(start: int = start) -> float:
            optimizer.zero_grad()
            losses = [mean(model, batch) / accumulate for batch in batches[start : start + accumulate]]
            for loss in losses:
                loss.backward()
            return float(torch.stack(losses).sum().detach())

        optimizer.step(closure)


def zero_before_step(model: nn.Module, optimizer: Optimizer, batches: Sequence[Batch], accumulate: int) -> None:
    for i, batch in enumerate(batches):
        (mean(model, batch) / accumulate).backward()
        if end(i, accumulate):
            optimizer.zero_grad()
            optimizer.step()


def clipped_by_value(model: nn.Module, optimizer: Optimizer, batches: Sequence[Batch], accumulate: int) -> None:
    for i, batch in enumerate(batches):
        (mean(model, batch) / accumulate).backward()
        if end(i, accumulate):
            nn.utils.clip_grad_value_(model.parameters(), 0.05)
            optimizer.step()
            optimizer.zero_grad()


def undivided_and_missing(model: nn.Module, optimizer: Optimizer, batches: Sequence[Batch], accumulate: int) -> None:
    for i, batch in enumerate(batches):
        mean(model, batch).backward()
        if end(i, accumulate):
            optimizer.step()


def steps_of(own: int) -> Loop:
    """A loop that has a number of its own instead of the one that it is given."""
    return lambda model, optimizer, batches, accumulate: tutorial(model, optimizer, batches, own)


def halved(model: nn.Module, optimizer: Optimizer, batches: Sequence[Batch], accumulate: int) -> None:
    """What is kept between steps is made smaller, not zero."""
    for i, batch in enumerate(batches):
        (mean(model, batch) / accumulate).backward()
        if end(i, accumulate):
            optimizer.step()
            for parameter in model.parameters():
                assert parameter.grad is not None
                parameter.grad *= 0.5
