"""What the full batch has, how far from it micro-batches are, and how far rounding alone may take them."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from trainers.accumulation.distances import difference, norm
from trainers.accumulation.probes import Place
from trainers.accumulation.rounding import Scales, tolerance
from trainers.accumulation.slices import Cut


class Match(NamedTuple):
    """What the full batch has in the place of a micro-batch's tensor."""

    cut: Cut
    source: Place
    value: Tensor
    norm: float
    """Of the value."""
    difference: float
    tolerance: float

    @property
    def off(self) -> bool:
        """Whether rounding does not explain the difference; it does not explain NaN."""
        return not self.difference <= self.tolerance

    @property
    def tolerances(self) -> float:
        """By how many it is off; NaN is off by more than any number."""
        if self.off and (not self.tolerance or math.isnan(self.difference)):
            return math.inf
        return self.difference / self.tolerance if self.tolerance else 0.0


class Table:
    """Tensors of the full batch, and by how much rounding may change each.

    That is what was measured, if it was, and at least `usual`, in units of the unit roundoff and relative to the norm;
    without `usual`, sqrt(eps) of the norm.
    """

    def __init__(
        self, tensors: Mapping[Place, Tensor], scales: Mapping[Place, float], usual: float | None, dtype: torch.dtype
    ) -> None:
        self.tensors = tensors
        self._scales, self._usual, self._dtype = scales, usual, dtype
        self._limits: dict[Place, float] = {}

    def limit(self, place: Place) -> float:
        """Return by how much two computations may differ, as a norm."""
        if place not in self._limits:
            whole = norm(self.tensors[place])
            self._limits[place] = (
                math.sqrt(torch.finfo(self._dtype).eps) * whole
                if self._usual is None
                else tolerance(max(self._scales.get(place, 0.0), self._usual * whole), self._dtype)
            )
        return self._limits[place]

    def is_measured(self, place: Place) -> bool:
        """Whether it is known what rounding does there, and not only what is usual."""
        return self._scales.get(place, 0.0) > 0

    def match(self, cut: Cut, source: Place, tensor: Tensor, share: float = 1.0) -> Match:
        """Compare a micro-batch's tensor with its share of what is cut out of the full batch's."""
        value = cut.take(self.tensors[source]) * share  # a copy: gradients become part of somebody's .grad
        return Match(cut, source, value, norm(value), difference(tensor, value), self.limit(source) * share)


Share = Literal["sum", "samples", "counted"]


class Statistic:
    """A tensor without a batch dimension, in all micro-batches: their sum, and means by samples and by what counts."""

    def __init__(self, table: Table, source: Place) -> None:
        self.off = False
        """In any of them it is not the full batch's."""
        self._full, self._limit = table.tensors[source], table.limit(source)
        self._parts: dict[Share, tuple[Tensor | float, float]] = {}

    def add(self, tensor: Tensor, count: int, counted: float, off: bool) -> None:
        """Take in a micro-batch's, of so many samples, in which so much counts."""
        self.off |= off
        weights: dict[Share, float] = {"sum": 1.0, "samples": count, "counted": counted}
        for share, weight in weights.items():
            total, weights_before = self._parts.get(share, (0.0, 0.0))
            self._parts[share] = total + tensor * weight, weights_before + weight

    def share(self) -> Share | None:
        """Return as what they add up to the full batch's, as those of a loss do that a model itself computes."""
        for share, (total, weights) in self._parts.items():
            weight = 1.0 if share == "sum" else weights
            if weight and difference(torch.as_tensor(total / weight), self._full) <= self._limit:
                return share
        return None


class Taken:
    """What micro-batches have been given of a gradient of the full batch's, if that may not be each number once.

    There may be gradients where micro-batches have no padding, and tokens that an expert gets only in the full batch.
    """

    def __init__(self) -> None:
        self._numbers, self._rows, self._twice = 0, set[int](), False

    def add(self, match: Match) -> None:
        """Take in what one has been given."""
        self._numbers += int(match.value.count_nonzero())
        if match.cut.rows is not None:
            index = set(match.cut.rows.tolist())
            self._twice |= bool(self._rows & index)
            self._rows |= index

    def is_all(self, full: Tensor) -> bool:
        """Whether it is each number of the full batch's once, but for zeros."""
        return not self._twice and self._numbers == int(full.count_nonzero())


Sides = dict[str, Table]
Kept = Mapping[str, Mapping[Place, Tensor]]
"""Of what modules get, `input`, and give, `output`."""


def tables(values: Kept, gradients: Kept, scales: Scales | None, dtype: torch.dtype) -> tuple[Sides, Sides]:
    """Return tables of the full batch's values, and of its gradients."""
    if scales is None:
        return _sides(values, {}, None, dtype), _sides(gradients, {}, None, dtype)
    # Nobody has measured inputs: the rounding errors behind one may be relatively as large as what becomes of them.
    relative = _relative(scales.places, values["output"])
    largest: dict[tuple[str, int], float] = {}
    for place, each in relative.items():
        largest[place[:2]] = max(each, largest.get(place[:2], 0.0))
    inputs = {place: largest.get(place[:2], 0.0) * norm(tensor) for place, tensor in values["input"].items()}
    backward = {"input": scales.input_gradients, "output": scales.output_gradients}
    shares = [share for side, each in gradients.items() for share in _relative(backward[side], each).values()]
    return (
        _sides(values, {"input": inputs, "output": scales.places}, _usual(relative.values()), dtype),
        _sides(gradients, backward, _usual(shares), dtype),
    )


def _sides(
    tensors: Kept, scales: Mapping[str, Mapping[Place, float]], usual: float | None, dtype: torch.dtype
) -> Sides:
    return {side: Table(tensors[side], scales.get(side, {}), usual, dtype) for side in tensors}


def _relative(scales: Mapping[Place, float], tensors: Mapping[Place, Tensor]) -> dict[Place, float]:
    norms = {place: norm(tensor) for place, tensor in tensors.items() if place in scales}
    return {place: scales[place] / whole for place, whole in norms.items() if whole and scales[place]}


def _usual(relative: Iterable[float]) -> float:
    """Return how large errors usually are, in units of the unit roundoff: at least one."""
    return max(1.0, statistics.median([*relative] or [1.0]))


class LossWeight(NamedTuple):
    """What a loss does with one output of the model in one micro-batch."""

    counted: float
    """What counts in the micro-batch."""
    factor: float
    """How many times too large the gradient for this output is."""
    rest: float
    """The part of it that no factor explains, relative to all of it, as norms."""


def loss_weight(gradient: Tensor, right: Tensor, counted: float) -> LossWeight:
    """Compare the gradient that a loss gives for an output with the full batch's."""
    square, whole = float((right * right).sum()), norm(gradient)
    factor = float((gradient * right).sum()) / square if square else 1.0
    return LossWeight(counted, factor, norm(gradient - factor * right) / whole if whole else 0.0)
