"""The one call in which trainers differ: hand over a bucket, get a handle to wait on.

`Exchanger` runs a plan's schedules over a transport, on a thread of its own, so that backward goes on meanwhile;
`LibraryExchanger` leaves the sums to torch.distributed's own all-reduce.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.profiler import record_function

from distsim import exchanges
from trainers.exchange import ScheduleRunner
from trainers.plan import EVALUATION, SMALL, SUMS, Plan
from trainers.transport import MessageLog, Transport


class Handle(Protocol):
    """An exchange under way."""

    def wait(self) -> None:
        """Return when the tensor that was handed over holds the result."""


class Reducer(Protocol):
    """What a training loop needs of the exchanges of a step."""

    spans: dict[int, tuple[float, float]]
    """Start and end of each schedule of the step under way, by its place in the plan, on the monotonic clock."""

    @property
    def log(self) -> MessageLog | None:
        """What was sent; None where nobody sees it."""

    @property
    def staging_bytes(self) -> int:
        """Bytes set aside for arrivals, the most that were ever needed at once."""

    def begin(self) -> None:
        """Start a new step."""

    def reduce(self, exchange: int, tensor: Tensor) -> Handle:
        """Hand over what one exchange of the plan sums, shape (params,)."""

    def share(self, exchange: int, tensor: Tensor) -> Handle:
        """Hand over what an exchange's servers have updated and its workers wait for, shape (params,)."""

    def sum(self, name: str, numbers: Sequence[float]) -> Callable[[], list[float]]:
        """Sum a few numbers over all ranks, as the plan's exchange of that name; call the answer to wait for it."""

    def barrier(self) -> None:
        """Wait for all ranks."""

    def close(self, failed: bool = False) -> None:
        """Stop; after a failure, without waiting for what can no longer be done."""


GRACE_S = 2.0
"""How long a failed exchange is waited for: one over gloo ends only when the other rank does."""


class Exchanger:
    """Exchanges one after another, in the order in which they are handed over, on a thread of its own.

    On a CUDA device that is a stream of its own, too: an exchange waits for what was queued when it was handed
    over, and waiting for it makes the caller's stream wait.
    """

    def __init__(
        self, plan: Plan, rank: int, transport: Transport, device: torch.device, small: Transport | None = None
    ) -> None:
        """`small` is for numbers, if not `transport` itself: on the CPU, so that nobody waits for the GPU for them."""
        self.spans: dict[int, tuple[float, float]] = {}
        self.transport, self._small = transport, small or transport
        self._small.log = transport.log  # one count of all
        self._plan, self._device = plan, device
        self._first = plan.first_schedule()
        evaluation = exchanges.build(SMALL, plan.ranks, SUMS).gradients  # not of a step: its place is behind all others
        schedules = [*plan.schedules(), evaluation]
        numbers = self._first[len(plan.buckets)]  # the first schedule that is not a bucket's
        self._runners = [
            ScheduleRunner(each, [rank], transport if which < numbers else self._small, which)
            for which, each in enumerate(schedules)
        ]
        self._rank = rank
        self._numbers: dict[str, Tensor] = {}
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="exchanger", daemon=True)
        self._thread.start()

    @property
    def log(self) -> MessageLog:
        return self.transport.log

    @property
    def staging_bytes(self) -> int:
        return sum(runner.staging_bytes for runner in self._runners)

    def begin(self) -> None:
        self.spans.clear()
        self.transport.log.restart()

    def reduce(self, exchange: int, tensor: Tensor) -> Handle:
        return self._start(self._first[exchange], tensor)

    def share(self, exchange: int, tensor: Tensor) -> Handle:
        return self._start(self._first[exchange] + 1, tensor)

    def sum(self, name: str, numbers: Sequence[float]) -> Callable[[], list[float]]:
        which = -1 if name == EVALUATION else self._first[self._plan.names.index(name)]
        if name not in self._numbers:
            self._numbers[name] = torch.empty(
                len(numbers), dtype=torch.float64, device=self._device if self._small is self.transport else "cpu"
            )
        tensor = self._numbers[name]
        tensor.copy_(torch.tensor(numbers, dtype=torch.float64))
        handle = self._start(which, tensor)

        def wait() -> list[float]:
            handle.wait()
            summed: list[float] = tensor.tolist()
            return summed

        return wait

    def barrier(self) -> None:
        self.transport.barrier()

    def close(self, failed: bool = False) -> None:
        self._jobs.put(None)
        if failed:
            self._close()  # wakes the thread up, if it waits for another rank
        self._thread.join(GRACE_S if failed else None)
        self._close()

    def _close(self) -> None:
        for each in {self.transport, self._small}:
            each.close()

    def _start(self, which: int, tensor: Tensor) -> _Job:
        job = _Job(self._runners[which], tensor, self._stream if tensor.is_cuda else None)
        self._jobs.put(job)
        return job

    def _work(self) -> None:
        if self._stream is not None:
            torch.cuda.set_device(self._device)  # which each thread has its own of
        failed: BaseException | None = None
        while (job := self._jobs.get()) is not None:
            began = time.monotonic()
            if failed is None:
                try:
                    job.run(self._rank)
                except BaseException as error:  # whoever waits gets it; those behind it cannot succeed any more
                    failed = error
            self.spans[job.runner.which] = began, time.monotonic()
            job.end(failed)


