"""How far what micro-batches have given is from what the full batch has."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from trainers.accumulation.distances import difference
from trainers.accumulation.effective import Part
from trainers.accumulation.outcome import Outcome
from trainers.accumulation.report import Difference
from trainers.accumulation.runs import Accumulated
from trainers.accumulation.slices import cuts


def differences(
    right: Outcome | Accumulated, seen: Outcome | Accumulated, allowed: Callable[[str], float]
) -> dict[str, Difference]:
    """Hold the gradients of one against those of another; `allowed` is the tolerance of each, by its name."""
    return {
        name: Difference(
            float(torch.linalg.vector_norm(gradient)),
            float(torch.dist(gradient, seen.gradients[name])),
            allowed(name),
        )
        for name, gradient in right.gradients.items()
    }


def distance(whole: Tensor, each: Tensor, part: Part, samples: int) -> float | None:
    """Return how far an output is from its samples in the full batch's, or None if it has no samples.

    Of several ways in which shapes let them be cut out, the nearest counts.
    """
    if part.size == samples and whole.shape == each.shape:
        return difference(whole, each)
    ways = [way for way in cuts(whole.shape, each.shape, samples, *part) if way.kind in ("samples", "pairs")]
    return min((difference(way.take(whole), each) for way in ways), default=None)


def together(parts: Sequence[Difference]) -> Difference:
    """Return the difference of all of them as one vector; its tolerance holds if errors are independent."""
    return Difference(
        math.hypot(*(each.norm for each in parts)),
        math.hypot(*(each.difference for each in parts)),
        math.hypot(*(each.tolerance for each in parts)),
    )


def worse(one: Difference | None, other: Difference | None) -> Difference | None:
    """Return the one that is more tolerances off, of those that are there."""
    known = [each for each in (one, other) if each is not None]
    return max(known, key=lambda each: each.tolerances, default=None)
