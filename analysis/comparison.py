"""Simulated and measured records of the same exchanges, side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tabulate import tabulate

from distsim.errors import ConfigError
from distsim.record import NOT_OBSERVABLE, RunRecord, Totals, read, time_error
from distsim.units import format_time


@dataclass(frozen=True, slots=True)
class Pair:
    """One exchange, simulated and measured."""

    simulated: RunRecord
    measured: RunRecord

    @property
    def error(self) -> float | None:
        """Relative error of the simulated time: -0.1 means that it is 10 % below the measured median."""
        return time_error(self.simulated, self.measured)

    @property
    def error_text(self) -> str:
        """The error in whole percent."""
        return "none" if self.error is None else f"{self.error:+.0%}"


def read_pairs(folder: Path) -> list[Pair]:
    """Read every NAME.simulated.json of a folder that has a NAME.measured.json beside it, by name.

    Raises: ConfigError if a record cannot be read, a measured one is not of a training, or the two are of
    different exchanges.
    """
    pairs = []
    for simulated in sorted(folder.glob("*.simulated.json")):
        measured = simulated.with_name(simulated.name.replace(".simulated.", ".measured."))
        if measured.exists():
            pairs.append(Pair(read(simulated), read(measured)))
            for name in ("strategy", "workers", "params", "dtype", "schedule_digest"):
                if getattr(pairs[-1].simulated, name) != getattr(pairs[-1].measured, name):
                    raise ConfigError(
                        f"{measured}: its {name} is not that of {simulated.name}; expected the same exchange"
                    )
            if not pairs[-1].measured.losses:
                raise ConfigError(f"{measured}: it has no losses; expected the record of a training")
    return pairs


def comparison_table(pairs: Sequence[Pair]) -> str:
    """Return the table of messages, bytes, times and losses; counts are those of the whole training run."""
    headers = [
        "strategy",
        *("messages\nsimulated", "messages\nmeasured", "bytes\nsimulated", "bytes\nmeasured"),
        *("exchange\nsimulated", "exchange\nmeasured", "error", "first\nloss", "last\nloss"),
    ]
    rows = [
        [
            pair.measured.strategy,
            *_counts(pair, "messages"),
            *_counts(pair, "bytes"),
            format_time(pair.simulated.time_s),
            format_time(pair.measured.time_s),
            pair.error_text,
            f"{pair.measured.losses[0]:.4f}",
            f"{pair.measured.losses[-1]:.4f}",
        ]
        for pair in pairs
    ]
    first = pairs[0].measured
    head = f"{first.workers} workers, {first.params:,} parameters ({first.dtype}), {first.exchanges} steps"
    align = ["left"] + ["right"] * (len(headers) - 1)
    return f"{head}\n\n{tabulate(rows, headers=headers, colalign=align, disable_numparse=True)}"


def _counts(pair: Pair, name: str) -> tuple[str, str]:
    """The simulated count of as many exchanges as were measured, and the measured one."""
    simulated, measured = pair.simulated.totals, pair.measured.totals
    exchanges = pair.measured.exchanges // pair.simulated.exchanges
    return (
        f"{getattr(simulated, name) * exchanges:,}" if isinstance(simulated, Totals) else NOT_OBSERVABLE,
        f"{getattr(measured, name):,}" if isinstance(measured, Totals) else NOT_OBSERVABLE,
    )
