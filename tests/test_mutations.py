"""Mutation test: no single-row mutant that matters passes the checker and the traffic checks.

What matters is judged without the checker, by a literal reading of the design's rules in plain Python: the
result of each (rank, chunk) as the expression that sums it (so a lost or doubled contribution and another
order of summation both show), the messages and bytes of each link, and who waits for whom, row by row.

The traffic checks are what `closed_forms.expected` says: sizes, links, steps, what each pair of ranks sends in
turn, and how many reads and applies wait. The last is what tells `input` from `work` where both have the same
value: such a mutant is right and sends the same, but its applies must wait (or no longer wait) for its reads.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations
from typing import Any

import numpy as np
import pytest
from closed_forms import expected, observed
from helpers import Event, Row, rows_of, waits_by_the_rules

from distsim import exchanges
from distsim.check import check
from distsim.errors import ScheduleError
from distsim.schedule import Exchange, Op, Schedule, Source

Labelled = tuple[int, Row]
"""A row with its number in the table that was not yet spoiled."""


def drop(rows: Sequence[Labelled], schedule: Schedule) -> Iterator[list[Labelled]]:
    for i in range(len(rows)):
        yield [*rows[:i], *rows[i + 1 :]]


def duplicate(rows: Sequence[Labelled], schedule: Schedule) -> Iterator[list[Labelled]]:
    for i in range(len(rows)):
        yield [*rows[: i + 1], (len(rows), rows[i][1]), *rows[i + 1 :]]


def reroute(rows: Sequence[Labelled], schedule: Schedule) -> Iterator[list[Labelled]]:
    for i, (_, row) in enumerate(rows):
        for rank in range(schedule.ranks):
            if rank != row.src:
                yield spoiled(rows, {i: row._replace(src=rank)})
            if rank != row.dst:
                yield spoiled(rows, {i: row._replace(dst=rank)})


def move(rows: Sequence[Labelled], schedule: Schedule) -> Iterator[list[Labelled]]:
    for i, (_, row) in enumerate(rows):
        for step in range(-1, schedule.steps + 1):
            if step != row.step:
                yield spoiled(rows, {i: row._replace(step=step)})


def change_chunk(rows: Sequence[Labelled], schedule: Schedule) -> Iterator[list[Labelled]]:
    for i, (_, row) in enumerate(rows):
        for chunk in range(schedule.chunks):
            if chunk != row.chunk:
                yield spoiled(rows, {i: row._replace(chunk=chunk)})


def exchange_steps(rows: Sequence[Labelled], schedule: Schedule) -> Iterator[list[Labelled]]:
    for (i, (_, one)), (j, (_, other)) in combinations(enumerate(rows), 2):
        if one.step != other.step:
            yield spoiled(rows, {i: one._replace(step=other.step), j: other._replace(step=one.step)})


def exchange_chunks(rows: Sequence[Labelled], schedule: Schedule) -> Iterator[list[Labelled]]:
    for (i, (_, one)), (j, (_, other)) in combinations(enumerate(rows), 2):
        if one.chunk != other.chunk:
            yield spoiled(rows, {i: one._replace(chunk=other.chunk), j: other._replace(chunk=one.chunk)})


def exchange_places(rows: Sequence[Labelled], schedule: Schedule) -> Iterator[list[Labelled]]:
    """Two rows of a pair of ranks change places in the table, which is the order in which messages match."""
    for i, j in combinations(range(len(rows)), 2):
        if rows[i][1][1:3] == rows[j][1][1:3]:
            mutant = list(rows)
            mutant[i], mutant[j] = rows[j], rows[i]
            yield mutant


def swap_op(rows: Sequence[Labelled], schedule: Schedule) -> Iterator[list[Labelled]]:
    for i, (_, row) in enumerate(rows):
        yield spoiled(rows, {i: row._replace(op=1 - row.op)})


def swap_source(rows: Sequence[Labelled], schedule: Schedule) -> Iterator[list[Labelled]]:
    for i, (_, row) in enumerate(rows):
        yield spoiled(rows, {i: row._replace(source=1 - row.source)})


KINDS: dict[str, Callable[[Sequence[Labelled], Schedule], Iterator[list[Labelled]]]] = {
    "drop": drop,
    "duplicate": duplicate,
    "reroute": reroute,
    "move to another step": move,
    "change the chunk": change_chunk,
    "exchange steps": exchange_steps,
    "exchange chunks": exchange_chunks,
    "exchange places": exchange_places,
    "swap op": swap_op,
    "swap source": swap_source,
}


def spoiled(rows: Sequence[Labelled], changed: dict[int, Row]) -> list[Labelled]:
    """Return the rows with some of them changed, in step order."""
    mutant = [(label, changed.get(i, row)) for i, (label, row) in enumerate(rows)]
    return sorted(mutant, key=lambda labelled: labelled[1].step)


@dataclass
class Expressions:
    """Sums as numbers: equal numbers are equal expressions, up to the two operands of a sum."""

    known: dict[tuple[int, int], int] = field(default_factory=dict)

    def leaf(self, rank: int, chunk: int) -> int:
        return self.known.setdefault((-1 - rank, -1 - chunk), len(self.known))

    def add(self, left: int, right: int) -> int:
        return self.known.setdefault((min(left, right), max(left, right)), len(self.known))


def result(rows: Sequence[Row], schedule: Schedule, expressions: Expressions) -> object:
    """What each (rank, chunk) holds in the end, or why that is not defined."""
    work: dict[tuple[int, int], int] = {
        (rank, chunk): expressions.leaf(rank, chunk) for rank, chunk in np.argwhere(schedule.contributes).tolist()
    }
    inputs = dict(work)
    for step in sorted({row.step for row in rows}):
        now = [row for row in rows if row.step == step]
        sent = [(inputs if row.source == Source.INPUT else work).get((row.src, row.chunk)) for row in now]
        if None in sent:
            return "a rank sends what it does not have"
        landing: dict[tuple[int, int], list[tuple[int, int, int]]] = {}
        for row, value in zip(now, sent, strict=True):
            assert value is not None
            landing.setdefault((row.dst, row.chunk), []).append((row.src, value, row.op))
        for place, arrivals in landing.items():
            if any(op == Op.COPY for *_, op in arrivals):
                if len(arrivals) > 1:
                    return "the order in which copies land decides"
                work[place] = arrivals[0][1]
                continue
            terms = [(rank, value) for rank, value, _ in arrivals]
            if place in work:
                terms.append((place[0], work[place]))
            terms.sort(key=lambda term: term[0])
            total = terms[0][1]
            for _, value in terms[1:]:
                total = expressions.add(total, value)
            work[place] = total
    return work


def meaning(labelled: Sequence[Labelled], schedule: Schedule, expressions: Expressions) -> tuple[object, ...]:
    """Everything about a table that a mutant must not change unnoticed."""
    rows = [row for _, row in labelled]
    label = [number for number, _ in labelled]
    traffic = Counter((row.src, row.dst, int(schedule.chunk_elements[row.chunk])) for row in rows)

    def named(event: Event) -> Event:
        return event[0], label[event[1]]

    waits = {(named(before), named(after)) for before, after in waits_by_the_rules(rows)}
    matching: dict[tuple[int, int], list[int]] = {}
    for number, row in labelled:  # messages of an ordered pair match in the order of the table
        matching.setdefault((row.src, row.dst), []).append(number)
    return result(rows, schedule, expressions), traffic, waits, matching


def caught_by(exchange: Exchange, which: int, rows: Sequence[Row]) -> str | None:
    """Put rows into one schedule of an exchange; return what finds fault with them, None if nothing does."""
    schedules = list(exchange.schedules())
    columns = np.array(rows, dtype=np.int32).reshape(-1, 6).T.copy()
    names = ("step", "src", "dst", "chunk", "op", "source")
    types = (np.int32,) * 4 + (np.int8,) * 2
    try:
        changes: dict[str, Any] = {
            name: column.astype(kind) for name, column, kind in zip(names, columns, types, strict=True)
        }
        schedules[which] = replace(schedules[which], **changes)
    except ScheduleError:
        return "table"
    mutant = replace(exchange, gradients=schedules[0], parameters=schedules[1] if len(schedules) > 1 else None)
    try:
        check(mutant)
    except ScheduleError:
        return "checker"
    if observed(mutant) != expected(exchange.strategy, exchange.workers, exchange.params):
        return "traffic"
    return None


@dataclass
class Tally:
    """How many mutants of a kind there were."""

    total: int = 0
    matter: int = 0
    caught: Counter[str] = field(default_factory=Counter)
    survivors: list[str] = field(default_factory=list)


def mutate(strategy: str, n: int, kind: str) -> Tally:
    """Spoil each row of a strategy in one way, and count who notices."""
    exchange = exchanges.build(strategy, n, 2 * n + 1)
    assert observed(exchange) == expected(strategy, n, exchange.params)
    tally = Tally()
    for which, schedule in enumerate(exchange.schedules()):
        expressions = Expressions()
        rows = list(enumerate(rows_of(schedule)))
        right = meaning(rows, schedule, expressions)
        for mutant in KINDS[kind](rows, schedule):
            tally.total += 1
            if meaning(mutant, schedule, expressions) == right:
                continue
            tally.matter += 1
            catcher = caught_by(exchange, which, [row for _, row in mutant])
            if catcher is None:
                changed = [f"{a[1]} -> {b[1]}" for a, b in zip(sorted(rows), sorted(mutant), strict=False) if a != b]
                tally.survivors.append(", ".join(changed))
            else:
                tally.caught[catcher] += 1
    return tally


ONE_CHUNK = ("all-to-all", "parameter-server", "recursive-doubling", "tree")
NOT_THERE = {
    *((strategy, kind) for strategy in ONE_CHUNK for kind in ("change the chunk", "exchange chunks")),
    *((strategy, "exchange places") for strategy in ONE_CHUNK),  # a pair of ranks talks once
    ("all-to-all", "exchange steps"),  # one step
    ("parameter-server", "exchange steps"),
}
SIZES = {"hierarchical": (2, 3, 4), "torus": (2, 3, 4)}  # with 5 ranks they are what others are, and take as long
HARMLESS = {
    # No rank that sends ever changes what it sends, so both sources are the same value without any wait.
    ("parameter-server", "swap source"),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("strategy", exchanges.STRATEGIES)
def test_every_mutant_that_matters_is_caught(strategy: str, kind: str) -> None:
    tallies = [mutate(strategy, n, kind) for n in SIZES.get(strategy, (2, 3, 4, 5))]
    for tally in tallies:
        assert tally.survivors == []
        assert sum(tally.caught.values()) == tally.matter
    total, matter = sum(tally.total for tally in tallies), sum(tally.matter for tally in tallies)
    caught = sum((tally.caught for tally in tallies), Counter[str]())
    print(f"{strategy}: {kind}: {total} mutants, {matter} matter, caught by {dict(caught)}")
    assert (total > 0) == ((strategy, kind) not in NOT_THERE)
    assert (matter > 0) == ((strategy, kind) not in NOT_THERE | HARMLESS)
