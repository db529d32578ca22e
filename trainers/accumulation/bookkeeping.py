"""What a loop's gradient says of its bookkeeping: with which weights it has summed the micro-batches' gradients.

The gradient that a loop arrives at is sum_m w_m g_m, g_m the gradient of the mean over micro-batch m alone. Right is
w_m = count_m / count of the step. Each known mistake makes weights of its own: divided by nothing, 1 each;
`zero_grad` missing, those of the step before as well. A mistake is named if the sum with its weights is the gradient,
the simplest first; only where none is, weights are fitted, and they are unique only if the g_m are independent.

All of this happens on sketches (Charikar, Chen, Farach-Colton 2002): linear, so that equal combinations stay equal,
and small, so that those of dozens of micro-batches of a large model fit into memory.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from trainers.accumulation import loops
from trainers.accumulation.loops import STEPS, Habit, LoopRun, Words

WIDTH = 251
"""Numbers that a sketch has of each parameter; a prime, so that no column of a matrix falls into one of them."""
LOW = 0.02
"""Relative rest that low precision may leave: adding up in bfloat16, 2^-9 a rounding, leaves a few of these."""
ROUNDINGS = 4096.0
"""A loop may differ from the micro-batches' own gradients by this many roundings, its loss being written otherwise."""
FEW = 8.0
"""Roundings that are no sign of low precision."""
CLEAR = 0.02
"""Fitted weights that are surer than this, relative to right ones, are called by their numbers."""
WHOLE = 0.25
"""Fitted weights that are surer than this, relative to right ones, are told from those that are used twice or not."""
LOWER = (torch.bfloat16, torch.float16, torch.float32)
SAME = 1e-3
"""Relative difference of factors and norms that are called the same: clip_grad_norm_ adds 1e-6 to the norm."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """Something that a loop does."""

    reason: str
    remedy: str | None
    expected: tuple[float, ...] = ()
    """Weights of all micro-batches handed to the loop, in the step that shows it best; () if weights do not show it."""
    found: tuple[float, ...] = ()
    """Weights that give what the loop has given; where micro-batches' gradients are dependent, others do as well."""
    error: bool = True
    """Not if it does the same to the full batch's gradient."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Combination:
    """total = sum of weight x part + a rest."""

    weights: Tensor
    margins: Tensor
    """How far off each weight may be if what was added up is known to the relative tolerance; inf: anywhere."""
    residual: float
    """Norm of the rest, relative to the total's."""


class _Task(NamedTuple):
    """What is to be explained."""

    run: LoopRun
    totals: Tensor
    """What calls of `step()` were given: (calls kept, parameters, WIDTH)."""
    parts: Tensor
    """(micro-batches of both steps, parameters, WIDTH)"""
    counts: Tensor
    samples: Tensor
    steps: int
    """Micro-batches of a step."""
    names: list[str]

    def of(self, rows: Tensor) -> _Task:
        """Return the same of some parameters alone."""
        names = [name for name, row in zip(self.names, rows.tolist(), strict=True) if row]
        return self._replace(totals=self.totals[:, rows], parts=self.parts[:, rows], names=names)


def sketch(gradients: Mapping[str, Tensor | None]) -> Tensor:
    """Return `WIDTH` float64 numbers for each gradient, in the mapping's order: (gradients, WIDTH), on the CPU.

    Element i, with a random sign that depends on the parameter's name and on i alone, is added to number i mod WIDTH:
    sketches can be added and multiplied as the gradients can. None counts as zeros.
    """
    rows = torch.zeros(len(gradients), WIDTH, dtype=torch.float64)
    for row, (name, gradient) in zip(rows, gradients.items(), strict=True):
        if gradient is not None:
            generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
            signs = torch.randint(2, (gradient.numel(),), dtype=torch.int8, generator=generator) * 2 - 1
            values = gradient.detach().to("cpu", torch.float64).flatten() * signs
            row += torch.nn.functional.pad(values, (0, -len(values) % WIDTH)).view(-1, WIDTH).sum(0)
    return rows


