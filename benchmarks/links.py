"""Whole training steps on hosts with real, slow links: DDP over gloo, and ours with and without overlap.

All sides train the same model in the same processes, taking turns in blocks of steps. The batch is so large that
forward and backward take as long as an exchange of all gradients: where they are balanced, overlap gains most.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from itertools import product
from statistics import median
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from benchmarks import hosts
from benchmarks.report import Table, against, table_of
from distsim.errors import ConfigError, DistsimError

if TYPE_CHECKING:
    from torch import Tensor, nn

RATES_BPS = (200_000_000, 1_000_000_000)
LAYERS, WIDTH, CONTEXT = 6, 384, 32
"""10.8 million parameters; the context is short, so that the batch can be set finely."""
BUCKETS_MB = (25.0, 5.0, 1.0)
"""DDP's default first."""
STEPS = 2
"""Of a block."""
DDP, OVERLAP, PLAIN = "DDP", "ours", "ours without overlap"
COMPUTE, EXCHANGE = "forward and backward alone", "gloo's all-reduce alone"
"""What is to be balanced; measured in turns with the sides, too."""
WANTED_TO_DDP, WANTED_GAIN = 1.0, 1.3
TIMEOUT_S = 1800.0
PORT = "29500"

TITLE = "Training steps on hosts with real links"


class Job(NamedTuple):
    """What the ranks of one measurement do."""

    ranks: int
    rate_bps: int
    rounds: int
    buckets_mb: Sequence[float]
    layers: int
    width: int


def measure(runs: int, quick: bool = False) -> list[Table]:
    """Measure on 2 hosts, and on 4 where each has a core, at each rate; `runs` rounds of a block of each side."""
    if find_spec("torch") is None:
        raise ConfigError("the benchmark `links` needs PyTorch; install it with `pip install 'distsim[train]'`")
    if why := hosts.unavailable():
        return [Table(title=TITLE, included="Nothing was measured.", columns={"skipped": [why]})]
    if quick:
        jobs = [Job(2, RATES_BPS[-1], runs, BUCKETS_MB[:1], 1, 32)]
    else:
        sizes = [ranks for ranks in (2, 4) if ranks <= (os.cpu_count() or 1)] or [2]
        jobs = [Job(ranks, rate_bps, runs, BUCKETS_MB, LAYERS, WIDTH) for ranks, rate_bps in product(sizes, RATES_BPS)]
    summaries, rows = [], []
    for job in jobs:
        found = _on_hosts(job)
        summaries.append(_summary(job, found))
        rows += _rows(job, found)
    balance = (
        "step: the whole of it, at the bucket size that suits each side best. to DDP: our overlapped step against "
        "DDP's; gain: ours without overlap against ours with, same buckets; ratios are paired step by step. compute: "
        "forward and backward alone; exchange: an all-reduce of all gradients by gloo alone; the batch is chosen "
        f"beforehand such that they are equal. Wanted: to DDP <= {WANTED_TO_DDP:g}x, gain >= {WANTED_GAIN:g}x."
    )
    included = (
        "Forward, backward, exchange, and the step of SGD: the slowest rank of each step; medians, 10th and 90th "
        "percentiles. Ours: ring over our own TCP transport. A host has a network namespace and a link of this rate "
        f"in each direction. Sides take turns in blocks of {STEPS} steps; the first block is not counted."
    )
    return [table_of(TITLE, balance, summaries), table_of(f"{TITLE}: all bucket sizes", included, rows)]


def _summary(job: Job, found: dict[str, Any]) -> dict[str, Any]:
    """Compare the sides, each at the bucket size that suits it best; without overlap, at that of ours with."""
    steps: dict[str, list[float]] = found["steps_s"]
    best = {
        side: min(job.buckets_mb, key=lambda bucket_mb: median(steps[_label(side, bucket_mb)]))
        for side in (DDP, OVERLAP)
    }
    ddp, ours = (steps[_label(side, bucket_mb)] for side, bucket_mb in best.items())
    plain = steps[_label(PLAIN, best[OVERLAP])]
    to_ddp, gain = _ratio(ours, ddp), _ratio(plain, ours)
    reached = (against(-WANTED_TO_DDP, -median(to_ddp)), against(WANTED_GAIN, median(gain)))
    return {
        "hosts": job.ranks,
        "rate": _rate(job),
        "batch": found["batch"],
        "compute_s": median(steps[COMPUTE]),
        "exchange_s": median(steps[EXCHANGE]),
        "DDP_s": median(ddp),
        "DDP_buckets": f"{best[DDP]:g} MB",
        "ours_s": median(ours),
        "our_buckets": f"{best[OVERLAP]:g} MB",
        **_percentiles("ratio_to_DDP", to_ddp),
        **_percentiles("ratio_gain", gain),
        "reached": ", ".join(reached),
    }


