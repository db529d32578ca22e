"""What every benchmark shares: a clock that takes turns, a table, and the machine that it all ran on."""

from __future__ import annotations

import os
import platform
import textwrap
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple, TypeVar

from distsim import tables
from distsim.units import format_bytes, format_time

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True, slots=True)
class Table:
    """The result of one benchmark."""

    title: str
    included: str
    """What the times and ratios include, and what not."""
    columns: Mapping[str, Sequence[Any]]
    """Name -> values in SI units; the ending of a name says which: `_s`, `_per_s`, `_bytes`, `ratio...`."""

    def __str__(self) -> str:
        headers = [
            name.removesuffix("_s").removesuffix("_per").removesuffix("_bytes").replace("_", " ")
            for name in self.columns
        ]
        shown = [[_shown(name, value) for value in values] for name, values in self.columns.items()]
        head = "\n".join([self.title, "-" * len(self.title), *textwrap.wrap(self.included, 118)])
        return f"{head}\n\n{tables.table(headers, list(zip(*shown, strict=True)))}"


def table_of(title: str, included: str, rows: Sequence[Mapping[str, Any]]) -> Table:
    """Make a table from rows, which all have the same keys."""
    return Table(title=title, included=included, columns={name: [row[name] for row in rows] for name in rows[0]})


def _shown(name: str, value: Any) -> str | None:
    if value is None or isinstance(value, str):
        return value
    if name.startswith("ratio"):
        return f"{value:.3g}x"
    if name.endswith("_per_s"):
        return f"{value / 1e6:.3g} M/s"
    if name.endswith("_bytes"):
        return format_bytes(value)
    return format_time(value) if name.endswith("_s") else f"{value:,}"


def timed(seconds: dict[str, list[float]], part: str, call: Callable[..., T], *arguments: Any) -> T:
    """Call, and add to the list of a part how long it took."""
    begin = time.perf_counter()
    result = call(*arguments)
    seconds.setdefault(part, []).append(time.perf_counter() - begin)
    return result


class Turns(NamedTuple):
    """What `in_turns` finds out about each side."""

    seconds: dict[str, list[float]]
    """Of the counted runs."""
    first_s: dict[str, float]
    """Of the run before them."""
    result: dict[str, float]


def in_turns(sides: Mapping[str, Callable[[], float]], runs: int) -> Turns:
    """Time `runs` calls of each side, which must return the same each time.

    The sides take turns, so that what slows the machine for a while slows all of them. Before, each side is
    called once uncounted, which compiles what is to be compiled.
    """
    first: dict[str, list[float]] = {}
    seconds: dict[str, list[float]] = {}
    result = {name: timed(first, name, side) for name, side in sides.items()}
    for _ in range(runs):
        for name, side in sides.items():
            again = timed(seconds, name, side)
            assert again == result[name], f"{name}: {again} in one run, {result[name]} in another"
    return Turns(seconds, {name: each for name, (each,) in first.items()}, result)


def spread(name: str, values: Sequence[float], unit: str = "") -> dict[str, float]:
    """Return three columns: the median of several runs, the least and the most."""
    return {name + unit: median(values), f"{name}_least{unit}": min(values), f"{name}_most{unit}": max(values)}


def against(wanted: float, reached: float) -> str:
    """Say whether a figure reaches what is wanted of it."""
    return "yes" if reached >= wanted else "NO"


def one_core() -> int | None:
    """Keep this process and its children on one core and return its number; None where the system cannot."""
    if not hasattr(os, "sched_setaffinity"):
        return None
    core = max(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {core})
    return core


def machine() -> dict[str, Any]:
    """Return when and where this runs, and on which versions."""
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "load_before": round(os.getloadavg()[0], 2),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        **{package: _version(package) for package in ("distsim", "numpy", "numba", "simpy")},
    }


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    except OSError:
        return platform.processor() or "unknown"
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or "unknown")


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
