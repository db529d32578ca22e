"""Who is to blame where micro-batches together do not give what the full batch does, why, and what to do about it.

record = FullBatch()
with compared(model, record) as watch:
    watch.begin()
    ...the full batch, forward and backward...
sight = Substituted(record, samples, tolerances=scales, dtype=torch.float64)
with compared(model, sight) as watch:
    while sight.again():
        ...for each micro-batch: watch.begin(); sight.begin(first, count, counted); forward, backward...
culprits(model, sight, watch, reference, found)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from torch import Tensor, nn

from trainers.accumulation.distances import difference, norm
from trainers.accumulation.outcome import Outcome
from trainers.accumulation.probes import Watch
from trainers.accumulation.rounding import tolerance
from trainers.accumulation.substituted import Finding, Substituted, Where
from trainers.accumulation.tables import Match

SAME = 1e-6
"""Numbers that agree to this are the same: what is to be told apart here differs far more, and by rounding far less."""

GROUP_NORM = (
    "--batch-norm group replaces it by GroupNorm (trainers.norms.to_group_norm); --batch-norm sync helps between "
    "ranks, not in time"
)
NO_DROPOUT = "none is needed for dropout, which is equal in expectation: --without-dropout tests everything else"
TWO_PASSES = "trainers.across.accumulate computes such losses in two passes (Gao et al., 2021)"
A_MEAN = "give the Workload reduction='mean', or let its loss return the sum"
ADDITIVE = "let the Workload's count of a batch be the sum of the counts of its samples"
EACH_ALONE = "let the workload's data and collate make the same of a sample each time, whatever is in the batch with it"
BY_COUNT = "let the Workload's loss return a sum over what counts: means and penalties times the batch's count"
OF_WHAT = "if it is a mean, let the Workload's count say how much it is a mean of; else none"


@dataclass(frozen=True, kw_only=True, slots=True)
class Culprit:
    """A module, or the loss, that gives something else for micro-batches although all that it gets is right."""

    module: str
    """Its name in the model; "" for the model itself, and for the loss."""
    type: str
    where: Where
    norm: float
    """Of what it should have given, where it is off most."""
    difference: float
    tolerance: float
    """What rounding explains of the difference."""
    reason: str
    remedy: str | None


class Seen(Protocol):
    """What micro-batches have given together."""

    @property
    def loss(self) -> float | None:
        """Mean over all that counts."""

    @property
    def gradients(self) -> dict[str, Tensor]:
        """Of that mean, by the name of the parameter."""


class Why(NamedTuple):
    """What may be said to somebody who is to blame."""

    reason: str
    remedy: str | None = None


class _Off(NamedTuple):
    norm: float
    difference: float
    tolerance: float

    @property
    def off(self) -> bool:
        return not self.difference <= self.tolerance


def culprits(model: nn.Module, sight: Substituted, watch: Watch, reference: Outcome, found: Seen) -> list[Culprit]:
    """Return who is to blame, in the order in which modules have finished their forward, the loss last.

    `reference` is what the full batch has given, `found` what the micro-batches have in the last pass of `sight`.
    """
    assert sight.scales is not None, "nobody can be blamed without tolerances"
    modules = dict(model.named_modules())
    called = list(dict.fromkeys(place.module for place in sight.record.outputs))
    made: dict[str, Culprit] = {}
    pairing: set[str] = set()
    for name in called:
        forward, backward = sight.worst.get((name, "forward")), sight.worst.get((name, "backward"))
        inside = {each for each in made if _within(name, each)}
        if forward is not None and forward.match.off:  # which explains its backward
            if inside & (sight.incomparable | pairing):
                continue  # explained by what these give, which could not be replaced
            why = _forward(name, modules[name], forward, sight, watch)
            made[name] = _culprit(name, modules[name], "forward", forward.match, why)
            pairing |= {name} if forward.what == "pairs" else set()
        elif backward is not None and backward.match.off:
            if name in sight.unreplaced or inside & sight.leaking:
                continue  # it may have got what is wrong
            why = Why(BACKWARD[backward.what].format(backward.other))
            made[name] = _culprit(name, modules[name], "backward", backward.match, why)

    seen = reference.loss if found.loss is None else found.loss
    value = _Off(abs(reference.loss), abs(seen - reference.loss), tolerance(sight.scales.loss, sight.dtype))
    if not value.off:  # else the loss may use parameters by itself, which makes their gradients no module's business
        for name, owners in _owners(model, called).items():
            right, limit = reference.gradients[name], tolerance(sight.scales.gradients[name], sight.dtype)
            off = _Off(norm(right), difference(found.gradients[name], right), limit)
            inside = {each for each in made for owner in owners if _within(owner, each)}
            if off.off and not (made.keys() | sight.unreplaced) & owners and not inside & sight.leaking:
                owner = next(each for each in called if each in owners)
                why = Why(f"the gradients of its parameter {name} do not add up to the full batch's")
                made[owner] = _culprit(owner, modules[owner], "backward", off, why)

    blamed = [made[name] for name in called if name in made]
    loss = sight.worst.get(("", "loss"))
    if blamed and sight.misled:
        return blamed  # by what the loss is off may be their doing
    if loss is not None and loss.match.off:
        blamed.append(_culprit("", None, "loss", loss.match, _loss(loss, sight)))
    elif value.off:
        blamed.append(_culprit("", None, "loss", value, Why(VALUE, BY_COUNT)))
    return blamed


def _culprit(name: str, module: nn.Module | None, where: Where, off: Match | _Off, why: Why) -> Culprit:
    return Culprit(
        module=name,
        type="loss" if module is None else type(module).__name__,
        where=where,
        norm=off.norm,
        difference=off.difference,
        tolerance=off.tolerance,
        reason=why.reason,
        remedy=why.remedy,
    )


OTHERS = "depends on the others in the batch"
FORWARD = {
    "output": f"its output for a sample {OTHERS}",
    "pairs": "its output has the batch in two dimensions: it pairs the samples of the batch with one another",
    "statistic": "what it returns without a batch dimension is neither the sum nor the mean of the micro-batches'",
    "handed": f"what its own code hands to {{}} for a sample {OTHERS}",
}
BACKWARD = {
    "given": f"the gradient that its backward gives for a sample {OTHERS}",
    "passed": f"the gradient that its own code passes back to {{}} for a sample {OTHERS}",
}
VALUE = "what it gives for micro-batches does not add up to the full batch's: not all of it is a sum over what counts"


def _forward(name: str, module: nn.Module, finding: Finding, sight: Substituted, watch: Watch) -> Why:
    if isinstance(module, nn.modules.batchnorm._BatchNorm):
        return Why("it normalises with the mean and the variance of the micro-batch", GROUP_NORM)
    if name in watch.random:
        return Why("it draws random numbers, other ones in each forward", NO_DROPOUT)
    if name in watch.changed and not finding.at_once:
        changed = ", ".join(sorted(watch.changed[name]))
        return Why(f"each forward changes what the next one depends on: {changed}")
    reason = FORWARD[finding.what].format(finding.other)
    if finding.match.cut.padded:
        reason += ", or on how far they are padded"
    given = {place.module for place in sight.record.inputs}
    if finding.what == "output" and name not in given and not any(module.children()):
        reason += ", or so do the whole numbers that it is given, which are not compared"
    if inside := sorted(each for each in sight.incomparable if _within(name, each)):
        some = f"{', '.join(inside[:3])}{f' and {len(inside) - 3} more' if len(inside) > 3 else ''}"
        reason += f"; or that of {some} in it does, whose outputs cannot be compared"
    return Why(reason, OF_WHAT if finding.what == "statistic" else None)


def _loss(finding: Finding, sight: Substituted) -> Why:
    if finding.what == "handed":
        return Why(f"what the model is given for a sample {OTHERS}, or changes each time that it is read", EACH_ALONE)
    weights = sight.loss_weights
    small = all(_same(each.factor, 1.0) for each in weights)  # no other weight, but something beside
    if small or any(not each.rest <= SAME or abs(each.factor) <= SAME for each in weights):
        more = "it compares samples with one another, or takes a statistic over them"
        return Why(f"the gradient that it gives for a sample {OTHERS}: {more}", TWO_PASSES)
    if all(_same(each.factor * each.counted, sight.counted) for each in weights):
        return Why("it returns the mean over its batch where the sum is expected", A_MEAN)
    if all(_same(each.factor, weights[0].factor) for each in weights):
        more = "counts of micro-batches do not add up to the full batch's"
        return Why(f"its gradients are off by a factor of {weights[0].factor:.4g}: {more}", ADDITIVE)
    return Why("it weighs a sample by what else is in the batch", BY_COUNT)


def _within(name: str, other: str) -> bool:
    """Whether the other module is part of this one."""
    return other != name and (not name or other.startswith(f"{name}."))


def _same(one: float, other: float) -> bool:
    return abs(one - other) <= SAME * abs(other)


def _owners(model: nn.Module, called: Sequence[str]) -> dict[str, set[str]]:
    """Return by each trained parameter's name the modules that use it: those that hold it, or call nothing for it."""
    names = {id(parameter): name for name, parameter in model.named_parameters() if parameter.requires_grad}
    found: dict[str, set[str]] = {name: set() for name in names.values()}
    for full, parameter in model.named_parameters(remove_duplicate=False):
        if id(parameter) in names:
            owner = full.rpartition(".")[0]
            while owner and owner not in called:  # such as an nn.ParameterList
                owner = owner.rpartition(".")[0]
            found[names[id(parameter)]].add(owner)
    return {name: owners for name, owners in found.items() if owners & set(called)}
