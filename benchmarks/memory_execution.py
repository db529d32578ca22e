"""Plans of memory run on real modules: peak and time beside what was predicted, and offload that compute hides.

Predictions come from layers that are timed one by one, in the same rounds as the steps that they predict.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.offload import forgotten
from benchmarks.report import Table, against, table_of
from distsim.errors import ConfigError
from distsim.memory import mixed, policies, simple
from distsim.memory.chain import Chain
from distsim.memory.chain import read as read_chain
from distsim.memory.plan import InfeasibleBudget, MemoryPlan, parse, with_drops
from distsim.memory.replay import Overlap
from distsim.memory.replay import replay as replayed

if TYPE_CHECKING:
    from trainers.offload import Store
    from trainers.workload import Workload

PEAK_WANTED, TIME_WANTED, HIDDEN_WANTED = 1.10, 1.05, 1.03
"""Measured over predicted peak and time, and a step that offloads all over the plain one."""
SHARES = (0.1, 0.4, 0.7)
"""Budgets: of the way from the least that a policy needs to what keeping everything takes."""
POLICIES: tuple[tuple[str, Overlap], ...] = (("fast", "none"), ("mixed", "full"))
MODELS: dict[str, tuple[str, dict[str, object], int]] = {
    "MLP": ("mlp", {"widths": "2048-512-4096-1024-2048-256"}, 2048),
    "transformer": ("language-model", {"layers": 8, "width": 256}, 8),
    "ResNet": ("resnet", {"depth": 18}, 32),
}
SMALL: dict[str, tuple[str, dict[str, object], int]] = {
    "MLP": ("mlp", {"widths": "64-32-64"}, 64),
    "transformer": ("language-model", {"layers": 2, "width": 32, "context": 16}, 2),
    "ResNet": ("resnet", {"width": 2}, 2),
}
"""Name -> workload, options and batch."""
HIDING = ("mlp", {"widths": "-".join(["2048"] * 6)}, 1024)
SMALL_HIDING = ("mlp", {"widths": "64-64-64"}, 64)
TIMEOUT_S = 3600.0


def measure(runs: int, quick: bool = False) -> list[Table]:
    """Measure each model in processes of its own: plans against predictions, then offload against the plain step."""
    try:
        import torch  # noqa: F401
    except ImportError:
        raise ConfigError(
            "the benchmark `memory-execution` needs PyTorch; install it with `pip install 'distsim[train]'`"
        ) from None
    rows = []
    hidden = []
    with tempfile.TemporaryDirectory() as folder:
        for name, model in (SMALL if quick else MODELS).items():
            chain = str(Path(folder) / f"{name}.json")
            job = {"model": model, "runs": runs, "folder": folder, "chain": chain}
            plans = _in_process("plan", job)
            rows += [{"model": name, **row} for row in _in_process("compare", {**job, "plans": plans})]
        hidden = _in_process("hide", {"model": SMALL_HIDING if quick else HIDING, "runs": runs, "folder": folder})
    if not quick:
        for row in rows:
            row["reached"] = _within(row)
        for row in hidden:
            row["wanted"] = f"{HIDDEN_WANTED:g}x"
            row["reached"] = against(-HIDDEN_WANTED, -row["ratio"])
    threads = "One thread computes, on all cores of this machine; one more writes and one reads."
    return [
        table_of(
            "Plans on real modules, measured over predicted",
            "Forward and backward of the layers; loss and gradients are the plain ones to the bit, counts are the "
            "plan's. Peak: all pages of the process. Time: median; the prediction is from layers and copies timed one "
            f"by one in the same rounds. Offload is to this machine's disk. Wanted: peak within {PEAK_WANTED - 1:.0%}, "
            f"time within {TIME_WANTED - 1:.0%}. {threads}",
            rows,
        ),
        table_of(
            "A step whose layers all offload to the disk",
            "All that the backwards of an MLP's layers need, over the same step plainly, which takes turns with it. "
            "Where the page cache is dropped, the file is written through and forgotten by the system between forward "
            f"and backward, which no time includes. Ratios are paired; median, 10th and 90th percentile. {threads}",
            hidden,
        ),
    ]


def _within(row: dict[str, Any]) -> str:
    peak, time_off = abs(row["ratio_peak"] - 1), abs(row["ratio_time"] - 1)
    return against(1, float(peak <= PEAK_WANTED - 1 and time_off <= TIME_WANTED - 1))


def _in_process(stage: str, job: dict[str, Any]) -> Any:
    """Run a stage in a process of its own, whose memory nobody has used before; return what it finds."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "benchmarks.memory_execution", stage, json.dumps(job)]
    try:
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, timeout=TIMEOUT_S)
    except subprocess.TimeoutExpired:
        raise ConfigError(f"the benchmark `memory-execution`, {stage}, has not ended in {TIMEOUT_S:.0f} s") from None
    if done.returncode:
        raise ConfigError(f"the benchmark `memory-execution`, {stage}, has failed: exit code {done.returncode}")
    return json.loads(done.stdout)


def _loaded(model: Sequence[Any]) -> tuple[Workload, Any]:
    from trainers.workload import load

    name, options, batch_size = model
    workload = load(name, options, seed=0, dtype="float32")
    workload.model.train()
    return workload, workload.collate([workload.data[index] for index in range(batch_size)])


