"""Micro-batches whose modules get, and pass on, what those of the full batch do: no error spreads to anybody else.

A module that gets what is right, in forward and in backward, and gives something else, is to blame itself.
"""

from __future__ import annotations

from collections import Counter, defaultdict, deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from trainers.accumulation.probes import Place, Record, Sight, Watch, _Gate, in_place_of
from trainers.accumulation.rounding import Scales
from trainers.accumulation.slices import WHOLE, Cut, Kind, cuts, matching_rows, rows
from trainers.accumulation.tables import LossWeight, Match, Share, Statistic, Table, Taken, loss_weight, tables

PASSES = 8
"""At most. Two or three are enough, unless the model gives something else each time."""

Where = Literal["forward", "backward", "loss"]
What = Literal["output", "pairs", "statistic", "handed", "passed", "given"]


class TwoSided(Sight):
    """Looks at what modules get, too. This one changes nothing."""

    caller: str | None = None
    """Whose own code calls the module whose input or output is being looked at; None: no module's, so the loss."""

    def input(self, place: Place, tensor: Tensor) -> Tensor:
        """Return what the module gets: the same tensor, or another one of its shape."""
        return tensor


class FullBatch(TwoSided, Record):
    """Keeps what the modules of a full batch get, too."""

    def __init__(self) -> None:
        super().__init__()
        self.inputs: dict[Place, Tensor] = {}
        self._recent: deque[Tensor] = deque(maxlen=8)

    def output(self, place: Place, tensor: Tensor) -> Tensor:
        super().output(place, tensor)
        self._recent.append(self.outputs[place])
        return tensor

    def input(self, place: Place, tensor: Tensor) -> Tensor:
        """Keep a clone; what another module has just given or got needs none."""
        same = (each for each in self._recent if each.shape == tensor.shape and torch.equal(each, tensor))
        kept = next(same, None)
        self.inputs[place] = tensor.clone() if kept is None else kept
        self._recent.append(self.inputs[place])
        return tensor


@dataclass(slots=True)
class Finding:
    """The largest difference, relative to its tolerance, for which one module is answerable in one direction."""

    match: Match
    what: What
    """Its output; its output for pairs of samples; its output without a batch dimension; what its own code hands to a
    module; the gradient that its own code passes on to what a module has given; the gradient that it gives for its
    input."""
    other: str
    """That module."""
    at_once: bool = False
    """The first of all micro-batches was off already, when no state could have changed."""


