"""A model's full batch, then its micro-batches with everything replaced, by plain autograd: for tests of culprits."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import default_collate

from trainers.accumulation.culprits import Culprit, culprits
from trainers.accumulation.outcome import Outcome
from trainers.accumulation.probes import Watch
from trainers.accumulation.rounding import rounding
from trainers.accumulation.substituted import FullBatch, Substituted, compared
from trainers.workload import mapped

FEATURES, CLASSES = 6, 4


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Two threads on shared cores take many times longer for models this small."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


Loss = Callable[[nn.Module, Any], Tensor]
Parts = Sequence[tuple[int, int]]


def parts(samples: int, size: int) -> Parts:
    return [(first, min(size, samples - first)) for first in range(0, samples, size)]


def vectors(samples: int, *shape: int, seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    """Samples: random numbers in this shape, and a class."""
    random = torch.Generator().manual_seed(seed)
    return [
        (
            torch.randn(*(shape or (FEATURES,)), generator=random, dtype=torch.float64),
            torch.randint(CLASSES, (), generator=random),
        )
        for _ in range(samples)
    ]


def cross_entropy(model: Callable[[Tensor], Tensor], batch: Any) -> Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="sum")


@dataclass
class Case:
    """What is run: `loss` is a sum over `count`."""

    model: nn.Module
    data: Sequence[Any]
    loss: Loss = cross_entropy
    count: Callable[[Any], float] = lambda batch: len(batch[0])
    collate: Callable[[list[Any]], Any] = default_collate
    dtype: torch.dtype = torch.float64

    def __post_init__(self) -> None:
        self.model.to(self.dtype)
        self.buffers = {name: each.clone() for name, each in self.model.named_buffers()}

    def batch(self, first: int, count: int) -> Any:
        batch = self.collate(list(self.data[first : first + count]))
        return mapped(batch, lambda each: each.to(self.dtype) if each.is_floating_point() else each)

    def fresh(self, seed: int) -> None:
        for name, each in self.model.named_buffers():
            each.data.copy_(self.buffers[name])
        self.model.zero_grad(set_to_none=True)
        torch.manual_seed(seed)

    def gradients(self) -> dict[str, Tensor]:
        return {
            name: torch.zeros_like(each) if each.grad is None else each.grad.clone()
            for name, each in self.model.named_parameters()
            if each.requires_grad
        }

    def full(self, watch: Watch | None = None) -> Outcome:
        self.fresh(0)
        if watch is not None:
            watch.begin()
        batch = self.batch(0, len(self.data))
        loss = self.loss(self.model, batch) / self.count(batch)
        loss.backward()  # type: ignore[no-untyped-call]
        return Outcome(outputs=(), loss=loss.item(), gradients=self.gradients())

    def micro_batches(self, cut: Parts, watch: Watch | None = None, sight: Substituted | None = None) -> Outcome:
        self.fresh(1)
        batches = [self.batch(*part) for part in cut]
        total, value = sum(map(self.count, batches)), 0.0
        for part, batch in zip(cut, batches, strict=True):
            if watch is not None and sight is not None:
                watch.begin()
                sight.begin(*part, self.count(batch))
            loss = self.loss(self.model, batch) / total
            loss.backward()  # type: ignore[no-untyped-call]
            value += loss.item()
        return Outcome(outputs=(), loss=value, gradients=self.gradients())

    def recorded(self) -> tuple[FullBatch, Outcome]:
        record = FullBatch()
        with compared(self.model, record) as watch:
            return record, self.full(watch)

    def searched(self, size: int = 3) -> tuple[list[Culprit], Substituted]:
        """Look for culprits with micro-batches of this size."""
        record, reference = self.recorded()
        count = int(self.count(self.batch(0, len(self.data))))
        scales = rounding(self.model, self.full, record, reference, count)
        sight = Substituted(record, len(self.data), tolerances=scales, dtype=torch.float64)
        with compared(self.model, sight) as watch:
            for _ in passes(sight):
                found = self.micro_batches(parts(len(self.data), size), watch, sight)
        self.fresh(0)
        return culprits(self.model, sight, watch, reference, found), sight


def passes(sight: Substituted) -> Iterator[None]:
    while sight.again():
        yield


def blamed(case: Case, size: int = 3) -> list[tuple[str, str]]:
    """Who is, and where."""
    return [(each.module, each.where) for each in case.searched(size)[0]]