def _rows(job: Job, found: dict[str, Any]) -> list[dict[str, Any]]:
    """Return a row for each side and bucket size."""
    default = found["steps_s"][_label(DDP, job.buckets_mb[0])]
    return [
        {
            "hosts": job.ranks,
            "rate": _rate(job),
            "side": side,
            "buckets": f"{bucket_mb:g} MB",
            **_percentiles("step", found["steps_s"][_label(side, bucket_mb)], "_s"),
            **_percentiles("ratio_to_default_DDP", _ratio(found["steps_s"][_label(side, bucket_mb)], default)),
        }
        for side, bucket_mb in product((DDP, OVERLAP, PLAIN), job.buckets_mb)
    ]


def _label(side: str, bucket_mb: float) -> str:
    return f"{side}, {bucket_mb:g} MB"


def _rate(job: Job) -> str:
    return f"{job.rate_bps / 1e6:g} Mbit/s"


def _ratio(these: Sequence[float], those: Sequence[float]) -> list[float]:
    return [this / that for this, that in zip(these, those, strict=True)]


def _percentiles(name: str, values: Sequence[float], unit: str = "") -> dict[str, float]:
    low, middle, high = np.percentile(values, (10, 50, 90)).tolist()
    return {f"{name}{unit}": middle, f"{name}_10th{unit}": low, f"{name}_90th{unit}": high}


