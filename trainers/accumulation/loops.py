"""A user's own accumulation loop, run on two steps' micro-batches; what it gives its optimizer is kept.

A loop is `loop(model, optimizer, batches, accumulate)`: the micro-batches of two steps in a row (one step would not
show a missing `zero_grad`), `accumulate` of them each, the last of a step possibly smaller. It has its own loss, and
may return its two logged losses. `trainers.accumulation.bookkeeping` says what it did by what came out, from what
loops are known to do: `habits`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from distsim.errors import ConfigError
from trainers.workload import Workload, explained

STEPS = 2
"""How many steps a loop is given the micro-batches of, and of how many calls of `step()` gradients are kept."""

Words = tuple[str, str]
"""What a loop does, and the remedy."""
DIVIDE = "(loss / accumulate).backward(), the loss a mean, and nothing else divided"
WEIGH = "weigh each micro-batch's mean by what counts in it: (loss * count / count_of_the_step).backward()"
EVERY: Words = (
    "optimizer.step() is called after every micro-batch",
    "call it after the last one of a step: if (i + 1) % accumulate == 0",
)
FIRST: Words = (
    "optimizer.step() is called after the first micro-batch of a step, as with i % accumulate == 0",
    "call it after the last one: if (i + 1) % accumulate == 0",
)
LATE: Words = ("optimizer.step() is called one micro-batch too late", FIRST[1])
EARLY: Words = ("optimizer.step() is called one micro-batch too early", FIRST[1])
MISSING: Words = (
    "zero_grad() is missing between steps: the second has the first's gradients, too",
    "call optimizer.zero_grad() after each optimizer.step()",
)
ALWAYS: Words = (
    "only the last micro-batch of a step counts, as if zero_grad() came before each",
    "call optimizer.zero_grad() after optimizer.step() alone",
)
UNUSED_LAST: Words = (
    "the last micro-batch of a step is left out",
    "use it, whatever its size: step after all micro-batches of a step, each with the weight of what counts in it",
)
UNUSED_FIRST: Words = (
    "the first micro-batch of a step is left out, as if zero_grad() came after its backward()",
    "call optimizer.zero_grad() before the first backward() of a step",
)
CLIPPED_EACH: Words = (
    "the micro-batches are shortened by factors of their own, as clipping after each of them does",
    "clip once, before optimizer.step()",
)
LOGGED = "return the mean over all that counts in a step: the sum of loss * count, divided by the sum of the counts"
NEVER = "call it after the last micro-batch of a step (a GradScaler leaves it out where gradients are not finite)"
EMPTY = "call zero_grad() after optimizer.step(), not between backward() and it"
GONE = "leave these parameters trainable, and nothing on the way to them detached or under no_grad()"
OTHER = (
    "look for a part of the loss that is detached in some micro-batches, another loss, mode (train, eval) or data than "
    "the workload's, gradients that hooks change, or clipping by value"
)
WIDER = "compute and add up in the model's own format, in .grad"
CLIPPED = "none needed; leave the clipping out to compare the gradients before it"
UNSCALED = "let a GradScaler that scales the loss call the optimizer, scaler.step(optimizer), or unscale_ before"
ONCE = "hand each micro-batch to the model once"


class Recorder(torch.optim.Optimizer):
    """Keeps the gradients that `step()` is given, of the first two calls, and changes no parameter."""

    def __init__(self, model: nn.Module) -> None:
        """Look after the model's trainable parameters."""
        self.trained = {name: each for name, each in model.named_parameters() if each.requires_grad}
        self.steps: list[dict[str, Tensor | None]] = []
        """By parameter; None where there is none."""
        self.calls = 0
        super().__init__(self.trained.values(), {"lr": 1e-3})  # schedulers and logs read a rate

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Keep a copy of the gradients; call the closure first, if there is one, and return what it does."""
        with torch.enable_grad():
            loss = None if closure is None else closure()
        self.calls += 1
        if self.calls <= STEPS:  # a loop that steps too often would keep as many copies of a large model
            self.steps.append({name: _copy(parameter.grad) for name, parameter in self.trained.items()})
        return loss


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class LoopRun:
    """What a loop has done with the micro-batches of two steps."""

    steps: tuple[dict[str, Tensor | None], ...]
    """What the first two calls of `optimizer.step()` were given, by trainable parameter; None where there was none."""
    calls: int
    """How often `optimizer.step()` was called."""
    losses: tuple[float, ...] | None
    """What the loop returned, if that was a list of numbers; of two steps if nothing is wrong with it."""


def run_loop(workload: Workload, batches: Sequence[Any], accumulate: int) -> LoopRun:
    """Run the workload's loop on the micro-batches of two steps, `accumulate` each.

    Gradients are None before and after. The model keeps its parameters; hooks and buffers are the loop's affair.

    Raises: ConfigError saying where the loop failed, or which parameter it has changed itself.
    """
    assert workload.loop is not None and len(batches) == STEPS * accumulate
    model = workload.model
    recorder = Recorder(model)
    before = {name: each.detach().clone() for name, each in recorder.trained.items()}
    modes = {module: module.training for module in model.modules()}
    _clear(model)
    try:
        with explained("the workload's loop failed"):
            returned = workload.loop(model, recorder, list(batches), accumulate)
        changed = [name for name, each in recorder.trained.items() if not _same(each, before[name])]
    finally:
        _clear(model)
        for name, parameter in recorder.trained.items():
            parameter.data = before[name]
            parameter.requires_grad_()
        for module, mode in modes.items():
            module.training = mode
    if changed:
        raise ConfigError(
            f"the workload's loop has changed parameters itself ({', '.join(changed[:3])}"
            f"{', ...' if changed[3:] else ''}); it must leave that to the optimizer that it is given, which records "
            "gradients and changes nothing"
        )
    return LoopRun(steps=tuple(recorder.steps), calls=recorder.calls, losses=_numbers(returned))


def _copy(gradient: Tensor | None) -> Tensor | None:
    """Return a dense copy: of an embedding the gradient may be sparse."""
    if gradient is None:
        return None
    return gradient.detach().clone() if gradient.layout is torch.strided else gradient.detach().to_dense()


def _same(first: Tensor, second: Tensor) -> bool:
    """Equal shapes, types and numbers; a NaN is equal to itself."""
    alike = first.shape == second.shape and first.dtype == second.dtype and first.device == second.device
    return alike and bool(torch.allclose(first.detach(), second, rtol=0.0, atol=0.0, equal_nan=True))


def _clear(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.grad = None


def _numbers(returned: object) -> tuple[float, ...] | None:
    """Read a list of numbers or of tensors of one element."""
    if not isinstance(returned, list | tuple):
        return None
    numbers = []
    for each in returned:
        if isinstance(each, bool) or not (isinstance(each, int | float) or (isinstance(each, Tensor) and _one(each))):
            return None
        numbers.append(float(each.detach() if isinstance(each, Tensor) else each))
    return tuple(numbers)


def _one(tensor: Tensor) -> bool:
    return tensor.numel() == 1 and not tensor.is_complex()


class Habit(NamedTuple):
    """Something that loops do, and the weights with which it sums the gradients of the micro-batches' own means."""

    words: tuple[Words, ...]
    """What it does and the remedy, for each thing that is wrong with it; () is right."""
    weights: Tensor
    """Of all micro-batches, for each of the first two calls of `step()`: (calls, micro-batches); or for any call."""


