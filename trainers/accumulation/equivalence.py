"""The test itself: every pair in every format against the full batch; then, if one differs, who is to blame."""

from __future__ import annotations

import math
import random
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from distsim.errors import ConfigError, DistsimError
from distsim.units import shown
from trainers import norms
from trainers.accumulation import dropout
from trainers.accumulation.bookkeeping import Finding, explain, sketch
from trainers.accumulation.culprits import culprits
from trainers.accumulation.differences import differences, distance, together, worse
from trainers.accumulation.distances import norm
from trainers.accumulation.effective import Batch, Pair, batches, pairs, parts
from trainers.accumulation.outcome import Outcome
from trainers.accumulation.probes import Watch
from trainers.accumulation.ranks import Ranks
from trainers.accumulation.report import Cause, Difference, Report, Tested, Weights
from trainers.accumulation.rounding import Formats, Scales, rounding, tolerance, unit_roundoff
from trainers.accumulation.runs import Accumulated, Subject, averaged
from trainers.accumulation.substituted import FullBatch, Substituted, compared
from trainers.workload import Workload, explained, of_sums

FORMATS = {"float64": torch.float64, "float32": torch.float32}
BY_COUNT = "leave `--normalise micro-batch` out: the trainers divide by what all micro-batches of all ranks count"
REPEATS = 1e-9
"""How far, relatively, two runs of the same full batch may be apart in float64: far less than any error makes, and far
more than another order of sums on a GPU."""
NOISY = 3
"""Runs with noise that tolerances are measured with."""


def examine(
    workload: Workload,
    *,
    effective_batch: int = 32,
    micro_batches: Sequence[int] | None = None,
    formats: Sequence[str] = tuple(FORMATS),
    normalise: Literal["count", "micro-batch"] = "count",
    batch_norm: Literal["keep", "sync", "group"] = "keep",
    without_dropout: bool = False,
    seed: int = 0,
    ranks: Ranks | None = None,
    progress: bool = False,
    name: str = "",
    options: Mapping[str, object] | None = None,
) -> Report:
    """Test a workload's model, loss and loop; in a test of your own, `assert examine(build()).equivalent`.

    The workload's own loop is tested if it has one, else what the trainers do; `normalise="micro-batch"` averages the
    means of micro-batches instead, and `batch_norm` is what becomes of batch normalisations. `name` and `options` are
    for the report. Weights, buffers and random numbers are afterwards what they were; gradients are None.

    Raises: ConfigError for numbers that cannot be, and if the full batch cannot be computed.
    """
    ranks = ranks or Ranks()
    for what, given, valid in (("formats", formats, FORMATS), ("normalise", [normalise], ("count", "micro-batch"))):
        for each in given:
            if each not in valid:
                raise ConfigError(f"{what} must be {' or '.join(valid)}, not {shown(each)}")
    if any(_is_compiled(each) for each in workload.model.modules()):
        raise ConfigError("the model is compiled, which hides its modules; test it as it is before torch.compile")
    workload = of_sums(workload)
    if workload.loop is not None and (ranks.size > 1 or normalise != "count"):
        raise ConfigError("the workload has a loop of its own, which is tested as it is, on one rank")
    if batch_norm != "keep" and not norms.batch_norms(workload.model):
        raise ConfigError(f"--batch-norm {batch_norm}: the model has no batch normalisation; leave it out")
    if batch_norm == "group":
        norms.to_group_norm(workload.model)
    elif batch_norm == "sync":
        norms.to_synchronised(workload.model)
    chosen = pairs(effective_batch, ranks.size, micro_batches, uneven=batch_norm != "sync" or ranks.size == 1)
    steps = batches(workload, effective_batch, seed, ranks.device, 1 if workload.loop is None else 2)
    total = (1 + NOISY) * len(steps) + sum(len(steps) + len(chosen) for _ in formats)
    with ExitStack() as ends:
        ends.enter_context(torch.random.fork_rng())
        ends.enter_context(_kept(workload.model))
        ends.enter_context(_exact())
        if without_dropout:
            ends.enter_context(dropout.switched_off(workload.model))
        bar = ends.enter_context(
            tqdm(total=total, unit="run", file=sys.stderr, delay=1, leave=False, disable=not progress or ranks.rank > 0)
        )
        test = _Test(workload, steps, ranks, seed, normalise, bar)
        found = [each for name in formats for each in test.format(name, chosen)]
        causes, weights = test.blame(found)
    return Report(
        workload=name,
        options=dict(options or {}),
        model=type(workload.model).__name__,
        parameters=sum(each.numel() for each in workload.model.parameters()),
        data=workload.data_name,
        effective_batch=effective_batch,
        ranks=ranks.size,
        loop="trainers" if workload.loop is None else "own",
        normalise=normalise,
        batch_norm=batch_norm,
        formats=tuple(formats),
        coarsest=str(test.coarsest).removeprefix("torch."),
        pairs=tuple(found),
        culprits=causes,
        weights=weights,
    )


