"""The test itself: every pair in every format against the full batch; then, if one differs, who is to blame."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any, Literal

import torch
from tqdm import tqdm

from distsim.errors import ConfigError, DistsimError
from trainers import norms
from trainers.accumulation import dropout
from trainers.accumulation.bookkeeping import Finding, explain, sketch
from trainers.accumulation.culprits import culprits
from trainers.accumulation.effective import Batch, Pair, batches, pairs, parts
from trainers.accumulation.outcome import Outcome
from trainers.accumulation.probes import Watch
from trainers.accumulation.ranks import Ranks
from trainers.accumulation.report import Cause, Difference, Report, Tested, Weights
from trainers.accumulation.rounding import Scales, rounding, tolerance, unit_roundoff
from trainers.accumulation.runs import Accumulated, Subject, averaged
from trainers.accumulation.slices import slice_of
from trainers.accumulation.substituted import FullBatch, Substituted, compared
from trainers.workload import Workload, explained, of_sums

FORMATS = {"float64": torch.float64, "float32": torch.float32}
BY_COUNT = "leave `--normalise micro-batch` out: the trainers divide by what all micro-batches of all ranks count"
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
    for the report. The model's dtype is afterwards that of the last format, or float64.

    Raises: ConfigError for numbers that cannot be, and if the full batch cannot be computed.
    """
    ranks = ranks or Ranks()
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
            references.append(right.full(step))
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
                if name == "float32" and not tested.equivalent and pair in self._exact and self._kinks(pair):
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
                    [self._right.count(data) for data in batches],
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
        shown = next((each for each in findings if each.found), None)
        if shown is None:
            return causes, None
        return causes, Weights(
            format=name,
            micro_batch=pair.micro_batch,
            steps=pair.steps,
            expected=shown.expected,
            found=shown.found,
        )

    def _counts(self, subject: Subject, pair: Pair) -> list[int]:
        return [self._right.count(data) for data in subject.micro_batches(pair)[1]]

    def _modules(self, pair: Pair) -> tuple[Cause, ...]:
        """Give every module the full batch's values as inputs, and return those that are off all the same."""
        subject, scales = self._subject("float64"), self._scales[0]
        record, reference = self._record(subject)
        sight = Substituted(record, len(self._steps[0].indexes), tolerances=scales, dtype=subject.dtype)
        try:
            with compared(subject.model, sight) as watch, explained("micro-batches"):
                while sight.again():
                    found = subject.substituted(pair, watch, sight)
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

    def _kinks(self, pair: Pair) -> bool:
        """Whether float32 gradients agree once the values in forward are the full batch's, and no kink can flip."""
        subject = self._subject("float32")
        record, reference = self._record(subject)
        sight = Substituted(record, len(self._steps[0].indexes), gradients=False, tolerances=None, dtype=subject.dtype)
        with compared(subject.model, sight) as watch:
            while sight.again():
                found = subject.substituted(pair, watch, sight)
        return all(each.equivalent for each in self._gradients(subject.dtype, reference, found, 0).values())

    def _subject(self, name: str, workload: Workload | None = None) -> Subject:
        return Subject(workload or self._right, self._steps, FORMATS[name], self._ranks, self._seed)

    def _record(self, subject: Subject, step: int = 0) -> tuple[FullBatch, Outcome]:
        record = FullBatch()
        with compared(subject.model, record) as watch:
            return record, subject.full(step, watch)

    def _measure(self, subject: Subject, step: int) -> Scales:
        record, reference = self._record(subject, step)
        self._bar.update()
        batch = self._steps[step]
        count = self._right.count(batch.collated(batch.whole, subject.dtype))

        def run(watch: Watch) -> Outcome:
            return subject.full(step, watch)

        return rounding(
            subject.model, run, record, reference, count, seed=self._seed, samples=NOISY, on_run=self._bar.update
        )

    def _compared(self, name: str, pair: Pair, references: Sequence[Outcome], found: Sequence[Accumulated]) -> Tested:
        """Hold what a pair has given against the full batches; of several steps, the worse one counts."""
        dtype, error = FORMATS[name], None
        if len(found) != len(references):
            error = f"optimizer.step() was called {len(found)} times for {len(references)} steps"
        values: list[tuple[Difference | None, Difference | None]] = []
        gradients: dict[str, Difference] = {}
        for step, (reference, seen) in enumerate(zip(references, found, strict=False)):
            scales, loss = self._scales[step], None
            if seen.loss is not None:
                off = abs(seen.loss - reference.loss)
                loss = Difference(abs(reference.loss), off, tolerance(scales.loss, scales.format(dtype)))
            values.append((self._logits(dtype, reference, seen, scales), loss))
            for each, difference in self._gradients(dtype, reference, seen, step).items():
                gradients[each] = _worse(gradients.get(each), difference) or difference
        tested = self._tested(name, pair, gradients, error=error)
        for logits, loss in values:
            tested = replace(tested, logits=_worse(tested.logits, logits), loss=_worse(tested.loss, loss))
        numbers = [each.difference for each in (tested.logits, tested.loss, *gradients.values()) if each is not None]
        if error is None and not all(map(math.isfinite, numbers)):
            tested = replace(tested, error="outputs, loss or gradients are not finite")
        return tested

    def _tested(self, name: str, pair: Pair, gradients: dict[str, Difference], error: str | None) -> Tested:
        effective = len(self._steps[0].indexes)
        cut = [part for rank in range(self._ranks.size) for part in parts(pair, effective, self._ranks.size, rank)]
        return Tested(
            format=name,
            micro_batch=pair.micro_batch,
            steps=pair.steps,
            last=min(part.size for part in cut),
            error=error,
            gradient=_together(list(gradients.values())) if gradients else None,
            gradients=gradients,
        )

    def _gradients(
        self, dtype: torch.dtype, reference: Outcome, found: Accumulated, step: int
    ) -> dict[str, Difference]:
        scales = self._scales[step]
        return {
            name: Difference(
                float(torch.linalg.vector_norm(right)),
                float(torch.linalg.vector_norm(found.gradients[name] - right)),
                tolerance(scales.gradients[name], scales.format(dtype)),
            )
            for name, right in reference.gradients.items()
        }

    def _logits(self, dtype: torch.dtype, reference: Outcome, found: Accumulated, scales: Scales) -> Difference | None:
        """Compare what the model returned, all ranks' together; None if it was not called, or returned other shapes."""
        samples = len(self._steps[0].indexes)
        pairs = (
            []
            if found.pieces is None
            else [
                (
                    each,
                    None
                    if which >= len(reference.outputs)
                    else slice_of(reference.outputs[which], each.shape, samples, *part),
                )
                for part, outputs in found.pieces
                for which, each in enumerate(outputs)
            ]
        )
        known = found.pieces is not None and bool(reference.outputs) and all(right is not None for _, right in pairs)
        squares = sum(float(torch.linalg.vector_norm(each - right)) ** 2 for each, right in pairs if right is not None)
        total = self._ranks.total({"squares": squares, "unknown": float(not known)})
        if total["unknown"]:
            return None
        norms = [float(torch.linalg.vector_norm(each)) for each in reference.outputs]
        return Difference(
            math.hypot(*norms),
            math.sqrt(total["squares"]),
            math.hypot(*(tolerance(each, scales.format(dtype)) for each in scales.outputs)),
        )


def _informative(tested: Tested) -> tuple[bool, bool, int]:
    """Sort the pair first that says most of what is wrong, in the least time."""
    return tested.error is not None, tested.steps < 2, tested.steps


def _shares(counts: Sequence[int]) -> tuple[float, ...]:
    return tuple(count / max(sum(counts), 1) for count in counts)


def _together(each: Sequence[Difference]) -> Difference:
    return Difference(
        *(math.hypot(*(getattr(one, name) for one in each)) for name in ("norm", "difference", "tolerance"))
    )


def _worse(one: Difference | None, other: Difference | None) -> Difference | None:
    known = [each for each in (one, other) if each is not None]
    return max(known, key=lambda each: each.tolerances, default=None)
