"""Messages over TCP sockets of our own: one thread, no framing, not a byte but the tensors'.

Both sides know from the schedule what comes next on each connection and how long it is, so that the kernel's
counters are the payload's, once those of the handshake (meeting.py) are taken off.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import struct
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from distsim.errors import DistsimError
from trainers.meeting import handshake_bytes, meet, own_address
from trainers.transport import Receive, Send, Transport

__all__ = ["TcpTransport", "Wire", "handshake_bytes", "meet", "own_address"]

BLOCK_BYTES = 256 * 1024
"""What is received at once of data that are to be added: they are still in the cache when they are.

A multiple of every element's size."""
YIELDS = 30
"""How often a core is offered to others before this thread goes to sleep, from which it takes long to wake up.

On 2 cores this makes short exchanges 10 to 14 % faster, of 2 ranks and of 4; to spin without it makes them slower.
"""
SHORT_BYTES = 64 * 1024
"""Messages up to here may end at any moment; what is longer is waited for asleep, which leaves the core to backward."""
LEAST_BYTES = 128 * 1024
"""How much of a long message must have arrived to wake up for it: with 1 Gbit/s a third less work than with 64 KiB."""


class Wire(NamedTuple):
    """What the kernel has counted on one connection since it was opened (TCP_INFO)."""

    bytes_acked: int
    """Sent and acknowledged, without retransmissions; with the handshake, see `handshake_bytes`."""
    bytes_received: int
    segs_out: int
    """Packets, those that only acknowledge among them."""
    total_retrans: int
    """Packets sent again."""
    bytes_retrans: int


_TCP_INFO = struct.Struct("=100xI16xQQI68xQ")
"""total_retrans, bytes_acked, bytes_received, segs_out and bytes_retrans in `struct tcp_info` of linux/tcp.h."""


@dataclass(slots=True, eq=False)
class _Connection:
    """One peer: what is to be sent to it and what is expected from it, each in its order."""

    rank: int
    socket: socket.socket
    outgoing: deque[Send] = field(default_factory=deque)
    incoming: deque[Receive] = field(default_factory=deque)
    sent: int = 0
    """Bytes of the first outgoing message that are gone."""
    received: int = 0
    """Bytes of the first incoming message that are here."""
    straight: memoryview | None = None
    """Where it is received to, or ..."""
    added: Tensor | None = None
    """... added to; neither until its first byte is here."""
    carry: bytes = b""
    """The beginning of an element whose end is not here yet."""
    events: int = 0
    """For which `poll` is asked."""
    least_bytes: int = 1
    """How many must have arrived for `poll` to say so."""


