"""Several ranks in one process: a thread for each, with a hard time limit."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")
LIMIT_S = 60.0


def together(*calls: Callable[[], T], limit_s: float = LIMIT_S) -> list[T]:
    """Call all at once, each in a thread of its own; raise what the first of them raises."""
    results: dict[int, T] = {}
    errors: list[BaseException] = []

    def run(place: int) -> None:
        try:
            results[place] = calls[place]()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(place,), daemon=True) for place in range(len(calls))]
    for thread in threads:
        thread.start()
    end = time.monotonic() + limit_s
    for thread in threads:
        thread.join(max(0.0, end - time.monotonic()))
    if errors:
        raise errors[0]
    assert len(results) == len(calls), f"still running after {limit_s} s"
    return [results[place] for place in range(len(calls))]
