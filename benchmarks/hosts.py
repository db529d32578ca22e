"""Hosts with real, slow links on one machine: a network namespace each, joined by cables and a switch.

A cable is a pair of virtual Ethernet devices, the switch a bridge in a namespace of its own: nothing of it is seen by
the machine's own network. A token bucket at either end of each cable lets through so many bits a second, in both
directions at once, as a full-duplex cable does. It needs Linux, root, and iproute2 (`ip` and `tc`).
"""

from __future__ import annotations

import itertools
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from ipaddress import IPv4Address
from pathlib import Path

from distsim.errors import ConfigError

NETWORK = IPv4Address("10.77.0.0")
"""Of all hosts; the first one has .1. Each use has a switch of its own, so that several do not meet."""
MOST = 250
DEVICE = "eth0"
"""The name of a host's own network device."""
MTU = 9000
"""Jumbo frames: of a full frame's 9,014 bytes, which the bucket counts, 8,948 are TCP's payload, 99.3 %."""
BURST_S = 1e-3
"""A bucket holds what the link carries in this time: as late may the kernel's timer be on a busy machine."""
LEAST_BURST_BYTES = 70 * 1024
"""But no less than one packet of the kernel, which TCP makes up to 64 KiB large, and cuts only if it must."""
QUEUE = "50ms"
"""How long a packet may wait at the switch before one that comes after it is dropped: many ranks send to one."""
PREFIX = "distsim"

_serial = itertools.count()


@dataclass(frozen=True, slots=True)
class Host:
    """One of the hosts."""

    name: str
    """Of its network namespace."""
    address: str
    """At which the others reach it."""

    def command(self, argv: Sequence[str]) -> list[str]:
        """Return the command that runs another one on this host; its process becomes the other's."""
        return ["ip", "netns", "exec", self.name, *argv]


@contextmanager
def hosts(count: int, rate_bps: int | None) -> Iterator[list[Host]]:
    """Make `count` hosts, each with a link of `rate_bps` bits a second in each direction; None: as fast as it goes.

    When the block ends they are removed, and what still runs on them is killed. What a killed run has left is
    removed by the next one: the names have the process id of their maker.

    Raises: ConfigError where this is not possible, saying why.
    """
    if not 1 <= count <= MOST:
        raise ConfigError(f"there can be 1 to {MOST} hosts, not {count}")
    if rate_bps is not None and rate_bps < 1_000_000:
        raise ConfigError(f"the rate of a link must be at least 1 Mbit/s (1,000,000), not {rate_bps}")
    _need_tools()
    for name in names():
        if not Path(f"/proc/{_owner(name)}").exists():
            _remove(name)
    own = f"{PREFIX}-{os.getpid()}-{next(_serial)}"
    try:
        yield _build(own, count, rate_bps)
    finally:
        for name in names():
            if name.startswith(f"{own}-"):
                _remove(name)


def unavailable() -> str | None:
    """Return in one sentence why there can be no such hosts here, or None if there can: it tries."""
    try:
        with hosts(1, 1_000_000_000):
            return None
    except ConfigError as error:
        return str(error)


def names() -> list[str]:
    """Return the network namespaces of all hosts and switches on this machine, of whatever run."""
    found = [line.split()[0] for line in _run("ip netns list").splitlines() if line]
    return [name for name in found if name.startswith(f"{PREFIX}-") and _owner(name).isdigit()]


def _owner(name: str) -> str:
    """The process id of who has made it: distsim-PID-SERIAL-RANK."""
    return name.split("-")[1]


def _build(own: str, count: int, rate_bps: int | None) -> list[Host]:
    made = [Host(f"{own}-{rank}", str(NETWORK + rank + 1)) for rank in range(count)]
    switch = f"{own}-switch"
    _run(f"ip netns add {switch}")
    _run(f"ip -n {switch} link add name switch type bridge mcast_snooping 0")
    _run(f"ip -n {switch} link set switch addrgenmode none up")  # no IPv6 of its own: nothing talks by itself
    for rank, host in enumerate(made):
        port = f"port{rank}"
        _run(f"ip netns add {host.name}")
        _run(f"ip -n {host.name} link set lo up")
        _run(f"ip -n {host.name} link add name {DEVICE} mtu {MTU} type veth peer name {port} mtu {MTU} netns {switch}")
        _run(f"ip -n {host.name} address add {host.address}/16 dev {DEVICE}")
        for namespace, device in ((switch, port), (host.name, DEVICE)):
            _run(f"ip -n {namespace} link set {device} addrgenmode none up")
            if rate_bps is not None:
                burst = max(LEAST_BURST_BYTES, int(rate_bps / 8 * BURST_S))
                bucket = f"tbf rate {rate_bps}bit burst {burst} latency {QUEUE}"
                _run(f"tc -n {namespace} qdisc add dev {device} root {bucket}")
        _run(f"ip -n {switch} link set {port} master switch")
        # TCP's congestion control is the one that every kernel has, so that links are alike on all machines.
        _run(host.command(["sh", "-c", "echo reno > /proc/sys/net/ipv4/tcp_congestion_control"]))
    return made


def _remove(name: str) -> None:
    """Kill what runs in a namespace, and remove it with its devices; somebody else may be doing the same."""
    with suppress(ConfigError):
        for process in _run(f"ip netns pids {name}").split():
            with suppress(ProcessLookupError):
                os.kill(int(process), signal.SIGKILL)
        _run(f"ip netns delete {name}")


def _need_tools() -> None:
    needs = "hosts with real links need"
    if sys.platform != "linux":
        raise ConfigError(f"{needs} Linux")
    for tool in ("ip", "tc"):
        if shutil.which(tool) is None:
            raise ConfigError(f"{needs} the command {tool}, which is not there; it is part of iproute2")
    if os.geteuid() != 0:
        raise ConfigError(f"{needs} root, to make network namespaces")


def _run(command: str | Sequence[str]) -> str:
    """Run a command to its end and return what it prints."""
    argv = command.split() if isinstance(command, str) else command
    # In a group of its own: Ctrl-C interrupts the caller alone, who then cleans up, and no half-finished command.
    ended = subprocess.run(argv, capture_output=True, text=True, stdin=subprocess.DEVNULL, process_group=0)
    if ended.returncode:
        said = " ".join(ended.stderr.split())
        raise ConfigError(f"hosts with real links are not possible here: `{' '.join(argv)}` says: {said}")
    return ended.stdout
