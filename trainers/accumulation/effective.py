"""How an effective batch is cut into micro-batches: pairs of micro-batch size and accumulation steps, rank by rank."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from distsim.errors import ConfigError
from trainers.data import Order
from trainers.workload import Workload, explained, mapped


class Pair(NamedTuple):
    """Samples of a micro-batch, and how many of them each rank takes in a step."""

    micro_batch: int
    steps: int


class Part(NamedTuple):
    """A micro-batch: samples `first` to `first + size - 1` of the effective batch."""

    first: int
    size: int


def pairs(effective: int, ranks: int, micro_batches: Sequence[int] | None = None, *, uneven: bool = True) -> list[Pair]:
    """Return the pairs to test, small micro-batches first.

    Without `micro_batches` these are all that divide a rank's share evenly, down to single samples, and, with `uneven`,
    the smallest one that leaves a smaller last micro-batch, if there is one.

    Raises: ConfigError for a micro-batch that is none, or an effective batch that cannot be shared out.
    """
    share = effective // ranks
    if effective % ranks or not share:
        raise ConfigError(f"--effective-batch {effective} cannot be shared out evenly among {ranks} ranks")
    sizes = micro_batches
    if sizes is not None and not sizes:
        raise ConfigError("--micro-batches must have at least one size")
    if sizes is None:
        even = [size for size in range(1, share + 1) if share % size == 0]
        odd = [size for size in range(2, share) if share % size][:1] if uneven else []
        sizes = sorted(even + odd)
    for size in sizes:
        if not 1 <= size <= share:
            raise ConfigError(f"--micro-batches must be from 1 to {share}, a rank's share of the batch, not {size}")
        if effective % (size * ranks) and not uneven:
            raise ConfigError(
                f"--micro-batches {size} does not divide the {share} samples of a rank: ranks would take different "
                "numbers of micro-batches, and synchronised batch normalisation would wait forever"
            )
    return [Pair(size, -(-effective // (size * ranks))) for size in dict.fromkeys(sizes)]


def parts(pair: Pair, effective: int, ranks: int, rank: int) -> list[Part]:
    """Return a rank's micro-batches in order: everybody's first ones come first, as in `trainers.data.Order`.

    Where samples run out, micro-batches are smaller, or there are fewer of them.
    """
    firsts = ((step * ranks + rank) * pair.micro_batch for step in range(pair.steps))
    return [Part(first, min(pair.micro_batch, effective - first)) for first in firsts if first < effective]


@dataclass(frozen=True, slots=True)
class Batch:
    """The samples of one effective batch, in the order in which training would take them; read once for all runs."""

    workload: Workload
    samples: tuple[Any, ...]
    device: torch.device

    def collated(self, part: Part, dtype: torch.dtype) -> Any:
        """Return a part of it as the workload makes batches, its floating-point tensors in this dtype."""
        with explained(f"making a batch of {part.size} samples"):
            made = self.workload.collate(list(self.samples[part.first : part.first + part.size]))
        return mapped(made, lambda tensor: tensor.to(self.device, dtype if tensor.is_floating_point() else None))

    @property
    def whole(self) -> Part:
        """The full batch."""
        return Part(0, len(self.samples))


def batches(workload: Workload, effective: int, seed: int, device: torch.device, steps: int) -> list[Batch]:
    """Return the effective batches of the first steps of a training with this seed.

    Raises: ConfigError if there are too few samples for one.
    """
    if effective > len(workload.data):
        raise ConfigError(f"--effective-batch {effective}: the workload has only {len(workload.data)} samples")
    order = Order(samples=len(workload.data), workers=1, batch_size=effective, accumulate=1, uneven="drop", seed=seed)
    chosen = [order.micro_batches(step, 0)[0] for step in range(steps)]
    made = []
    for indexes in chosen:
        with explained("reading the workload's data"):
            made.append(Batch(workload, tuple(workload.data[int(index)] for index in indexes), device))
    return made
