"""Memory plans run on the module that they are for: time and peak of memory, counted and timed in turns.

expected = [trial(chain, point.plan, point.budget, "full") for point in front]
plain, found = measure(workload, batch, expected, rounds=7, folder=Path("/scratch"), precision=precision)
"""

from __future__ import annotations

import ctypes
import gc
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import Function
from tqdm import tqdm

from distsim.errors import ConfigError
from distsim.memory.chain import Chain
from distsim.memory.order import by_start
from distsim.memory.plan import MemoryPlan, Op
from distsim.memory.replay import READS, WRITES, Overlap, Replay
from trainers.memory import apply
from trainers.memory_program import Counts
from trainers.offload import Store, disk_store, host_store, room_bytes
from trainers.precision import Precision
from trainers.profile import example_of
from trainers.transport import synchronize
from trainers.workload import Workload, sequence

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""Of mallopt(3)."""
RETURNED_BYTES, KEPT_BYTES = 2**16, 2**25
"""Allocations from which on glibc gives memory back to the system: while memory is measured, and otherwise."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Trial:
    """A plan to run, and what is expected of it."""

    plan: MemoryPlan
    replay: Replay
    written_bytes: int
    read_bytes: int


def trial(chain: Chain, plan: MemoryPlan, budget: float, overlap: Overlap) -> Trial:
    """Prepare a plan to be run; PlanError if it is none for this chain.

    Its rows are put into the order in which they start, where that makes no difference to its replay: whoever runs
    a plan takes one row after the other, and a copy that goes on beside a computation is to begin before it.
    """
    plan, found = by_start(chain, plan, budget, overlap)
    rows = plan.rows()
    moved = {ops: sum(_copied(chain, op, layer) for op, layer in rows if op in ops) for ops in (WRITES, READS)}
    return Trial(plan=plan, replay=found, written_bytes=moved[WRITES], read_bytes=moved[READS])


def _copied(chain: Chain, op: Op, layer: int) -> int:
    whole = op in (Op.WRITE_SAVED, Op.READ_SAVED)
    return int(chain.saved[layer - 1] if whole and chain.saved is not None else chain.size[layer])


class Measured(NamedTuple):
    """What layers took that ran by a plan, or plainly."""

    times: list[float]
    """Seconds of forward and backward, of each round."""
    peak_memory: int | None
    """Bytes: the layers' input, and by how much memory has grown beside it at most. On a CPU that is what the operating
    system sees, all pages of the process, on a GPU what torch's allocator has handed out; None where neither is had."""
    forwards: int
    loads: int
    stores: int
    written_bytes: int
    read_bytes: int
    exact: bool
    """Whether loss, gradients and buffers are those of the plain layers, to the bit."""

    @property
    def time(self) -> float:
        """Median."""
        return median(self.times)

    def as_planned(self, planned: Trial) -> bool:
        """Whether results are exact, and counts those of the plan."""
        expected = planned.replay
        counts = (expected.forwards, expected.loads, expected.stores, planned.written_bytes, planned.read_bytes)
        return self.exact and self[2:7] == counts


def measure(
    workload: Workload,
    batch: Any,
    trials: Sequence[Trial],
    *,
    rounds: int,
    folder: Path | None = None,
    precision: Precision,
    each_round: Callable[[], object] = lambda: None,
    between: Callable[[Store], float] = lambda store: 0.0,
    progress: bool = False,
) -> tuple[Measured, list[Measured]]:
    """Run a workload's layers plainly and by each plan; return what the plain ones took, and those by plans.

    Model and batch are on one device. Plans copy to a folder's disk, or to host memory without one. Of the model, only
    the layers' own forward and backward are timed; a first round is not counted. `each_round` is called before every
    round, `between` after the forward of each plan that copies: it returns how many seconds the step does not include.
    The model's gradients and buffers change, as in training.

    Raises: ConfigError for plans that the layers cannot run, and for copies from host memory to itself.
    """
    freed_memory_returns()
    layers = sequence(workload)
    with precision.autocast():
        example = example_of(workload, batch)
    stored = max((each.written_bytes for each in trials), default=0)
    if stored and folder is None and example.device.type != "cuda":
        raise ConfigError(
            "these plans offload to host memory, where the layers compute: give a folder, such as /dev/shm, which is "
            "memory, too"
        )
    runs: list[Trial | None] = [None, *trials]
    bar = tqdm(
        total=rounds + 3,
        desc="running plans",
        unit="round",
        file=sys.stderr,
        delay=2,
        leave=False,
        disable=not progress,
    )
    with bar, ExitStack() as stack:
        store = stack.enter_context(_store(folder, trials)) if stored else None

        def step(each: Trial | None) -> tuple[Counts | None, float]:
            """Run forward and backward once; return what a plan has counted, and seconds that are not the step's."""
            given = example.detach().requires_grad_(example.requires_grad)
            with _by_plan(layers, each, store) as applied:
                with precision.autocast():
                    lost = _Loss.apply(layers(given))  # type: ignore[no-untyped-call]
                aside = 0.0 if applied is None or store is None else between(store)
                lost.backward()
            return (None if applied is None else applied.last), aside

        counts, peaks = [], []
        for each in runs:
            step(each)  # starts libraries, allocates what stays
            counts.append(step(each)[0])
            peaks.append(_most_memory(lambda each=each: step(each), example.device))  # type: ignore[misc]
        bar.update()
        freed_memory_stays()
        outcomes = []
        for each in runs:
            with _by_plan(layers, each, store):
                outcomes.append(_outcome(workload, batch, precision))
        exact = [_same(outcomes[0], each) for each in outcomes]
        del outcomes
        bar.update()
        times: list[list[float]] = [[] for _ in runs]
        for _ in range(1 + rounds):
            each_round()
            for each, own in zip(runs, times, strict=True):
                gc.collect()
                own.append(_seconds(lambda each=each: step(each), example.device))  # type: ignore[misc]
            bar.update()
    input_bytes = example.untyped_storage().nbytes()
    found = [
        Measured(
            times=own[1:],
            peak_memory=None if peak is None else peak + input_bytes,
            forwards=sum(count.forwards) if count else len(layers),
            loads=sum(count.loads) if count else 0,
            stores=sum(count.stores) if count else 0,
            written_bytes=count.written_bytes if count else 0,
            read_bytes=count.read_bytes if count else 0,
            exact=same,
        )
        for own, peak, count, same in zip(times, peaks, counts, exact, strict=True)
    ]
    return found[0], found[1:]


