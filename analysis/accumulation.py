"""`python -m analysis.accumulation REPORT.json ... --out FIGURE.png`: which layers' gradients accumulation changes.

A REPORT.json is what `python -m trainers.accumulation --json` writes. Each report is a column, each number format a
row; a row shares its scale, so that the same model with batch and with group normalisation can be compared.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import textwrap
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from analysis.layer_axis import common, labels, position
from distsim.errors import ConfigError, DistsimError

COLOURS = matplotlib.colormaps["viridis"]
"""Of micro-batches, small to large: its lightness alone tells them apart, so it is good for the colour-blind."""
LIGHTEST = 0.88
BLAME = "#d55e00"
NAMED = 12
"""Pairs that the legend names; of more, some that are evenly spread."""
OUTSIDE = ("loss", "loop")
"""What may be to blame and is no module."""
DECADES = 40
"""Ratios beyond 10^±40 are drawn there: no rounding of 64 bits reaches so far."""
WIDTH = 76
"""Characters of a line of a panel's title."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Pair:
    """A (micro-batch x steps) pair in a number format; ratios are of a layer's difference to its full-batch norm."""

    micro_batch: int
    steps: int
    last: int
    format: str
    equivalent: bool
    error: str
    kinks: bool
    ratios: dict[str, float]
    tolerances: dict[str, float]

    @property
    def name(self) -> str:
        """As the legend has it: `8 x 4`, or `5 x 7, last 2`."""
        return f"{self.micro_batch} × {self.steps}" + (f", last {self.last}" if self.last != self.micro_batch else "")


@dataclass(frozen=True, kw_only=True, slots=True)
class Chart:
    """What is drawn of a report."""

    heading: str
    formats: tuple[str, ...]
    layers: tuple[str, ...]
    tensors: int
    pairs: tuple[Pair, ...]
    culprits: tuple[str, ...]

    def of(self, number_format: str) -> list[Pair]:
        """Return the pairs that were run in a format."""
        return [pair for pair in self.pairs if pair.format == number_format]


def read(path: Path) -> Mapping[str, Any]:
    """Read a report; ConfigError naming the file for what is none."""
    try:
        report = json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot read it: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path}:{getattr(error, 'lineno', 1)}: not JSON: {error}") from error
    try:
        _chart(report)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
    found: Mapping[str, Any] = report
    return found


def _chart(report: Mapping[str, Any]) -> Chart:
    try:
        culprits = report["culprits"]
        pairs = tuple(_pair(each) for each in report["pairs"])
        chart = Chart(
            heading=_heading(report, culprits),
            formats=tuple(str(each) for each in report["formats"]),
            layers=tuple(dict.fromkeys(layer for pair in pairs for layer in pair.ratios)),
            tensors=max((len(each["gradients"] or ()) for each in report["pairs"]), default=0),
            pairs=pairs,
            culprits=tuple(str(each["module"]) for each in culprits if each["where"] not in OUTSIDE),
        )
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise ConfigError(
            f"not a report: {error!r}; expected what python -m trainers.accumulation --json writes"
        ) from error
    if not chart.formats or not chart.pairs:
        raise ConfigError("not a report: it has no pairs; expected what python -m trainers.accumulation --json writes")
    return chart


def _pair(pair: Mapping[str, Any]) -> Pair:
    tensors: dict[str, list[list[float]]] = {}
    for each in pair["gradients"] or ():
        numbers = [math.nan if each[key] is None else float(each[key]) for key in ("norm", "difference", "tolerance")]
        tensors.setdefault(str(each["name"]).rpartition(".")[0], []).append(numbers)
    layers = {name: [math.hypot(*column) for column in zip(*rows, strict=True)] for name, rows in tensors.items()}
    return Pair(
        micro_batch=int(pair["micro_batch"]),
        steps=int(pair["steps"]),
        last=int(pair["last"]),
        format=str(pair["format"]),
        equivalent=bool(pair["equivalent"]),
        error=" ".join(str(pair["error"] or "").split()),
        kinks=bool(pair["kinks"]),
        ratios={name: _ratio(difference, norm) for name, (norm, difference, _) in layers.items()},
        tolerances={name: _ratio(tolerance, norm) for name, (norm, _, tolerance) in layers.items()},
    )


def _ratio(part: float, norm: float) -> float:
    if norm:
        return part / norm
    return math.inf if part else part


