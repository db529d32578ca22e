"""Where the points of a sweep run: in this process, in processes on all cores, or where a plug-in puts them.

All have `submit(function, *arguments)` and return a `concurrent.futures.Future`.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol

from distsim.errors import ConfigError

PLUG_INS = "distsim.executors"
"""Entry points of this group are functions of an address that return a context with an executor in it."""


class Executor(Protocol):
    """All that a sweep asks of an executor."""

    def submit(self, function: Callable[..., Any], /, *arguments: Any) -> Future[Any]:
        """Call a function sometime, somewhere."""


class InProcess:
    """Calls functions at once, in this process."""

    def submit(self, function: Callable[..., Any], /, *arguments: Any) -> Future[Any]:
        """Call a function; return when it is done."""
        future: Future[Any] = Future()
        try:
            future.set_result(function(*arguments))
        except Exception as error:
            future.set_exception(error)
        return future


class _Pool:
    """A process pool whose futures can be cancelled and whose processes can then be stopped.

    The pool's own future must not be cancelled before that: its thread then ends with an InvalidStateError,
    which Python prints.
    """

    def __init__(self, pool: ProcessPoolExecutor) -> None:
        self._pool = pool

    def submit(self, function: Callable[..., Any], /, *arguments: Any) -> Future[Any]:
        """Call a function in one of the processes."""
        answer: Future[Any] = Future()

        def pass_on(done: Future[Any]) -> None:
            if not done.cancelled() and answer.set_running_or_notify_cancel():
                error = done.exception()
                if error is not None:
                    answer.set_exception(error)
                else:
                    answer.set_result(done.result())

        self._pool.submit(function, *arguments).add_done_callback(pass_on)
        return answer


def cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0))


@contextmanager
def processes(jobs: int) -> Iterator[Executor]:
    """Yield an executor with `jobs` processes, started afresh: threads of this one cannot be forked safely.

    When the block is left by an exception, what still runs is stopped; otherwise it has ended.
    """
    if jobs == 1:
        yield InProcess()
        return
    others = set(multiprocessing.active_children())
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(jobs, mp_context=context, initializer=_start_worker)
    # Ctrl-C at a terminal goes to all processes; only this one may answer. The new ones inherit what is blocked.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        for _ in range(jobs):
            pool.submit(os.getpid)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    try:
        yield _Pool(pool)
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        mine = set(multiprocessing.active_children()) - others
        for child in mine:
            child.terminate()
        for child in mine:
            child.join()
        raise
    finally:
        pool.shutdown()


def _start_worker() -> None:
    """End when the parent is killed: it is the parent that stops workers otherwise."""
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None, "workers have a parent"
    parent.join()
    os._exit(1)


def plugged_in(name: str, address: str) -> AbstractContextManager[Executor]:
    """Return the executor that a plug-in offers under `name` at an address.

    Raises: ConfigError if there is none or it lacks a package.
    """
    from importlib.metadata import distributions

    # Not `entry_points()`: it sees one installation of each name, and an old build in the current folder hides ours.
    offers = {found for each in distributions() for found in each.entry_points.select(group=PLUG_INS, name=name)}
    for found in offers:
        try:
            offer: Callable[[str], AbstractContextManager[Executor]] = found.load()
        except ImportError as error:
            raise ConfigError(
                f"--{name}: {error.name or error} is not installed; install it with `pip install 'distsim[train]'`"
            ) from None
        return offer(address)
    raise ConfigError(f"--{name}: no installed package offers this; install distsim anew, with its entry points")
