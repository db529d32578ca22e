"""How many bytes some lines of code allocate: tensors, and what kernels need for themselves.

with Meter(torch.device("cpu")) as meter:
    with meter.span("forward"):
        out = layer(given)
meter.used["forward"].most
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile, record_function

PREFIX = "trainers.meter "
"""Of the names of spans, to find them among all that is recorded."""


class Used(NamedTuple):
    """What a span has allocated, in bytes: less what was given back at its end, and the most at any moment."""

    left: int
    most: int


class Meter:
    """Counts what torch allocates on a device within spans that do not overlap.

    On a CPU it reads the events of torch's profiler, so that there can be no other one at the time; on a GPU the
    allocator's counters, in its blocks of 512 bytes.
    """

    def __init__(self, device: torch.device) -> None:
        self.used: dict[str, Used] = {}
        """Of each span, by name; there on leaving the meter."""
        self._device = device
        self._profile: Any = None
        if device.type != "cuda":
            os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # it tells stderr of each start and stop otherwise
            self._profile = profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=False)

    @contextmanager
    def span(self, name: str) -> Iterator[None]:
        """Count what happens in this context under a name."""
        if self._profile is not None:
            with record_function(f"{PREFIX}{name}"):
                yield
            return
        torch.cuda.reset_peak_memory_stats(self._device)
        before = torch.cuda.memory_allocated(self._device)
        yield
        left, most = torch.cuda.memory_allocated(self._device), torch.cuda.max_memory_allocated(self._device)
        self.used[name] = Used(left - before, most - before)

    def __enter__(self) -> Self:
        if self._profile is not None:
            self._profile.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._profile is not None:
            self._profile.__exit__(kind, error, traceback)
            if error is None:
                self._count(self._profile.profiler.kineto_results.events())

    def _count(self, events: list[Any]) -> None:
        changes = [(each.start_ns(), each.nbytes()) for each in events if each.name() == "[memory]"]
        changes.sort(key=lambda change: change[0])  # at one time in the order in which they are recorded
        times = np.array([when for when, _ in changes], np.int64)
        totals = np.cumsum([0, *(change for _, change in changes)])
        for each in events:
            if each.name().startswith(PREFIX):
                first = np.searchsorted(times, each.start_ns())
                last = np.searchsorted(times, each.end_ns(), side="right")
                within = totals[first : last + 1] - totals[first]
                self.used[each.name().removeprefix(PREFIX)] = Used(int(within[-1]), int(within.max()))
