"""Compare two run records, usually a simulated and a measured one: counts must be equal, times need not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from distsim.errors import ConfigError
from distsim.record import NOT_OBSERVABLE, Part, RunRecord, Spans, Totals, time_error
from distsim.units import format_time


@dataclass(frozen=True, kw_only=True, slots=True)
class Line:
    """One compared quantity, for one step's exchanges."""

    name: str
    first: str
    second: str
    verdict: str
    """`equal`, `DIFFERENT`, how far the first lies above the second, or why they cannot be compared."""


def diff(first: RunRecord, second: RunRecord) -> list[Line]:
    """Compare all that two records say about one step's exchanges: as a whole, part by part, message by message.

    Raises: ConfigError if they are not records of the same exchange.
    """
    for name in ("strategy", "workers", "params", "dtype"):
        ours, theirs = getattr(first, name), getattr(second, name)
        if ours != theirs:
            raise ConfigError(
                f"these are records of different exchanges: {name} is {ours} in one, {theirs} in the other"
            )
    lines = [_equal("schedule digest", first.schedule_digest[:12], second.schedule_digest[:12])]
    one, other = _per_exchange(first), _per_exchange(second)
    for name in ("messages", "bytes", "message_sizes", "links"):
        lines.append(_counts(name.replace("_", " "), one, other, name))
    if first.parts and second.parts:
        lines += _parts(first.parts, second.parts)
    if first.spans is not None and second.spans is not None:
        lines.append(_messages(first.spans, second.spans))
    error = time_error(first, second)
    lines.append(
        Line(
            name="exchange time",
            first=format_time(first.time_s),
            second=format_time(second.time_s),
            verdict="not comparable" if error is None else f"{error:+.1%}",
        )
    )
    return lines


def agree(lines: list[Line]) -> bool:
    """Whether nothing that was compared is different."""
    return all(line.verdict != "DIFFERENT" for line in lines)


def _per_exchange(record: RunRecord) -> Totals | str:
    if record.totals == NOT_OBSERVABLE:
        return NOT_OBSERVABLE
    return record.totals.per_exchange(record.exchanges) or "exchanges differ"


def _counts(title: str, first: Totals | str, second: Totals | str, name: str) -> Line:
    if first == NOT_OBSERVABLE or second == NOT_OBSERVABLE:
        shown = [part if isinstance(part, str) else _show(getattr(part, name)) for part in (first, second)]
        return Line(name=title, first=shown[0], second=shown[1], verdict=NOT_OBSERVABLE)
    values = [part if isinstance(part, str) else getattr(part, name) for part in (first, second)]
    verdict = "equal" if values[0] == values[1] else "DIFFERENT"
    return Line(name=title, first=_show(values[0]), second=_show(values[1]), verdict=verdict)


def _parts(first: Sequence[Part], second: Sequence[Part]) -> list[Line]:
    """Compare the counts of each part, by name; times are left to the whole."""
    counts = [
        {part.name: f"{part.messages:,} message{'s' * (part.messages != 1)}, {part.bytes:,} B" for part in parts}
        for parts in (first, second)
    ]
    return [_equal(name, *(shown.get(name, "none") for shown in counts)) for name in counts[0] | counts[1]]


def _messages(first: Spans, second: Spans) -> Line:
    """Compare message by message: what was sent when in the schedule, by whom to whom, and how large."""
    names = ("schedule", "row", "step", "src", "dst", "chunk", "bytes")
    rows = [list(zip(*(getattr(spans, name) for name in names), strict=True)) for spans in (first, second)]
    same = sum(one == other for one, other in zip(*rows, strict=False))
    verdict = "equal" if rows[0] == rows[1] else "DIFFERENT"
    shown = [f"{same} of {len(part)}" for part in rows]
    return Line(name="message by message", first=shown[0], second=shown[1], verdict=verdict)


def _equal(name: str, first: str, second: str) -> Line:
    return Line(name=name, first=first, second=second, verdict="equal" if first == second else "DIFFERENT")


def _show(value: object) -> str:
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, dict):
        return ", ".join(f"{count:,} x {size:,} B" for size, count in list(value.items())[:4]) or "none"
    if isinstance(value, list):
        return f"{len(value)} pairs"
    return str(value)