class _Job:
    """An exchange handed over: its own handle."""

    def __init__(self, runner: ScheduleRunner, tensor: Tensor, stream: torch.cuda.Stream | None) -> None:
        self.runner = runner
        self._tensor, self._stream = tensor, stream
        self._over = threading.Event()
        self._failed: BaseException | None = None
        if stream is not None:
            self._ready, self._done = (torch.cuda.Event() for _ in range(2))  # type: ignore[no-untyped-call]
            self._ready.record(torch.cuda.current_stream(tensor.device))

    def run(self, rank: int) -> None:
        with torch.cuda.stream(self._stream) if self._stream is not None else nullcontext():
            if self._stream is not None:
                self._stream.wait_event(self._ready)
            with record_function(f"exchange {self.runner.which}"):  # its name in a profiler's trace
                self.runner.run({rank: self._tensor})
            if self._stream is not None:
                self._done.record()

    def end(self, failed: BaseException | None) -> None:
        self._failed = failed
        self._over.set()

    def wait(self) -> None:
        self._over.wait()
        if self._failed is not None:
            raise self._failed
        if self._stream is not None:
            torch.cuda.current_stream(self._tensor.device).wait_event(self._done)


class LibraryExchanger:
    """The library's own all-reduce, whose messages nobody sees."""

    log = None
    staging_bytes = 0

    def __init__(self, plan: Plan, device: torch.device) -> None:
        self.spans: dict[int, tuple[float, float]] = {}
        self._plan, self._device = plan, device

    def begin(self) -> None:
        self.spans.clear()

    def reduce(self, exchange: int, tensor: Tensor) -> Handle:
        return _LibraryHandle(self.spans, exchange, tensor)

    def share(self, exchange: int, tensor: Tensor) -> Handle:
        raise AssertionError("an all-reduce leaves nothing to share")

    def sum(self, name: str, numbers: Sequence[float]) -> Callable[[], list[float]]:
        which = len(self._plan.exchanges) if name == EVALUATION else self._plan.names.index(name)
        tensor = torch.tensor(numbers, dtype=torch.float64, device=self._device)
        handle = _LibraryHandle(self.spans, which, tensor)

        def wait() -> list[float]:
            handle.wait()
            summed: list[float] = tensor.tolist()
            return summed

        return wait

    def barrier(self) -> None:
        dist.barrier()

    def close(self, failed: bool = False) -> None:
        return None


class _LibraryHandle:
    def __init__(self, spans: dict[int, tuple[float, float]], which: int, tensor: Tensor) -> None:
        self._spans, self._which, self._began = spans, which, time.monotonic()
        self._work = dist.all_reduce(tensor, async_op=True)

    def wait(self) -> None:
        assert self._work is not None, "the rank is in the process group"
        self._work.wait()
        self._spans[self._which] = self._began, time.monotonic()
