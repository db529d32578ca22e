"""Whole training steps on loopback: ring buckets, over TCP and over gloo point to point, beside DDP.

All sides have a model of their own and the same loop; they take turns, step by step, in the same processes.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from benchmarks.report import Table, against, table_of
from distsim.errors import ConfigError, DistsimError

if TYPE_CHECKING:
    from torch import Tensor, nn

RANKS = (2, 4)
LAYERS, WIDTH, CONTEXT = 6, 384, 128
"""10.8 million parameters, 43 MB of gradients: two buckets, or three, of 25 MB at most."""
BATCH = 1
"""Sequences of each rank: the fewest, so that the exchange is as large a part of the step as it can be."""
ROUNDS = 12
"""For each counted run."""
LEARNING_RATE = 1e-3
"""So small that sums in another order, at 4 ranks, do not lead elsewhere."""
DDP, TCP, GLOO = "DDP", "ours, TCP", "ours, gloo point to point"
WANTED = 1.03
TIMEOUT_S = 900.0


def measure(runs: int, quick: bool = False) -> list[Table]:
    """Measure all sides with 2 and with 4 processes, in `12 * runs` rounds."""
    need_torch("training")
    rows: list[dict[str, Any]] = []
    for ranks in RANKS:
        job = {"layers": 1, "width": 32, "rounds": runs} if quick else {"layers": LAYERS, "width": WIDTH}
        found = in_processes("benchmarks.training", ranks, {"rounds": ROUNDS * runs, **job})
        rows += _rows(ranks, {side: together_s([each[side] for each in found]) for side in found[0]})
    included = (
        "zero_grad, forward, backward, exchange, and SGD's step: from when the last rank begins until the last one is "
        "done. A round is a step of each side, in an order that changes, with a barrier before each; the first round "
        "is not counted. Buckets of 25 MB; a process and a thread for each rank, on all cores of this machine. Median, "
        "10th and 90th percentile; ratios to DDP are paired round by round, and from..to is a 95 % confidence "
        f"interval of their median. Wanted: at most {WANTED:g}x over TCP."
    )
    return [table_of("A whole training step on loopback", included, rows)]


def _rows(ranks: int, seconds: Mapping[str, npt.NDArray[np.float64]]) -> list[dict[str, Any]]:
    rows = []
    for side, each in seconds.items():
        ratios = each / seconds[DDP]
        low, high = median_interval(ratios)
        rows.append(
            {
                "ranks": ranks,
                "side": side,
                "steps": len(each),
                **percentiles("step", each, "_s"),
                **percentiles("ratio", ratios),
                "ratio_from": low,
                "ratio_to": high,
                "reached": against(-WANTED, -float(np.median(ratios))) if side == TCP else None,
            }
        )
    return rows


def percentiles(name: str, values: npt.NDArray[np.float64], unit: str = "") -> dict[str, float]:
    """Return three columns: the median, the 10th and the 90th percentile."""
    low, middle, high = np.percentile(values, (10, 50, 90)).tolist()
    return {f"{name}{unit}": middle, f"{name}_10th{unit}": low, f"{name}_90th{unit}": high}


def median_interval(values: npt.NDArray[np.float64], confidence: float = 0.95) -> tuple[float, float]:
    """Return a confidence interval of the median of whatever the values are drawn from: two of the values.

    The k-th least and the k-th most: the median lies outside with the probability that of n fair coins fewer than k
    show heads, or fewer than k tails. Of very few values, the least and the most, which promise less.
    """
    count = len(values)
    k, outside = 0, 0.0
    while k < count / 2:
        outside += 2 * math.comb(count, k) / 2**count
        if outside > 1 - confidence:
            break
        k += 1
    ordered = np.sort(values)
    return float(ordered[max(k - 1, 0)]), float(ordered[count - max(k, 1)])


def together_s(spans: Sequence[Any]) -> npt.NDArray[np.float64]:
    """Return how long each round took; `spans` has shape (ranks, rounds, [start, end]), all on one clock."""
    start, end = np.moveaxis(np.array(spans, dtype=np.float64), 2, 0)
    return np.asarray(end.max(axis=0) - start.max(axis=0))


def need_torch(name: str) -> None:
    """Raises: ConfigError if there is no PyTorch, which the benchmark of this name needs."""
    try:
        import torch  # noqa: F401
    except ImportError:
        raise ConfigError(
            f"the benchmark `{name}` needs PyTorch; install it with `pip install 'distsim[train]'`"
        ) from None


def in_processes(module: str, ranks: int, job: Mapping[str, Any]) -> list[Any]:
    """Run `python -m module JOB` once for each rank, and return what each has written to its file.

    The job that a rank gets has three keys more: `rank`, `ranks` and `folder`, where `store` is for the ranks to
    meet in and `RANK.json` is the file. One that fails, or takes 15 minutes, ends them all.

    Raises: DistsimError if one has failed; what it printed says why.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    with tempfile.TemporaryDirectory() as folder:
        processes = []
        try:
            for rank in range(ranks):
                mine = json.dumps({**job, "rank": rank, "ranks": ranks, "folder": folder})
                processes.append(subprocess.Popen([sys.executable, "-m", module, mine], env=environment))
            end = time.monotonic() + TIMEOUT_S
            while any(process.poll() is None for process in processes):
                if any(process.poll() for process in processes) or time.monotonic() > end:
                    break
                time.sleep(0.05)
            codes = [process.poll() for process in processes]
        finally:
            for process in processes:
                process.kill()
                process.wait()
        if any(code != 0 for code in codes):
            raise DistsimError(f"a rank of {module} has failed: exit codes {codes} (None: still ran)")
        return [json.loads((Path(folder) / f"{rank}.json").read_text("utf-8")) for rank in range(ranks)]


