"""`--memory-budget`: rank 0 measures the workload's layers and plans them, and all ranks run that one plan.

Profiles differ from rank to rank and from run to run, so a plan is told, never compared: rank 0's goes through the
store that ranks meet in, before they are connected. It changes when things are computed, not what: losses, parameters
and messages are those of a run without it.
"""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

from distsim.errors import ConfigError, DistsimError
from distsim.memory import policies
from distsim.memory.plan import InfeasibleBudget, Op, parse
from distsim.memory.replay import WRITES, Overlap
from distsim.units import format_bytes
from trainers import offload, profile
from trainers.config import RunConfig
from trainers.group import ProcessGroup
from trainers.memory import Applied, apply
from trainers.precision import Precision
from trainers.recompute import sources
from trainers.workload import Workload, sequence, to_device

ROUNDS = 3
"""How often layers are timed: the order of their costs decides, which a few rounds show."""
PLANNING_TIMEOUT = timedelta(minutes=30)
"""How long ranks wait for rank 0's plan; if rank 0 fails, torchrun ends them earlier."""
SLACK = 2
"""Room on disk over that of one pass: later micro-batches may be longer, and a loss may run the layers twice."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Planned:
    """A plan as ranks tell it to each other, in JSON or by Ray."""

    layers: int
    plan: str
    waits: list[tuple[int, int]]
    """As `trainers.memory.apply` takes them."""
    room_bytes: int
    """What a pass copies takes so much of a file."""
    peak_bytes: int
    time_s: float
    """Of the layers' forward and backward by the plan, predicted from their own times; one micro-batch."""
    plain_time_s: float


def check(config: RunConfig, workload: Workload) -> None:
    """Refuse a workload without layers that a plan could apply to, before the ranks meet.

    Raises: ConfigError naming the field `layers` of the workload, and what it could be.
    """
    if config.memory_budget is not None:
        try:
            sequence(workload)
        except ConfigError as error:
            raise ConfigError(f"--memory-budget: {error}") from None


def plan(config: RunConfig, workload: Workload, device: torch.device) -> Planned:
    """Measure the layers on a micro-batch of the first samples, and plan them; the model moves to `device`.

    Random numbers, parameters, gradients and buffers are afterwards what they were.

    Raises: ConfigError if the layers cannot be measured, or saying the least budget that is feasible.
    """
    assert config.memory_budget is not None
    workload.model.to(device)
    drawn = [(source, source.get()) for source in sources(device)]
    try:
        size = min(config.batch_size, len(workload.data))
        batch = workload.collate([workload.data[at] for at in range(size)])
        with Precision(config.precision, device).autocast():
            example = profile.example_of(workload, to_device(batch, device))
            layers = sequence(workload)
            chain = profile.profile(layers, example, rounds=ROUNDS, folder=_folder(config), progress=True)
    finally:
        for source, state in drawn:
            source.put(state)
    overlap: Overlap = "full"
    if config.offload == "none":
        chain, overlap = replace(chain, write=None, read=None, write_saved=None, read_saved=None), "none"
    try:
        made, replayed = policies.plan(chain, policies.parse("auto"), config.memory_budget, overlap)
    except InfeasibleBudget as error:
        least = math.ceil(error.least)
        raise ConfigError(
            f"--memory-budget {config.memory_budget}: no plan for the {chain.layers} layers fits into "
            f"{format_bytes(config.memory_budget)}; the least that is feasible is {least} bytes ({format_bytes(least)})"
        ) from None
    assert chain.saved is not None
    sizes = [(chain.saved if op == Op.WRITE_SAVED else chain.size[1:])[i - 1] for op, i in made.rows() if op in WRITES]
    return Planned(
        layers=chain.layers,
        plan=made.text(),
        waits=list(replayed.waits),
        room_bytes=sum(offload.room_bytes(int(each)) for each in sizes),
        peak_bytes=int(replayed.peak_memory),
        time_s=replayed.time,
        plain_time_s=chain.plain_time,
    )


