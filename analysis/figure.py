"""The figure of a comparison: times, losses, and every message of one exchange, simulated and measured."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from analysis.comparison import Pair
from distsim.errors import ConfigError
from distsim.record import RunRecord

SIMULATED, MEASURED = "#4c78a8", "#f58518"
PHASES = ("#4c78a8", "#54a24b")
"""Colours of messages that carry gradients, and parameters."""


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
        for column, record in enumerate((pair.simulated, pair.measured)):
            _messages(figure.add_subplot(grid[row, column]), record, longest)
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
    axes.set_ylabel("time of one exchange (ms)")
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
    axes.set_ylabel("loss (nats per byte)")
    axes.legend(frameon=False)
    axes.set_title("Training loss, mean over the workers")


def _messages(axes: Axes, record: RunRecord, longest_ms: float) -> None:
    """One bar for each message of one exchange, on the line of its sender."""
    spans = record.spans
    axes.set_title(f"{record.strategy}: messages of one exchange, {record.origin}")
    axes.set_xlim(0, longest_ms)
    axes.set_xlabel("ms since the exchange began")
    axes.set_ylabel("sending rank")
    axes.set_yticks(range(record.ranks))
    axes.set_ylim(record.ranks - 0.4, -0.6)
    if spans is None:
        axes.text(0.5, 0.5, "not observable", ha="center", va="center", transform=axes.transAxes)
        return
    src, phase = np.array(spans.src), np.array(spans.schedule)
    start, finish = np.array(spans.start_s) * 1e3, np.array(spans.finish_s) * 1e3
    for rank in range(record.ranks):
        mine = np.flatnonzero(src == rank)
        height = 0.8 / max(1, len(mine))
        for line, message in enumerate(mine):
            axes.broken_barh(
                [(float(start[message]), float(finish[message] - start[message]))],
                (rank - 0.4 + line * height, 0.85 * height),
                color=PHASES[int(phase[message])],
            )
    if phase.any():
        axes.plot([], [], color=PHASES[0], linewidth=6, label="gradients")
        axes.plot([], [], color=PHASES[1], linewidth=6, label="parameters")
        axes.legend(frameon=False, loc="upper right")


def _end_s(record: RunRecord) -> float:
    """When the last drawn message arrives."""
    return max(record.spans.finish_s, default=0.0) if record.spans is not None else record.time_s
