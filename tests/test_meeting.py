"""Who gets into a run's connections, and who does not."""

from __future__ import annotations

import contextlib
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from threads import LIMIT_S, together
from torch.distributed import HashStore  # type: ignore[attr-defined]

from distsim.errors import DistsimError
from trainers import meeting
from trainers.meeting import ANSWER, HELLO, NONCE_BYTES, meet, own_address

pytestmark = pytest.mark.timeout(120)


def test_all_pairs_are_connected_without_delay_and_nobody_can_come_later() -> None:
    store = HashStore()
    every = together(*(partial(meet, store, rank, 4, "127.0.0.1", 30.0) for rank in range(4)))
    for rank, mine in enumerate(every):
        assert list(mine) == [peer for peer in range(4) if peer != rank]
        for peer, each in mine.items():
            assert each.getpeername() == every[peer][rank].getsockname()
            assert each.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
    for rank in range(4):
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(address_in(store, rank))
        for each in every[rank].values():
            each.close()


def address_in(store: Any, rank: int) -> tuple[str, int]:
    host, port = store.get(f"tcp/address/{rank}").decode().split()
    return host, int(port)


@contextlib.contextmanager
def waiting_rank_0(seconds: float = 30.0, world_size: int = 2) -> Iterator[tuple[Any, tuple[str, int], list[Any]]]:
    """Rank 0 alone; yields the store, its address, and a list in which its sockets or its error will be."""
    store = HashStore()
    found: list[Any] = []

    def run() -> None:
        try:
            found.append(meet(store, 0, world_size, "127.0.0.1", seconds))
        except DistsimError as error:
            found.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    store.wait(["tcp/address/0"])
    try:
        yield store, address_in(store, 0), found
    finally:
        thread.join(LIMIT_S)
        for each in found[0].values() if isinstance(found[0], dict) else ():
            each.close()


def secret_of(store: Any) -> bytes:
    return bytes.fromhex(store.get("tcp/secret").decode())


def is_refused(stranger: socket.socket, limit_s: float = 20.0) -> bool:
    """Whether a stranger's connection gets closed, with nothing more said to it."""
    stranger.settimeout(limit_s)
    try:
        return stranger.recv(1) == b""
    except ConnectionResetError:
        return True


def hear(stranger: socket.socket, size: int) -> bytes:
    stranger.settimeout(20.0)
    heard = b""
    while len(heard) < size:
        part = stranger.recv(size - len(heard))
        assert part, "closed"
        heard += part
    return heard


def says_hello(stranger: socket.socket, rank: int, nonce: bytes = bytes(NONCE_BYTES)) -> tuple[bytes, bytes]:
    """Say hello as a rank; return the other side's nonce and its proof."""
    stranger.sendall(HELLO.pack(rank, nonce))
    other, proof = ANSWER.unpack(hear(stranger, ANSWER.size))
    return other, proof


def garbage(stranger: socket.socket, store: Any) -> None:
    stranger.sendall(b"GET / HTTP/1.1\r\n\r\n" + bytes(500))


def half_a_hello_and_gone(stranger: socket.socket, store: Any) -> None:
    stranger.sendall(HELLO.pack(1, bytes(NONCE_BYTES))[:20])
    stranger.shutdown(socket.SHUT_WR)


def the_rank_itself(stranger: socket.socket, store: Any) -> None:
    stranger.sendall(HELLO.pack(0, bytes(NONCE_BYTES)))


def a_rank_outside(stranger: socket.socket, store: Any) -> None:
    stranger.sendall(HELLO.pack(2, bytes(NONCE_BYTES)))


def another_secret(stranger: socket.socket, store: Any) -> None:
    nonce, _ = says_hello(stranger, 1)
    stranger.sendall(meeting._proof(secrets.token_bytes(32), b"higher", 1, 0, bytes(NONCE_BYTES) + nonce))


def the_proof_of_another_pair(stranger: socket.socket, store: Any) -> None:
    nonce, _ = says_hello(stranger, 1)
    stranger.sendall(meeting._proof(secret_of(store), b"higher", 2, 0, bytes(NONCE_BYTES) + nonce))


def a_mirror(stranger: socket.socket, store: Any) -> None:
    _, proof = says_hello(stranger, 1)
    stranger.sendall(proof)


def a_replay(stranger: socket.socket, store: Any) -> None:
    """All that the right rank said on another connection, where it was right."""
    with socket.create_connection(address_in(store, 0)) as overheard:
        nonce, _ = says_hello(overheard, 1)
    proof = meeting._proof(secret_of(store), b"higher", 1, 0, bytes(NONCE_BYTES) + nonce)
    says_hello(stranger, 1)
    stranger.sendall(proof)


STRANGERS = (
    garbage,
    half_a_hello_and_gone,
    the_rank_itself,
    a_rank_outside,
    another_secret,
    the_proof_of_another_pair,
    a_mirror,
    a_replay,
)


@pytest.mark.parametrize("stranger", STRANGERS)
def test_strangers_are_refused_and_the_right_one_still_gets_in(
    stranger: Callable[[socket.socket, Any], None], capfd: pytest.CaptureFixture[str]
) -> None:
    with waiting_rank_0() as (store, address, found):
        with socket.create_connection(address) as connection:
            stranger(connection, store)
            assert is_refused(connection)
        assert not found
        right = meet(store, 1, 2, "127.0.0.1", 30.0)
        right[0].close()
    assert isinstance(found[0], dict) and list(found[0]) == [1]
    assert capfd.readouterr() == ("", "")