def _heading(report: Mapping[str, Any], culprits: Sequence[Mapping[str, Any]]) -> str:
    """What was tested, the verdict, and who is to blame, in lines that are not wider than a panel."""
    facts = [f"{name}={value}" for name, value in dict(report["options"]).items()]
    facts += [f"batch norm: {report['batch_norm']}"] if report["batch_norm"] != "keep" else []
    facts += [f"batch of {int(report['effective_batch']):,}"]
    facts += [f"{int(report['ranks'])} ranks"] if int(report["ranks"]) > 1 else []
    facts += ["own loop"] if report["loop"] == "own" else []
    facts += ["normalised by micro-batch"] if report["normalise"] != "count" else []
    facts += [f"{int(report['parameters']):,} parameters"]
    modules = Counter(str(each["type"]) for each in culprits if each["where"] not in OUTSIDE)
    blamed = [f"{count:,} {kind}" for kind, count in modules.most_common()]
    blamed += [f"the {each}" for each in OUTSIDE if any(culprit["where"] == each for culprit in culprits)]
    verdict = "equivalent" if report["equivalent"] else "not equivalent"
    lines = [f"{verdict}: {report['workload']}", ", ".join(facts)]
    return "\n".join(map(_wrapped, [*lines, *(["to blame: " + ", ".join(blamed)] if blamed else [])]))


def _wrapped(line: str) -> str:
    return textwrap.fill(line, WIDTH, max_lines=2, placeholder=" ...")


