"""Hosts with real links: they reach each other and nothing else, and leave nothing behind. No time is measured here."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from benchmarks import hosts, links
from distsim.errors import ConfigError

ROOT = Path(__file__).resolve().parent.parent
RATE_BPS = 200_000_000


NEEDED = """
ip netns add $0 && trap 'ip netns delete $0' EXIT &&
ip -n $0 link add some type veth peer name other && ip -n $0 link add bridge0 type bridge &&
tc -n $0 qdisc add dev some root tbf rate 1gbit burst 128kb latency 50ms &&
ip netns exec $0 sh -c 'echo reno > /proc/sys/net/ipv4/tcp_congestion_control'
"""
"""What this machine must allow for."""


@pytest.fixture(scope="module")
def allowed() -> None:
    """Skip where there can be no such hosts, saying why; where all that they need is there, they must be possible."""
    why = hosts.unavailable()
    needed = subprocess.run(["sh", "-c", NEEDED, f"test-hosts-{os.getpid()}"], capture_output=True)
    assert why is None or needed.returncode != 0
    if why:
        pytest.skip(why)


def own(owner: int | None = None) -> list[str]:
    """Return the namespaces that a process has made, by default this one."""
    return [name for name in hosts.names() if name.startswith(f"{hosts.PREFIX}-{owner or os.getpid()}-")]


def devices(*prefix: str) -> list[str]:
    """Return the network devices that a command in some place sees."""
    shown = subprocess.run([*prefix, "ip", "-json", "link"], capture_output=True, text=True, check=True).stdout
    return sorted(each["ifname"] for each in json.loads(shown))


ANSWERS = """
import socket, sys
with socket.create_server(("", 7000)) as door:
    print("open", flush=True)
    connection, (address, _) = door.accept()
    with connection:
        connection.sendall(f"hello {address}".encode())
"""
ASKS = """
import socket, sys
with socket.create_connection((sys.argv[1], 7000), timeout=30) as connection:
    print(connection.recv(100).decode())
"""


def test_hosts_reach_each_other(allowed: None) -> None:
    with hosts.hosts(3, RATE_BPS) as made:
        assert len({host.name for host in made}) == len({host.address for host in made}) == 3
        for here, there in ((made[0], made[2]), (made[2], made[0])):
            command = here.command([sys.executable, "-c", ANSWERS])
            with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as answers:
                assert answers.stdout is not None and answers.stdout.readline() == "open\n"
                asks = there.command([sys.executable, "-c", ASKS, here.address])
                heard = subprocess.run(asks, capture_output=True, text=True, timeout=60)
            assert heard.stdout == f"hello {there.address}\n", heard.stderr


def test_the_machines_own_network_does_not_see_them(allowed: None) -> None:
    before = devices()
    with hosts.hosts(2, None) as made:
        assert devices() == before
        assert devices(*made[0].command([])) == sorted(["lo", hosts.DEVICE])


@pytest.mark.parametrize("rate_bps", [RATE_BPS, None])
def test_both_ends_of_each_cable_are_shaped(rate_bps: int | None, allowed: None) -> None:
    with hosts.hosts(2, rate_bps):
        rates: dict[tuple[str, str], int] = {}
        for name in own():
            shown = subprocess.run(["tc", "-json", "-n", name, "qdisc"], capture_output=True, text=True, check=True)
            buckets = [each for each in json.loads(shown.stdout) if each["kind"] == "tbf"]
            rates |= {(name.rpartition("-")[2], each["dev"]): each["options"]["rate"] * 8 for each in buckets}
    ends = [("0", hosts.DEVICE), ("1", hosts.DEVICE), ("switch", "port0"), ("switch", "port1")]
    assert rates == ({} if rate_bps is None else dict.fromkeys(ends, rate_bps))


def test_nothing_is_left_behind(allowed: None) -> None:
    with hosts.hosts(2, RATE_BPS) as made:
        assert len(own()) == 3  # two hosts and their switch
        sleeper = subprocess.Popen(made[1].command(["sleep", "30"]))
        wait_until(lambda: in_namespace(made[1].name))
    assert own() == []
    assert sleeper.wait(60) == -signal.SIGKILL


def test_nothing_is_left_behind_after_an_exception(allowed: None) -> None:
    with pytest.raises(ZeroDivisionError), hosts.hosts(2, RATE_BPS):
        raise ZeroDivisionError
    assert own() == []


def test_nothing_is_left_behind_if_the_making_fails(allowed: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hosts, "QUEUE", "long")  # of which tc knows nothing, when a host and the switch are there
    with pytest.raises(ConfigError, match=r"`tc -n .*latency long` says: "), hosts.hosts(2, RATE_BPS):
        raise AssertionError("there should be no hosts")
    assert own() == []


def test_two_uses_at_once_do_not_meet(allowed: None) -> None:
    with hosts.hosts(1, None) as some, hosts.hosts(1, None) as others:
        assert some[0].name != others[0].name
        assert len(own()) == 4
    assert own() == []


MAKER = """
import subprocess, time
from benchmarks import hosts
with hosts.hosts(2, 200_000_000) as made:
    left = subprocess.Popen(made[0].command(["sleep", "600"]), stdout=subprocess.DEVNULL)
    while str(left.pid) not in subprocess.run(
        ["ip", "netns", "pids", made[0].name], capture_output=True, text=True).stdout.split():
        time.sleep(0.01)
    print(left.pid, flush=True)
    time.sleep(600)