def combination(total: Tensor, parts: Sequence[Tensor], tolerance: float = 1e-9) -> Combination:
    """Fit `total` as a weighted sum of `parts`, all of one shape; the smallest weights where parts are dependent.

    Parts, scaled to norm 1, are dependent if some sum of them is less than the relative `tolerance`.
    """
    columns, target = torch.stack([part.flatten() for part in parts], dim=1).double(), total.flatten().double()
    norms = columns.norm(dim=0)
    norms[norms == 0] = 1.0
    left, singular, right = torch.linalg.svd(columns / norms, full_matrices=False)
    kept = singular > tolerance * float(singular.max())
    left, inverse, right = left[:, kept], 1.0 / singular[kept], right[kept].T
    weights = right @ (inverse * (left.T @ target)) / norms
    size, added = float(target.norm()), float((weights.abs() * norms).sum())
    margins = (right * inverse).norm(dim=1) * tolerance * max(size, added) / norms
    margins[right.square().sum(dim=1) < 1.0 - 1e-6] = math.inf  # dependent parts leave it open
    rest = float((target - columns @ weights).norm())
    return Combination(weights=weights, margins=margins, residual=rest / size if size else 0.0)


def explain(
    run: LoopRun,
    parts: Sequence[Tensor],
    counts: Sequence[int],
    accumulate: int,
    *,
    samples: Sequence[int] | None = None,
    losses: Sequence[float] | None = None,
    tolerance: float | None = None,
) -> list[Finding]:
    """Say what a loop has done other than to hand its optimizer the mean's gradient, twice; [] if it has done that.

    `parts` are sketches of the gradients of each micro-batch's own mean, of both steps, at the same parameters and in
    the loop's floating-point format; `counts` how much counts in each, `samples` how many samples it has (its count,
    unless given), `losses` its mean: what the loop returns is held against them. Numbers that differ by less than the
    relative `tolerance` are equal: unless given, by 4096 roundings of the format. Where several explanations are
    equally simple and fit, all of them are named, with "or".
    """
    assert len(parts) == len(counts) == STEPS * accumulate
    if not run.steps:
        return [Finding(reason="optimizer.step() is never called", remedy=loops.NEVER)]
    totals, stacked = torch.stack([sketch(step) for step in run.steps]), torch.stack(list(parts))
    if not bool(totals.isfinite().all()):
        return [Finding(reason="the gradient that optimizer.step() is given is not finite", remedy=None)]
    if not bool(totals.any()):
        return [Finding(reason="no parameter has a gradient when optimizer.step() is called", remedy=loops.EMPTY)]
    held = next(each.dtype for step in run.steps for each in step.values() if each is not None)
    exact = ROUNDINGS * torch.finfo(held).eps / 2 if tolerance is None else tolerance
    sizes = [torch.tensor(list(each), dtype=torch.float64) for each in (counts, samples or counts)]
    task = _Task(run, totals, stacked, sizes[0], sizes[1], accumulate, list(run.steps[0]))
    said = loops.logged(run, losses, sizes[0], accumulate, exact) if losses is not None else []
    return _gradients(task, exact) + [Finding(reason=what, remedy=remedy) for what, remedy in said]


def _gradients(task: _Task, exact: float) -> list[Finding]:
    """Explain them with all parameters, then without those that have none, then most of them, then less exactly."""
    silent = task.parts.any(dim=2).any(dim=0) & ~task.totals.any(dim=2).any(dim=0)
    gone = Finding(reason=f"no gradient arrives at {_listed(task.of(silent).names)}", remedy=loops.GONE)
    tries: list[tuple[_Task, list[Finding]]] = [(task, [])]
    if bool(silent.any()):
        tries.append((task.of(~silent), [gone]))
    rest, known = tries[-1]
    for tried, missing in tries:
        if (found := _by_weights(tried, exact)) is not None:
            return missing + _coarse(tried, exact) + found
    if (found := _by_parameter(rest, exact)) is not None:
        return known + found
    left = _rest(rest)  # if nothing is, it is a sum with weights that cannot be told, and not one of low precision
    for tried, missing in tries:
        if left > exact and (found := _by_weights(tried, LOW)) is not None:
            return missing + _coarse(tried, LOW) + found
    return [*known, _unknown(rest, left, exact)]