def plan(model: Sequence[Any], runs: int, folder: str, chain: str) -> list[dict[str, Any]]:
    """Measure a model's layers into the file `chain`; return plans for it."""
    from trainers.profile import example_of, profile
    from trainers.workload import sequence

    workload, batch = _loaded(model)
    found = profile(sequence(workload), example_of(workload, batch), rounds=runs, folder=Path(folder))
    Path(chain).write_text(found.to_json(), "utf-8")
    return list(_plans(found))


def _plans(chain: Chain) -> Iterator[dict[str, Any]]:
    most = replayed(chain, simple.store_all(chain)).peak_memory
    for policy, overlap in POLICIES:
        named = policies.parse(policy)
        try:
            policies.plan(chain, named, 0.0, overlap)
            least = 0.0
        except InfeasibleBudget as error:
            least = error.least
        for share in SHARES:
            budget = least + share * (most - least)
            made, _ = policies.plan(chain, named, budget, overlap)
            yield {"policy": policy, "overlap": overlap, "budget": budget, "plan": made.text()}


def compare(
    model: Sequence[Any], runs: int, folder: str, chain: str, plans: Sequence[dict[str, Any]]
) -> list[dict[str, Any]]:
    """Run a model plainly and by plans; return a row for each plan."""
    from trainers.memory_trials import freed_memory_returns, trial
    from trainers.memory_trials import measure as measured
    from trainers.precision import Precision
    from trainers.profile import example_of, profile
    from trainers.workload import sequence

    freed_memory_returns()
    workload, batch = _loaded(model)
    example = example_of(workload, batch)
    before = read_chain(chain)
    trials = [trial(before, parse(each["plan"], before.layers), each["budget"], each["overlap"]) for each in plans]
    again: list[Chain] = []

    def each_round() -> None:
        again.append(profile(sequence(workload), example, rounds=1, folder=Path(folder)))

    precision = Precision("full", example.device)
    _, found = measured(
        workload, batch, trials, rounds=runs, folder=Path(folder), precision=precision, each_round=each_round
    )
    timed = _median_times(before, again[1:])
    rows = []
    for each, made, took in zip(plans, trials, found, strict=True):
        assert took.as_planned(made), f"{each['policy']} at {each['budget']}: other gradients, or counts, than planned"
        predicted = replayed(timed, made.plan, each["budget"], each["overlap"]).time
        peak = took.peak_memory
        rows.append(
            {
                "policy": each["policy"],
                "forwards": f"{took.forwards} of {before.layers}",
                "copied_bytes": took.written_bytes,
                "predicted_peak_bytes": made.replay.peak_memory,
                "peak_bytes": peak,
                "ratio_peak": None if peak is None else peak / made.replay.peak_memory,
                "predicted_s": predicted,
                "time_s": took.time,
                "ratio_time": took.time / predicted,
            }
        )
    return rows


def _median_times(chain: Chain, rounds: Sequence[Chain]) -> Chain:
    """Return a chain with the times of several rounds."""
    columns: dict[str, Any] = {
        name: np.median([getattr(each, name) for each in rounds], axis=0)
        for name in ("forward", "backward", "write", "read", "write_saved", "read_saved")
    }
    return replace(chain, **columns)


def hide(model: Sequence[Any], runs: int, folder: str) -> list[dict[str, Any]]:
    """Run a model plainly and with everything offloaded; return a row for each state of the page cache."""
    from trainers.memory_trials import measure as measured
    from trainers.memory_trials import trial
    from trainers.precision import Precision
    from trainers.profile import example_of, profile
    from trainers.workload import sequence

    workload, batch = _loaded(model)
    example = example_of(workload, batch)
    chain = profile(sequence(workload), example, rounds=1, folder=Path(folder))
    made = offload_all(chain)
    budget = replayed(chain, made).peak_memory  # one after the other: no room for what is not needed
    rows = []
    for cache in ("kept", "dropped"):
        plain, (took,) = measured(
            workload,
            batch,
            [trial(chain, made, budget, "full")],
            rounds=runs,
            folder=Path(folder),
            precision=Precision("full", example.device),
            between=_drop if cache == "dropped" else (lambda store: 0.0),
        )
        ratios = np.array(took.times) / np.array(plain.times)
        low, middle, high = np.percentile(ratios, (10, 50, 90)).tolist()
        rows.append(
            {
                "page_cache": cache,
                "copied_bytes": took.written_bytes,
                "plain_s": median(plain.times),
                "time_s": took.time,
                "ratio": middle,
                "ratio_10th": low,
                "ratio_90th": high,
            }
        )
    return rows


def offload_all(chain: Chain) -> MemoryPlan:
    """Return the plan that runs nothing again and keeps only the last layer's."""
    return with_drops(chain, mixed.rows(chain, [mixed.Way.OFFLOAD] * chain.layers, ahead=1))


def _drop(store: Store) -> float:
    """Make the system forget what is in the store's file; return how long that took."""
    import torch

    from trainers.spool import File

    store.write("mark", [torch.zeros(1)]).wait()  # what was written before is: that is the step's own time
    began = time.perf_counter()
    assert isinstance(store.medium, File), "offload is to a folder"
    if not forgotten([store.medium.fileno()]):
        print("benchmarks: the page cache could not be dropped", file=sys.stderr)
    aside = time.perf_counter() - began
    store.discard("mark")
    return aside


STAGES: dict[str, Callable[..., object]] = {"plan": plan, "compare": compare, "hide": hide}


if __name__ == "__main__":
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, range(os.cpu_count() or 1))  # the parent keeps itself to one core
    print(json.dumps(STAGES[sys.argv[1]](**json.loads(sys.argv[2]))))