class Substituted(TwoSided):
    """Gives modules what those of the full batch get, and keeps how far each is off all the same.

        with compared(model, sight) as watch:
            while sight.again():
                ...for each micro-batch: watch.begin(); sight.begin(first, count, counted); forward, backward...

    Losses are to be parts of the full batch's mean: sums, divided by what counts in all micro-batches.
    `gradients=False` leaves backward alone: no kink (of a ReLU, of max-pooling) is then on another side than in the
    full batch. Without `tolerances` nobody is blamed, and what is off by more than sqrt(eps) of its norm is left as it
    is.
    """

    def __init__(
        self,
        record: FullBatch,
        samples: int,
        *,
        gradients: bool = True,
        tolerances: Scales | None,
        dtype: torch.dtype,
    ) -> None:
        self.record, self.samples, self.scales, self.dtype = record, samples, tolerances, dtype
        self._gradients = gradients
        self._calls = Counter(place.module for place in record.outputs if place.which == 0)
        self._values, self._backward = tables(
            {"input": record.inputs, "output": record.outputs},
            {"input": record.input_gradients, "output": record.output_gradients},
            tolerances,
            dtype,
        )
        self._statistics: dict[_Key, Statistic] = {}
        self._shares: dict[_Key, Share | None] = {}
        self._unknown: set[_Key] = set()
        self._pairs: set[_Key] = set()
        self._passes = 0
        self._reset()

    def _reset(self) -> None:
        """Begin a pass."""
        self.worst: dict[tuple[str, Where], Finding] = {}
        """By module ("" is the model, and the loss) and direction; of modules that are not off, too."""
        self.loss_weights: list[LossWeight] = []
        self.unreplaced: set[str] = set()
        """Modules that have got gradients which were not, or could not be, replaced by what is right."""
        self.leaking: set[str] = set()
        """Modules that have given such gradients for their inputs."""
        self.misled = False
        """The loss has got what could not be replaced."""
        self._missing: set[_Key] = set()
        self._off: set[_Key] = set()
        self._pairing: set[_Key] = set()
        self._statistics = {}
        self._sums: dict[_Key, _Sum] = {}
        self._kinds: defaultdict[_Key, set[Kind]] = defaultdict(set)
        self._taken: defaultdict[_Key, Taken] = defaultdict(Taken)
        self._order = -1
        self.counted = 0.0
        """How much counts in all micro-batches of this pass."""

    @property
    def incomparable(self) -> set[str]:
        """Modules with outputs of which cannot be told where the full batch has them."""
        return {key.place.module for key in self._unknown | self._missing if key.side == "output"}

    def again(self) -> bool:
        """Return whether the micro-batches are to be run: at first, and as long as another time teaches more.

        Outputs without a batch dimension are let alone at first if they are off: only when all are there can be told
        whether they add up to the full batch's, as losses do that a model itself computes. If not, they are replaced as
        well. What cannot be compared in one micro-batch is not compared in any, and what is for pairs of samples in one
        is so in all.
        """
        if self._passes:
            shares = {key: each.share() for key, each in self._statistics.items() if each.off}
            settled = shares == self._shares and self._pairing <= self._pairs and not self._missing & self._off
            self._unknown |= self._missing
            if self.scales is None or settled or self._passes == PASSES:
                self._finish()
                return False
            self._shares, self._pairs, self._all_counted = shares, self._pairing, self.counted
            self._reset()
        self._passes += 1
        return True

    def begin(self, first: int, count: int, counted: float | None = None) -> None:
        """The next micro-batch has samples `first` to `first + count - 1`; `counted` is what counts in it."""
        self._order += 1
        self._first, self._count, self._counted = first, count, float(count) if counted is None else counted
        self.counted += self._counted
        self._matches: dict[_Key, Match] = {}
        self._given: dict[tuple[str, int], Cut] = {}
        self._callers: dict[Place, str | None] = {}

    def output(self, place: Place, tensor: Tensor) -> Tensor:
        self._callers[place] = self.caller
        return self._value(_Key("output", place), tensor, place.module)

    def input(self, place: Place, tensor: Tensor) -> Tensor:
        """Return what a module gets. What it is handed is the business of the code that calls it."""
        return self._value(_Key("input", place), tensor, self.caller)

    def output_gradient(self, place: Place, gradient: Tensor) -> Tensor:
        return self._gradient(_Key("output", place), gradient, self._callers.get(place))

    def input_gradient(self, place: Place, gradient: Tensor) -> Tensor:
        return self._gradient(_Key("input", place), gradient, place.module)

    def _value(self, key: _Key, tensor: Tensor, module: str | None) -> Tensor:
        match = None if key in self._unknown else self._match(key, tensor)
        if match is None or (match.off and self.scales is None):
            self._missing.add(key)
            self.misled |= key.side == "output" and self.caller is None
            return tensor
        self._matches[key] = match
        self._kinds[key].add(match.cut.kind)
        if key.side == "input" and (not match.off or match.cut.kind == "pairs"):
            self._given.setdefault(key.place[:2], match.cut)
        what: What = "handed" if key.side == "input" else "output"
        if self._has_no_batch(match):
            if key not in self._statistics:
                self._statistics[key] = Statistic(self._values[key.side], match.source)
            self._statistics[key].add(tensor, self._count, self._counted, match.off)
            if match.off and self._shares.get(key, "sum") is not None:
                return tensor
            what = what if key.side == "input" else "statistic"
        elif match.cut.kind == "pairs":
            what = "pairs"
            self.misled |= key.side == "output" and self.caller is None
        if match.off:
            self._off.add(key)
        if key.side == "input" or not self._gets_pairs(key.place):
            self._note(module, "forward", what, key.place.module, match)
        return tensor if torch.equal(tensor, match.value) else match.value

    def _match(self, key: _Key, tensor: Tensor) -> Match | None:
        """Find what the full batch has in a tensor's place, or should have; None if that cannot be told."""
        table, place = self._values[key.side], key.place
        tried: list[Match] = []
        for cut, source in self._cuts(table, place, tensor):
            if cut.kind == "shorter" and tried and (self.caller is None or not tensor.any()):
                continue  # what the loss gets is of the samples at hand, if it can be; zeros do not tell
            match = table.match(cut, source, tensor)
            if cut.kind == "pairs" and tried and not match.off:
                self._pairing.add(key)
                return tried[0]._replace(cut=cut, value=match.value)  # which has the pairs with other micro-batches
            if not match.off and key not in self._pairs:
                return match
            tried.append(match)
        # It is off, or was gathered. Where its module's input was found, there it should be.
        given = self._given.get(place[:2]) if key.side == "output" else None
        likely = min(
            (each for each in tried if each.cut.kind in ("samples", "same")),
            key=lambda each: (given is None or each.cut.layout != given.layout, each.difference),
            default=None,
        )
        full = table.tensors.get(place)
        if full is None or (likely is not None and self.caller is None):
            return likely  # in another order rows would be other samples for the loss
        index = matching_rows(full, tensor, table.limit(place))
        if index is None and given is not None and given.rows is not None and len(given.rows) == len(tensor):
            index = given.rows
        if index is None or full.shape[1:] != tensor.shape[1:]:
            return likely
        return table.match(rows(index), place, tensor)

    def _cuts(self, table: Table, place: Place, tensor: Tensor) -> Iterator[tuple[Cut, Place]]:
        calls, rest = divmod(self._calls[place.module], self.samples)
        if calls and not rest and self._count < self.samples and tensor.dim():
            source = place._replace(call=place.call + self._first * calls)  # called sample by sample
            if source in table.tensors and table.tensors[source].shape == tensor.shape:
                yield WHOLE._replace(kind="samples", layout=(-1, True)), source
        if place in table.tensors:
            full = table.tensors[place].shape
            for cut in cuts(full, tensor.shape, self.samples, self._first, self._count):
                yield cut, place

    def _gradient(self, key: _Key, gradient: Tensor, module: str | None) -> Tensor:
        if not self._gradients:
            return gradient
        table, match = self._backward[key.side], self._matches.get(key)
        if match is not None and match.source in table.tensors and self._is_constant(key, match):
            self._add(key, gradient, module, match)
            return gradient
        share = None if match is None or match.source not in table.tensors else self._share(key, match)
        if match is None or share is None:
            self._leave(key)
            return gradient
        found = table.match(match.cut, match.source, gradient, share)
        if key.side == "output" and (match.cut.padded or match.cut.rows is not None):
            self._taken[key].add(found)
        if module is None:
            self.loss_weights.append(loss_weight(gradient, found.value, self._counted))
        self._note(module, "backward", _direction(key), key.place.module, found)
        return found.value

    def _is_constant(self, key: _Key, match: Match) -> bool:
        """Whether something without a batch dimension has been the full batch's up to now."""
        if match.cut.kind == "shorter":
            return True
        return self._has_no_batch(match) and key not in self._shares and not self._statistics[key].off

    def _add(self, key: _Key, gradient: Tensor, module: str | None, match: Match) -> None:
        """Add up the gradient for a constant, such as a table of positions: which part is whose, is not known."""
        if key not in self._sums:
            full = self._backward[key.side].tensors[match.source]
            self._sums[key] = _Sum(module, match.source, torch.zeros_like(full))
        part = self._sums[key].total
        for dim, size in enumerate(gradient.shape):
            part = part.narrow(dim, 0, size)
        part.add_(gradient)

    def _leave(self, key: _Key) -> None:
        (self.unreplaced if key.side == "output" else self.leaking).add(key.place.module)

    def _share(self, key: _Key, match: Match) -> float | None:
        """Return how much of what is cut out of the full batch's gradient is this micro-batch's; None if unknown."""
        if not self._has_no_batch(match):
            return 1.0 if match.cut.kind in ("samples", "rows", "same") else None
        share = self._shares.get(key)
        if share == "counted":
            return self._counted / self._all_counted
        return None if share is None else 1.0 if share == "sum" else self._count / self.samples

    def _finish(self) -> None:
        """Compare what could not be before all micro-batches had been there."""
        for key, (module, source, total) in self._sums.items():
            changing = key in self._statistics and self._statistics[key].off
            table = self._backward[key.side]
            found = table.match(WHOLE, source, total)
            comparable = self._kinds[key] <= {"same", "shorter"} and key not in self._unknown and not changing
            if comparable and table.is_measured(source):  # not for parameters: their gradients are compared themselves
                self._note(module, "backward", _direction(key), key.place.module, found)
            if found.off or not comparable:
                self._leave(key)
        for key, taken in self._taken.items():
            if not taken.is_all(self._backward[key.side].tensors[key.place]):
                self.unreplaced.add(key.place.module)

    def _gets_pairs(self, place: Place) -> bool:
        """Whether a module has been given pairs of samples: of the micro-batch's only, which is not its fault."""
        given = self._given.get(place[:2])
        return given is not None and given.kind == "pairs"

    def _has_no_batch(self, match: Match) -> bool:
        return match.cut.kind == "same" and self._count < self.samples

    def _note(self, module: str | None, where: Where, what: What, other: str, match: Match) -> None:
        key: tuple[str, Where] = ("", "loss") if module is None else (module, where)
        finding = self.worst.get(key)
        if finding is None:
            finding = self.worst[key] = Finding(match, what, other)
        elif match.tolerances > finding.match.tolerances:
            finding.match, finding.what, finding.other = match, what, other
        finding.at_once |= match.off and self._order == 0


