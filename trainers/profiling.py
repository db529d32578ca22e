"""A trace of some training steps by torch.profiler, for https://ui.perfetto.dev or chrome://tracing."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

from torch import profiler
from torch._C._profiler import _ExperimentalConfig

from distsim.errors import ConfigError
from distsim.files import make_writable
from trainers.config import WARM_UP


class Steps(Protocol):
    """Is told when a step is over."""

    def step(self) -> None:
        """A training step is over."""


class _NoSteps:
    def step(self) -> None:
        return None


@contextmanager
def traced(steps: int, path: Path, enabled: bool) -> Iterator[Steps]:
    """Trace `steps` steps, after two of warm-up, into the JSON file `path`; nothing at all unless enabled.

    Call `step()` of what it yields after each step. The file is there, whole, as soon as the last traced step is
    over; a run that ends before leaves what was traced until then, and none if it ends in warm-up. Names of one's own
    come from torch.profiler.record_function.

    Raises: ConfigError, before any step, if the file's folder cannot be written.
    """
    if not enabled:
        yield _NoSteps()
        return
    make_writable(path.parent)

    def save(trace: profiler.profile) -> None:
        partial = path.parent / f".{path.name}.{os.getpid()}"
        try:
            trace.export_chrome_trace(str(partial))
            partial.replace(path)
        except OSError as error:
            raise ConfigError(f"{path}: cannot write it: {error.strerror}") from error
        finally:
            partial.unlink(missing_ok=True)

    schedule = profiler.schedule(wait=WARM_UP - 1, warmup=1, active=steps, repeat=1)
    threads = _ExperimentalConfig(profile_all_threads=True)  # exchanges have a thread of their own
    with profiler.profile(schedule=schedule, on_trace_ready=save, experimental_config=threads) as trace:
        yield trace
