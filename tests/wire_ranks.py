"""Ranks that run every schedule while Linux counts what they send. A program: test_wire.py starts it and reads it.

    python wire_ranks.py FOLDER RANKS...

The ranks are forks of one process. They meet through files and wait for each other at a semaphore, so that nothing
but the messages themselves is on the wire. Prints what `Measured` describes, as a list in JSON.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from namespaces import connections, loopback
from torch import nn
from torch.distributed import FileStore, PrefixStore  # type: ignore[attr-defined]

import trainers
from distsim import exchanges
from distsim.schedule import ITEMSIZE
from trainers.exchange import ScheduleRunner
from trainers.tcp import TcpTransport, meet
from trainers.transport import MessageLog, TorchTransport, Transport

SERVER = "parameter-server:placement=colocated"
STRATEGIES = (
    *(name for name in exchanges.STRATEGIES if name != "parameter-server"),  # its own servers are reached by Ray
    SERVER,
    f"{SERVER},servers=2",
    "ring:channels=2,bidirectional=true",
    "ring:segments=3",
    "tree:radix=3,segments=2",
)
SIZES = (300_007, 101, 1)
"""float32 elements: more than sockets buffer, little, and so few that most ranks have no part of their own."""
ROUNDS = 2
TRAINING_STEPS = 3
PATIENCE_S = 60.0
TRAINING = "training"
TCP_RTO_MIN_US = 45
"""Of linux/tcp.h, since Linux 6.15; Python has no name for it."""


@dataclass(frozen=True)
class Measured:
    """What one rank has sent, by its transport's count and by the kernel's."""

    transport: str
    what: str
    """A strategy, or TRAINING."""
    ranks: int
    rank: int
    rounds: int
    """How often each of the exchanges was made."""
    exchanged: list[tuple[str, int, int]]
    """Strategy, elements and bytes an element of each exchange."""
    counts: list[tuple[tuple[int, ...], int]]
    """Of the transport: ((schedule, src, dst, bytes), messages)."""
    ends: list[tuple[tuple[int, int], tuple[int, ...]]]
    """Of the kernel: (own port, other port), and by how much acked, received, packets and again have grown."""
    loopback: tuple[int, int]
    """Bytes and packets of all ranks together; of other processes, too, outside a namespace."""
    hasty: bool
    """Whether data are sent again before a delayed acknowledgement can come."""


class Rank:
    """One of the ranks."""

    def __init__(self, rank: int, ranks: int, folder: Path, all_here: Barrier) -> None:
        self.rank, self.ranks = rank, ranks
        self.wait = all_here.wait
        store = FileStore(str(folder / f"store of {ranks}"), ranks)
        dist.init_process_group("gloo", store=PrefixStore("gloo", store), rank=rank, world_size=ranks)
        self.sockets = meet(PrefixStore("tcp", store), rank, ranks, "127.0.0.1", PATIENCE_S)
        self.hasty = all(hasty(each) for peer, each in self.sockets.items() if rank < peer)

    def measure_all(self) -> list[Measured]:
        tcp = TcpTransport(self.rank, self.sockets, self.wait, PATIENCE_S)
        by_name: dict[str, Transport] = {"tcp": tcp, "gloo": TorchTransport()}
        found = [self.strategy(*each, strategy) for strategy in STRATEGIES for each in by_name.items()]
        tcp.close()
        self.hasty = False  # attach opens connections of its own
        return [*found, self.training()]

    def strategy(self, name: str, transport: Transport, strategy: str) -> Measured:
        """Sum tensors of all sizes."""
        built = [exchanges.build(strategy, self.ranks, size) for size in SIZES]
        values = [torch.empty(size) for size in SIZES]
        parts = [(value, schedule) for value, each in zip(values, built, strict=True) for schedule in each.schedules()]
        runners = [ScheduleRunner(part, [self.rank], transport, which) for which, (_, part) in enumerate(parts)]
        transport.log = MessageLog()

        def run() -> None:
            for _ in range(ROUNDS):
                for value in values:
                    value.fill_(self.rank + 1)
                for runner, (value, _) in zip(runners, parts, strict=True):
                    runner.run({self.rank: value})

        grown, carried = self.counted(run)
        assert all(bool((value == self.ranks * (self.ranks + 1) / 2).all()) for value in values), strategy
        exchanged = [(strategy, size, 4) for size in SIZES]
        return self.measured(name, strategy, ROUNDS, exchanged, transport.log, grown, carried)

    def training(self) -> Measured:
        """Train a model of several buckets, which are exchanged while backward goes on."""
        torch.manual_seed(0)
        model = nn.Sequential(*(nn.Linear(101, 101) for _ in range(8)))
        exchange = trainers.attach(model, strategy="ring", bucket_mb=0.1, transport="tcp")
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        random = torch.Generator().manual_seed(self.rank)

        def train() -> None:
            for _ in range(TRAINING_STEPS):
                optimizer.zero_grad()
                exchange(torch.randn(5, 101, generator=random)).square().mean().backward()
                optimizer.step()

        grown, carried = self.counted(train)
        plan, log = exchange.plan, exchange.exchanger.log
        exchanged = [
            (each.strategy, each.params, ITEMSIZE[dtype])
            for each, dtype in zip(plan.exchanges, plan.dtypes, strict=True)
        ]
        found = self.measured("tcp", TRAINING, TRAINING_STEPS, exchanged, log, grown, carried)
        exchange.close()
        return found

    def counted(self, action: Callable[[], None]) -> tuple[Any, tuple[int, int]]:
        """Return what an action adds to the counters of each connection, and to those of the loopback interface."""
        self.quiet()
        ends, before = connections(), loopback()
        self.wait()
        action()
        self.quiet()
        grown = [(ports, _less(after[1:], ends[ports][1:])) for ports, after in connections().items()]
        carried = _less(loopback(), before)
        self.wait()
        return grown, (carried[0], carried[1])

    def quiet(self) -> None:
        """Return when all ranks are here and nothing is on the way: an acknowledgement may come late."""
        self.wait()
        end = time.monotonic() + PATIENCE_S
        while any(each.under_way for each in connections().values()):
            assert time.monotonic() < end, "data are never acknowledged"
            time.sleep(0.002)
        self.wait()

    def measured(
        self, name: str, what: str, rounds: int, exchanged: Any, log: Any, grown: Any, carried: Any
    ) -> Measured:
        counts = list(log.counts.items())
        return Measured(name, what, self.ranks, self.rank, rounds, exchanged, counts, grown, carried, self.hasty)


def hasty(end: socket.socket) -> bool:
    """Let one end of a connection send again after 10 ms, where the other takes up to 40 to acknowledge.

    So it is seen what is counted then. False if this Linux does not know how.
    """
    try:
        end.setsockopt(socket.IPPROTO_TCP, TCP_RTO_MIN_US, 10_000)
    except OSError:
        return False
    return True


def _less(after: tuple[int, ...], before: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(later - sooner for later, sooner in zip(after, before, strict=True))


def be(rank: int, ranks: int, folder: Path, all_here: Barrier) -> None:
    """Be one rank from its beginning to its end, and leave a file of what it has measured."""
    try:
        found = Rank(rank, ranks, folder, all_here).measure_all()
        (folder / f"{rank} of {ranks}.json").write_text(json.dumps([asdict(each) for each in found]))
        all_here.wait()
        dist.destroy_process_group()
    except BaseException:
        all_here.abort()  # the others would wait
        raise


def main(folder: Path, counts: list[int]) -> int:
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    fork = multiprocessing.get_context("fork")
    found = []
    for ranks in counts:
        all_here = fork.Barrier(ranks, timeout=PATIENCE_S)
        processes = [fork.Process(target=be, args=(rank, ranks, folder, all_here)) for rank in range(ranks)]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        if any(process.exitcode for process in processes):
            return 1
        found += [
            each for rank in range(ranks) for each in json.loads((folder / f"{rank} of {ranks}.json").read_text())
        ]
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), [int(count) for count in sys.argv[2:]]))