def all_cores() -> None:
    """Let this process run on all cores: the one that has started it keeps itself to one."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, range(os.cpu_count() or 1))


def _be_a_rank(layers: int, width: int, rounds: int, rank: int, ranks: int, folder: str) -> None:
    """Train all sides in turns, see that they train alike, and write the spans of each to a file."""
    all_cores()
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=ranks)
    tokens = torch.randint(256, (BATCH, CONTEXT + 1), generator=torch.Generator().manual_seed(rank))
    models, called, close = _sides(layers, width)
    start = torch.nn.utils.parameters_to_vector(models[DDP].parameters()).detach().clone()
    steps = {side: _stepper(model, called[side], tokens) for side, model in models.items()}
    spans: dict[str, list[tuple[float, float]]] = {side: [] for side in steps}
    order = np.random.default_rng(0)  # the same one on all ranks
    for turn in range(rounds + 1):
        for side in order.permutation(list(steps)).tolist():
            dist.barrier()
            begin = time.monotonic()
            steps[side]()
            end = time.monotonic()
            if turn:  # the first is the warm-up
                spans[side].append((begin, end))
    moved = {
        side: torch.nn.utils.parameters_to_vector(each.parameters()).detach() - start for side, each in models.items()
    }
    for side, way in moved.items():
        apart = float((way - moved[DDP]).norm() / moved[DDP].norm())
        assert apart < 1e-3, f"{side} does not train as DDP does: {apart:g} of the way apart"
    for each in close:
        each()
    dist.barrier()
    dist.destroy_process_group()
    (Path(folder) / f"{rank}.json").write_text(json.dumps(spans), "utf-8")


def _sides(
    layers: int, width: int
) -> tuple[dict[str, nn.Module], dict[str, Callable[[Tensor], Tensor]], list[Callable[[], None]]]:
    """Return the model of each side, what a loop calls, and what to call when all is over."""
    import torch
    from torch.nn.parallel import DistributedDataParallel

    import trainers
    from trainers.workloads.language_model import LanguageModel

    models: dict[str, nn.Module] = {}
    for side in (DDP, TCP, GLOO):
        torch.manual_seed(1)
        models[side] = LanguageModel(layers, width, CONTEXT)
    over_tcp = trainers.attach(models[TCP], "ring", transport="tcp")
    over_gloo = trainers.attach(models[GLOO], "ring", transport="torch")
    called: dict[str, Callable[[Tensor], Tensor]] = {
        DDP: DistributedDataParallel(models[DDP], gradient_as_bucket_view=True),
        TCP: over_tcp,
        GLOO: over_gloo,
    }
    return models, called, [over_tcp.close, over_gloo.close]


def _stepper(model: nn.Module, called: Callable[[Tensor], Tensor], tokens: Tensor) -> Callable[[], None]:
    """Return one training step, as a loop of one's own has it."""
    import torch
    from torch.nn import functional

    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)

    def step() -> None:
        optimizer.zero_grad()
        logits = called(tokens[:, :-1])
        loss = functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    return step


if __name__ == "__main__":
    _be_a_rank(**json.loads(sys.argv[1]))
