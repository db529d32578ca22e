"""The page docs/algorithms.md: every algorithm in words and formulas, and formulas held against simulations."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from distsim import exchanges, formulas
from distsim.cluster import IDEAL_BANDWIDTH, IDEAL_LATENCY, ideal, parse
from distsim.commands.algorithms_data import OPTIONS, option_rows, pairs, values, written
from distsim.schedule import ITEMSIZE
from distsim.step import simulate
from distsim.units import format_bytes, format_time, parse_bandwidth_Bps, parse_time_s

RANKS = (2, 3, 4, 5, 8, 16, 33, 64)
SMALL = 10_560
"""Elements: all of RANKS, and all parts that strategies make of an array for them, divide it."""
LARGE = 10_000 * SMALL
DTYPE = "float32"
SIZES = (2**10, 2**16, 2**20, 2**24, 2**30)

INTRODUCTION = """\
# Algorithms

Every strategy of every collective: how it goes, when to choose it, its options, and what it costs. `distsim
algorithms` prints the tables on a terminal, `distsim algorithms --json` as data. This page is printed by `distsim
algorithms --markdown`, with the formulas that the program itself holds its simulations against; a test fails if the
page is not what the command prints.

The model is that of Hockney: a message alone takes a latency a, plus its bytes over a bandwidth B. The formulas are
those of default options on an ideal switch: every device has one link in and one out, and the switch never limits.
A message holds its whole route at once (cut-through: it is not stored and forwarded at each hop), messages that
meet on a link share it max-min fairly, but those of one rank to another go one after another, as on a connection,
and additions are free. A real network limits more: `distsim compare --ranks 16 --size 16MiB --cluster h100_2x8_ndr`
simulates all strategies there, and `distsim exchange auto` takes the fastest.

Ranks hand over their messages in one of two ways, the option `--posting`. *Eager*, the default: each message as soon
as what it carries is there, whatever round it belongs to. *Rounds*: a message of a step only once all that its sender
and its receiver send and receive in their steps before is over, as in the synchronous rounds of textbooks. Some
formulas hold only with rounds, because eager messages of different rounds meet on a link; they say so.

n ranks exchange p elements, or S bytes. *Latencies* is the factor of a, *arrays* that of S/B: how often the bytes
of the whole array cross a link one after another; the time is latencies a + arrays S/B. Further,
"""

STAR = """\
title: "64 hosts on a switch"
source: "figures of the comparison with ASTRA-sim"
topology: {kind: switch, devices: 64, link: port}
links:
  port:
    bandwidth: {value: "50 GiB/s", source: "given"}
    latency: {value: "1 us", source: "two hops of 500 ns"}
