"""RunRecord: what a run did, simulated or measured, in one format; "is the simulator right?" is a diff of two."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from distsim.errors import ConfigError
from distsim.files import write_whole
from distsim.schedule import ITEMSIZE
from distsim.step import Simulation
from distsim.traffic import Traffic

NOT_OBSERVABLE: Literal["not observable"] = "not observable"
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
    def of(traffic: Traffic) -> Totals:
        """Take the counts of a traffic."""
        return Totals(
            messages=traffic.messages,
            bytes=traffic.bytes,
            message_sizes=traffic.message_sizes,
            links=traffic.links(),
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


class Spans(_Frozen):
    """The messages of one exchange, as columns; times in seconds since the exchange began."""

    schedule: list[int]
    """0 for gradients, 1 for parameters."""
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
    """One run of one strategy. Times in seconds, sizes in bytes."""

    format: Literal["distsim run record 1"] = "distsim run record 1"
    origin: Literal["simulated", "measured"]
    strategy: str
    workers: Annotated[int, Field(ge=1)]
    ranks: Annotated[int, Field(ge=1)]
    """Workers and servers."""
    params: Count
    dtype: str
    schedule_digest: str
    exchanges: Annotated[int, Field(ge=1)]
    """How many exchanges the totals cover."""
    totals: Totals | Literal["not observable"]
    """Not observable where a library hides its messages."""
    exchange_time_s: Annotated[list[Annotated[float, Field(ge=0)]], Field(min_length=1)]
    """Of each exchange."""
    losses: list[float] = []
    """Of each step, the mean over the workers."""
    spans: Spans | None = None
    """The messages of the last exchange."""
    configuration: dict[str, Any] = {}
    environment: dict[str, Any] = {}

    @property
    def time_s(self) -> float:
        """The median exchange time."""
        return statistics.median(self.exchange_time_s)


def time_error(first: RunRecord, second: RunRecord) -> float | None:
    """Return how far the first's exchange time lies above the second's: 0.1 is 10 %; None if the second's is 0."""
    return first.time_s / second.time_s - 1 if second.time_s > 0 else None


def from_simulation(simulation: Simulation) -> RunRecord:
    """Make the record of a simulated exchange."""
    if simulation.copies > 1:
        raise ConfigError(
            f"a record has every message, and each of this simulation stands for {simulation.copies:,}; "
            "simulate the whole (--whole), or fewer ranks"
        )
    exchange, timeline = simulation.exchange, simulation.timeline
    itemsize = ITEMSIZE[simulation.dtype]
    columns: dict[str, list[Any]] = {name: [] for name in Spans.model_fields}
    for which, part in enumerate(simulation.lowered.parts):
        first = part.messages.first
        columns["schedule"] += [which] * part.messages.count
        columns["row"] += first.tolist()
        for name in ("step", "src", "dst", "chunk"):
            columns[name] += getattr(part.schedule, name)[first].tolist()
        columns["bytes"] += (part.messages.totals(part.schedule.elements()) * itemsize).tolist()
        columns["start_s"] += timeline.start_s[part.sends].tolist()
        columns["finish_s"] += timeline.finish_s[part.sends].tolist()
    spans = Spans(**columns)
    return RunRecord(
        origin="simulated",
        strategy=exchange.strategy,
        workers=exchange.workers,
        ranks=exchange.ranks,
        params=exchange.params,
        dtype=simulation.dtype,
        schedule_digest=exchange.digest(),
        exchanges=1,
        totals=Totals.of(simulation.traffic),
        exchange_time_s=[simulation.time_s],
        spans=spans,
        configuration={
            "cluster": simulation.cluster.name,
            "cluster_title": simulation.cluster.title,
            "sharing": simulation.cluster.sharing,
            "posting": simulation.posting,
        },
    )


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
