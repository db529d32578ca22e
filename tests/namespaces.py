"""A network namespace in which a test's processes are alone, and what Linux counts on connections and on loopback."""

from __future__ import annotations

import os
import socket
import struct
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest

PACKET_BYTES = 52
"""Headers of a packet: IPv4 20, TCP 20, and TCP's option of timestamps 12 with its padding (RFC 7323)."""

REFUSED = "this machine does not permit network namespaces of one's own: other traffic would be counted too"

_BEGIN = '''
"""Runs a command after making a fresh network namespace ready: loopback, which is off at first, is switched on.

Off are the option that makes some acknowledgements longer than others (RFC 2018), and packets of several segments.
"""
import array, fcntl, os, socket, struct, sys
for name in ("tcp_sack", "tcp_dsack"):
    with open(f"/proc/sys/net/ipv4/{name}", "w") as file:
        file.write("0")
with socket.socket() as some:
    SIOCETHTOOL, ETHTOOL_STSO = 0x8946, 0x1F
    off = array.array("I", [ETHTOOL_STSO, 0])
    fcntl.ioctl(some, SIOCETHTOOL, struct.pack("16sP16x", b"lo", off.buffer_info()[0]))
    SIOCGIFFLAGS, SIOCSIFFLAGS, IFF_UP = 0x8913, 0x8914, 1
    request = struct.pack("16sH14x", b"lo", 0)
    flags = struct.unpack("16sH14x", fcntl.ioctl(some, SIOCGIFFLAGS, request))[1]
    fcntl.ioctl(some, SIOCSIFFLAGS, struct.pack("16sH14x", b"lo", flags | IFF_UP))
os.execv(sys.argv[1], sys.argv[1:])
'''


@cache
def namespace() -> tuple[str, ...] | None:
    """The command that starts another one in a network namespace of its own; None if that is not permitted."""
    for unshare in (("unshare", "-n"), ("unshare", "-rn")):
        command = (*unshare, sys.executable, "-c", _BEGIN)
        try:
            if subprocess.run((*command, "/bin/true"), capture_output=True, timeout=30).returncode == 0:
                return command
        except OSError:
            pass
    return None


def needed() -> tuple[str, ...]:
    """The same, for a test that means nothing elsewhere: it is skipped where there is none."""
    prefix = namespace()
    if prefix is None:
        pytest.skip(REFUSED)
    return prefix


class Loopback(NamedTuple):
    """What the loopback interface of this network namespace has carried so far, headers of IP and TCP among it."""

    bytes: int
    packets: int


def loopback() -> Loopback:
    lines = Path("/proc/net/dev").read_text().splitlines()
    received = next(line for line in lines if line.split(":")[0].strip() == "lo").split(":")[1].split()
    return Loopback(int(received[0]), int(received[1]))


def segments_sent_again() -> int:
    """Of all TCP connections of this network namespace so far."""
    names, values = (line.split() for line in Path("/proc/net/snmp").read_text().splitlines() if line[:4] == "Tcp:")
    return int(values[names.index("RetransSegs")])


class Connection(NamedTuple):
    """One end of a TCP connection, as TCP_INFO has it (`struct tcp_info` of linux/tcp.h)."""

    under_way: int
    """Segments sent and not acknowledged, and bytes not yet sent."""
    acked: int
    """Bytes sent and acknowledged, each once."""
    received: int
    packets: int
    """Sent by this end, with those that only acknowledge, and those sent again."""
    again: int
    """Bytes sent again."""


_INFO, _ESTABLISHED = struct.Struct("=B23xI76x16xQQI4xI60xQ"), 1


def connections() -> dict[tuple[int, int], Connection]:
    """This process's ends of TCP connections, whoever has opened them, by (own port, other port)."""
    found = {}
    for name in os.listdir("/proc/self/fd"):
        try:
            number = os.dup(int(name))
        except OSError:  # the folder that is being listed
            continue
        try:
            end = socket.socket(fileno=number)
        except OSError:  # a file
            os.close(number)
            continue
        with end:
            if end.family not in (socket.AF_INET, socket.AF_INET6) or end.type != socket.SOCK_STREAM:
                continue
            raw = end.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _INFO.size)
            state, unacked, acked, received, packets, unsent, again = _INFO.unpack(raw)
            if state == _ESTABLISHED:
                ports = end.getsockname()[1], end.getpeername()[1]
                found[ports] = Connection(unacked + unsent, acked, received, packets, again)
    return found
