"""What a training run leaves behind: its records, simulated and measured."""

from __future__ import annotations

import os
import platform
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from distsim import record
from distsim.check import check
from distsim.cluster import load
from distsim.errors import DistsimError
from distsim.files import make_writable
from distsim.record import NOT_OBSERVABLE, Part, RunRecord, Spans, Totals
from distsim.step import simulate
from distsim.traffic import Traffic
from distsim.units import format_bytes, format_time
from trainers import flops
from trainers.config import RunConfig
from trainers.loop import RankResult
from trainers.metrics import Metrics
from trainers.plan import Plan
from trainers.timing import together_s
from trainers.workload import Workload


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
            else f"{totals.messages:,} messages, {totals.bytes:,} bytes in {run.exchanges:,} steps"
        )
        lines = [
            f"{run.strategy}: {run.workers} workers, {run.params:,} parameters ({run.dtype}), "
            f"on {run.configuration['data_name']}",
            f"  loss      {run.losses[0]:.4f} -> {run.losses[-1]:.4f}",
            f"  sent      {sent}",
            f"  exchange  {format_time(run.time_s)} (median)",
            f"  record    {self.measured_path}",
        ]
        if "memory" in run.environment:
            lines.insert(4, f"  memory    {_memory(run)}")
        if self.simulated is not None:
            lines.insert(4, f"  simulated {format_time(self.simulated.time_s)}")
            lines.append(f"  compare   distsim diff {self.simulated_path} {self.measured_path}")
        return "\n".join(lines)


def _memory(run: RunRecord) -> str:
    """Say in a line what a plan has come to."""
    seen, budget = run.environment["memory"], run.configuration["memory_budget"]
    slower = max(0.0, seen["predicted_time_s"] / seen["plain_time_s"] - 1)
    return (
        f"{format_bytes(seen['planned_bytes'])} of {format_bytes(budget)} planned: {seen['recomputed']} of "
        f"{seen['layers']} layers recomputed, {seen['copied']} copied; {slower:+.0%} time predicted"
    )


def follow(metrics: Metrics, utilisation: float, config: RunConfig) -> Callable[..., None]:
    """Return what tells the metrics of a step, with the model FLOPs utilisation, if it is known."""

    def on_step(step: int, *, step_s: float, **seen: Any) -> None:
        mfu = utilisation * config.accumulate / step_s if utilisation else None
        metrics.step(step, step_s=step_s, mfu=mfu, **seen)

    return on_step


def utilisation(workload: Workload, config: RunConfig, device: torch.device) -> float:
    """Return the model FLOPs utilisation of one micro-batch a second; 0 if its FLOPs cannot be counted."""
    size = min(config.batch_size, len(workload.data))
    batch = workload.collate([workload.data[at] for at in range(size)])
    counted = flops.of_batch(workload.model, workload.loss, batch)
    return counted / flops.peak_flops(device, config.dtype, config.precision)[0] if counted else 0.0


def prepare(plan: Plan, config: RunConfig, cluster: str | None, out: Path) -> RunRecord | None:
    """Before training: prove the exchanges, make sure of the folder for the records, and simulate on `cluster`.

    Without a cluster nothing is simulated, and None returned.

    Raises: ConfigError if the folder cannot be written, or for what is wrong with the cluster.
    """
    make_writable(out)
    if cluster is None:
        for exchange in plan.exchanges:
            check(exchange)
        return None
    place = load(cluster)
    simulated = [simulate(each, place, dtype) for each, dtype in zip(plan.exchanges, plan.dtypes, strict=True)]
    return record.from_simulations(simulated, plan.names)


def measured(
    config: RunConfig,
    plan: Plan,
    workload: Workload,
    results: Sequence[RankResult],
    device: str,
    memory: dict[str, Any] | None = None,
) -> RunRecord:
    """Put the ranks' results together; `memory` is what `budget.Memory.seen` says, if there is a plan.

    Raises: DistsimError if the workers' final parameters differ in a single bit.
    """
    digests = [result.model_digest for result in results[: plan.workers]]
    different = [rank for rank, digest in enumerate(digests) if digest != digests[0]]
    if different:
        raise DistsimError(f"after training, the parameters of ranks {different} differ from those of rank 0")
    # A library hides its messages, and on CUDA the host sees when they are queued, not when they move.
    counted = config.transport != "library"
    times = _schedule_times(results)
    return RunRecord(
        origin="measured",
        strategy=plan.strategy,
        workers=plan.workers,
        ranks=plan.ranks,
        params=sum(exchange.params for exchange in plan.exchanges[: len(plan.buckets)]),
        dtype=config.dtype,
        schedule_digest=record.digest(plan.exchanges),
        exchanges=config.steps,
        totals=Totals.of(_traffic(plan.ranks, _messages(plan, results))) if counted else NOT_OBSERVABLE,
        exchange_time_s=times.sum(axis=1).tolist(),
        losses=results[0].losses,
        spans=_spans(plan, results) if counted and device == "cpu" else None,
        parts=_parts(plan, results, times, config.steps) if counted else [],
        configuration={
            **asdict(config),
            "data_name": workload.data_name,
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
            "exposed_time_s": statistics.median(np.max([result.exposed_s for result in results], axis=0).tolist()),
            "staging_bytes": [result.staging_bytes for result in results],
            **({} if memory is None else {"memory": memory}),
        },
    )