class _Loss(Function):
    """LOSS: a gradient of ones for the output, which nobody holds on to."""

    @staticmethod
    def forward(ctx: Any, output: Tensor) -> Tensor:
        ctx.shape = output.shape
        return output.new_zeros(())

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient.new_ones(ctx.shape)


def _store(folder: Path | None, trials: Sequence[Trial]) -> Store:
    if folder is None:
        return host_store()
    # A write takes whole pages, and one more wherever what is stored is in another order.
    most = max(room_bytes(each.written_bytes) + each.replay.stores * 2 * room_bytes(1) for each in trials)
    return disk_store(folder, most)


@contextmanager
def _by_plan(layers: nn.Sequential, each: Trial | None, store: Store | None) -> Iterator[Any]:
    """Let layers run by a plan, or plainly."""
    if each is None:
        yield None
        return
    applied = apply(layers, each.plan, waits=each.replay.waits, store=store)
    try:
        yield applied
    finally:
        applied.remove()


def _outcome(workload: Workload, batch: Any, precision: Precision) -> list[Tensor]:
    """Return the whole model's loss, gradients and buffers of one step; gradients then stay, buffers do not."""
    model = workload.model
    before = [each.clone() for each in model.buffers()]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model.zero_grad()
        with precision.autocast():
            lost = workload.loss(model, batch)
        lost.backward()  # type: ignore[no-untyped-call]
    found = [lost, *(each.grad for each in model.parameters() if each.grad is not None), *model.buffers()]
    copies = [each.detach().clone() for each in found]
    with torch.no_grad():
        for each, value in zip(model.buffers(), before, strict=True):
            each.copy_(value)
    return copies


def _same(one: list[Tensor], other: list[Tensor]) -> bool:
    def bits(each: Tensor) -> Tensor:
        return each.flatten().view(torch.uint8)  # NaN is itself, 0 is not -0

    return len(one) == len(other) and all(torch.equal(bits(a), bits(b)) for a, b in zip(one, other, strict=True))


def _seconds(run: Callable[[], tuple[object, float]], device: torch.device) -> float:
    synchronize(device)
    began = perf_counter()
    _, aside = run()
    synchronize(device)
    return perf_counter() - began - aside


def freed_memory_returns() -> None:
    """From now on give what is freed back to the system at once, so that resident memory says what is in use.

    It slows allocations down. What was freed before may still be used again, and counts then: call this before
    anything large is allocated. Does nothing without glibc.
    """
    _allocator(RETURNED_BYTES)


def freed_memory_stays() -> None:
    """Let glibc keep what is freed, as much as it would have come to by itself."""
    _allocator(KEPT_BYTES)


def _allocator(threshold: int) -> None:
    library = ctypes.CDLL(None)
    if hasattr(library, "mallopt"):
        library.mallopt(M_MMAP_THRESHOLD, threshold)
        library.mallopt(M_TRIM_THRESHOLD, 2 * threshold)


def _most_memory(run: Callable[[], object], device: torch.device) -> int | None:
    """Return by how many bytes memory has grown at most during a run; None where that cannot be known."""
    gc.collect()
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        run()
        return torch.cuda.max_memory_allocated(device) - before
    library = ctypes.CDLL(None)
    if not hasattr(library, "malloc_trim"):
        return None
    library.malloc_trim(0)
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # from now on the high-water mark is that of the run
    run()
    return _status("VmHWM") - before


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text("ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))
