"""Messages between Ray actors: each goes through the object store, its reference to the receiver's mailbox."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray
from torch import Tensor

from distsim.errors import DistsimError
from trainers.transport import Done, Message, Request, Transport

DELIVERY_TIMEOUT_S = 300.0


class Mailbox:
    """References that have been delivered and not yet fetched, by (sender, serial number)."""

    def __init__(self) -> None:
        self._letters: dict[tuple[int, int], Any] = {}
        self._changed = threading.Condition()

    def put(self, src: int, serial: int, letter: Any) -> None:
        """Deliver a letter: a list that holds one object reference, or nothing for a signal."""
        with self._changed:
            self._letters[src, serial] = letter
            self._changed.notify_all()

    def take(self, src: int, serial: int, timeout_s: float | None) -> Any:
        """Wait for a letter and remove it.

        Raises: DistsimError naming the sender if it does not come within `timeout_s`.
        """
        with self._changed:
            if not self._changed.wait_for(lambda: (src, serial) in self._letters, timeout_s):
                raise DistsimError(f"message {serial} of rank {src} has not come within {timeout_s:.0f} s")
            return self._letters.pop((src, serial))


class RayTransport(Transport):
    """Sends through the object store of the sender's node; the receiver's node fetches from there.

    Letters are numbered for each ordered pair, since a threaded actor may run deliveries in any order.
    """

    def __init__(self, rank: int, peers: Sequence[Any], mailbox: Mailbox) -> None:
        super().__init__()
        self._rank = rank
        self._peers = peers
        self._mailbox = mailbox
        self._sent = [0] * len(peers)
        self._received = [0] * len(peers)

    @property
    def ranks(self) -> int:
        """Number of ranks."""
        return len(self._peers)

    def barrier(self) -> None:
        """Wait for all ranks. Signals carry no data and are not counted."""
        if self._rank == 0:
            for peer in range(1, len(self._peers)):
                self._take(peer)
            for peer in range(1, len(self._peers)):
                self._deliver(peer, [])
        else:
            self._deliver(0, [])
            self._take(0)

    def _start(self, sends: Sequence[Message], receives: Sequence[Message]) -> tuple[list[Request], list[Request]]:
        arriving = [_Arriving(self, message.src, self._next(message.src), message.tensor) for message in receives]
        for message in sends:
            # Explicit put of a flat array and a nested reference: twice as fast as passing the array itself.
            self._deliver(message.dst, [ray.put(message.tensor.numpy())])
        return [Done()] * len(sends), list(arriving)

    def _deliver(self, dst: int, letter: list[Any]) -> None:
        self._peers[dst].deliver.remote(self._rank, self._sent[dst], letter)
        self._sent[dst] += 1

    def _next(self, src: int) -> int:
        self._received[src] += 1
        return self._received[src] - 1

    def _take(self, src: int) -> Any:
        # As long as it takes: others may compute for hours, and whoever dies is seen by the driver.
        return self._mailbox.take(src, self._next(src), None)

    def fetch(self, src: int, serial: int) -> np.ndarray:
        """Wait for a letter and fetch its object, a read-only view of this node's store."""
        (reference,) = self._mailbox.take(src, serial, DELIVERY_TIMEOUT_S)
        array: np.ndarray = ray.get(reference)
        return array


@dataclass(frozen=True, slots=True)
class _Arriving:
    transport: RayTransport
    src: int
    serial: int
    target: Tensor

    def wait(self) -> None:
        np.copyto(self.target.numpy(), self.transport.fetch(self.src, self.serial))
