"""Small workloads for the accumulation test: some are equivalent, each of the others has one thing planted in it.

Samples are rows of numbers with a class each, or sentences of very different lengths.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from trainers.workload import Workload

WIDTH, CLASSES, SAMPLES = 6, 3, 48
VOCABULARY, PADDING, LONGEST = 11, -100, 9

Batch = tuple[Tensor, Tensor]
Loop = Callable[[nn.Module, torch.optim.Optimizer, Sequence[Any], int], object]


def rows() -> list[Batch]:
    """Rows of numbers and a class for each."""
    generator = torch.Generator().manual_seed(5)
    numbers = torch.randn(SAMPLES, WIDTH, generator=generator)
    classes = torch.randint(CLASSES, (SAMPLES,), generator=generator)
    return list(zip(numbers, classes, strict=True))


def mlp(*between: nn.Module) -> nn.Module:
    """Two layers, and what is planted between them."""
    return nn.Sequential(nn.Linear(WIDTH, 8), nn.Tanh(), *between, nn.Linear(8, CLASSES))


def cross_entropy(model: nn.Module, batch: Batch, reduction: str = "sum") -> Tensor:
    return functional.cross_entropy(model(batch[0]), batch[1], reduction=reduction)


mean_cross_entropy = partial(cross_entropy, reduction="mean")


def plain(*, loop: str | None = None) -> Workload:
    """Nothing is wrong with it."""
    return Workload(model=mlp(), data=rows(), loss=cross_entropy, loop=None if loop is None else LOOPS[loop])


def averaging() -> Workload:
    """A loss that is a mean, and says so: right."""
    return Workload(model=mlp(), data=rows(), loss=mean_cross_entropy, reduction="mean")


def batch_norm() -> Workload:
    return Workload(model=mlp(nn.BatchNorm1d(8)), data=rows(), loss=cross_entropy)


def dropout() -> Workload:
    return Workload(model=mlp(nn.Dropout(0.3)), data=rows(), loss=cross_entropy)


def contrastive() -> Workload:
    """InfoNCE: each row is to be more like its noisy copy than like the other rows' ones."""

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        numbers, _ = batch
        copies = numbers + 0.1 * numbers.flip(1)
        left, right = (functional.normalize(model(each), dim=1) for each in (numbers, copies))
        own = torch.arange(len(numbers))
        loss: Tensor = functional.cross_entropy(left @ right.T / 0.1, own, reduction="sum")
        return loss

    return Workload(model=mlp(), data=rows(), loss=loss)


def balance() -> Workload:
    """An auxiliary loss that wants all classes to be used alike, by the batch's mean probabilities."""

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        logits = model(batch[0])
        shares = logits.softmax(1).mean(0)
        loss: Tensor = functional.cross_entropy(logits, batch[1], reduction="sum") + len(logits) * shares.square().sum()
        return loss

    return Workload(model=mlp(), data=rows(), loss=loss)


class Sentences(nn.Module):
    """Guesses each word from the words up to it."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, 8)
        self.head = nn.Linear(8, VOCABULARY)

    def forward(self, words: Tensor) -> Tensor:
        logits: Tensor = self.head(torch.tanh(self.embedding(words).cumsum(1)))
        return logits


def sentences(*, reduction: str = "sum", count: str = "words", loop: str | None = None) -> Workload:
    """Sentences of one to nine words; `count` of words is right, of sentences is not what their mean is over."""
    generator = torch.Generator().manual_seed(6)
    data = []
    for number in range(SAMPLES):
        words = torch.randint(VOCABULARY, (LONGEST,), generator=generator)
        targets = words.roll(-1)
        targets[1 + number * 5 % LONGEST :] = PADDING
        data.append((words, targets))

    def counted(batch: Batch) -> int:
        return int((batch[1] != PADDING).sum()) if count == "words" else len(batch[1])

    return Workload(
        model=Sentences(),
        data=data,
        loss=partial(sentence_loss, reduction=reduction),
        reduction="sum" if reduction == "sum" else "mean",
        count=counted,
        loop=None if loop is None else LOOPS[loop],
    )


def sentence_loss(model: nn.Module, batch: Batch, reduction: str = "mean") -> Tensor:
    logits = model(batch[0]).flatten(0, 1)
    return functional.cross_entropy(logits, batch[1].flatten(), ignore_index=PADDING, reduction=reduction)


def mean_of(model: nn.Module, batch: Batch) -> Tensor:
    """The mean loss of either kind of batch."""
    return sentence_loss(model, batch) if isinstance(model, Sentences) else mean_cross_entropy(model, batch)


def textbook(
    model: nn.Module, optimizer: torch.optim.Optimizer, batches: Sequence[Any], accumulate: int
) -> list[float]:
    """As in most tutorials: right where micro-batches count alike."""
    losses = [0.0, 0.0]
    for number, batch in enumerate(batches):
        loss = mean_of(model, batch) / accumulate
        loss.backward()  # type: ignore[no-untyped-call]
        losses[number // accumulate] += float(loss.detach())
        if (number + 1) % accumulate == 0:
            optimizer.step()
            optimizer.zero_grad()
    return losses


def weighted(model: nn.Module, optimizer: torch.optim.Optimizer, batches: Sequence[Any], accumulate: int) -> None:
    """Each micro-batch by how much it counts."""
    for first in range(0, len(batches), accumulate):
        step = batches[first : first + accumulate]
        total = sum(int((batch[1] != PADDING).sum()) for batch in step)
        for batch in step:
            loss = mean_of(model, batch) * int((batch[1] != PADDING).sum()) / total
            loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()


def never_zeroed(model: nn.Module, optimizer: torch.optim.Optimizer, batches: Sequence[Any], accumulate: int) -> None:
    for number, batch in enumerate(batches):
        (mean_of(model, batch) / accumulate).backward()  # type: ignore[no-untyped-call]
        if (number + 1) % accumulate == 0:
            optimizer.step()


def not_divided(model: nn.Module, optimizer: torch.optim.Optimizer, batches: Sequence[Any], accumulate: int) -> None:
    for number, batch in enumerate(batches):
        mean_of(model, batch).backward()  # type: ignore[no-untyped-call]
        if (number + 1) % accumulate == 0:
            optimizer.step()
            optimizer.zero_grad()


def steps_always(model: nn.Module, optimizer: torch.optim.Optimizer, batches: Sequence[Any], accumulate: int) -> None:
    for batch in batches:
        (mean_of(model, batch) / accumulate).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()


LOOPS: dict[str, Loop] = {
    "textbook": textbook,
    "weighted": weighted,
    "never zeroed": never_zeroed,
    "not divided": not_divided,
    "steps always": steps_always,
}