def _by_weights(task: _Task, limit: float) -> list[Finding] | None:
    """Mistakes that are known first, then factors that all weights of a step share, then fitted weights."""
    for attempt in (_by_known, _by_factor, _by_fit):
        if (found := attempt(task, limit)) is not None:
            return found
    return None


def _by_known(task: _Task, limit: float) -> list[Finding] | None:
    candidates = loops.habits(task.run, task.counts, task.samples, task.steps)
    if not candidates:
        return None
    rests = _rests(task, torch.stack([each.weights for each in candidates]))
    bound = limit if limit < LOW else min(limit, 2.0 * float(rests.min()))
    fits = [each for each, rest in zip(candidates, rests.tolist(), strict=True) if rest <= bound]
    return _findings(task, [each for each in fits if len(each.words) == len(fits[0].words)]) if fits else None


def _by_factor(task: _Task, limit: float) -> list[Finding] | None:
    if task.run.calls != STEPS:
        return None
    for base in _bases(task):
        wanted, given = (_own(task) * base.weights) @ task.parts.flatten(1), task.totals.flatten(1)
        factors = (given * wanted).sum(1) / wanted.square().sum(1)
        weights = _own(task) * base.weights * factors[:, None]
        if float(_rests(task, weights[None])) <= limit:
            words, error = _why(task, base, factors.tolist())
            return _shown(task, base.words, _own(task) * base.weights) + _shown(task, [words], weights, error=error)
    return None


def _why(task: _Task, base: Habit, factors: list[float]) -> tuple[Words, bool]:
    """Say why all weights of a step are a factor too large or small, and whether that is a mistake."""
    kept = [[each for each in step.values() if each is not None] for step in task.run.steps]
    norms = [math.hypot(*(float(each.double().norm()) for each in step)) for step in kept]
    shortened = [norm for norm, factor in zip(norms, factors, strict=True) if factor < 1 - SAME]
    same = math.isclose(*factors, rel_tol=SAME)
    if not same and shortened and max(factors) < 1 + SAME and max(norms) < (1 + SAME) * min(shortened):
        clipped = f"gradients are clipped to the norm {min(shortened):.4g} at the end of a step"
        return (f"{clipped}, as the full batch's would be", loops.CLIPPED), False
    times = f"{factors[0]:.5g}" if same else f"{factors[0]:.5g} (step 1) and {factors[1]:.5g} (step 2)"
    also = f"; clipping to the norm {norms[0]:.4g} would do that" if math.isclose(*norms, rel_tol=SAME) else ""
    power = math.log2(factors[0]) if same and factors[0] > 0 else 0.0
    scaled = power > 7.5 and abs(power - round(power)) < SAME  # a GradScaler begins with 2^16, and halves and doubles
    what = "that mean of means" if base.words else "what it must be"
    return (f"the gradient is {times} times {what}{also}", loops.UNSCALED if scaled else _remedy(task)), True


def _by_fit(task: _Task, limit: float) -> list[Finding] | None:
    fits = [combination(total, list(task.parts), limit) for total in task.totals]
    if max(each.residual for each in fits) > limit:
        return None
    weights, margins = torch.stack([each.weights for each in fits]), torch.stack([each.margins for each in fits])
    clear, own = margins * task.steps < CLEAR, _own(task).bool()
    if task.run.calls != STEPS:
        return _shown(task, [(_miscounted(task), loops.EVERY[1])], weights) if bool(clear.all()) else None
    if bool(((weights.abs() * task.steps > CLEAR) & clear & ~own).any()):
        return _shown(task, [("micro-batches of one step are in the other's gradient", loops.MISSING[1])], weights)
    for base in _bases(task):
        if words := _uses(task, weights[own] / base.weights, margins[own] / base.weights):
            return _shown(task, [*words, *base.words], weights)
    if not bool(clear.all()):
        return None
    ratios = weights[own] / _bases(task)[0].weights
    shorter = bool(((ratios > 0) & (ratios < 1 + CLEAR)).all())
    other = ("the micro-batches have other weights", _remedy(task))
    return _shown(task, [loops.CLIPPED_EACH if shorter else other], weights)