class TcpTransport(Transport):
    """Point-to-point messages between the ranks that `meet` has connected; tensors on the CPU."""

    adds = True

    def __init__(
        self,
        rank: int,
        sockets: Mapping[int, socket.socket],
        barrier: Callable[[], object],
        timeout_s: float = 1800.0,
    ) -> None:
        """Take over the sockets; give up when nothing at all can be sent or received for `timeout_s` seconds."""
        super().__init__()
        self.rank = rank
        self.timeout_s = timeout_s
        self._barrier = barrier
        self._connections = {peer: _Connection(peer, each) for peer, each in sockets.items()}
        self._by_number = {each.socket.fileno(): each for each in self._connections.values()}
        self._poll = select.poll()
        self._ended: list[Send | Receive] = []
        self._scratch = torch.empty(BLOCK_BYTES + 16, dtype=torch.uint8)
        self._scratch_bytes = self._scratch.numpy().data
        self._scratch_as: dict[torch.dtype, Tensor] = {}
        for each in sockets.values():
            each.setblocking(False)

    def barrier(self) -> None:
        self._barrier()

    def close(self) -> None:
        """Close all connections; whoever waits for one in another thread gets an error."""
        for each in self._connections.values():
            with contextlib.suppress(OSError):  # it is closed already, here or at the other end
                each.socket.shutdown(socket.SHUT_RDWR)
            each.socket.close()

    def wire(self, peer: int) -> Wire:
        """Return the kernel's counters of the connection to a rank. Linux only."""
        info = self._connections[peer].socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _TCP_INFO.size)
        total_retrans, bytes_acked, bytes_received, segs_out, bytes_retrans = _TCP_INFO.unpack(info)
        return Wire(bytes_acked, bytes_received, segs_out, total_retrans, bytes_retrans)

    def expect(self, receives: Sequence[Receive]) -> None:
        for message in receives:
            if message.size_bytes:
                self._connections[message.src].incoming.append(message)
            else:
                message.land(message.message)
                self._ended.append(message)
        for each in self._connections.values():
            self._register(each)

    def _send(self, sends: Sequence[Send]) -> None:
        for message in sends:
            if message.buffer is None:
                message.buffer = _bytes_of(message.tensor)
            connection = self._connections[message.dst]
            connection.outgoing.append(message)
            if len(connection.outgoing) == 1:
                self._write(connection)
                self._register(connection)

    def _finished(self) -> Sequence[Send | Receive]:
        while not self._ended:
            for number, events in self._wait():
                connection = self._by_number[number]
                if connection.incoming and events & ~select.POLLOUT:
                    self._read(connection)
                if connection.outgoing and events & ~select.POLLIN:
                    self._write(connection)
                self._register(connection)
        ended, self._ended = self._ended, []
        return ended

    def _wait(self) -> list[tuple[int, int]]:
        """Return file numbers and what can be done with them."""
        poll = self._poll.poll
        for _ in range(YIELDS if self._all_short() else 0):
            if ready := poll(0):
                return ready
            os.sched_yield()
        if ready := poll(self.timeout_s * 1000):
            return ready
        raise self._too_late()

    def _all_short(self) -> bool:
        """Whether nothing long is under way."""
        return all(
            (not each.incoming or each.incoming[0].size_bytes <= SHORT_BYTES)
            and (not each.outgoing or len(each.outgoing[0].buffer or b"") <= SHORT_BYTES)
            for each in self._connections.values()
        )

    def _register(self, connection: _Connection) -> None:
        """Wait for what can go on, and for nothing else."""
        events = (select.POLLIN if connection.incoming else 0) | (select.POLLOUT if connection.outgoing else 0)
        if events != connection.events:
            connection.events = events
            if events:
                self._poll.register(connection.socket, events)
            else:
                self._poll.unregister(connection.socket)

    def _write(self, connection: _Connection) -> None:
        """Send what the socket takes."""
        while connection.outgoing:
            message = connection.outgoing[0]
            buffer = message.buffer
            assert buffer is not None
            try:
                connection.sent += connection.socket.send(buffer[connection.sent :] if connection.sent else buffer)
            except BlockingIOError:
                return
            except OSError as error:
                raise _lost(connection) from error
            if connection.sent < len(buffer):
                return
            connection.sent = 0
            self._ended.append(connection.outgoing.popleft())

    def _read(self, connection: _Connection) -> None:
        """Receive what is there of the first message that is expected."""
        message = connection.incoming[0]
        if connection.straight is None and connection.added is None:
            target, adds = message.land(message.message)
            connection.added = target if adds else None
            connection.straight = None if adds else _bytes_of(target)
        try:
            if connection.straight is not None:
                count = connection.socket.recv_into(connection.straight[connection.received :])
            else:
                count = self._read_block(connection, message.size_bytes - connection.received)
        except BlockingIOError:
            return
        except OSError as error:
            raise _lost(connection) from error
        if not count:
            raise _lost(connection)
        connection.received += count
        if message.size_bytes > SHORT_BYTES:
            _wake_up_for(connection, min(message.size_bytes - connection.received, LEAST_BYTES))
        if connection.received == message.size_bytes:
            connection.received = 0
            connection.straight = connection.added = None
            self._ended.append(connection.incoming.popleft())

    def _read_block(self, connection: _Connection, left: int) -> int:
        """Receive into the scratch buffer, add whole elements, and keep what is left of the last one."""
        target, kept = connection.added, len(connection.carry)
        assert target is not None
        if kept:
            self._scratch_bytes[:kept] = connection.carry
        count = connection.socket.recv_into(self._scratch_bytes[kept:], min(left, BLOCK_BYTES))
        size = target.element_size()
        first = connection.received // size
        whole = (kept + count) // size
        scratch = self._scratch_as.get(target.dtype)
        if scratch is None:
            scratch = self._scratch_as[target.dtype] = self._scratch.view(target.dtype)
        target[first : first + whole].add_(scratch[:whole])
        connection.carry = bytes(self._scratch_bytes[whole * size : kept + count])
        return count

    def _too_late(self) -> DistsimError:
        """Say for whom this rank has waited in vain."""
        givers = ", ".join(str(each.rank) for each in self._connections.values() if each.incoming)
        takers = ", ".join(str(each.rank) for each in self._connections.values() if each.outgoing)
        waits = [f"data from rank {givers}"] * bool(givers) + [f"rank {takers} to take data"] * bool(takers)
        return DistsimError(f"rank {self.rank} has waited {self.timeout_s:g} s for {' and for '.join(waits)}")


def _bytes_of(tensor: Tensor) -> memoryview:
    """A tensor's memory, of whatever type it is."""
    return tensor.view(torch.uint8).numpy().data


def _wake_up_for(connection: _Connection, least_bytes: int) -> None:
    """Let `poll` sleep until so much has arrived: on a slow link it would wake up for every packet."""
    if connection.least_bytes != max(least_bytes, 1):
        connection.least_bytes = max(least_bytes, 1)
        connection.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, connection.least_bytes)


def _lost(connection: _Connection) -> DistsimError:
    return DistsimError(f"the connection to rank {connection.rank} is lost; that rank's own message says why")