"""


class Agreement(NamedTuple):
    """One strategy among n ranks: what its formulas say and what simulations count, at two sizes."""

    collective: str
    strategy: str
    n: int
    messages: tuple[int, int]
    """Formula, simulated; so for all that follow. Small and large arrays have equally many."""
    largest: tuple[int, int]
    """Elements, of the large array."""
    small_s: tuple[float | None, float]
    large_s: tuple[float | None, float]
    differs: float | None
    """The greater relative difference of the two times; None without a closed form."""


def agreements(among: Sequence[int] = RANKS) -> Iterator[Agreement]:
    """Simulate every strategy of every collective on the ideal switch, beside its formulas."""
    itemsize = ITEMSIZE[DTYPE]
    a_s, B_Bps = parse_time_s(IDEAL_LATENCY), parse_bandwidth_Bps(IDEAL_BANDWIDTH)
    for collective, strategy in pairs():
        formula = formulas.FORMULAS[collective][strategy]
        for n in among:
            cluster = ideal(exchanges.ranks_of(strategy, n, collective))
            times: list[tuple[float | None, float]] = []
            for p in (SMALL, LARGE):
                exchange = exchanges.build(strategy, n, p, collective)
                result = simulate(exchange, cluster, DTYPE, posting=formula.posting)
                times.append((formula.time_s(n, p * itemsize, a_s, B_Bps), result.time_s))
            yield Agreement(
                collective=collective,
                strategy=strategy,
                n=n,
                messages=(formula.messages(n), result.traffic.messages),
                largest=(formula.largest_elements(n, LARGE), max(result.traffic.message_sizes) // itemsize),
                small_s=times[0],
                large_s=times[1],
                differs=max((abs(told / seen - 1) for told, seen in times if told is not None), default=None),
            )


def page() -> str:
    """Return the page, with its last newline; it takes seconds, for hundreds of simulations."""
    names = [f"- {name}: {meaning}" for name, (_, meaning) in formulas.NAMES.items()]
    parts = [INTRODUCTION + "\n" + "\n".join(names)]
    for collective, known in exchanges.ALGORITHMS.items():
        parts.append(f"## {collective}")
        parts += [_section(collective, strategy) for strategy in known]
    parts.append("## Options\n\nThey follow the strategy's name, as in `ring:channels=2,bidirectional=true`.")
    rows = [(f"`{name}`", kind, default, takers, OPTIONS[name]) for takers, name, kind, default in option_rows()]
    parts.append(_table(("option", "type", "default", "taken by", "meaning"), rows))
    parts += [_times(), _agreement(), _star()]
    return "\n\n".join(parts) + "\n"


def _section(collective: str, strategy: str) -> str:
    """Return what there is to say of one strategy for one collective."""
    one = values(collective, strategy)
    given = ", ".join(f"`{each['name']}` ({each['type']}; {written(each['default'])})" for each in one["options"])
    lines = [
        f"### {collective}: {strategy}\n",
        _wrapped(one["description"]),
        "",
        f"- messages: {one['messages']}; the largest has {one['largest_message']} elements",
        f"- latencies: {one['latencies']}; arrays: {one['arrays']}",
        f"- time: {one['time']}, for {one['time_holds_for']}{', with rounds' if one['posting'] == 'rounds' else ''}",
        f"- options (type; default): {given}",
        f"- source: {one['source']}",
    ]
    return "\n".join(lines)


def _times() -> str:
    """Return the times that the formulas give for all-reduces of several sizes."""
    a_s, B_Bps = parse_time_s(IDEAL_LATENCY), parse_bandwidth_Bps(IDEAL_BANDWIDTH)
    parts = [
        "## All-reduces side by side\n\n"
        f"The formulas' times on the ideal switch with a = {IDEAL_LATENCY} and B = {IDEAL_BANDWIDTH}. The fastest one "
        "is in bold."
    ]
    for n in (8, 64):
        known = formulas.FORMULAS["all-reduce"]
        times = {name: [formula.time_s(n, size, a_s, B_Bps) for size in SIZES] for name, formula in known.items()}
        least = [min(t for t in column if t is not None) for column in zip(*times.values(), strict=True)]
        rows = [(name, *map(_bold_if_least, row, least)) for name, row in times.items()]
        sizes = ("1 KiB", "64 KiB", "1 MiB", "16 MiB", "1 GiB")
        parts.append(_table((f"{n} ranks", *sizes), rows))
    return "\n\n".join(parts)


def _bold_if_least(time_s: float | None, least_s: float) -> str:
    text = _time(time_s)
    return f"**{text}**" if time_s is not None and math.isclose(time_s, least_s) else text


def _agreement() -> str:
    """Return the tables that hold formulas against simulations."""
    found = list(agreements())
    worst = max(one.differs for one in found if one.differs is not None)
    bytes_ = [format_bytes(p * ITEMSIZE[DTYPE]) for p in (SMALL, LARGE)]
    what = (
        f"Every strategy, simulated on the ideal switch ({IDEAL_LATENCY}, {IDEAL_BANDWIDTH}; a server is one device "
        f"more), for a small array of {bytes_[0]} and a large one of {bytes_[1]}, which all numbers of ranks below "
        "divide. Messages and the elements of the largest one, of the large array, are those that were counted; where "
        "a formula says otherwise, it stands beside them. Times are simulated, with the posting with which the formula "
        f"holds, and none that has a formula differs from it by a fraction of {_power_above(worst)} or more. Where "
        "there is no closed form, it is simulated only."
    )
    parts = ["## Formulas and simulations", _wrapped(what)]
    for collective in exchanges.ALGORITHMS:
        rows = [_agreement_row(one) for one in found if one.collective == collective]
        headers = ("n", "posting", "messages", "largest", "small", "large", "formula and simulation differ by")
        parts += [f"### {collective}: agreement", _table(("strategy", *headers), rows)]
    return "\n\n".join(parts)


def _agreement_row(one: Agreement) -> tuple[str, ...]:
    posting = formulas.FORMULAS[one.collective][one.strategy].posting
    difference = "no closed form: simulated only" if one.differs is None else f"< {_power_above(one.differs)}"
    return (
        *(one.strategy, str(one.n), posting, _both(*one.messages), _both(*one.largest)),
        *(_time(one.small_s[1]), _time(one.large_s[1]), difference),
    )


def _both(told: int, seen: int) -> str:
    return f"{seen:,}" if told == seen else f"{seen:,} (formula: {told:,})"


def _power_above(difference: float) -> str:
    """Return a power of ten above a difference; differences of rounding alone, which machines may change, are one."""
    return f"1e{math.floor(math.log10(max(difference, 1e-13))) + 1}"


def _star() -> str:
    """Return the figures that are known from another simulator."""
    cluster = parse(STAR, "star", "star.yaml")
    latency_s, bandwidth_Bps, size = 1e-6, parse_bandwidth_Bps("50 GiB/s"), 2**30
    quoted = {"halving-doubling": "78.762 ms", "ring": "78.876 ms"}
    rows = []
    for strategy, theirs in quoted.items():
        told = formulas.FORMULAS["all-reduce"][strategy].time_s(64, size, latency_s, bandwidth_Bps)
        seen = simulate(exchanges.build(strategy, 64, size // ITEMSIZE[DTYPE]), cluster, DTYPE).time_s
        assert told is not None
        rows.append((strategy, f"{told * 1e3:.3f} ms", f"{seen * 1e3:.3f} ms", theirs))
    return (
        "## Cut-through, and store and forward\n\n"
        "64 hosts on a star, 1 GiB, 50 GiB/s per host, 500 ns per hop and two hops, so a = 1 us:\n\n"
        + _table(("all-reduce", "formula", "distsim", "ASTRA-sim (quoted)"), rows)
        + "\n\n"
        + _wrapped(
            "ASTRA-sim's figures are quoted from the request for this page and were not measured here. There a switch "
            "stores each message before it forwards it, so that its bytes take their time once on each of the two "
            "hops: latencies a + 2 arrays S/B gives the quoted figures."
        )
    )


def _wrapped(text: str) -> str:
    return textwrap.fill(text, 119, break_on_hyphens=False)


def _time(seconds: float | None) -> str:
    return "no closed form" if seconds is None else format_time(seconds)


def _table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table in Markdown."""
    rule = ["---"] * len(headers)
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (headers, rule, *rows))
