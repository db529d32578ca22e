"""Ranks that share a store connect pairwise by TCP, and prove to each other that they are of one run.

The store holds a secret of the run and everybody's address. Of each pair the higher rank connects and says who it
is; then both show that they know the secret, by an HMAC of the two nonces of this connection and both ranks'
numbers (challenge and response, so that nothing overheard is of use again). All parts have a fixed length:

    higher -> lower: rank, nonce    lower -> higher: nonce, proof    higher -> lower: proof

After that not a byte but payload crosses the connection.
"""

from __future__ import annotations

import hmac
import secrets
import selectors
import socket
import struct
import time
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from datetime import timedelta

from torch.distributed.distributed_c10d import Store

from distsim.errors import ConfigError, DistsimError

PATIENCE_S = 10.0
"""How long a stranger may take over the handshake."""
STRANGERS = 64
"""Handshakes under way at once, besides the ranks'; the oldest gives way to a newer one."""
LOOPBACK_BUFFER_BYTES = 448 * 1024
"""What a socket to the same host may buffer (Linux doubles it): a core's cache then holds what is on the way.

With the buffers that Linux grows by itself, of up to 4 MB, a ring of 4 ranks on 2 cores took 1.5 times as long.
"""
NONCE_BYTES = 32
HELLO = struct.Struct(f"!I{NONCE_BYTES}s")
ANSWER = struct.Struct(f"!{NONCE_BYTES}s32s")
PROOF_BYTES = 32


def own_address(master_addr: str, single_machine: bool) -> str:
    """Return the address at which this rank can be reached: loopback, or that from which MASTER_ADDR is reached.

    Raises: ConfigError if MASTER_ADDR is unknown here, or is the loopback address though there are other machines.
    """
    if single_machine:
        return "127.0.0.1"
    try:
        family, kind, protocol, _, where = socket.getaddrinfo(master_addr, 1, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.connect(where)  # of a datagram socket: asks the routing table, sends nothing
            address = str(probe.getsockname()[0])
    except (OSError, UnicodeError) as error:
        raise ConfigError(f"MASTER_ADDR {master_addr!r} cannot be reached from this machine: {error}") from error
    if address.startswith("127.") or address == "::1":
        raise ConfigError(
            f"MASTER_ADDR {master_addr!r} is the loopback address {address} on this machine, where ranks of other "
            "machines cannot reach it; expected an address of its network (torchrun: --master-addr or --local-addr)"
        )
    return address


def meet(store: Store, rank: int, world_size: int, host: str, timeout_s: float = 120.0) -> dict[int, socket.socket]:
    """Connect this rank with all others, which do the same at the same time; return rank -> socket.

    `store` is one in which nobody has met yet (a PrefixStore); `host` is this rank's own address. Whoever else
    connects is refused.

    Raises: DistsimError naming the ranks that have not come within `timeout_s` seconds, or that are not who they
    should be; DistsimError if the store is gone.
    """
    end = time.monotonic() + timeout_s
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sockets: dict[int, socket.socket] = {}
    with ExitStack() as undo:
        try:
            listener = socket.create_server((host, 0), family=family, backlog=max(128, world_size))
        except OSError as error:
            raise DistsimError(f"rank {rank} cannot listen on its own address {host}: {error}") from error
        with listener:
            undo.callback(_close_all, sockets)
            try:
                secret = bytes.fromhex(store.compare_set("tcp/secret", "", secrets.token_hex(32)).decode())
                store.set(f"tcp/address/{rank}", f"{host} {listener.getsockname()[1]}")
            except RuntimeError as error:
                raise DistsimError("the store in which ranks meet is lost; rank 0's own message says why") from error
            for peer in range(rank):
                address = _address_of(store, peer, world_size, end, timeout_s)
                sockets[peer] = _connect(address, secret, rank, peer, end, timeout_s)
            _Reception(listener, secret, rank, world_size, sockets).admit(end, timeout_s)
        for each in sockets.values():
            each.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if each.getpeername()[0] == each.getsockname()[0]:
                each.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, LOOPBACK_BUFFER_BYTES)
        undo.pop_all()
    return dict(sorted(sockets.items()))


def handshake_bytes(rank: int, peer: int) -> int:
    """Return what the handshake has added to TCP_INFO's bytes_acked at `rank`'s end of the connection to `peer`.

    Linux counts the acknowledged SYN of the side that connects as one byte.
    """
    return 1 + HELLO.size + PROOF_BYTES if rank > peer else ANSWER.size


def _proof(secret: bytes, side: bytes, higher: int, lower: int, nonces: bytes) -> bytes:
    """Prove knowledge of the secret; the side is in it, so that neither side's proof serves as the other's."""
    return hmac.digest(secret, side + struct.pack("!II", higher, lower) + nonces, "sha256")


def _left_s(end: float) -> float:
    """Return the seconds until then, as a timeout: 0 would mean none."""
    return max(0.001, end - time.monotonic())


def _address_of(store: Store, peer: int, world_size: int, end: float, timeout_s: float) -> tuple[str, int]:
    """Wait for a rank's address in the store."""
    try:
        store.wait([f"tcp/address/{peer}"], timedelta(seconds=_left_s(end)))
        host, _, port = store.get(f"tcp/address/{peer}").decode().partition(" ")
    except RuntimeError as error:
        raise DistsimError(f"rank {peer} of {world_size} has not come within {timeout_s:g} s") from error
    return host, int(port)


