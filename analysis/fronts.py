"""`python -m analysis.fronts FRONT.json ... --out FIGURE.png`: time against memory, of several planners in one figure.

A FRONT.json is what `distsim memory CHAIN.json --pareto --json` prints, or what `python -m trainers.measure_memory`
writes of the same plans run on a real module: its points are marks, and those of planners are lines.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from distsim.errors import ConfigError, DistsimError

MARKS = ("s", "^", "o", "D")
COLOURS = ("#4c78a8", "#f58518", "#54a24b", "#b279a2", "#e45756", "#72b7b2")


@dataclass(frozen=True, kw_only=True, slots=True)
class Front:
    """Budgets and the times that they allow, ascending budgets; seconds and bytes, or units of their own."""

    name: str
    measured: bool
    si: bool
    plain_time: float
    budgets: tuple[float, ...]
    times: tuple[float, ...]


def read(path: Path) -> Front:
    """Read a front; ConfigError naming the file for what is none."""
    try:
        data = json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot read it: {error.strerror}") from error
    except ValueError as error:
        raise ConfigError(f"{path}:{getattr(error, 'lineno', 1)}: not JSON: {error}") from error
    try:
        points = [_point(each) for each in data["frontier"]]
        overlap = {"none": "", "half": ", transfers overlap", "full": ", transfers overlap"}[data["overlap"]]
        return Front(
            name=str(data.get("title") or f"{data['policy']}{overlap}"),
            measured=data.get("origin") == "measured",
            si=data["unit"] == "SI",
            plain_time=float(data["plain_time"]),
            budgets=tuple(budget for budget, _ in points),
            times=tuple(time for _, time in points),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(
            f"{path}: not a front: {error!r}; expected what distsim memory --pareto --json prints"
        ) from error


def _point(point: Any) -> tuple[float, float]:
    return float(point.get("measured_peak_memory", point["budget"])), float(point.get("measured_time", point["time"]))


def draw(fronts: list[Front], path: Path) -> None:
    """Write the figure as PNG: memory across, time upwards, and how much slower than keeping everything."""
    if len({front.si for front in fronts}) > 1:
        raise ConfigError("fronts in seconds and bytes and fronts in units of their own cannot share a figure")
    matplotlib.use("agg")
    figure = Figure(figsize=(9, 5.4), layout="constrained")
    axes: Axes = figure.add_subplot()
    memory_scale, time_scale = (1e6, 1e-3) if fronts[0].si else (1.0, 1.0)
    most = 1.03 * max(max(front.budgets) for front in fronts) / memory_scale
    measured = 0
    for place, front in enumerate(fronts):
        budgets = [budget / memory_scale for budget in front.budgets]
        times = [time / time_scale for time in front.times]
        colour = COLOURS[place % len(COLOURS)]
        if front.measured:
            mark = MARKS[measured % len(MARKS)]
            measured += 1
            axes.plot(budgets, times, mark, color="black", markersize=8, fillstyle="none", label=front.name, zorder=5)
        else:
            # A budget between two points allows what the lower one does.
            axes.step(
                [*budgets, most], [*times, times[-1]], where="post", color=colour, label=front.name, linewidth=1.8
            )
            axes.plot(budgets, times, "o", color=colour, markersize=3.5)
    plain = fronts[0].plain_time / time_scale
    axes.axhline(plain, color="#8c8c8c", linestyle=":", linewidth=1.2, label="every forward once, nothing waits")
    axes.set_xlabel("memory budget (MB)" if fronts[0].si else "memory budget")
    axes.set_ylabel("time of forward and backward (ms)" if fronts[0].si else "time of forward and backward")
    axes.set_xlim(0, most)
    slower = axes.secondary_yaxis(
        "right",
        functions=(
            lambda time: (np.asarray(time) / plain - 1) * 100,
            lambda more: (np.asarray(more) / 100 + 1) * plain,
        ),
    )
    slower.set_ylabel("slower than keeping everything (%)")
    axes.grid(alpha=0.3)
    axes.legend(loc="upper right", fontsize=9)
    try:
        figure.savefig(path, dpi=120)
    except OSError as error:
        raise ConfigError(f"{path}: cannot write it: {error.strerror}") from error


def main(argv: list[str] | None = None) -> int:
    """Draw; return the exit code."""
    flags = argparse.ArgumentParser(prog="python -m analysis.fronts", description="Draw fronts of time against memory.")
    flags.add_argument("fronts", nargs="+", type=Path, metavar="FRONT", help="JSON of distsim memory --pareto --json")
    flags.add_argument("--out", type=Path, required=True, metavar="FIGURE", help="PNG to write")
    given = flags.parse_args(argv)
    try:
        draw([read(path) for path in given.fronts], given.out)
        print(f"figure: {given.out}")
    except DistsimError as error:
        print(f"analysis.fronts: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
