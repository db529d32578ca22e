"""The one call in which trainers differ: hand over a bucket, get a handle to wait on.

`Exchanger` runs a plan's schedules over transports, on threads of their own, so that backward goes on meanwhile;
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
from distsim.schedule import Schedule
from trainers.exchange import ScheduleRunner, Staging
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
    """Exchanges a plan's buckets and numbers, in lanes: each is a transport and a thread of its own.

    Exchanges of one lane follow one another in the order in which they are handed over; with two lanes the links
    are busy while one exchange turns from what has arrived to what it sends next. On a CUDA device lanes have
    streams of their own, too: an exchange waits for what was queued when it was handed over, and waiting for it
    makes the caller's stream wait.
    """

    def __init__(self, plan: Plan, rank: int, lanes: Sequence[Transport], device: torch.device) -> None:
        """Exchanges take the lanes in turn; with CUDA the last one is for numbers alone, which are on the CPU."""
        self.spans: dict[int, tuple[float, float]] = {}
        self.log = lanes[0].log
        for each in lanes:
            each.log = self.log  # one count of all
        self._plan, self._cpu_lane = plan, device.type == "cuda"
        self._first = plan.first_schedule()
        self._lanes = [_Lane(each, rank, device, self.spans) for each in lanes]
        self._runners: dict[int, tuple[ScheduleRunner, _Lane]] = {}
        for place, exchange in enumerate(plan.exchanges):
            for which, schedule in enumerate(exchange.schedules(), self._first[place]):
                self._run_in(self._lane_of(place), which, schedule, rank)
        self._evaluation = len(self._runners)  # not of a step: its place is behind all others
        schedule = exchanges.build(SMALL, plan.ranks, SUMS).gradients
        self._run_in(self._lanes[-1], self._evaluation, schedule, rank)
        self._numbers: dict[str, Tensor] = {}

    def _lane_of(self, exchange: int) -> _Lane:
        if self._cpu_lane and exchange >= len(self._plan.buckets):
            return self._lanes[-1]
        return self._lanes[exchange % (len(self._lanes) - self._cpu_lane)]

    def _run_in(self, lane: _Lane, which: int, schedule: Schedule, rank: int) -> None:
        self._runners[which] = ScheduleRunner(schedule, [rank], lane.transport, which, lane.staging), lane

    @property
    def staging_bytes(self) -> int:
        return sum(lane.staging.total_bytes for lane in self._lanes)

    def begin(self) -> None:
        self.spans.clear()
        self.log.restart()

    def reduce(self, exchange: int, tensor: Tensor) -> Handle:
        return self._start(self._first[exchange], tensor)

    def share(self, exchange: int, tensor: Tensor) -> Handle:
        return self._start(self._first[exchange] + 1, tensor)

    def sum(self, name: str, numbers: Sequence[float]) -> Callable[[], list[float]]:
        which = self._evaluation if name == EVALUATION else self._first[self._plan.names.index(name)]
        if name not in self._numbers:
            self._numbers[name] = torch.empty(len(numbers), dtype=torch.float64)
        tensor = self._numbers[name]
        tensor.copy_(torch.tensor(numbers, dtype=torch.float64))
        handle = self._start(which, tensor)

        def wait() -> list[float]:
            handle.wait()
            summed: list[float] = tensor.tolist()
            return summed

        return wait

    def barrier(self) -> None:
        self._lanes[0].transport.barrier()

    def close(self, failed: bool = False) -> None:
        for lane in self._lanes:
            lane.close(failed)

    def _start(self, which: int, tensor: Tensor) -> _Job:
        runner, lane = self._runners[which]
        job = _Job(runner, tensor, lane.stream if tensor.is_cuda else None)
        lane.jobs.put(job)
        return job


class _Lane:
    """A transport, and a thread that does what is handed over."""

    def __init__(
        self, transport: Transport, rank: int, device: torch.device, spans: dict[int, tuple[float, float]]
    ) -> None:
        self.transport, self._rank, self._device, self._spans = transport, rank, device, spans
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        self.staging = Staging()  # one exchange at a time: all of them share it
        self.jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="exchanger", daemon=True)
        self._thread.start()

    def close(self, failed: bool) -> None:
        self.jobs.put(None)
        if failed:
            self.transport.close()  # wakes the thread up, if it waits for another rank
        self._thread.join(GRACE_S if failed else None)
        self.transport.close()

    def _work(self) -> None:
        if self.stream is not None:
            torch.cuda.set_device(self._device)  # which each thread has its own of
        failed: BaseException | None = None
        while (job := self.jobs.get()) is not None:
            began = time.monotonic()
            if failed is None:
                try:
                    job.run(self._rank)
                except BaseException as error:  # whoever waits gets it; those behind it cannot succeed any more
                    failed = error
            self._spans[job.runner.which] = began, time.monotonic()
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
