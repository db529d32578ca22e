"""RunRecord: what a run did, simulated or measured, in one format; "is the simulator right?" is a diff of two."""

from __future__ import annotations

import hashlib
import json
import statistics
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from distsim.errors import ConfigError
from distsim.files import write_whole
from distsim.schedule import ITEMSIZE, Exchange
from distsim.step import Simulation
from distsim.traffic import Traffic

NOT_OBSERVABLE: Literal["not observable"] = "not observable"
BUCKET = "bucket"
"""How the names of exchanges begin that carry gradients, and not numbers about them: `bucket 0`, `bucket 1`, ..."""
Count = Annotated[int, Field(ge=0)]


class _Frozen(BaseModel):
    # A training that diverges has losses that JSON has no numbers for; they are written as "NaN".
    model_config = ConfigDict(extra="forbid", frozen=True, ser_json_inf_nan="strings")


class Totals(_Frozen):
    """Messages and bytes of all exchanges of a run."""

    messages: Count
    bytes: Count
    message_sizes: dict[Count, Count]
    """Bytes of a message -> how many of that size."""
    links: list[tuple[Count, Count, Count, Count]]
    """(src, dst, messages, bytes) for each ordered pair of ranks that talked."""

    @staticmethod
    def of(*traffics: Traffic) -> Totals:
        """Add up the counts of traffics between the same ranks."""
        sizes: Counter[int] = Counter()
        messages: Counter[tuple[int, int]] = Counter()
        sent: Counter[tuple[int, int]] = Counter()
        for traffic in traffics:
            sizes.update(traffic.message_sizes)
            for src, dst, count, size in traffic.links():
                messages[src, dst] += count
                sent[src, dst] += size
        return Totals(
            messages=sum(traffic.messages for traffic in traffics),
            bytes=sum(traffic.bytes for traffic in traffics),
            message_sizes=dict(sorted(sizes.items())),
            links=[(*pair, messages[pair], sent[pair]) for pair in sorted(messages)],
        )

    def per_exchange(self, exchanges: int) -> Totals | None:
        """Divide by the number of exchanges; None if the exchanges were not all alike."""
        numbers = [self.messages, self.bytes, *self.message_sizes.values()]
        numbers += [number for link in self.links for number in link[2:]]
        if any(number % exchanges for number in numbers):
            return None
        return Totals(
            messages=self.messages // exchanges,
            bytes=self.bytes // exchanges,
            message_sizes={size: count // exchanges for size, count in self.message_sizes.items()},
            links=[(src, dst, count // exchanges, size // exchanges) for src, dst, count, size in self.links],
        )


class Part(_Frozen):
    """One of the exchanges that a training step is made of: those of its buckets, and small ones of numbers."""

    name: str
    params: Count
    """Elements of the exchanged array."""
    dtype: str
    schedule_digest: str
    messages: Count
    """Per step, as are bytes and time."""
    bytes: Count
    time_s: Annotated[float, Field(ge=0)]
    """Simulated as if it were alone; measured: the median."""


class Spans(_Frozen):
    """The messages of one step's exchanges, as columns; times in seconds since the first one began."""

    schedule: list[int]
    """Numbered through: of each part its gradients', then its parameters' if it has any, then those of the next."""
    row: list[int]
    step: list[int]
    src: list[int]
    dst: list[int]
    chunk: list[int]
    bytes: list[int]
    start_s: list[float]
    finish_s: list[float]

    @model_validator(mode="after")
    def _equally_long(self) -> Spans:
        if len({len(column) for _, column in self}) > 1:
            raise ValueError("the columns are not equally long")
        return self


class RunRecord(_Frozen):
    """One run of one strategy: the exchange of a training step, whole or in parts. Seconds and bytes."""

    format: Literal["distsim run record 1"] = "distsim run record 1"
    origin: Literal["simulated", "measured"]
    strategy: str
    workers: Annotated[int, Field(ge=1)]
    ranks: Annotated[int, Field(ge=1)]
    """Workers and servers."""
    params: Count
    """Elements whose gradients are exchanged in a step, those of all buckets."""
    dtype: str
    schedule_digest: str
    """As `digest` makes it of the step's exchanges."""
    exchanges: Annotated[int, Field(ge=1)]
    """How many steps' exchanges the totals cover."""
    totals: Totals | Literal["not observable"]
    """Not observable where a library hides its messages."""
    exchange_time_s: Annotated[list[Annotated[float, Field(ge=0)]], Field(min_length=1)]
    """Of each step's exchanges together."""
    losses: list[float] = []
    """Of each step, the mean over all workers' samples."""
    spans: Spans | None = None
    """The messages of the last step."""
    parts: list[Part] = []
    """The exchanges of a step in their order; none in records from before there were parts."""
    configuration: dict[str, Any] = {}
    environment: dict[str, Any] = {}

    @model_validator(mode="after")
    def _parts_told_apart(self) -> RunRecord:
        if len({part.name for part in self.parts}) < len(self.parts):
            raise ValueError("two parts have the same name")
        return self

    @property
    def time_s(self) -> float:
        """The median exchange time."""
        return statistics.median(self.exchange_time_s)


def time_error(first: RunRecord, second: RunRecord) -> float | None:
    """Return how far the first's exchange time lies above the second's: 0.1 is 10 %; None if the second's is 0."""
    return first.time_s / second.time_s - 1 if second.time_s > 0 else None


def digest(exchanges: Sequence[Exchange]) -> str:
    """SHA-256, in hexadecimal, of a step's exchanges: the digest of a single one, or one over those of several."""
    digests = [exchange.digest() for exchange in exchanges]
    return digests[0] if len(digests) == 1 else hashlib.sha256(" ".join(digests).encode()).hexdigest()


def from_simulation(simulation: Simulation) -> RunRecord:
    """Make the record of a simulated exchange, that of a step with a single bucket.

    Raises: ConfigError if not every message was simulated.
    """
    return from_simulations([simulation], [f"{BUCKET} 0"])


def from_simulations(simulations: Sequence[Simulation], names: Sequence[str]) -> RunRecord:
    """Make the record of a step whose exchanges run one after another on the same ranks of one cluster.

    `names` are those of the parts. Strategy, workers and type are the first exchange's; others may have their own.

    Raises: ConfigError if not every message was simulated.
    """
    for simulation in simulations:
        if simulation.copies > 1:
            raise ConfigError(
                f"a record has every message, and each of this simulation stands for {simulation.copies:,}; "
                "simulate the whole (--whole), or fewer ranks"
            )
    first = simulations[0]
    assert {each.exchange.ranks for each in simulations} == {first.exchange.ranks}, "parts have the same ranks"
    return RunRecord(
        origin="simulated",
        strategy=first.exchange.strategy,
        workers=first.exchange.workers,
        ranks=first.exchange.ranks,
        params=sum(
            each.exchange.params for each, name in zip(simulations, names, strict=True) if name.startswith(BUCKET)
        ),
        dtype=first.dtype,
        schedule_digest=digest([each.exchange for each in simulations]),
        exchanges=1,
        totals=Totals.of(*(each.traffic for each in simulations)),
        exchange_time_s=[sum(each.time_s for each in simulations)],
        spans=_spans(simulations),
        parts=[
            Part(
                name=name,
                params=each.exchange.params,
                dtype=each.dtype,
                schedule_digest=each.exchange.digest(),
                messages=each.traffic.messages,
                bytes=each.traffic.bytes,
                time_s=each.time_s,
            )
            for each, name in zip(simulations, names, strict=True)
        ],
        configuration={
            "cluster": first.cluster.name,
            "cluster_title": first.cluster.title,
            "sharing": first.cluster.sharing,
            "posting": first.posting,
        },
    )


def _spans(simulations: Sequence[Simulation]) -> Spans:
    columns: dict[str, list[Any]] = {name: [] for name in Spans.model_fields}
    which, began_s = 0, 0.0
    for simulation in simulations:
        timeline, itemsize = simulation.timeline, ITEMSIZE[simulation.dtype]
        for part in simulation.lowered.parts:
            first = part.messages.first
            columns["schedule"] += [which] * part.messages.count
            columns["row"] += first.tolist()
            for name in ("step", "src", "dst", "chunk"):
                columns[name] += getattr(part.schedule, name)[first].tolist()
            columns["bytes"] += (part.messages.totals(part.schedule.elements()) * itemsize).tolist()
            columns["start_s"] += (began_s + timeline.start_s[part.sends]).tolist()
            columns["finish_s"] += (began_s + timeline.finish_s[part.sends]).tolist()
            which += 1
        began_s += simulation.time_s
    return Spans(**columns)


def write(record: RunRecord, path: Path) -> None:
    """Write a record as JSON: whole or not at all.

    Raises: ConfigError naming the file if it cannot be written.
    """
    write_whole(path, record.model_dump_json(indent=1) + "\n")


def read(path: Path) -> RunRecord:
    """Read a record.

    Raises: ConfigError with file and place if it cannot be read, is no JSON, or is no record.
    """
    try:
        text = path.read_text(encoding="utf-8")
        return RunRecord.model_validate(json.loads(text))
    except OSError as error:
        raise ConfigError(f"{path}: cannot read it: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not a run record: it is not UTF-8 text") from error
    except (json.JSONDecodeError, RecursionError) as error:
        line = getattr(error, "lineno", 1)
        raise ConfigError(f"{path}:{line}: not a run record: {getattr(error, 'msg', 'nested too deeply')}") from error
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"]) or "the file"
        raise ConfigError(f"{path}: not a run record: {place}: {first['msg']}") from error
    except ValueError as error:  # a number of thousands of digits
        raise ConfigError(f"{path}: not a run record: {error}") from error