def _connect(
    address: tuple[str, int], secret: bytes, rank: int, peer: int, end: float, timeout_s: float
) -> socket.socket:
    """Connect to a lower rank and convince each other. It may take its time: it connects to others first."""
    where = f"rank {peer} at {address[0]} port {address[1]}"
    with ExitStack() as undo:
        try:
            connection = undo.enter_context(socket.create_connection(address, timeout=_left_s(end)))
            nonce, answer = secrets.token_bytes(NONCE_BYTES), b""
            connection.sendall(HELLO.pack(rank, nonce))
            while len(answer) < ANSWER.size:
                connection.settimeout(_left_s(end))
                part = connection.recv(ANSWER.size - len(answer))
                if not part:
                    raise DistsimError(f"{where} has refused rank {rank}")
                answer += part
            other_nonce, proof = ANSWER.unpack(answer)
            if not hmac.compare_digest(proof, _proof(secret, b"lower", rank, peer, nonce + other_nonce)):
                raise DistsimError(f"what answers as {where} is not that rank of this run")
            connection.sendall(_proof(secret, b"higher", rank, peer, nonce + other_nonce))
        except TimeoutError as error:
            raise DistsimError(f"{where} has not answered rank {rank} within {timeout_s:g} s") from error
        except OSError as error:
            raise DistsimError(f"rank {rank} cannot connect to {where}: {error}") from error
        undo.pop_all()
    return connection


@dataclass(slots=True, eq=False)
class _Stranger:
    """Somebody who has connected and has not yet proven to be a rank."""

    connection: socket.socket
    deadline: float
    heard: bytes = b""
    rank: int = -1
    """Who it says it is."""
    nonces: bytes = b""
    """Of both sides, once it has said that."""


class _Reception:
    """Lets the higher ranks in and nobody else; hears all who knock at once, so that none holds up another."""

    def __init__(
        self, listener: socket.socket, secret: bytes, rank: int, world_size: int, sockets: dict[int, socket.socket]
    ) -> None:
        self.listener, self.secret, self.rank, self.world_size = listener, secret, rank, world_size
        self.sockets = sockets
        self.selector = selectors.DefaultSelector()
        self.strangers: dict[int, _Stranger] = {}  # by file number, the oldest first

    def admit(self, end: float, timeout_s: float) -> None:
        """Accept until all higher ranks are in `sockets`."""
        self.listener.setblocking(False)
        self.selector.register(self.listener, selectors.EVENT_READ)
        try:
            while missing := [str(rank) for rank in range(self.rank + 1, self.world_size) if rank not in self.sockets]:
                now = time.monotonic()
                if now >= end:
                    raise DistsimError(
                        f"rank {', '.join(missing)} of {self.world_size} has not come to rank {self.rank} "
                        f"within {timeout_s:g} s"
                    )
                for each in list(self.strangers.values()):
                    if each.deadline <= now or len(self.strangers) > STRANGERS + self.world_size:
                        self._let_go(each).close()
                until = min([end, *(each.deadline for each in self.strangers.values())])
                for key, _ in self.selector.select(max(0.0, until - now)):
                    if key.fileobj is self.listener:
                        self._welcome()
                    else:
                        self._hear(self.strangers[key.fd])
        finally:
            self.selector.close()
            for each in self.strangers.values():
                each.connection.close()

    def _welcome(self) -> None:
        with suppress(OSError):  # gone again, or out of file numbers: others have to go first
            connection, _ = self.listener.accept()
            connection.setblocking(False)
            self.strangers[connection.fileno()] = _Stranger(connection, time.monotonic() + PATIENCE_S)
            self.selector.register(connection, selectors.EVENT_READ)

    def _let_go(self, stranger: _Stranger) -> socket.socket:
        self.selector.unregister(stranger.connection)
        return self.strangers.pop(stranger.connection.fileno()).connection

    def _hear(self, stranger: _Stranger) -> None:
        """Go on with a handshake; never read more than belongs to it, since payload may follow."""
        size = PROOF_BYTES if stranger.nonces else HELLO.size
        try:
            part = stranger.connection.recv(size - len(stranger.heard))
            stranger.heard += part
            if part and len(stranger.heard) < size:
                return
            if part and not stranger.nonces and self._answer(stranger):
                return
        except OSError:
            part = b""  # gone, or it does not listen
        connection = self._let_go(stranger)
        if part and stranger.nonces and self._is_proven(stranger):
            self.sockets[stranger.rank] = connection
        else:
            connection.close()

    def _answer(self, stranger: _Stranger) -> bool:
        """Prove to be this rank, if it says that it is one who is still to come."""
        rank, nonce = HELLO.unpack(stranger.heard)
        if not self._is_awaited(rank):
            return False
        own = secrets.token_bytes(NONCE_BYTES)
        stranger.rank, stranger.nonces, stranger.heard = rank, nonce + own, b""
        proof = _proof(self.secret, b"lower", rank, self.rank, stranger.nonces)
        stranger.connection.send(ANSWER.pack(own, proof))  # the first that is sent: there is room for all of it
        return True

    def _is_proven(self, stranger: _Stranger) -> bool:
        proof = _proof(self.secret, b"higher", stranger.rank, self.rank, stranger.nonces)
        return hmac.compare_digest(stranger.heard, proof) and self._is_awaited(stranger.rank)

    def _is_awaited(self, rank: int) -> bool:
        return self.rank < rank < self.world_size and rank not in self.sockets


def _close_all(sockets: dict[int, socket.socket]) -> None:
    for each in sockets.values():
        each.close()
