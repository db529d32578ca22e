"""Messages between Ray actors: each goes through the object store, its reference to the receiver's mailbox."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
import ray

from distsim.errors import DistsimError
from trainers.transport import Receive, Send, Transport

DELIVERY_TIMEOUT_S = 1800.0
"""How long a rank waits for another, which may be computing all the while: gloo's own default."""


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

    def take(self, addresses: Collection[tuple[int, int]], timeout_s: float | None) -> tuple[tuple[int, int], Any]:
        """Wait for the first of several letters, each (sender, serial number); return its address, and remove it.

        Raises: DistsimError naming the senders if none comes within `timeout_s`.
        """
        with self._changed:
            if not self._changed.wait_for(lambda: self._there(addresses), timeout_s):
                senders = ", ".join(str(src) for src, _ in addresses)
                raise DistsimError(f"nothing has come from rank {senders} within {timeout_s:.0f} s")
            address = next(iter(self._there(addresses)))
            return address, self._letters.pop(address)

    def _there(self, addresses: Collection[tuple[int, int]]) -> list[tuple[int, int]]:
        return [address for address in addresses if address in self._letters]


class RayTransport(Transport):
    """Sends through the object store of the sender's node; the receiver's node fetches from there.

    Letters are numbered for each ordered pair, since a threaded actor may run deliveries in any order.
    """

    adds = True

    def __init__(self, rank: int, peers: Sequence[Any], mailbox: Mailbox) -> None:
        super().__init__()
        self._rank = rank
        self._peers = peers
        self._mailbox = mailbox
        self._sent = [0] * len(peers)
        self._received = [0] * len(peers)
        self._expected: dict[int, deque[tuple[int, Receive]]] = {}
        self._ended: list[Send | Receive] = []

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

    def expect(self, receives: Sequence[Receive]) -> None:
        for message in receives:
            self._expected.setdefault(message.src, deque()).append((self._next(message.src), message))

    def _send(self, sends: Sequence[Send]) -> None:
        for message in sends:
            # Explicit put of a flat array and a nested reference: twice as fast as passing the array itself.
            self._deliver(message.dst, [ray.put(message.tensor.numpy())])
        self._ended += sends

    def _finished(self) -> Sequence[Send | Receive]:
        if self._ended:
            ended, self._ended = self._ended, []
            return ended
        heads = {(src, line[0][0]): src for src, line in self._expected.items() if line}
        address, (reference,) = self._mailbox.take(heads, DELIVERY_TIMEOUT_S)
        _, message = self._expected[heads[address]].popleft()
        array: np.ndarray = ray.get(reference)  # a read-only view of this node's store
        target, adds = message.land(message.message)
        if adds:
            np.add(target.numpy(), array, out=target.numpy())
        else:
            np.copyto(target.numpy(), array)
        return [message]

    def _deliver(self, dst: int, letter: list[Any]) -> None:
        self._peers[dst].deliver.remote(self._rank, self._sent[dst], letter)
        self._sent[dst] += 1

    def _next(self, src: int) -> int:
        self._received[src] += 1
        return self._received[src] - 1

    def _take(self, src: int) -> None:
        # As long as it takes: others may compute for hours, and whoever dies is seen by the driver.
        self._mailbox.take([(src, self._next(src))], None)
