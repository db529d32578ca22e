"""What a test has found: for a terminal, and as JSON for other programs and for the figure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from distsim.tables import table

WIDE = 1e-3
"""Relative tolerance of a gradient from which on a report says that it is wide."""
SHOWN = 4
"""Names of modules that are written out where there are more."""


@dataclass(frozen=True, slots=True)
class Difference:
    """Of a tensor from the full batch's: L2 norms, absolute."""

    norm: float
    """Of the full batch's."""
    difference: float
    tolerance: float
    """What rounding may do, see `trainers.accumulation.rounding`."""

    @property
    def equivalent(self) -> bool:
        """Whether rounding alone may have made the difference; False for what is no number."""
        return self.difference <= self.tolerance

    @property
    def relative(self) -> float:
        """Difference over norm."""
        return self.difference / self.norm if self.norm else (0.0 if not self.difference else float("inf"))

    @property
    def tolerances(self) -> float:
        """Difference over tolerance."""
        return self.difference / self.tolerance if self.tolerance else (0.0 if not self.difference else float("inf"))


@dataclass(frozen=True, kw_only=True, slots=True)
class Tested:
    """One pair of micro-batch size and steps, in one number format."""

    format: str
    micro_batch: int
    steps: int
    last: int
    """Samples of the smallest micro-batch."""
    error: str | None = None
    """What the workload's own code raised, or that there were numbers that are none."""
    logits: Difference | None = None
    """All that the model itself returned; None if it was not called."""
    loss: Difference | None = None
    gradient: Difference | None = None
    """All parameters together."""
    gradients: Mapping[str, Difference]
    """By parameter, in the model's order."""
    kinks: bool = False
    """Gradients differ by more than rounding, but not once kinks (ReLU, max-pooling) are kept from flipping."""

    @property
    def equivalent(self) -> bool:
        """Whether everything agrees, kinks apart."""
        values = all(each is None or each.equivalent for each in (self.logits, self.loss))
        return (
            self.error is None and values and (self.kinks or all(each.equivalent for each in self.gradients.values()))
        )

    @property
    def worst(self) -> tuple[str, Difference | None]:
        """What is most tolerances off: a parameter's gradient, "logits" or "loss"."""
        named = {"logits": self.logits, "loss": self.loss, **self.gradients}
        known = {name: each for name, each in named.items() if each is not None}
        return max(known.items(), key=lambda each: each[1].tolerances, default=("", None))

    @property
    def width(self) -> float:
        """The gradient's tolerance, relative to it."""
        return self.gradient.tolerance / self.gradient.norm if self.gradient and self.gradient.norm else 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Cause:
    """Something that keeps accumulation from being equivalent."""

    module: str
    """Its name in the model; "" for the model itself, the loss, or the loop."""
    type: str
    where: Literal["forward", "backward", "loss", "loop"]
    reason: str
    remedy: str | None
    found: Difference | None = None
    """By how much it alone is off, given right inputs."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Weights:
    """What the gradient at hand is made of: multiples of the micro-batches' own gradients."""

    format: str
    micro_batch: int
    steps: int
    expected: tuple[float, ...]
    found: tuple[float, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    """A whole test."""

    workload: str
    options: Mapping[str, object]
    model: str
    parameters: int
    data: str
    effective_batch: int
    ranks: int
    loop: Literal["trainers", "own"]
    normalise: Literal["count", "micro-batch"]
    batch_norm: str
    formats: tuple[str, ...]
    coarsest: str
    """What some of the model or its loss computes in whatever format its parameters have; float64 if nothing does."""
    pairs: tuple[Tested, ...]
    culprits: tuple[Cause, ...]
    weights: Weights | None

    @property
    def equivalent(self) -> bool:
        """Whether every pair is, in every format."""
        return all(each.equivalent for each in self.pairs)

    def to_json(self) -> dict[str, Any]:
        """Return everything as `--json` prints it; numbers that are none are null."""
        made = asdict(self)
        for plain, pair in zip(made["pairs"], self.pairs, strict=True):
            plain["equivalent"] = pair.equivalent
            plain["gradients"] = [{"name": name, **values} for name, values in plain["gradients"].items()]
        for cause in made["culprits"]:
            cause |= cause.pop("found") or dict.fromkeys(("norm", "difference", "tolerance"))
        finite: dict[str, Any] = _finite({"equivalent": self.equivalent, **made})
        return finite

    def text(self) -> str:
        """Return a table and, in words, who is to blame."""
        options = ", ".join(f"{name}={value}" for name, value in self.options.items())
        named = f"{self.workload}{f' ({options})' if options else ''}: " if self.workload else ""
        how = HOW["own" if self.loop == "own" else self.normalise]
        ranks = "1 rank" if self.ranks == 1 else f"{self.ranks} ranks"
        lines = [
            f"{named}{self.model} of {self.parameters:,} parameters{f', on {self.data}' if self.data else ''}",
            f"effective batch of {self.effective_batch} on {ranks}{NORMS[self.batch_norm]}; {how}",
            "",
            table(HEADERS, [_row(pair) for pair in self.pairs]),
            "",
        ]
        for error in dict.fromkeys(pair.error for pair in self.pairs if pair.error is not None):
            where = [f"{pair.format} {pair.micro_batch} x {pair.steps}" for pair in self.pairs if pair.error == error]
            lines += [f"{', '.join(where[:SHOWN])}{', ...' if len(where) > SHOWN else ''}: {error}", ""]
        if self.coarsest != "float64" and "float64" in self.formats:
            lines += [f"some of it computes in {self.coarsest} even then: that has {self.coarsest}'s tolerances", ""]
        for name in self.formats:
            widest = max((pair.width for pair in self.pairs if pair.format == name), default=0.0)
            if widest > WIDE:
                lines += [f"{name}: rounding may change this gradient by {widest:.1e} of it; less cannot be seen", ""]
        if not (self.equivalent or self.culprits) and all(pair.error is None for pair in self.pairs):
            lines += ["no module, loss or loop was found that is off by itself", ""]
        if self.culprits:
            lines += [*_causes(self.culprits), ""]
        lines.append("equivalent" if self.equivalent else "NOT equivalent")
        if any(pair.kinks for pair in self.pairs):
            lines.insert(-1, "kinks: " + KINKS)
        return "\n".join(lines)


HOW = {
    "count": "gradients are summed and divided by the count of all micro-batches",
    "micro-batch": "the mean of the micro-batches' means",
    "own": "gradients by the workload's own loop, in two steps",
}
NORMS = {
    "keep": "",
    "sync": ", batch normalisation synchronised",
    "group": ", batch normalisation made group normalisation",
}
HEADERS = ("format", "micro-batch", "steps", "logits", "loss", "gradient", "tolerance", "worst is off", "")
KINKS = (
    "rounding has put values on the other side of a ReLU's or max-pooling's kink, where gradients jump;\n"
    "with the same values in forward they agree"
)


def _row(pair: Tested) -> tuple[object, ...]:
    size = f"{pair.micro_batch}" if pair.last == pair.micro_batch else f"{pair.micro_batch}, last {pair.last}"
    verdict = ("kinks only" if pair.kinks else "equivalent") if pair.equivalent else "NOT equivalent"
    if pair.gradient is None:
        return (pair.format, size, pair.steps, None, None, None, None, None, verdict)
    name, worst = pair.worst
    named = "" if pair.equivalent else f" ({name})"
    return (
        pair.format,
        size,
        pair.steps,
        None if pair.logits is None else f"{pair.logits.relative:.1e}",
        None if pair.loss is None else f"{pair.loss.relative:.1e}",
        f"{pair.gradient.relative:.1e}",
        f"{pair.width:.1e}",
        "" if worst is None else f"{worst.tolerances:.2g} tolerances{named}",
        verdict,
    )


def _causes(causes: tuple[Cause, ...]) -> list[str]:
    """Say who is to blame, those that are alike together."""
    groups: dict[tuple[str, str, str, str | None], list[str]] = {}
    for cause in causes:
        groups.setdefault((cause.where, cause.type, cause.reason, cause.remedy), []).append(cause.module)
    lines = []
    for (_, kind, reason, remedy), modules in groups.items():
        names = [name for name in modules if name]
        listed = ", ".join(names[:SHOWN]) + (", ..." if len(names) > SHOWN else "")
        many = f"{len(modules)} x {kind}" if len(modules) > 1 else kind
        lines.append(f"{many}{f' ({listed})' if listed else ''}: {reason}")
        if remedy:
            lines.append(f"  remedy: {remedy}")
    return lines


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    if isinstance(value, float) and not abs(value) < float("inf"):
        return None
    return value
