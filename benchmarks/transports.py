"""The ring all-reduce between processes on loopback: our TCP, gloo point to point, and gloo's own all-reduce."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.report import Table, against, table_of
from distsim import exchanges
from distsim.errors import ConfigError

WANTED = {10_000: 0.5, 1_000_000: 0.9, 25_000_000: 1.0}
"""float32 elements -> how long our TCP may take, over the time of gloo's all-reduce."""
ROUNDS = {10_000: 60, 1_000_000: 10, 25_000_000: 3}
"""Rounds for each counted run: short exchanges need more of them for a 90th percentile that means something."""
RANKS = (2, 4)
LIBRARY = "gloo all-reduce"
TIMEOUT_S = 600.0

Samples = dict[str, list[float]]


def measure(runs: int, quick: bool = False) -> list[Table]:
    """Measure all sides by turns, round by round, with 2 and with 4 processes."""
    try:
        import torch  # noqa: F401
    except ImportError:
        raise ConfigError(
            "the benchmark `transports` needs PyTorch; install it with `pip install 'distsim[train]'`"
        ) from None
    rounds = {1_000: 2} if quick else {elements: runs * each for elements, each in ROUNDS.items()}
    rows = []
    for ranks in RANKS:
        for elements, samples in _in_processes(ranks, rounds).items():
            rows += _rows(ranks, elements, samples)
    included = (
        "A time is from when the last rank begins until the last one is done, the interpreter included; each round "
        "times all sides, after a barrier each. Median, 10th and 90th percentile; ratios to gloo's all-reduce are "
        "paired round by round. Processes with one thread each, on all cores of this machine."
    )
    return [table_of("Ring all-reduce of float32 on loopback", included, rows)]


def _rows(ranks: int, elements: int, samples: Samples) -> list[dict[str, Any]]:
    rows = []
    for side, seconds in samples.items():
        ratios = np.array(seconds) / np.array(samples[LIBRARY])
        wanted = WANTED.get(elements) if side.startswith("TCP") else None
        rows.append(
            {
                "ranks": ranks,
                "elements": elements,
                "side": side,
                **_percentiles("time", seconds, "_s"),
                **_percentiles("ratio", ratios),
                "wanted": f"{wanted:g}x" if wanted else None,
                "reached": against(-wanted, -float(np.median(ratios))) if wanted else None,
            }
        )
    return rows


def _percentiles(name: str, values: Any, unit: str = "") -> dict[str, float]:
    low, middle, high = np.percentile(values, (10, 50, 90)).tolist()
    return {f"{name}{unit}": middle, f"{name}_10th{unit}": low, f"{name}_90th{unit}": high}


def _in_processes(ranks: int, rounds: dict[int, int]) -> dict[int, Samples]:
    """Start one process for each rank and return what they have measured, by elements and side."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    with tempfile.TemporaryDirectory() as folder:
        processes = []
        try:
            for rank in range(ranks):
                job = json.dumps({"rank": rank, "ranks": ranks, "rounds": rounds, "folder": folder})
                command = [sys.executable, "-m", "benchmarks.transports", job]
                processes.append(subprocess.Popen(command, env=environment))
            end = time.monotonic() + TIMEOUT_S
            codes = [process.wait(end - time.monotonic()) for process in processes]
        finally:
            for process in processes:
                process.kill()
                process.wait()
        if any(codes):
            raise ConfigError(f"a rank of the benchmark `transports` has failed: exit codes {codes}")
        spans = [json.loads((Path(folder) / f"{rank}.json").read_text("utf-8")) for rank in range(ranks)]
    return {
        elements: {side: _together_s([each[str(elements)][side] for each in spans]) for side in spans[0][str(elements)]}
        for elements in rounds
    }


def _together_s(spans: Sequence[Sequence[tuple[float, float]]]) -> list[float]:
    """Return how long each round took; `spans` has shape (ranks, rounds, [start, end]), all on one clock."""
    start, end = np.moveaxis(np.array(spans), 2, 0)
    seconds: list[float] = (end.max(axis=0) - start.max(axis=0)).tolist()
    return seconds


def _be_a_rank(rank: int, ranks: int, rounds: dict[str, int], folder: str) -> None:
    """Measure as one of the ranks, and write the spans of each side to a file."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, range(os.cpu_count() or 1))  # the parent keeps itself to one core
    import torch
    import torch.distributed as dist
    from torch.distributed.distributed_c10d import _get_default_store

    from trainers import tcp
    from trainers.exchange import ScheduleRunner
    from trainers.transport import TorchTransport

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=ranks)
    sockets = tcp.meet(_get_default_store(), rank, ranks, tcp.own_address("", single_machine=True))
    ours, gloo = tcp.TcpTransport(rank, sockets, dist.barrier), TorchTransport()
    found: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for elements, count in rounds.items():
        start = torch.arange(int(elements), dtype=torch.float32) % 1000 + rank
        value, total = torch.empty_like(start), torch.empty_like(start)
        torch.add(torch.mul(start - rank, ranks), ranks * (ranks - 1) / 2, out=total)  # small integers: exact
        ring = exchanges.build("ring", ranks, int(elements)).gradients
        over_tcp, over_gloo = (ScheduleRunner(ring, [rank], transport) for transport in (ours, gloo))
        sides: dict[str, Callable[[], object]] = {
            "TCP ring": lambda runner=over_tcp, value=value: runner.run({rank: value}),  # type: ignore[misc]
            "gloo ring": lambda runner=over_gloo, value=value: runner.run({rank: value}),  # type: ignore[misc]
            LIBRARY: lambda value=value: dist.all_reduce(value),  # type: ignore[misc]
        }
        spans = found[elements] = {side: [] for side in sides}
        for turn in range(count + 1):
            for side, exchange in sides.items():
                value.copy_(start)
                dist.barrier()
                begin = time.monotonic()
                exchange()
                end = time.monotonic()
                assert torch.equal(value, total), f"{side} does not sum"
                if turn:  # the first is the warm-up
                    spans[side].append((begin, end))
    dist.barrier()
    ours.close()
    dist.destroy_process_group()
    (Path(folder) / f"{rank}.json").write_text(json.dumps(found), "utf-8")


if __name__ == "__main__":
    _be_a_rank(**json.loads(sys.argv[1]))