def scales(counts: Tensor, samples: Tensor, steps: int) -> list[Habit]:
    """Return how loops scale a micro-batch's loss, the right way first, with weights (micro-batches of two steps).

    `counts` and `samples` are how much counts in each micro-batch and how many samples it has, `steps` how many
    micro-batches a step has.
    """
    count, size = (each.view(STEPS, -1).sum(1, keepdim=True).expand(-1, steps).flatten() for each in (counts, samples))
    right, ones = counts / count, torch.ones_like(counts)
    uneven = not torch.allclose(right, ones / steps)
    padded = not torch.equal(counts, samples)
    many = f"the {steps} micro-batches of a step"
    shown = ", ".join(f"{each:,.0f}" for each in counts[: min(steps, 4)]) + (", ..." if steps > 4 else "")
    ways = [
        (
            uneven,
            f"the micro-batches' means are averaged, though they are over different counts ({shown})",
            ones / steps,
        ),
        (padded, "the micro-batches' means are weighted by their samples, which are not what counts", samples / size),
        (True, f"the loss is not divided by {many}", ones),
        (True, f"the loss is divided by {many} twice", right / steps),
        (uneven, f"the loss, a mean over one of several counts, is divided by {many} twice", ones / steps**2),
        (True, f"the loss, a mean already, is divided by the {size[0]:,.0f} samples of the step", 1 / size),
        (padded, f"the loss, a mean already, is divided by the {count[0]:,.0f} that count in the step", 1 / count),
        (True, "the loss, a sum, is not divided by anything", counts),
        (steps > 1, f"the loss, a sum, is divided by {many} but not by what counts in them", counts / steps),
    ]
    remedy = WEIGH if uneven else DIVIDE
    wrong = [Habit(((words, remedy),), weights) for holds, words, weights in ways if holds]
    one = bool((counts == 1).all())  # a mean and a sum over one are the same: say it once
    wrong = [
        each for each in wrong if not torch.allclose(each.weights, right) and not (one and "a sum" in each.words[0][0])
    ]
    return [Habit((), right), *wrong]