@contextmanager
def _exact() -> Iterator[None]:
    """Let CUDA multiply float32 as float32, and in one order."""
    matmul, conv = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = matmul, conv


class _Test:
    """What the runs of one test share."""

    def __init__(
        self, workload: Workload, steps: Sequence[Batch], ranks: Ranks, seed: int, normalise: str, bar: Any
    ) -> None:
        """Measure in float64 what rounding may do to each step's full batch."""
        self._right = workload
        self._workload = averaged(workload) if normalise == "micro-batch" else workload
        self._steps, self._ranks, self._seed, self._bar = steps, ranks, seed, bar
        self._exact: set[Pair] = set()  # equivalent in float64
        self._coarse: dict[str, torch.dtype] = {}  # what is computed in, autocast and casts of its own included
        subject = self._subject("float64")
        self._scales = [self._measure(subject, step) for step in range(len(steps))]

    @property
    def coarsest(self) -> torch.dtype:
        """What some of the model computes in whatever its parameters have; float64 if nothing does."""
        return max((each.coarsest for each in self._scales), key=unit_roundoff)

    def format(self, name: str, chosen: Sequence[Pair]) -> Iterator[Tested]:
        """Test all pairs in one format."""
        right = self._subject(name)
        references = []
        for step in range(len(self._steps)):
            with Formats() as formats:
                references.append(right.full(step))
            self._coarse[name] = max(self._coarse.get(name, torch.float64), formats.coarsest, key=unit_roundoff)
            self._bar.update()
        subject = self._subject(name, self._workload)
        for pair in chosen:
            try:
                with explained("micro-batches"):
                    found = subject.own_loop(pair)[1] if self._right.loop else [subject.accumulated(pair)]
            except ConfigError as error:
                if self._ranks.size > 1:  # the others wait for this rank's gradients
                    raise DistsimError(f"rank {self._ranks.rank}: {error}") from error
                yield self._tested(name, pair, {}, error=str(error))
            else:
                tested = self._compared(name, pair, references, found)
                if name == "float32" and not tested.equivalent and pair in self._exact and self._kinks(pair, found):
                    tested = replace(tested, kinks=True)
                if name == "float64" and tested.equivalent:
                    self._exact.add(pair)
                yield tested
            self._bar.update()

    def blame(self, found: Sequence[Tested]) -> tuple[tuple[Cause, ...], Weights | None]:
        """Find out why pairs are not equivalent, by the one of them with the fewest micro-batches."""
        failed = [each for each in found if not each.equivalent]
        if not failed:
            return (), None
        worst = min(failed, key=lambda each: (each.format != failed[0].format, *_informative(each)))
        pair = Pair(worst.micro_batch, worst.steps)
        causes = self._modules(pair)
        loops, weights = self._loop(pair, worst.format)
        return (*causes, *loops), weights

    def _loop(self, pair: Pair, name: str) -> tuple[list[Cause], Weights | None]:
        """Say what is wrong with the bookkeeping, and what the gradient is made of."""
        own = self._right.loop is not None
        if not own and self._workload is self._right:
            return [], None
        subject = self._subject(name)
        if own:
            with dropout.switched_off(subject.model):
                run, _ = subject.own_loop(pair)
                made = [subject.micro_batches(pair, step) for step in range(len(self._steps))]
                batches = [data for _, each in made for data in each]
                alone = [(loss, sketch(gradients)) for loss, gradients in map(subject.alone, batches)]
                findings = explain(
                    run,
                    [each for _, each in alone],
                    [subject.counted(data) for data in batches],
                    pair.steps,
                    samples=[part.size for mine, _ in made for part in mine],
                    losses=[loss for loss, _ in alone],
                )
        else:
            counts = [count for each in self._ranks.gather(self._counts(subject, pair)) for count in each]
            if len(set(counts)) < 2:
                return [], None
            alike = tuple(1 / len(counts) for _ in counts)
            reason = f"averages the means of micro-batches that count from {min(counts)} to {max(counts)}, as if alike"
            findings = [Finding(reason=reason, remedy=BY_COUNT, expected=_shares(counts), found=alike)]
        causes = [
            Cause(module="", type="the loop", where="loop", reason=each.reason, remedy=each.remedy) for each in findings
        ]
        telling = next((each for each in findings if each.found), None)
        if telling is None:
            return causes, None
        return causes, Weights(
            format=name,
            micro_batch=pair.micro_batch,
            steps=pair.steps,
            expected=telling.expected,
            found=telling.found,
        )

    def _counts(self, subject: Subject, pair: Pair) -> list[int]:
        return [subject.counted(data) for data in subject.micro_batches(pair)[1]]

    def _modules(self, pair: Pair) -> tuple[Cause, ...]:
        """Give every module the full batch's values as inputs, and return those that are off all the same."""
        subject, scales = self._subject("float64"), self._scales[0]
        record, reference = self._record(subject)
        sight = Substituted(record, subject.samples, tolerances=scales, dtype=scales.format(subject.dtype))
        try:
            with compared(subject.model, sight) as watch:
                while sight.again():
                    found = subject.local(pair, 0, watch, sight)
        except ConfigError:  # the pair's own error says it
            return ()
        return tuple(
            Cause(
                module=each.module,
                type=each.type,
                where=each.where,
                reason=each.reason,
                remedy=each.remedy,
                found=Difference(each.norm, each.difference, each.tolerance),
            )
            for each in culprits(subject.model, sight, watch, reference, found)
        )

    def _kinks(self, pair: Pair, found: Sequence[Accumulated]) -> bool:
        """Whether float32 gradients differ by nothing but kinks on which rounding has put values elsewhere.

        They must be the sum of the micro-batches' own gradients, whose forward is the same; and micro-batches must have
        the full batch's gradients if every module's forward values are the full batch's, so that no kink can flip.
        """
        if len(found) != len(self._steps):
            return False
        for step, seen in enumerate(found):
            subject = self._subject("float32")
            record, reference = self._record(subject, step)
            plain = subject.local(pair, step)
            sight = Substituted(record, subject.samples, gradients=False, tolerances=None, dtype=subject.dtype)
            with compared(subject.model, sight) as watch:
                while sight.again():
                    same = subject.local(pair, step, watch, sight)
            for one, other in ((seen, plain), (same, reference)):
                off = differences(other, one, partial(self._tolerance, "float32", step))
                if not all(each.equivalent for each in off.values()):
                    return False
        return True

    def _subject(self, name: str, workload: Workload | None = None) -> Subject:
        return Subject(workload or self._right, self._steps, FORMATS[name], self._ranks, self._seed)

    def _record(self, subject: Subject, step: int = 0) -> tuple[FullBatch, Outcome]:
        record = FullBatch()
        with compared(subject.model, record) as watch:
            return record, subject.full(step, watch)

    def _measure(self, subject: Subject, step: int) -> Scales:
        record, reference = self._record(subject, step)
        self._bar.update()
        again = subject.full(step)
        off = together(list(differences(reference, again, lambda name: 0.0).values()))
        if off.relative > REPEATS:
            raise ConfigError(
                "the full batch gives something else when it runs again (its gradients differ by "
                f"{off.relative:.1e}): something depends on more than parameters, buffers and random numbers"
            )
        batch = self._steps[step]
        count = subject.counted(batch.collated(batch.whole, subject.dtype))

        def run(watch: Watch) -> Outcome:
            return subject.full(step, watch)

        return rounding(
            subject.model, run, record, reference, count, seed=self._seed, samples=NOISY, on_run=self._bar.update
        )

    def _compared(self, name: str, pair: Pair, references: Sequence[Outcome], found: Sequence[Accumulated]) -> Tested:
        """Hold what a pair has given against the full batches; of several steps, the worse one counts."""
        error = None
        if len(found) != len(references):
            error = f"optimizer.step() was called {len(found)} times for {len(references)} steps"
        values: list[tuple[Difference | None, Difference | None]] = []
        gradients: dict[str, Difference] = {}
        for step, (reference, seen) in enumerate(zip(references, found, strict=False)):
            scales, loss = self._scales[step], None
            if seen.loss is not None:
                off = abs(seen.loss - reference.loss)
                loss = Difference(abs(reference.loss), off, tolerance(scales.loss, self._computes(name, step)))
            values.append((self._logits(name, step, reference, seen), loss))
            off_by = differences(reference, seen, partial(self._tolerance, name, step))
            for each, difference in off_by.items():
                gradients[each] = worse(gradients.get(each), difference) or difference
        tested = self._tested(name, pair, gradients, error=error)
        for logits, loss in values:
            tested = replace(tested, logits=worse(tested.logits, logits), loss=worse(tested.loss, loss))
        numbers = [each.difference for each in (tested.logits, tested.loss, *gradients.values()) if each is not None]
        if error is None and not all(map(math.isfinite, numbers)):
            tested = replace(tested, error="outputs, loss or gradients are not finite")
        return tested

    def _tested(self, name: str, pair: Pair, gradients: dict[str, Difference], error: str | None) -> Tested:
        effective = len(self._steps[0].samples)
        cut = [part for rank in range(self._ranks.size) for part in parts(pair, effective, self._ranks.size, rank)]
        return Tested(
            format=name,
            micro_batch=pair.micro_batch,
            steps=pair.steps,
            last=min(part.size for part in cut),
            error=error,
            gradient=together(list(gradients.values())) if gradients else None,
            gradients=gradients,
        )

    def _tolerance(self, name: str, step: int, parameter: str) -> float:
        return tolerance(self._scales[step].gradients[parameter], self._computes(name, step))

    def _computes(self, name: str, step: int) -> torch.dtype:
        """What tolerances are for: the format itself, or a coarser one that some of the model computes in."""
        return max(self._scales[step].format(FORMATS[name]), self._coarse[name], key=unit_roundoff)

    def _logits(self, name: str, step: int, reference: Outcome, found: Accumulated) -> Difference | None:
        """Compare what the model returned for samples, all ranks' together; None if there is nothing to compare.

        What has no batch dimension, such as a loss of the model's own, counts by what it does to loss and gradients.
        """
        squares: dict[int, float] = {}
        known = found.pieces is not None
        for part, outputs in found.pieces or ():
            known = known and len(outputs) == len(reference.outputs)
            for which, (whole, each) in enumerate(zip(reference.outputs, outputs, strict=False)):
                if (off := distance(whole, each, part, len(self._steps[step].samples))) is not None:
                    squares[which] = squares.get(which, 0.0) + off**2
        total = self._ranks.gather((known, squares))
        of_samples = set().union(*(each for _, each in total))
        if not all(each for each, _ in total) or not of_samples:
            return None
        norms = [norm(reference.outputs[which]) for which in of_samples]
        allowed = [tolerance(self._scales[step].outputs[which], self._computes(name, step)) for which in of_samples]
        square = sum(value for _, each in total for value in each.values())
        return Difference(math.hypot(*norms), math.sqrt(square), math.hypot(*allowed))


def _is_compiled(module: nn.Module) -> bool:
    return type(module).__name__ == "OptimizedModule" or getattr(module, "_compiled_call_impl", None) is not None


@contextmanager
def _kept(model: nn.Module) -> Iterator[None]:
    """Let the model have its weights and buffers back, in the format that they had, and no gradients."""
    tensors = [*model.parameters(), *model.buffers()]
    before = [(each, each.detach().clone()) for each in tensors]
    states = random.getstate(), np.random.get_state()
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        for each, was in before:
            each.data = was
            each.grad = None


def _informative(tested: Tested) -> tuple[bool, bool, int]:
    """Sort the pair first that says most of what is wrong, in the least time."""
    return tested.error is not None, tested.steps < 2, tested.steps


def _shares(counts: Sequence[int]) -> tuple[float, ...]:
    return tuple(count / max(sum(counts), 1) for count in counts)