def _on_hosts(job: Job) -> dict[str, Any]:
    """Start a rank on each host and return what rank 0 prints."""
    with hosts.hosts(job.ranks, job.rate_bps) as made:
        common = {
            **os.environ,
            **{"MASTER_ADDR": made[0].address, "MASTER_PORT": PORT, "WORLD_SIZE": str(job.ranks)},
            **{"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "OMP_NUM_THREADS": "1"},
            **{"GLOO_SOCKET_IFNAME": hosts.DEVICE, "TORCH_CPP_LOG_LEVEL": "ERROR"},  # it warns of hosts without names
        }
        processes = [
            subprocess.Popen(
                host.command([sys.executable, "-m", "benchmarks.links", json.dumps(job)]),
                env={**common, "RANK": str(rank)},
                stdout=subprocess.PIPE,
                text=True,
            )
            for rank, host in enumerate(made)
        ]
        try:
            end = time.monotonic() + TIMEOUT_S
            while any(process.poll() is None for process in processes):
                if any(process.poll() for process in processes) or time.monotonic() > end:
                    break
                time.sleep(0.1)
            codes = [process.poll() for process in processes]
        finally:
            for process in processes:
                process.kill()
            printed = [process.communicate()[0] for process in processes]
    if any(code != 0 for code in codes):
        raise DistsimError(f"a rank of the benchmark `links` has failed: exit codes {codes} (None: still ran)")
    result: dict[str, Any] = json.loads(printed[0])
    return result


def _be_a_rank(job: Job) -> dict[str, Any]:
    """Balance, then train all sides in turns; return what was found, of the slowest rank."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, range(os.cpu_count() or 1))  # the parent keeps itself to one core
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    model = _fresh(job)
    gradients = torch.zeros(sum(each.numel() for each in model.parameters()))

    def all_reduce() -> None:
        dist.all_reduce(gradients)

    def compute_s(batch: int) -> float:
        tokens = _tokens(batch)
        return _alone_s(lambda: _backward(model, tokens))

    batch = _balance(compute_s, _alone_s(all_reduce))
    tokens = _tokens(batch)
    sides = _sides(job, tokens)
    turns: dict[str, Callable[[], object]] = {label: side.step for label, side in sides.items()}
    turns |= {COMPUTE: lambda: _backward(model, tokens), EXCHANGE: all_reduce}
    seconds: dict[str, list[float]] = {label: [] for label in turns}
    for turn in range(job.rounds + 1):
        for label, step in turns.items():
            dist.barrier()
            for _ in range(STEPS):
                begin = time.perf_counter()
                step()
                if turn:  # the first is the warm-up
                    seconds[label].append(time.perf_counter() - begin)
    results = [torch.nn.utils.parameters_to_vector(side.model.parameters()) for side in sides.values()]
    for label, result in zip(sides, results, strict=True):
        assert torch.allclose(result, results[0], rtol=0, atol=1e-5), f"{label} does not train as DDP does"
    steps_s = {label: _slowest(each) for label, each in seconds.items()}
    for side in sides.values():
        side.close()
    dist.barrier()
    dist.destroy_process_group()
    return {"batch": batch, "steps_s": steps_s}


class Side(NamedTuple):
    """A model, a whole training step of it, and what to do when all is over."""

    model: nn.Module
    step: Callable[[], object]
    close: Callable[[], object]


def _sides(job: Job, tokens: Tensor) -> dict[str, Side]:
    """Return all sides by label, with models of their own that are alike; DDP's default comes first."""
    import torch
    from torch.nn.parallel import DistributedDataParallel

    from trainers import attach

    def side(model: nn.Module, called: Callable[[Tensor], Tensor], close: Callable[[], object]) -> Side:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

        def step() -> None:
            optimizer.zero_grad()
            _backward(called, tokens)
            optimizer.step()

        return Side(model, step, close)

    found = {}
    for bucket_mb in job.buckets_mb:
        model = _fresh(job)
        parallel = DistributedDataParallel(model, bucket_cap_mb=bucket_mb)
        found[_label(DDP, bucket_mb)] = side(model, parallel, lambda: None)
        for name in (OVERLAP, PLAIN):
            model = _fresh(job)
            exchange = attach(model, "ring", bucket_mb=bucket_mb, overlap=name == OVERLAP)
            found[_label(name, bucket_mb)] = side(model, exchange, exchange.close)
    return found


def _fresh(job: Job) -> nn.Module:
    """Return the model with the weights that it always begins with."""
    import torch

    from trainers.workloads.language_model import LanguageModel

    torch.manual_seed(1)
    return LanguageModel(job.layers, job.width, CONTEXT)


def _tokens(batch: int) -> Tensor:
    """Return this rank's batch, (batch, context + 1), the same each time."""
    import torch
    import torch.distributed as dist

    return torch.randint(256, (batch, CONTEXT + 1), generator=torch.Generator().manual_seed(dist.get_rank()))


def _backward(model: Callable[[Tensor], Tensor], tokens: Tensor) -> None:
    """Forward and backward."""
    from torch.nn import functional

    logits = model(tokens[:, :-1])
    loss = functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
    loss.backward()  # type: ignore[no-untyped-call]


def _alone_s(action: Callable[[], object], times: int = 3) -> float:
    """Return the least of an action's seconds, of the slowest rank each time, after a warm-up."""
    import torch.distributed as dist

    seconds = []
    for _ in range(times + 1):
        dist.barrier()
        begin = time.perf_counter()
        action()
        seconds.append(time.perf_counter() - begin)
    return min(_slowest(seconds)[1:])


def _slowest(seconds: Sequence[float]) -> list[float]:
    """Return the seconds of the slowest rank, of each."""
    import torch
    import torch.distributed as dist

    most = torch.tensor(seconds, dtype=torch.float64)
    dist.all_reduce(most, dist.ReduceOp.MAX)
    found: list[float] = most.tolist()
    return found


def _balance(compute_s: Callable[[int], float], wanted_s: float, tries: int = 8) -> int:
    """Return the batch size at which computing takes as long as wanted.

    `compute_s(batch)` measures; it is nearly proportional to the batch.
    """
    found: dict[int, float] = {}
    batch = 1
    while batch not in found and len(found) < tries:
        found[batch] = compute_s(batch)
        batch = max(1, round(batch * wanted_s / found[batch]))
    return min(found, key=lambda each: abs(found[each] - wanted_s))


def main(argv: Sequence[str]) -> None:
    """Be one of the ranks; rank 0 prints what was found as JSON."""
    found = _be_a_rank(Job(*json.loads(argv[0])))
    if os.environ["RANK"] == "0":
        print(json.dumps(found))


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except ConfigError as error:
        sys.exit(f"benchmarks.links: error: {error}")