"""


@contextmanager
def maker() -> Iterator[tuple[subprocess.Popen[str], int]]:
    """Start a process that makes hosts; yield it and the process id of what it runs on one of them."""
    command = [sys.executable, "-c", MAKER]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, stderr=subprocess.DEVNULL)
    assert process.stdout is not None
    try:
        left = int(process.stdout.readline())
        try:
            yield process, left
        finally:
            with suppress(ProcessLookupError):
                os.kill(left, signal.SIGKILL)
    finally:
        process.kill()
        process.communicate()


def in_namespace(name: str) -> list[str]:
    """Return the ids of the processes on a host."""
    return subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True).stdout.split()


def runs(process: int) -> bool:
    """Return whether a process is there and no zombie."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_until(condition: object) -> None:
    """Wait until a condition holds, for at most half a minute."""
    assert callable(condition)
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_nothing_is_left_behind_after_ctrl_c(allowed: None) -> None:
    with maker() as (process, left):
        assert len(own(process.pid)) == 3
        process.send_signal(signal.SIGINT)
        process.wait(60)
        assert own(process.pid) == []
        wait_until(lambda: not runs(left))


def test_the_next_run_removes_what_a_killed_one_has_left_and_nothing_else(allowed: None) -> None:
    with maker() as (killed, left), maker() as (alive, other):
        killed.kill()
        killed.wait(60)
        assert len(own(killed.pid)) == 3 and runs(left)
        with hosts.hosts(1, None):
            assert own(killed.pid) == []
            wait_until(lambda: not runs(left))
            assert len(own(alive.pid)) == 3 and runs(other)
        alive.send_signal(signal.SIGINT)
        alive.wait(60)
        assert own(alive.pid) == []


@pytest.fixture
def tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that is all there is on PATH, and a user who is root."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    return tmp_path


def tool(folder: Path, name: str, script: str = "exit 0") -> None:
    """Put a command into a folder."""
    (folder / name).write_text(f"#!/bin/sh\n{script}\n")
    (folder / name).chmod(0o755)


@pytest.mark.parametrize("missing", ["ip", "tc"])
def test_a_missing_tool_is_named(missing: str, tools: Path) -> None:
    for name in {"ip", "tc"} - {missing}:
        tool(tools, name)
    assert hosts.unavailable() == (
        f"hosts with real links need the command {missing}, which is not there; it is part of iproute2"
    )


def test_only_root_can_make_them(tools: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool(tools, "ip")
    tool(tools, "tc")
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert hosts.unavailable() == "hosts with real links need root, to make network namespaces"


def test_elsewhere_than_on_linux_there_are_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    assert hosts.unavailable() == "hosts with real links need Linux"


def test_what_the_kernel_refuses_is_quoted(tools: Path) -> None:
    tool(tools, "tc")
    tool(tools, "ip", 'case "$*" in *add*) echo "mount failed:\n  not permitted" >&2; exit 1;; esac')
    switch = f"{hosts.PREFIX}-{os.getpid()}-"
    why = hosts.unavailable()
    assert why is not None and "\n" not in why
    assert why.startswith(f"hosts with real links are not possible here: `ip netns add {switch}")
    assert why.endswith("-switch` says: mount failed: not permitted")


@pytest.mark.parametrize(
    ("count", "rate_bps", "expected"),
    [(0, None, "1 to 250 hosts, not 0"), (251, None, "not 251"), (2, 1000, "at least 1 Mbit/s .*, not 1000")],
)
def test_impossible_hosts_are_refused(count: int, rate_bps: int | None, expected: str) -> None:
    with pytest.raises(ConfigError, match=expected), hosts.hosts(count, rate_bps):
        raise AssertionError("there should be no hosts")


def test_the_benchmark_says_why_it_is_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hosts, "unavailable", lambda: "no root here")
    (table,) = links.measure(1)
    assert "no root here" in str(table)


@pytest.mark.parametrize(("fixed_s", "wanted_s", "expected"), [(0.0, 1.0, 20), (0.2, 1.0, 16), (2.0, 1.0, 1)])
def test_the_batch_balances_computing_and_exchange(fixed_s: float, wanted_s: float, expected: int) -> None:
    assert links._balance(lambda batch: fixed_s + 0.05 * batch, wanted_s) == expected
