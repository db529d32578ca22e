"""The ranks that a test runs on: those of torchrun, or this process alone."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from trainers.exchanger import Exchanger, Handle, Reducer
from trainers.group import ProcessGroup, local_device
from trainers.plan import Plan


class Alone:
    """A Reducer without other ranks: what is handed over is the sum."""

    log = None
    staging_bytes = 0

    def __init__(self) -> None:
        self.spans: dict[int, tuple[float, float]] = {}

    def begin(self) -> None:
        return None

    def reduce(self, exchange: int, tensor: Tensor) -> Handle:
        return _Done()

    def share(self, exchange: int, tensor: Tensor) -> Handle:
        return _Done()

    def sum(self, name: str, numbers: Sequence[float]) -> Callable[[], list[float]]:
        return lambda: list(numbers)

    def barrier(self) -> None:
        return None

    def close(self, failed: bool = False) -> None:
        return None


class _Done:
    def wait(self) -> None:
        return None


class Ranks:
    """Who takes part, and what they tell one another; all ranks make the same calls in the same order."""

    def __init__(self, group: ProcessGroup | None = None) -> None:
        self.size, self.rank = (1, 0) if group is None else (group.world_size, group.rank)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu") if group is None else group.device
        self._group, self._reducers = group, 0

    @contextmanager
    def reducer(self, plan: Plan) -> Iterator[Reducer]:
        """Yield what exchanges gradients: by the plan's schedules, over the trainers' own transport."""
        if self._group is None:
            yield Alone()
            return
        made = Exchanger(plan, self.rank, self._group.lanes("auto", False, self._reducers), self.device)
        self._reducers += 1
        failed = True
        try:
            yield made
            failed = False
        finally:
            made.close(failed)

    def gather(self, mine: Any) -> list[Any]:
        """Return what all ranks have, on all of them."""
        found = [mine]
        if self._group is not None:
            found = [None] * self.size
            dist.all_gather_object(found, mine)
        return found


@contextmanager
def started(fingerprint: Mapping[str, str]) -> Iterator[Ranks]:
    """Meet the other ranks if torchrun has started this one, after comparing what all are about to test.

    Raises: ConfigError naming the ranks that differ.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        yield Ranks()
        return
    with ProcessGroup(local_device()) as group:
        group.agree(dict(fingerprint))
        group.start()
        yield Ranks(group)