def _messages(plan: Plan, results: Sequence[RankResult]) -> list[tuple[int, int, int, int, int]]:
    """Return what the senders have counted in training steps: (schedule, src, dst, bytes, how many)."""
    schedules = len(plan.schedules())  # what lies behind them is an evaluation's
    logs = [result.log for result in results if result.log is not None]
    counted = [(*message, count) for log in logs for message, count in log.counts.items()]
    return [message for message in counted if message[0] < schedules]


def _traffic(ranks: int, messages: Sequence[tuple[int, int, int, int, int]]) -> Traffic:
    _, src, dst, size, count = np.array(messages, dtype=np.int64).reshape(-1, 5).T
    return Traffic.of(ranks, *(np.repeat(column, count) for column in (src, dst, size)))


def _parts(plan: Plan, results: Sequence[RankResult], times: npt.NDArray[np.float64], steps: int) -> list[Part]:
    """What each exchange of a step has sent, on average over the steps, and its median time."""
    messages = _messages(plan, results)
    parts = []
    for place, (name, exchange, dtype) in enumerate(zip(plan.names, plan.exchanges, plan.dtypes, strict=True)):
        first = plan.first_schedule()[place]
        own = range(first, first + len(exchange.schedules()))
        sent = [(size, count) for which, _, _, size, count in messages if which in own]
        parts.append(
            Part(
                name=name,
                params=exchange.params,
                dtype=dtype,
                schedule_digest=exchange.digest(),
                messages=sum(count for _, count in sent) // steps,
                bytes=sum(size * count for size, count in sent) // steps,
                time_s=float(np.median(times[:, own].sum(axis=1))),
            )
        )
    return parts


def _schedule_times(results: Sequence[RankResult]) -> npt.NDArray[np.float64]:
    """Return how long each schedule of each step took all ranks, shape (steps, schedules)."""
    spans = np.array([result.spans for result in results])  # (ranks, steps, schedules, [start, end])
    ranks, steps, schedules, _ = spans.shape
    flat = together_s(spans.reshape(ranks, steps * schedules, 2), [result.machine for result in results])
    return flat.reshape(steps, schedules)


def _spans(plan: Plan, results: Sequence[RankResult]) -> Spans | None:
    """Join senders' and receivers' views of the last step's messages, in schedule and row order.

    A message starts when it is posted and ends when its receiver takes it up. None if the ranks' clocks differ.
    """
    if len({result.machine for result in results}) > 1:
        return None
    began = min(start for result in results for start, _ in result.spans[-1])
    logs = [result.log for result in results if result.log is not None]
    sent = {key: value for log in logs for key, value in log.sent_s.items()}
    size = {key: value for log in logs for key, value in log.bytes_of.items()}
    received = {key: value for log in logs for key, value in log.received_s.items()}
    parts = plan.schedules()
    rows = sorted(key for key in sent if key[0] < len(parts))  # those behind are an evaluation's
    return Spans(
        schedule=[which for which, _ in rows],
        row=[row for _, row in rows],
        step=[int(parts[which].step[row]) for which, row in rows],
        src=[int(parts[which].src[row]) for which, row in rows],
        dst=[int(parts[which].dst[row]) for which, row in rows],
        chunk=[int(parts[which].chunk[row]) for which, row in rows],
        bytes=[size[key] for key in rows],
        start_s=[sent[key] - began for key in rows],
        finish_s=[received[key] - began for key in rows],
    )


def file_name(config: RunConfig) -> str:
    """Return what a run's files are called."""
    return _file_name(config.strategy, config.transport == "library")


def _file_name(strategy: str, library: bool) -> str:
    return strategy.replace(":", "_") + ("-library" if library else "")


def finish(measured: RunRecord, simulated: RunRecord | None, out: Path) -> Summary:
    """Write the records into the folder `out` as NAME.measured.json and NAME.simulated.json.

    The name is the strategy (its options after an underscore: not every file system takes a colon), or
    STRATEGY-library. An earlier simulation of that name, which would now stand
    beside another run, is removed.
    """
    name = _file_name(measured.strategy, measured.totals == NOT_OBSERVABLE)
    paths = {origin: out / f"{name}.{origin}.json" for origin in ("measured", "simulated")}
    record.write(measured, paths["measured"])
    if simulated is None:
        paths["simulated"].unlink(missing_ok=True)
        return Summary(measured, paths["measured"], None, None)
    record.write(simulated, paths["simulated"])
    return Summary(measured, paths["measured"], simulated, paths["simulated"])