def _uses(task: _Task, ratios: Tensor, margins: Tensor) -> list[Words]:
    """Say which micro-batches are used twice or not at all, if that is all that is wrong."""
    clear = margins < WHOLE
    present = ratios[clear & (ratios.abs() > WHOLE)]
    if not len(present):
        return []
    typical = float(present.median())
    times = (ratios / typical).round()
    off = ((times != 1) & clear).nonzero().flatten().tolist()
    if not off or not bool(((ratios / typical - times).abs() < CLEAR + margins / abs(typical))[clear].all()):
        return []
    each = [
        f"micro-batch {index % task.steps + 1} of step {index // task.steps + 1} is "
        + {0: "not used", 2: "used twice"}.get(int(times[index]), f"used {int(times[index])} times")
        for index in off
    ]
    words = [("; ".join(each[:4] + (["..."] if each[4:] else [])), loops.ONCE)]
    if abs(typical - 1) > CLEAR:
        words.append((f"the others' weights are {typical:.4g} times what they must be", _remedy(task)))
    return words


def _by_parameter(task: _Task, limit: float) -> list[Finding] | None:
    """What is right for half of the parameters is what the loop does, and the others are something else."""
    alive = task.parts.any(dim=2).any(dim=0) | task.totals.any(dim=2).any(dim=0)
    best: tuple[int, Habit, Tensor] | None = None
    for known in loops.habits(task.run, task.counts, task.samples, task.steps):
        wanted = torch.einsum("cm,mpw->cpw", known.weights, task.parts)
        size = known.weights.abs() @ task.parts.norm(dim=2)
        fits = (task.totals - wanted).norm(dim=2).norm(dim=0) <= limit * size.norm(dim=0)
        count = int((fits & alive).sum())
        if best is None or count > best[0]:
            best = count, known, alive & ~fits
    if best is None or 2 * best[0] < int(alive.sum()):
        return None
    _, known, off = best
    odd = task.of(off)
    found = _by_factor(odd, limit) if not known.words else None
    reason = f"the gradients of {_listed(odd.names)} are no such sum of the micro-batches', those of the others are"
    if found and len(found) == 1:
        reason = f"of {_listed(odd.names)}, {found[0].reason}; the others' gradients are right"
    return [*_findings(task, [known]), Finding(reason=reason, remedy=loops.OTHER)]


def _coarse(task: _Task, limit: float) -> list[Finding]:
    """Say that the sums are of low precision, if only the limit for that explains them or they show it themselves."""
    kept = [each for step in task.run.steps for each in step.values() if each is not None]
    held, rest = kept[0].dtype, _rest(task)
    lower = [each for each in LOWER if torch.finfo(each).eps > torch.finfo(held).eps]
    low = next((each for each in lower if all(one.to(each).to(held).equal(one) for one in kept)), None)
    off = f"; {rest:.1g} of the gradient is off"
    if low is not None and rest > FEW * torch.finfo(held).eps:
        name = str(low).removeprefix("torch.")
        reason = f"the gradients are added up in low precision: {name} holds all of their numbers{off}"
    elif limit == LOW:
        reason = f"the gradients are as low precision (autocast) or a small change of the loss makes them{off}"
    else:
        return []
    return [Finding(reason=reason, remedy=loops.WIDER)]


def _unknown(task: _Task, left: float, limit: float) -> Finding:
    if task.run.calls != STEPS:
        return Finding(reason=_miscounted(task), remedy=loops.EVERY[1])
    reason = "the micro-batches' gradients are too much alike, some nearly sums of others, to tell their weights"
    if left > limit:
        reason = f"no weighted sum of the micro-batches' gradients is what step() is given: {left:.2g} of it is left"
    return Finding(reason=reason, remedy=loops.OTHER)


