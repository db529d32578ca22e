"""The ranks of one torchrun: a store to meet in, fingerprints to compare, then a process group and a transport."""

from __future__ import annotations

import json
import os
import socket
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, _get_default_store
from torch.distributed.rendezvous import rendezvous

from distsim.errors import ConfigError, DistsimError
from trainers.fingerprint import agree
from trainers.meeting import meet, own_address
from trainers.tcp import TcpTransport
from trainers.transport import TorchTransport, Transport

Result = TypeVar("Result")

MEETING_TIMEOUT = timedelta(seconds=120)


class ProcessGroup:
    """The ranks of one torchrun: a store to meet in, then a process group, closed in any case."""

    def __init__(self, device: torch.device, name: str = "") -> None:
        """Meet in the store of the process group that is there, else in torchrun's; `name` keeps meetings apart."""
        self.device = device
        self._master = os.environ.get("MASTER_ADDR", "127.0.0.1")
        world_size, local = os.environ.get("WORLD_SIZE"), os.environ.get("LOCAL_WORLD_SIZE")
        self._single_machine = world_size == local if local else self._master in ("127.0.0.1", "localhost")
        if self._single_machine:
            names = [name for _, name in socket.if_nameindex() if name.startswith("lo")]
            os.environ.setdefault("GLOO_SOCKET_IFNAME", names[0])  # one machine: nothing leaves it
        if dist.is_initialized():
            store, self.rank, self.world_size = _get_default_store(), dist.get_rank(), dist.get_world_size()
        else:
            store, self.rank, self.world_size = next(rendezvous("env://", timeout=MEETING_TIMEOUT))
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        self.store = PrefixStore(f"distsim/{attempt}/{name}", store)  # torchrun's may be that of the last attempt

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
            torch.cuda.set_device(self.device)
            dist.init_process_group(
                "nccl", store=self.store, rank=self.rank, world_size=self.world_size, device_id=self.device
            )
        else:
            torch.set_num_threads(max(1, int(os.environ.get("OMP_NUM_THREADS", "1"))))
            dist.init_process_group("gloo", store=self.store, rank=self.rank, world_size=self.world_size)
        dist.barrier()

    def lanes(self, kind: str, overlap: bool, serial: int = 0) -> list[Transport]:
        """Return what an Exchanger's messages go by: tcp (CPU only), or torch, for gloo or NCCL; auto: the faster one.

        With overlap there are two on the CPU; CUDA has one of NCCL, and one of TCP for numbers. `serial` tells an
        Exchanger's lanes from those that others have had before.

        Raises: ConfigError if this kind cannot move tensors of this device.
        """
        if self.device.type == "cuda":
            if kind == "tcp":
                raise ConfigError("--transport tcp moves tensors of the CPU; these are on CUDA: use --transport torch")
            return [TorchTransport(rounds=True), self._tcp(f"numbers {serial}")]
        names = [f"lane {lane} {serial}" for lane in range(2 if overlap else 1)]
        return [TorchTransport() if kind == "torch" else self._tcp(name) for name in names]

    def _tcp(self, name: str) -> Transport:
        host, store = own_address(self._master, self._single_machine), PrefixStore(name, self.store)
        sockets = meet(store, self.rank, self.world_size, host, MEETING_TIMEOUT.total_seconds())
        return TcpTransport(self.rank, sockets, dist.barrier)

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


def local_device() -> torch.device:
    """The GPU of this local rank where there is one for each, otherwise the CPU."""
    local_rank = int(os.environ["LOCAL_RANK"])
    if torch.cuda.is_available() and torch.cuda.device_count() >= int(os.environ["LOCAL_WORLD_SIZE"]):
        return torch.device("cuda", local_rank)
    return torch.device("cpu")