def test_the_same_steps_with_the_right_secret_are_let_in() -> None:
    """Without this the strangers above might be refused for being badly written."""
    with waiting_rank_0() as (store, address, found), socket.create_connection(address) as connection:
        nonce, proof = says_hello(connection, 1)
        both = bytes(NONCE_BYTES) + nonce
        assert proof == meeting._proof(secret_of(store), b"lower", 1, 0, both)
        connection.sendall(meeting._proof(secret_of(store), b"higher", 1, 0, both) + b"payload")
        while not found:
            time.sleep(0.01)
        assert hear(found[0][1], 7) == b"payload"


def test_silent_strangers_hold_up_nobody_and_are_sent_away(monkeypatch: pytest.MonkeyPatch) -> None:
    with waiting_rank_0() as (store, address, _), contextlib.ExitStack() as stack:
        silent = [stack.enter_context(socket.create_connection(address)) for _ in range(5)]
        for each in silent[:3]:
            each.sendall(b"\0\0\0\1 and a bit")
        begin = time.monotonic()
        meet(store, 1, 2, "127.0.0.1", 30.0)[0].close()
        assert time.monotonic() - begin < meeting.PATIENCE_S / 2
        assert all(is_refused(each) for each in silent)
    monkeypatch.setattr(meeting, "PATIENCE_S", 0.2)
    with waiting_rank_0() as (store, address, found):
        with socket.create_connection(address) as connection:
            assert is_refused(connection) and not found
        meet(store, 1, 2, "127.0.0.1", 30.0)[0].close()


def test_of_too_many_strangers_the_oldest_have_to_go(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meeting, "STRANGERS", 2)
    with waiting_rank_0() as (store, address, found), contextlib.ExitStack() as stack:
        silent = [stack.enter_context(socket.create_connection(address)) for _ in range(8)]
        assert all(is_refused(each, meeting.PATIENCE_S / 2) for each in silent[:4]) and not found
        meet(store, 1, 2, "127.0.0.1", 30.0)[0].close()


def test_a_rank_that_does_not_come_is_named() -> None:
    expected = pytest.raises(DistsimError, match="rank 2 of 3 has not come to rank 1 within 1 s")
    with waiting_rank_0(1.0, world_size=3) as (store, _, found), expected:
        meet(store, 1, 3, "127.0.0.1", 1.0)
    assert str(found[0]) == "rank 2 of 3 has not come to rank 0 within 1 s"
    with pytest.raises(DistsimError, match=r"rank 0 of 2 has not come within 0\.3 s"):
        meet(HashStore(), 1, 2, "127.0.0.1", 0.3)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (bytes(ANSWER.size), "what answers as rank 0 at 127.0.0.1 port [0-9]+ is not that rank of this run"),
        (b"HTTP/1.1 400", "rank 0 at 127.0.0.1 port [0-9]+ has refused rank 1"),
        (None, "rank 0 at 127.0.0.1 port [0-9]+ has not answered rank 1 within 0.5 s"),
    ],
)
def test_a_wrong_answer_is_not_taken_for_a_rank(answer: bytes | None, message: str) -> None:
    store = HashStore()
    with socket.create_server(("127.0.0.1", 0)) as other:
        store.set("tcp/address/0", f"127.0.0.1 {other.getsockname()[1]}")

        def respond() -> None:
            connection, _ = other.accept()
            with connection:
                hear(connection, HELLO.size)
                if answer is None:
                    connection.recv(1)
                else:
                    connection.sendall(answer)

        def come() -> None:
            with pytest.raises(DistsimError, match=message):
                meet(store, 1, 2, "127.0.0.1", 0.5)

        together(respond, come)


def test_a_rank_in_another_ones_place_is_found_out() -> None:
    with waiting_rank_0(2.0, world_size=3) as (store, address, _):
        store.set("tcp/address/1", f"{address[0]} {address[1]}")
        secret = secret_of(store)
        with pytest.raises(DistsimError, match=r"what answers as rank 1 at .* is not that rank"):
            meeting._connect(address, secret, 2, 1, time.monotonic() + 20, 20)


def test_nobody_there_and_no_place_to_listen() -> None:
    store = HashStore()
    with socket.create_server(("127.0.0.1", 0)) as closed:
        store.set("tcp/address/0", f"127.0.0.1 {closed.getsockname()[1]}")
    with pytest.raises(DistsimError, match=r"rank 1 cannot connect to rank 0 at 127\.0\.0\.1 port .*refused"):
        meet(store, 1, 2, "127.0.0.1", 5.0)
    with pytest.raises(DistsimError, match=r"rank 0 cannot listen on its own address 192\.0\.2\.1"):
        meet(store, 0, 2, "192.0.2.1", 5.0)  # kept for documentation (RFC 5737): no machine has it


def test_own_address() -> None:
    assert own_address("whatever", single_machine=True) == "127.0.0.1"
    with pytest.raises(DistsimError, match=r"MASTER_ADDR '127\.0\.0\.1' is the loopback address 127\.0\.0\.1"):
        own_address("127.0.0.1", single_machine=False)
    with pytest.raises(DistsimError, match=r"MASTER_ADDR 'a\.\.b' cannot be reached from this machine"):
        own_address("a..b", single_machine=False)
    routes = [line.split() for line in Path("/proc/net/route").read_text().splitlines()[1:]]
    if any(route[1] == "00000000" for route in routes):  # a default route leads to any address
        address = own_address("192.0.2.1", single_machine=False)
        assert not address.startswith("127.")
        socket.create_server((address, 0)).close()
