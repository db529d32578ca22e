"""Points of a sweep as Ray tasks: what `distsim sweep --ray ADDRESS` finds by its entry point."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any

import ray

from distsim.errors import ConfigError, DistsimError
from trainers.ray_session import session


class RayExecutor:
    """Calls functions as Ray tasks of one core each, wherever the cluster has one free."""

    def submit(self, function: Callable[..., Any], /, *arguments: Any) -> Future[Any]:
        """Call a function sometime; its DistsimErrors come back as they are."""
        answer: Future[Any] = Future()
        answer.set_running_or_notify_cancel()
        reference = ray.remote(function).remote(*arguments)
        reference.future().add_done_callback(lambda done: _pass_on(done, answer))
        return answer


def _pass_on(done: Future[Any], answer: Future[Any]) -> None:
    error = done.exception()
    if error is None:
        answer.set_result(done.result())
    elif isinstance(error, ray.exceptions.RayTaskError) and isinstance(error.cause, DistsimError):
        answer.set_exception(error.cause)
    elif isinstance(error, ray.exceptions.RayError) and not isinstance(error, ray.exceptions.RayTaskError):
        answer.set_exception(DistsimError(f"Ray lost a task of the sweep: {error}"))
    else:
        answer.set_exception(error)


@contextmanager
def connect(address: str) -> Iterator[RayExecutor]:
    """Yield an executor on the Ray cluster at an address; "local" is one that ends with the block.

    Raises: ConfigError if none answers.
    """
    try:
        running = session(None if address == "local" else address, exchange_bytes=0)
        with running:
            yield RayExecutor()
    except ConfigError as error:
        raise ConfigError(str(error).replace("--ray-address", "--ray")) from None
