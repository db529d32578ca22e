"""The figure of a comparison: times, losses, and every message of one step, simulated and measured."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.collections import PolyCollection
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from analysis.comparison import Pair
from distsim.errors import ConfigError
from distsim.record import BUCKET, RunRecord, Spans

SIMULATED, MEASURED = "#4c78a8", "#f58518"
PHASES = ("#4c78a8", "#54a24b")
"""Colours of messages that carry gradients, and parameters, where a step has a single bucket."""
NUMBERS = "#8c8c8c"
"""Colour of messages that carry neither."""
NAMED = 6
"""Buckets that a legend names; of more, the first and the last."""
LINES = 16
"""Messages of a rank side by side; beyond them bars would be too thin to see, and lines are used again."""
Colour = tuple[float, float, float]


def draw(pairs: Sequence[Pair], path: Path) -> None:
    """Write the figure as PNG: on top times and losses, below two message charts for each strategy.

    Raises: ConfigError naming the file if it cannot be written.
    """
    matplotlib.use("agg")
    figure = Figure(figsize=(12, 3.2 + 2.6 * len(pairs)), layout="constrained")
    grid = figure.add_gridspec(1 + len(pairs), 2, height_ratios=[1.2, *[1.0] * len(pairs)])
    _times(figure.add_subplot(grid[0, 0]), pairs)
    _losses(figure.add_subplot(grid[0, 1]), pairs)
    for row, pair in enumerate(pairs, start=1):
        longest = 1.05e3 * max(_end_s(pair.simulated), _end_s(pair.measured))
        charts = [figure.add_subplot(grid[row, column]) for column in (0, 1)]
        shown = [_messages(*chart, longest) for chart in zip(charts, (pair.simulated, pair.measured), strict=True)]
        _legend(charts[1], shown[0] | shown[1])
    try:
        figure.savefig(path, dpi=120)
    except OSError as error:
        raise ConfigError(f"{path}: cannot write it: {error.strerror}") from error


def _times(axes: Axes, pairs: Sequence[Pair]) -> None:
    """Bars of simulated and median measured times; whiskers from the 10th to the 90th percentile."""
    place = np.arange(len(pairs))
    simulated = np.array([pair.simulated.time_s for pair in pairs]) * 1e3
    measured = np.array([pair.measured.time_s for pair in pairs]) * 1e3
    spread = np.array([np.quantile(pair.measured.exchange_time_s, [0.1, 0.9]) for pair in pairs]).T * 1e3
    axes.bar(place - 0.2, simulated, 0.38, color=SIMULATED, label="simulated")
    axes.bar(place + 0.2, measured, 0.38, color=MEASURED, label="measured (median, 10th to 90th percentile)")
    whiskers = np.abs(spread - measured)
    axes.errorbar(place + 0.2, measured, yerr=whiskers, fmt="none", ecolor="black", capsize=4, linewidth=1)
    axes.set_xticks(place, [f"{pair.measured.strategy}\n{pair.error_text}" for pair in pairs])
    axes.set_ylabel("exchange time of a step (ms)")
    axes.set_ylim(0, 1.35 * float(max(simulated.max(), spread.max())))
    axes.legend(loc="upper left", frameon=False)
    axes.set_title("Exchange time, and the simulation's error")


def _losses(axes: Axes, pairs: Sequence[Pair]) -> None:
    """Loss of each step; equal curves lie on each other, so they are drawn in different widths."""
    for index, pair in enumerate(pairs):
        steps = np.arange(1, len(pair.measured.losses) + 1)
        width = 1.2 + 2.2 * (len(pairs) - 1 - index)
        axes.plot(steps, pair.measured.losses, linewidth=width, alpha=0.8, label=pair.measured.strategy)
    axes.set_xlabel("step")
    axes.set_ylabel("loss")
    axes.legend(frameon=False)
    axes.set_title("Training loss")


def _messages(axes: Axes, record: RunRecord, longest_ms: float) -> dict[str, Colour]:
    """One bar for each message of one step, on the line of its sender; return what the colours stand for."""
    spans = record.spans
    axes.set_title(f"{record.strategy}: messages of one step, {record.origin}")
    axes.set_xlim(0, longest_ms)
    axes.set_xlabel("ms since the first exchange began")
    axes.set_ylabel("sending rank")
    axes.set_yticks(range(record.ranks))
    axes.set_ylim(record.ranks - 0.4, -0.6)
    if spans is None:
        axes.text(0.5, 0.5, "not observable", ha="center", va="center", transform=axes.transAxes)
        return {}
    src = np.array(spans.src, dtype=np.int64)
    start, finish = np.array(spans.start_s) * 1e3, np.array(spans.finish_s) * 1e3
    top, height = np.zeros(len(src)), np.zeros(len(src))
    for rank in range(record.ranks):
        mine = np.flatnonzero(src == rank)
        mine = mine[np.argsort(start[mine], kind="stable")]
        lines = min(LINES, max(1, len(mine)))
        height[mine] = 0.8 / lines
        top[mine] = rank - 0.4 + (np.arange(len(mine)) % lines) * height[mine]
    bottom = top + 0.85 * height
    corners = np.array([[start, top], [finish, top], [finish, bottom], [start, bottom]])
    colours, legend = message_colours(record, spans)
    axes.add_collection(PolyCollection(list(corners.transpose(2, 0, 1)), facecolors=colours), autolim=False)
    return legend


def _legend(axes: Axes, shown: dict[str, Colour]) -> None:
    """Say beside the charts what their colours stand for, where there are several."""
    if len(shown) > 1:
        handles = [Patch(color=colour, label=label) for label, colour in shown.items()]
        axes.legend(handles=handles, loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False, fontsize="small")


def message_colours(record: RunRecord, spans: Spans) -> tuple[list[Colour], dict[str, Colour]]:
    """Return a colour for each message, and what the colours stand for.

    A single bucket has one colour for gradients and one for parameters; of several, each has its own, lighter for
    parameters. Spans number the schedules of all parts through, so a part is found by how many messages it has.
    """
    schedule = np.array(spans.schedule, dtype=np.int64)
    names = [part.name for part in record.parts] or [f"{BUCKET} 0"]
    part: npt.NDArray[np.int64] = np.zeros(len(schedule), dtype=np.int64)
    counts = [each.messages for each in record.parts]
    if sum(counts) == len(schedule):
        part[np.argsort(schedule, kind="stable")] = np.repeat(np.arange(len(counts)), counts)
    buckets = [name for name in names if name.startswith(BUCKET)]
    if len(buckets) > 1:
        found = matplotlib.colormaps["viridis"](np.linspace(0, 0.85, len(buckets)))[:, :3].tolist()
        first = {name: _rgb(colour) for name, colour in zip(buckets, found, strict=True)}
        second = {name: _rgb([0.5 + 0.5 * value for value in colour]) for name, colour in first.items()}
        shown = {name: first[name] for name in (buckets if len(buckets) <= NAMED else (buckets[0], buckets[-1]))}
        lighter = {"lighter: parameters": second[buckets[0]]}
    else:
        first, second = ({name: to_rgb(colour) for name in buckets} for colour in PHASES)
        shown, lighter = {"gradients": to_rgb(PHASES[0])}, {"parameters": to_rgb(PHASES[1])}
    begins = {int(which): int(schedule[part == which].min()) for which in np.unique(part)}
    kinds = [
        (names[which], number > begins[which]) for which, number in zip(part.tolist(), spans.schedule, strict=True)
    ]
    colours = [(second if later else first).get(name, to_rgb(NUMBERS)) for name, later in kinds]
    if any(later and name in second for name, later in kinds):
        shown |= lighter
    if others := {name: None for name, _ in kinds if name not in first}:
        shown[", ".join(others)] = to_rgb(NUMBERS)
    return colours, shown


def _rgb(values: Sequence[float]) -> Colour:
    red, green, blue = values
    return red, green, blue


def _end_s(record: RunRecord) -> float:
    """When the last drawn message arrives."""
    return max(record.spans.finish_s, default=0.0) if record.spans is not None else record.time_s
