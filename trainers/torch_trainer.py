"""Training under torchrun: ranks meet in its store, compare fingerprints, then exchange by gloo or NCCL."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from distsim import exchanges
from distsim.check import check
from distsim.errors import ConfigError, DistsimError
from trainers import data, report
from trainers.config import RunConfig
from trainers.fingerprint import agree, fingerprint
from trainers.loop import train
from trainers.neighbours import Sample, sample
from trainers.transport import TorchTransport
from trainers.workloads import language_model

Result = TypeVar("Result")

MEETING_TIMEOUT = timedelta(seconds=120)


def run(config: RunConfig, cluster: str | None, out: Path) -> report.Summary | None:
    """Train as the rank that torchrun's environment names; rank 0 writes the records and returns a summary.

    Raises: ConfigError if the ranks disagree or one does not come.
    """
    rank = int(os.environ["RANK"])
    text = data.load_text(config.text, config.context + 1)
    device = _device()
    model = language_model.build(config)
    params = sum(parameter.numel() for parameter in model.parameters())
    exchange = exchanges.build(config.strategy, config.workers, params)
    check(exchange)
    predicted = report.prepare(exchange, config, cluster, out) if rank == 0 else None

    with ProcessGroup(device) as group:
        group.agree(fingerprint(config, text, model, exchange, device.type))
        group.start()
        transport = TorchTransport()
        progress = report.Progress(config, enabled=rank == 0)
        result = train(
            config,
            text,
            model.to(device),
            exchange,
            rank,
            transport,
            reduce_gradients=all_reduce if config.transport == "library" else None,
            report=progress.show,
        )
        progress.close()
        results = group.gather(result)
    if results is None:
        return None
    measured = report.measured(config, exchange, text, results, str(device.type))
    return report.finish(measured, predicted, out)


def calibrate(sizes: Sequence[int], rounds: int) -> tuple[str, list[list[Sample]] | None]:
    """Time neighbour exchanges of all ranks; return the backend, and on rank 0 everybody's samples."""
    device = _device()
    with ProcessGroup(device) as group:
        group.agree({"device": device.type, "configuration: sizes": str(sizes), "configuration: rounds": str(rounds)})
        group.start()
        mine = sample(group.rank, group.world_size, TorchTransport(), sizes, rounds, device)
        return dist.get_backend(), group.gather(mine)


def all_reduce(gradients: Tensor) -> None:
    """Sum by the library's own all-reduce, whose messages nobody sees."""
    dist.all_reduce(gradients)


class ProcessGroup:
    """The ranks of one torchrun: a store to meet in, then a process group, closed in any case."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        if int(os.environ["WORLD_SIZE"]) == int(os.environ["LOCAL_WORLD_SIZE"]):
            names = [name for _, name in socket.if_nameindex() if name.startswith("lo")]
            os.environ.setdefault("GLOO_SOCKET_IFNAME", names[0])  # one machine: nothing leaves it
        store, self.rank, self.world_size = next(rendezvous("env://", timeout=MEETING_TIMEOUT))
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        self.store = PrefixStore(f"distsim/{attempt}", store)  # after a restart, torchrun's store may be the old one

    def __enter__(self) -> ProcessGroup:
        return self

    def agree(self, mine: dict[str, str]) -> None:
        """Compare fingerprints through the store, before any process group exists.

        Raises: ConfigError naming the ranks that differ, or the first that has not come.
        """
        self.store.set(f"fingerprint/{self.rank}", json.dumps(mine))
        others = []
        for rank in range(self.world_size):
            try:
                self.store.wait([f"fingerprint/{rank}"], MEETING_TIMEOUT)
            except RuntimeError as error:
                waited = f"{MEETING_TIMEOUT.total_seconds():.0f} s"
                kind = ConfigError if rank else DistsimError  # rank 0, which else speaks for all, is not there
                raise kind(f"rank {rank} of {self.world_size} has not come within {waited}") from error
            others.append(json.loads(self.store.get(f"fingerprint/{rank}")))
        agree(others)

    def start(self) -> None:
        """Connect the ranks."""
        if self.device.type == "cuda":
            os.environ.setdefault("NCCL_ALGO", "Ring")  # what --transport library is compared with
            torch.cuda.set_device(self.device)
            dist.init_process_group(
                "nccl", store=self.store, rank=self.rank, world_size=self.world_size, device_id=self.device
            )
        else:
            torch.set_num_threads(max(1, int(os.environ.get("OMP_NUM_THREADS", "1"))))
            dist.init_process_group("gloo", store=self.store, rank=self.rank, world_size=self.world_size)
        dist.barrier()

    def gather(self, result: Result) -> list[Result] | None:
        """Bring every rank's result to rank 0."""
        results: list[Any] | None = [None] * self.world_size if self.rank == 0 else None
        dist.gather_object(result, results)
        return results

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        if dist.is_initialized():
            if error is None:
                dist.barrier()
            dist.destroy_process_group()
        if isinstance(error, RuntimeError) and "by peer" in str(error):  # gloo has no type of its own for it
            raise ConfigError("the connection to another rank is lost; that rank's own message says why") from error


def _device() -> torch.device:
    """The GPU of this local rank where there is one for each, otherwise the CPU."""
    local_rank = int(os.environ["LOCAL_RANK"])
    if torch.cuda.is_available() and torch.cuda.device_count() >= int(os.environ["LOCAL_WORLD_SIZE"]):
        return torch.device("cuda", local_rank)
    return torch.device("cpu")