def habits(run: LoopRun, counts: Tensor, samples: Tensor, steps: int) -> list[Habit]:
    """Return what loops do that call `step()` as often as this one did, at most two things at once, right first.

    The weights are those of the calls that the run has kept.
    """
    scaled = scales(counts, samples, steps)
    both = [
        Habit(pattern.words + scale.words, pattern.weights * scale.weights)
        for pattern in _patterns(run.calls, counts, steps)
        for scale in scaled
        if len(pattern.words + scale.words) <= 2
    ]
    return sorted(both + _own_steps(run.calls, steps), key=lambda each: len(each.words))


def logged(run: LoopRun, losses: Sequence[float], counts: Tensor, steps: int, tolerance: float) -> list[Words]:
    """Say what the losses that a loop returned are, if not the means of its steps; `losses` are the micro-batches'.

    Both losses must agree with what is said of them, to the relative tolerance.
    """
    if run.losses is None:
        return []
    if len(run.losses) != STEPS:
        return [(f"the loop returns {len(run.losses)} losses for {STEPS} steps", "return the mean of each step")]
    right = counts.view(STEPS, steps) / counts.view(STEPS, steps).sum(1, keepdim=True)
    ones, last = torch.ones_like(right), torch.eye(steps, dtype=torch.float64)[-1]
    many = f"the {steps} micro-batches"
    ways = {
        "": right,
        f"the sum of those of {many}, not their mean": ones,
        f"the mean of the means of {many}, though they are over different counts": ones / steps,
        "that of the last micro-batch alone": last,
        f"that of the last micro-batch alone, divided by {steps}": last / steps,
        f"the mean of {many}, divided by {steps} once more": right / steps,
        f"the sum of those of all that counts in {many}, not their mean": counts.view(STEPS, steps),
    }
    own, found = (torch.tensor(list(each), dtype=torch.float64).view(STEPS, -1) for each in (losses, run.losses))
    fits = [
        what
        for what, weights in ways.items()
        if bool(((found[:, 0] - (weights * own).sum(1)).abs() <= tolerance * (weights * own).abs().sum(1)).all())
    ]
    if "" in fits:
        return []
    return [(f"the loss that the loop returns is {' or '.join(fits) or 'not the mean of its step'}", LOGGED)]


def _patterns(calls: int, counts: Tensor, steps: int) -> Iterator[Habit]:
    """Yield which micro-batches each call's gradient has: how often, by what the loop calls when."""
    total, ends = STEPS * steps, {steps - 1, STEPS * steps - 1}
    stepping: list[tuple[tuple[Words, ...], set[int]]] = [((), ends)]
    if steps > 1:
        stepping += [((EVERY,), set(range(total))), ((FIRST,), {0, steps})]
        stepping += [((LATE,), {steps}), ((LATE,), {steps, total - 1})]
    if steps > 2:
        stepping += [((EARLY,), {steps - 2, total - 2})]
    for words, after in stepping:
        if len(after) != calls:
            continue
        yield Habit(words, _held(total, after, {each + 1 for each in after}))
        yield Habit((*words, MISSING), _held(total, after, set()))
        yield Habit((*words, ALWAYS), _held(total, after, set(range(total))))
        if words == (EVERY,):
            yield Habit(words, _held(total, after, {each + 1 for each in ends}))
        if after == ends and steps > 1:
            for unused, place in ((UNUSED_LAST, steps - 1), (UNUSED_FIRST, 0)):
                used = torch.ones(STEPS, steps, dtype=counts.dtype)
                used[:, place] = 0
                weighed = counts.view(STEPS, steps)
                others = weighed.sum(1, keepdim=True) / (weighed * used).sum(1, keepdim=True)
                for again in (1.0, others, steps / (steps - 1)):  # of all; of those used, by counts and as means
                    yield Habit((unused,), _held(total, ends, {steps}) * (used * again).flatten())


def _held(total: int, steps_after: Collection[int], zeros_before: Collection[int]) -> Tensor:
    """Run a loop on counters: how often each micro-batch is in the gradient at each of the first calls of `step()`."""
    held, calls = torch.zeros(total, dtype=torch.float64), []
    for each in range(total):
        if each in zeros_before:
            held = torch.zeros_like(held)
        held[each] += 1
        if each in steps_after:
            calls.append(held.clone())
    return torch.stack(calls[:STEPS])


def _own_steps(calls: int, steps: int) -> list[Habit]:
    """Loops that have a number of micro-batches of their own instead of the one that they are given."""
    found, total = [], STEPS * steps
    for own in range(2, total + 1):
        if own != steps and total // own == calls:
            words = (
                f"optimizer.step() comes after each {own} micro-batches, not {steps}, and the loss is divided by {own}",
                "use the number of micro-batches that the loop is given",
            )
            after = range(own - 1, total, own)
            found.append(Habit((words,), _held(total, after, {each + 1 for each in after}) / own))
    return found
