"""What a training run leaves behind: progress while it runs, then its records, simulated and measured."""

from __future__ import annotations

import os
import platform
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from distsim import record
from distsim.cluster import load
from distsim.errors import DistsimError
from distsim.files import make_writable
from distsim.record import NOT_OBSERVABLE, RunRecord, Spans, Totals
from distsim.schedule import Exchange
from distsim.step import simulate
from distsim.traffic import Traffic
from distsim.units import format_time
from trainers.config import RunConfig
from trainers.data import Text
from trainers.loop import RankResult
from trainers.timing import together_s


@dataclass(frozen=True, slots=True)
class Summary:
    """The records of a run and where they lie."""

    measured: RunRecord
    measured_path: Path
    simulated: RunRecord | None
    simulated_path: Path | None

    def text(self) -> str:
        """Say in a few lines what was done and where the records are."""
        run = self.measured
        totals = run.totals
        sent = (
            f"{totals}: the library hides its messages"
            if totals == NOT_OBSERVABLE
            else f"{totals.messages} messages, {totals.bytes} bytes in {run.exchanges} exchanges"
        )
        lines = [
            f"{run.strategy}: {run.workers} workers, {run.params:,} parameters ({run.dtype}), "
            f"on {run.configuration['text_name']}",
            f"  loss      {run.losses[0]:.4f} -> {run.losses[-1]:.4f}",
            f"  sent      {sent}",
            f"  exchange  {format_time(run.time_s)} (median)",
            f"  record    {self.measured_path}",
        ]
        if self.simulated is not None:
            lines.insert(4, f"  simulated {format_time(self.simulated.time_s)}")
            lines.append(f"  compare   distsim diff {self.simulated_path} {self.measured_path}")
        return "\n".join(lines)


class Progress:
    """A progress bar on stderr, with the loss."""

    def __init__(self, config: RunConfig, enabled: bool) -> None:
        self._bar = tqdm(total=config.steps, desc=config.strategy, unit="step", disable=not enabled, file=sys.stderr)

    def show(self, steps: int, loss: float | None) -> None:
        """Show how many steps are done, and the last loss."""
        if loss is not None:
            self._bar.set_postfix_str(f"loss {loss:.4f}", refresh=False)
        self._bar.update(steps - self._bar.n)

    def close(self) -> None:
        """Leave the bar as it is."""
        self._bar.close()


def prepare(exchange: Exchange, config: RunConfig, cluster: str | None, out: Path) -> RunRecord | None:
    """Before training: make sure of the folder for the records, and simulate the exchange on `cluster`, if named.

    Raises: ConfigError if the folder cannot be written, or for what is wrong with the cluster.
    """
    make_writable(out)
    if cluster is None:
        return None
    return record.from_simulation(simulate(exchange, load(cluster), config.dtype))


def measured(
    config: RunConfig, exchange: Exchange, text: Text, results: Sequence[RankResult], device: str
) -> RunRecord:
    """Put the ranks' results together.

    Raises: DistsimError if the workers' final parameters differ in a single bit.
    """
    digests = [result.model_digest for result in results[: exchange.workers]]
    different = [rank for rank, digest in enumerate(digests) if digest != digests[0]]
    if different:
        raise DistsimError(f"after training, the parameters of ranks {different} differ from those of rank 0")
    # A library hides its messages, and on CUDA the host sees when they are queued, not when they move.
    visible = config.transport == "schedule" and device == "cpu"
    return RunRecord(
        origin="measured",
        strategy=exchange.strategy,
        workers=exchange.workers,
        ranks=exchange.ranks,
        params=exchange.params,
        dtype=config.dtype,
        schedule_digest=exchange.digest(),
        exchanges=config.steps,
        totals=NOT_OBSERVABLE if config.transport == "library" else Totals.of(_traffic(exchange, results)),
        exchange_time_s=_exchange_times(results),
        losses=np.mean([result.losses for result in results[: exchange.workers]], axis=0).tolist(),
        spans=_spans(exchange, results) if visible else None,
        configuration={
            **asdict(config),
            "text_name": text.name,
            "text_bytes": len(text.data),
            "text_digest": text.digest(),
            "parameters_digest": digests[0],
        },
        environment={
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "platform": platform.platform(),
            "cpus": os.cpu_count(),
            "device": torch.cuda.get_device_name() if device == "cuda" else device,
            "step_time_s": statistics.median(np.max([result.step_s for result in results], axis=0).tolist()),
            "staging_bytes": [result.staging_bytes for result in results],
        },
    )


def _traffic(exchange: Exchange, results: Sequence[RankResult]) -> Traffic:
    """Count what the senders have counted."""
    counted = [(*message, count) for result in results for message, count in result.counts.items()]
    src, dst, size, count = np.array(counted, dtype=np.int64).reshape(-1, 4).T
    return Traffic.of(exchange.ranks, *(np.repeat(column, count) for column in (src, dst, size)))


def _exchange_times(results: Sequence[RankResult]) -> list[float]:
    """Of each step: how long the exchange took all ranks, less the longest update in its midst."""
    times = np.array([result.exchange_s for result in results])  # (ranks, steps, [start, end, update])
    seconds: list[float] = (
        together_s(times, [result.machine for result in results]) - times[:, :, 2].max(axis=0)
    ).tolist()
    return seconds


def _spans(exchange: Exchange, results: Sequence[RankResult]) -> Spans | None:
    """Join senders' and receivers' views of the last exchange's messages, in schedule and row order.

    A message starts when it is posted and ends when its receiver takes it up. None if the ranks' clocks differ.
    """
    if len({result.machine for result in results}) > 1:
        return None
    began = min(result.exchange_s[-1][0] for result in results)
    sent = {row: value for result in results for row, value in result.sent.items()}
    received = {row: value for result in results for row, value in result.received.items()}
    rows = sorted(sent)
    parts = exchange.schedules()
    return Spans(
        schedule=[which for which, _ in rows],
        row=[row for _, row in rows],
        step=[int(parts[which].step[row]) for which, row in rows],
        src=[int(parts[which].src[row]) for which, row in rows],
        dst=[int(parts[which].dst[row]) for which, row in rows],
        chunk=[int(parts[which].chunk[row]) for which, row in rows],
        bytes=[sent[key][1] for key in rows],
        start_s=[sent[key][0] - began for key in rows],
        finish_s=[received[key] - began for key in rows],
    )


def finish(measured: RunRecord, simulated: RunRecord | None, out: Path) -> Summary:
    """Write the records into the folder `out` as NAME.measured.json and NAME.simulated.json.

    The name is the strategy (its options after an underscore: not every file system takes a colon), or
    STRATEGY-library. An earlier simulation of that name, which would now stand
    beside another run, is removed.
    """
    name = measured.strategy.replace(":", "_") + ("-library" if measured.totals == NOT_OBSERVABLE else "")
    paths = {origin: out / f"{name}.{origin}.json" for origin in ("measured", "simulated")}
    record.write(measured, paths["measured"])
    if simulated is None:
        paths["simulated"].unlink(missing_ok=True)
        return Summary(measured, paths["measured"], None, None)
    record.write(simulated, paths["simulated"])
    return Summary(measured, paths["measured"], simulated, paths["simulated"])