@contextmanager
def compared(model: nn.Module, sight: TwoSided) -> Iterator[Watch]:
    """Let a sight look at all modules of a model, as `watched` does, and at what they get."""
    watch = _Comparing(model, sight)
    try:
        watch.attach()
        yield watch
    finally:
        watch.detach()


class _Comparing(Watch):
    def __init__(self, model: nn.Module, sight: TwoSided) -> None:
        super().__init__(model, sight)
        self._looks_at_inputs = True
        self._two_sided = sight

    def _input(self, place: Place, tensor: Tensor) -> Tensor:
        self._two_sided.caller = self._stack[-2].module if len(self._stack) > 1 else None
        was = tensor.detach()
        with torch.no_grad():
            value = self._two_sided.input(place, was)
        if not tensor.requires_grad:
            return tensor if value is was else torch.empty_like(was).copy_(value)

        def given(gradient: Tensor) -> Tensor:
            return in_place_of(gradient, self._two_sided.input_gradient(place, gradient.detach()))

        if value is was:  # not a copy: a module may work on its input in place
            seen = tensor.view_as(tensor)
            seen.register_hook(given)  # type: ignore[no-untyped-call]
            return seen
        gate: Tensor = _Gate.apply(tensor, [torch.empty_like(was).copy_(value)], given)  # type: ignore[no-untyped-call]
        return gate

    def _output(self, place: Place, tensor: Tensor) -> Tensor:
        self._two_sided.caller = self._stack[-1].module if self._stack else None
        return super()._output(place, tensor)


class _Key(NamedTuple):
    side: str
    """input or output"""
    place: Place


class _Sum(NamedTuple):
    """The gradients of micro-batches for a constant, added up."""

    module: str | None
    """Whose code they come from."""
    source: Place
    total: Tensor


def _direction(key: _Key) -> What:
    return "given" if key.side == "input" else "passed"
