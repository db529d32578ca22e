"""Training under torchrun: ranks meet in its store, compare fingerprints, then exchange by TCP, gloo or NCCL."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch.distributed as dist

from trainers import budget, norms, profiling, report, workload
from trainers.config import RunConfig
from trainers.exchanger import Exchanger, LibraryExchanger
from trainers.fingerprint import fingerprint
from trainers.group import ProcessGroup, local_device
from trainers.loop import check, train
from trainers.metrics import Metrics
from trainers.neighbours import Sample, sample
from trainers.plan import plan, trainable


def run(config: RunConfig, cluster: str | None, out: Path, *, tensorboard: bool = False) -> report.Summary | None:
    """Train as the rank that torchrun's environment names; rank 0 writes the records and returns a summary.

    Raises: ConfigError if the ranks disagree or one does not come.
    """
    rank = int(os.environ["RANK"])
    device = local_device()
    work = workload.load(config.workload, config.options, config.seed, config.dtype)
    check(config, work)
    norms.apply(config, work)
    budget.check(config, work)
    exchanges = plan(trainable(work.model), config.strategy, config.workers, config.bucket_mb, config.overlap)
    predicted = report.prepare(exchanges, config, cluster, out) if rank == 0 else None

    with ProcessGroup(device) as group, ExitStack() as ends:
        group.agree(fingerprint(config, work, exchanges, device.type))
        utilisation = report.utilisation(work, config, device) if rank == 0 else 0.0  # while the others wait
        memory = ends.enter_context(budget.applied(group, config, work, device))
        if config.transport == "library":
            os.environ.setdefault("NCCL_ALGO", "Ring")  # the algorithm that the schedule is compared with
        group.start()
        work.model.to(device)
        if config.batch_norm == "sync":
            norms.to_synchronised(work.model)
        metrics = Metrics(
            folder=out if rank == 0 else None,
            name=report.file_name(config),
            steps=config.steps,
            tensorboard=tensorboard,
            show=rank == 0,
        )
        reducer = (
            LibraryExchanger(exchanges, device)
            if config.transport == "library"
            else Exchanger(exchanges, rank, group.lanes(config.transport, config.overlap), device)
        )
        on_step = report.follow(metrics, utilisation, config)
        trace_file = out / f"{report.file_name(config)}.trace.json"
        failed = True
        try:
            with profiling.traced(config.profile, trace_file, enabled=rank == 0 and config.profile > 0) as trace:

                def after_step(step: int, **seen: Any) -> None:
                    on_step(step, **seen)
                    trace.step()

                result = train(config, work, exchanges, rank, reducer, after_step, metrics.evaluation)
            failed = False
        finally:
            metrics.close()
            reducer.close(failed)
        results = group.gather(result)
    if results is None:
        return None
    seen = None if memory is None else memory.seen()
    return report.finish(report.measured(config, exchanges, work, results, device.type, seen), predicted, out)


def calibrate(sizes: Sequence[int], rounds: int) -> tuple[str, list[list[Sample]] | None]:
    """Time neighbour exchanges of all ranks; return the backend, and on rank 0 everybody's samples."""
    device = local_device()
    with ProcessGroup(device) as group:
        group.agree({"device": device.type, "configuration: sizes": str(sizes), "configuration: rounds": str(rounds)})
        group.start()
        lanes = group.lanes("auto", overlap=False)
        mine = sample(group.rank, group.world_size, lanes[0], sizes, rounds, device)
        for lane in lanes:
            lane.close()
        return ("TCP" if device.type == "cpu" else dist.get_backend()), group.gather(mine)