def draw(reports: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Write the figure as PNG (or PDF, SVG, by the path's suffix): layers across, relative differences upwards.

    Raises: ConfigError for a mapping that is no report, and naming the file if it cannot be written.
    """
    charts = [_chart(report) for report in reports]
    formats = tuple(dict.fromkeys(each for chart in charts for each in chart.formats))
    figure = Figure(figsize=(1.9 + 6.4 * len(charts), 1.2 + 3.6 * len(formats)), dpi=120, layout="constrained")
    grid = figure.subplots(len(formats), len(charts), squeeze=False)
    sizes = sorted({pair.micro_batch for chart in charts for pair in chart.pairs})
    colours = {size: COLOURS(LIGHTEST * place / max(len(sizes) - 1, 1)) for place, size in enumerate(sizes)}
    for row, number_format in enumerate(formats):
        scale = _Scale([each for chart in charts for pair in chart.of(number_format) for each in _numbers(pair)])
        for column, chart in enumerate(charts):
            axes: Axes = grid[row, column]
            _panel(axes, chart, number_format, scale, colours)
            axes.tick_params(labelleft=column == 0, labelbottom=row == len(formats) - 1)
        grid[row, 0].set_ylabel("relative L2 difference of gradients")
        above = [f"{chart.heading}\n" if row == 0 else "" for chart in charts]
        below = [_summary(chart.of(number_format), number_format) for chart in charts]
        lines = max(one.count("\n") + other.count("\n") for one, other in zip(above, below, strict=True))
        for column, (one, other) in enumerate(zip(above, below, strict=True)):
            gap = "\n" * (lines - one.count("\n") - other.count("\n") + (row == 0))
            grid[row, column].set_title(f"{one}{gap}{other}", loc="left", fontsize=9, parse_math=False)
    for axes, chart in zip(grid[-1], charts, strict=True):
        axes.set_xlabel(_counted(chart))
    figure.legend(handles=list(_legend(charts, colours)), loc="outside right upper", fontsize=9, frameon=False)
    try:
        figure.savefig(path, format=path.suffix[1:] or "png")
    except OSError as error:
        raise ConfigError(f"{path}: cannot write it: {error.strerror}") from error
    except ValueError as error:
        raise ConfigError(f"{path}: cannot write it: {error}") from error


def _numbers(pair: Pair) -> Iterator[float]:
    yield from pair.ratios.values()
    yield from pair.tolerances.values()


class _Scale:
    """A logarithmic axis that has places for 0 below, and, where it is needed, for infinity above."""

    def __init__(self, numbers: Iterable[float]) -> None:
        values = np.fromiter(numbers, float)
        drawn = values[np.isfinite(values) & (values > 0)] if len(values) else values
        exponents = np.clip(np.log10(drawn), -DECADES, DECADES) if len(drawn) else np.array([-16.0, 0.0])
        self.low, self.high = math.floor(exponents.min()), math.ceil(exponents.max())
        self.high = max(self.high, self.low + 1)
        part = 0.1 * (self.high - self.low)
        self.zero, self.infinity = 10.0 ** (self.low - part), 10.0 ** (self.high + part)
        self.endless = bool(np.isinf(values).any())
        self.bottom = 10.0 ** (self.low - 2 * part)
        self.top = 10.0 ** (self.high + part * (1.5 if self.endless else 0.3))

    def places(self, values: Sequence[float]) -> Any:
        """Return where values stand on the axis; nan where there is none."""
        given = np.asarray(values, dtype=float)
        inside = np.clip(given, 10.0**self.low, 10.0**self.high)
        return np.where(given == 0, self.zero, np.where(np.isinf(given), self.infinity, inside))

    def apply(self, axes: Axes) -> None:
        """Set scale, limits and ticks: powers of ten, 0 and infinity."""
        axes.set_yscale("log")
        axes.set_ylim(self.bottom, self.top)
        each = max(1, math.ceil((self.high - self.low) / 8))
        powers = range(self.high, self.low - 1, -each)
        labels = [f"$10^{{{power}}}$" for power in powers]
        ends = [(self.zero, "exactly 0"), *([(self.infinity, "∞")] if self.endless else [])]
        axes.set_yticks(
            [10.0**power for power in powers] + [end for end, _ in ends], labels + [name for _, name in ends]
        )
        axes.set_yticks([], minor=True)
        axes.axhline(self.zero, color="#8c8c8c", linewidth=0.6, linestyle="--", zorder=1)


def _counted(chart: Chart) -> str:
    """Return the name of the axis along the layers."""
    layers, where = len(chart.layers), common(chart.layers)
    if not layers:
        return "no gradients"
    count = f"{layers:,} layer{'s' * (layers > 1)} ({chart.tensors:,} tensor{'s' * (chart.tensors > 1)})"
    return f"{count} of module {where}, in model order" if where else f"{count} in model order"


def _panel(axes: Axes, chart: Chart, number_format: str, scale: _Scale, colours: Mapping[int, Any]) -> None:
    """Draw a report's pairs in one format."""
    pairs, count = chart.of(number_format), len(chart.layers)
    scale.apply(axes)
    # Of pairs with different tolerances the loosest is shown.
    known = [pair.tolerances for pair in pairs if pair.tolerances]
    most = [max((each.get(layer, math.nan) for each in known), default=math.nan) for layer in chart.layers]
    edges = np.arange(count + 1) - 0.5
    axes.stairs(scale.places(most), edges, baseline=scale.bottom, fill=True, color="#d9d9d9", zorder=0)
    for pair in pairs:
        axes.plot(
            np.arange(count),
            scale.places([pair.ratios.get(layer, math.nan) for layer in chart.layers]),
            color=colours[pair.micro_batch],
            linestyle=":" if pair.kinks else "-",
            linewidth=1.2,
            marker="o" if count <= 100 else None,
            markersize=3.5,
            label=pair.name,
        )
    marks = [position(module, chart.layers) for module in chart.culprits if count]
    axes.plot(marks, [0.025] * len(marks), "|", color=BLAME, markersize=10, transform=axes.get_xaxis_transform())
    names = labels(chart.layers)
    axes.set_xticks(list(names), list(names.values()), fontsize=8)
    if any(len(name) > 4 for name in names.values()):
        for label in axes.get_xticklabels():
            label.set(rotation=40, ha="right", rotation_mode="anchor")
    axes.set_xlim(-0.5 - 0.01 * count, max(count, 1) - 0.5 + 0.01 * count)
    axes.grid(alpha=0.25)


def _summary(pairs: Sequence[Pair], number_format: str) -> str:
    """How many pairs are equivalent, and what has stopped others."""
    if not pairs:
        return f"{number_format}: not run"
    lines = [f"{number_format}: {sum(pair.equivalent for pair in pairs):,} of {len(pairs):,} pairs equivalent"]
    failed = [pair for pair in pairs if pair.error]
    lines += [f"{failed[0].name}: {failed[0].error}"] if failed else []
    lines += [f"and {len(failed) - 1:,} more pairs with errors"] if len(failed) > 1 else []
    return "\n".join(map(_wrapped, lines))


def _legend(charts: Sequence[Chart], colours: Mapping[int, Any]) -> Iterator[Artist]:
    pairs = {pair.name: pair for chart in charts for pair in chart.pairs}
    ordered = sorted(pairs.values(), key=lambda pair: (pair.micro_batch, pair.steps))
    yield Line2D([], [], linestyle="", label="micro-batch × steps")
    shown = np.unique(np.linspace(0, len(ordered) - 1, min(NAMED, len(ordered))).round().astype(int))
    for place in shown:
        pair = ordered[place]
        yield Line2D([], [], color=colours[pair.micro_batch], linewidth=2, label=pair.name)
    if any(pair.kinks for chart in charts for pair in chart.pairs):
        yield Line2D([], [], color="black", linestyle=":", label="apart only at kinks\n(ReLU, max-pool)")
    yield Patch(color="#d9d9d9", label="within tolerance")
    if any(chart.culprits for chart in charts):
        yield Line2D([], [], color=BLAME, marker="|", markersize=10, linestyle="", label="module to blame")


def main(argv: list[str] | None = None) -> int:
    """Draw; return the exit code."""
    flags = argparse.ArgumentParser(
        prog="python -m analysis.accumulation", description="Draw which layers' gradients accumulation changes."
    )
    flags.add_argument(
        "reports", nargs="+", type=Path, metavar="REPORT", help="JSON of python -m trainers.accumulation --json"
    )
    flags.add_argument("--out", type=Path, required=True, metavar="FIGURE", help="PNG to write")
    given = flags.parse_args(argv)
    try:
        draw([read(path) for path in given.reports], given.out)
        print(f"figure: {given.out}")
    except DistsimError as error:
        print(f"analysis.accumulation: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