def _miscounted(task: _Task) -> str:
    often = "once" if task.run.calls == 1 else f"{task.run.calls} times"
    return f"optimizer.step() is called {often} for the {STEPS * task.steps} micro-batches of {STEPS} steps"


def _rest(task: _Task) -> float:
    return max(combination(total, list(task.parts)).residual for total in task.totals)


def _rests(task: _Task, weights: Tensor) -> Tensor:
    """Return the norms of totals - weights x parts, relative to what was added up; weights (any, calls kept, parts)."""
    totals, parts = task.totals.flatten(1), task.parts.flatten(1)
    basis, coordinates = torch.linalg.qr(parts.T)
    inside = totals @ basis
    outside = (totals - inside @ basis.T).norm()
    rests = torch.hypot(torch.linalg.vector_norm(inside - weights @ coordinates.T, dim=(1, 2)), outside)
    sizes: Tensor = torch.linalg.vector_norm(weights.abs() @ parts.norm(dim=1), dim=1)
    return rests / sizes


def _bases(task: _Task) -> list[Habit]:
    """Return the scale that is right and, where that is another one, that of means of means."""
    even = torch.full_like(task.counts, 1.0 / task.steps)
    scales = loops.scales(task.counts, task.samples, task.steps)
    return [each for each in scales if not each.words or torch.allclose(each.weights, even)]


def _own(task: _Task) -> Tensor:
    """Return which micro-batches belong to which call if each step has one: 0 and 1, (calls kept, micro-batches)."""
    return torch.eye(STEPS, dtype=torch.float64).repeat_interleave(task.steps, dim=1)[: len(task.totals)]


def _findings(task: _Task, fits: Sequence[Habit]) -> list[Finding]:
    """Return what habits that fit equally well do: all of one, or one or another."""
    said = {each.words: each for each in reversed(fits)}
    if len(said) == 1:
        return _shown(task, fits[0].words, fits[0].weights)
    different = list(reversed(said.values()))
    texts = [" and ".join(what for what, _ in each.words) for each in different[:3]]
    remedies = dict.fromkeys(remedy for each in different[:3] for _, remedy in each.words)
    reason = ", or ".join(texts + (["something else"] if len(different) > 3 else [])) + " (here these are the same)"
    return [Finding(reason=reason, remedy="; or ".join(remedies))]


def _shown(task: _Task, words: Sequence[Words], weights: Tensor, error: bool = True) -> list[Finding]:
    """Return what a loop does, with the weights (calls kept, micro-batches) of the call where they are farthest off."""
    right = _own(task) * _bases(task)[0].weights
    off = (weights - right).norm(dim=1)
    call = int((off >= (1 - SAME) * off.max()).nonzero()[0]) if task.run.calls == STEPS else 0
    expected, found = right[call], weights[call]
    found = torch.where(found.abs() > SAME * found.abs().max(), found, 0.0)
    seen = ((expected != 0) | (found.abs() > CLEAR * float(expected.max()))).nonzero().flatten()
    some = slice(int(seen.min()), int(seen.max()) + 1)
    which = "step" if task.run.calls == STEPS else "call"
    text = f" ({which} {call + 1}: weights {_few(found[some].tolist())}, right are {_few(expected[some].tolist())})"
    return [
        Finding(
            reason=what + (text if not number else ""),
            remedy=remedy,
            expected=tuple(expected.tolist()),
            found=tuple(found.tolist()),
            error=error,
        )
        for number, (what, remedy) in enumerate(words)
    ]


def _few(numbers: Sequence[float]) -> str:
    texts = [f"{number:.3g}" for number in numbers]
    if len(texts) > 1 and len(set(texts)) == 1:
        return f"{texts[0]} each"
    return ", ".join(texts if len(texts) <= 8 else [*texts[:4], "...", *texts[-2:]])


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def _remedy(task: _Task) -> str:
    return loops.WEIGH if len(_bases(task)) > 1 else loops.DIVIDE