class Memory:
    """A rank's layers under a plan; the threads of its store run until it is closed."""

    def __init__(self, config: RunConfig, workload: Workload, planned: Planned, rank: int) -> None:
        """Apply a plan. Raises: ConfigError naming rank, folder and bytes if there is no room on the disk."""
        self.planned = planned
        made, folder = parse(planned.plan, planned.layers), _folder(config)
        self._store: offload.Store | None = None
        if made.count(*WRITES):
            try:
                room = SLACK * planned.room_bytes
                self._store = offload.host_store() if folder is None else offload.disk_store(folder, room)
            except ConfigError as error:
                raise ConfigError(f"--offload, rank {rank}: {error}") from None
        with ExitStack() as failed:
            if self._store is not None:
                failed.callback(self._store.close)
            self.applied: Applied = apply(sequence(workload), made, waits=planned.waits, store=self._store)
            failed.pop_all()

    def close(self) -> None:
        """Let the layers run plainly again, end the store's threads and give its room back."""
        self.applied.remove()
        if self._store is not None:
            self._store.close()

    def seen(self) -> dict[str, Any]:
        """Return what the record says of the plan, and of what this rank has done by it."""
        told, applied = self.planned, self.applied
        rows = applied.plan.rows()
        runs = Counter(layer for op, layer in rows if op in (Op.FORWARD, Op.RECORD))
        return {
            "layers": told.layers,
            "recomputed": sum(count > 1 for count in runs.values()),
            "copied": len({layer for op, layer in rows if op in WRITES}),
            "planned_bytes": told.peak_bytes,
            "predicted_time_s": told.time_s,
            "plain_time_s": told.plain_time_s,
            "forwards": sum(applied.total.forwards),
            "stores": sum(applied.total.stores),
            "loads": sum(applied.total.loads),
            "written_bytes": applied.total.written_bytes,
            "read_bytes": applied.total.read_bytes,
            "plan": told.plan,
        }


@contextmanager
def applied(
    group: ProcessGroup, config: RunConfig, workload: Workload, device: torch.device
) -> Iterator[Memory | None]:
    """Run the workload's layers by rank 0's plan within this context, on all ranks alike; without a budget, plainly.

    Raises: ConfigError, the same on all ranks, if there is no plan or one of them cannot run it.
    """
    if config.memory_budget is None:
        yield None
        return
    if device.type == "cpu":  # as when the group starts: layers are to be timed as they will run
        torch.set_num_threads(max(1, int(os.environ.get("OMP_NUM_THREADS", "1"))))
    told: dict[str, Any] = {}
    if group.rank == 0:
        try:
            told = {"plan": asdict(plan(config, workload, device))}
        except ConfigError as error:
            told = {"refused": str(error)}
        group.store.set("memory plan", json.dumps(told))
    told = json.loads(_read(group, 0, "memory plan"))
    if "refused" in told:
        raise ConfigError(told["refused"])

    memory, refused = None, ""
    try:
        memory = Memory(config, workload, Planned(**told["plan"]), group.rank)
    except ConfigError as error:
        refused = str(error)
    try:
        group.store.set(f"memory/{group.rank}", refused)
        for rank in range(group.world_size):
            if said := _read(group, rank, f"memory/{rank}").decode():
                raise ConfigError(said)
        yield memory
    finally:
        if memory is not None:
            memory.close()


def _read(group: ProcessGroup, rank: int, name: str) -> bytes:
    """Return what a rank has put into the store, when it has."""
    try:
        group.store.wait([name], PLANNING_TIMEOUT)
    except RuntimeError as error:
        waited = f"{PLANNING_TIMEOUT.total_seconds():.0f} s"
        raise DistsimError(f"rank {rank} has not said within {waited} how layers are to run") from error
    found: bytes = group.store.get(name)
    return found


def _folder(config: RunConfig) -> Path | None:
    """Return where to offload to; None: to host memory, or not at all."""
    return None if config.offload in ("none", "host") else Path(config.offload)
