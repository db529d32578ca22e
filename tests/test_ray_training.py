"""The parameter server on real Ray actors: what it trains, what it says when something goes wrong, what is left."""

from __future__ import annotations

import json
import re
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from processes import TINY, TRAINERS, Run, environment, kill, marked, run, short_folder
from test_trainers_cli import NOT_FINITE, assert_simulated_as_measured, errors
from test_training import STEPS, command, reference, tiny

from distsim import record
from distsim.record import RunRecord, Totals

pytestmark = pytest.mark.timeout(150)

SERVER = ("--strategy", "parameter-server", "--workers", "2", *TINY)

SCRIPT = '''
"""Trains as `python -m trainers` does, with actors that save their parameters or die at a step."""

import os
import signal
import sys

import numpy as np
import torch

from trainers import ray_trainer
from trainers.__main__ import main

folder, doomed = sys.argv[1], int(sys.argv[2])


class Rank(ray_trainer.Rank):
    def train(self, trace_file):
        result = super().train(trace_file)
        model = self._workload.model
        np.save(f"{folder}/{self._rank}.npy", torch.nn.utils.parameters_to_vector(model.parameters()).detach())
        return result

    def _note(self, kind, step, seen):
        super()._note(kind, step, seen)
        if (self._rank, step) == (doomed, 3):
            os.kill(os.getpid(), signal.SIGKILL)


ray_trainer.Rank = Rank
sys.exit(main(sys.argv[3:]))
'''


@pytest.fixture
def folder() -> Iterator[Path]:
    with short_folder() as path:
        yield path


def assert_nothing_is_left(ended: Run, folder: Path) -> None:
    """No process, no shared memory, and of the temporary files only what PyTorch's import leaves."""
    assert ended.left == []
    assert [file.name for file in folder.iterdir() if "ray" in file.name or "session" in file.name] == []


def script(folder: Path, doomed: int = -1) -> list[str]:
    file = folder / "script.py"
    file.write_text(SCRIPT)
    return [sys.executable, str(file), str(folder), str(doomed)]


def test_training_is_single_process_training_on_the_union_of_the_batches(folder: Path) -> None:
    ended = run([*script(folder), *command("parameter-server", 4, folder / "runs"), "--workers", "2"], folder)
    assert (ended.code, errors(ended)) == (0, []), ended.err
    assert_nothing_is_left(ended, folder)
    wanted = reference(8)
    parameters = [np.load(folder / f"{rank}.npy") for rank in range(3)]
    assert np.linalg.norm(parameters[0] - wanted.parameters) <= 1e-12 * np.linalg.norm(wanted.parameters)
    assert len({each.tobytes() for each in parameters}) == 1  # the workers and the server
    measured = RunRecord.model_validate(json.loads(ended.out))  # --json: one record and nothing else on stdout
    np.testing.assert_allclose(measured.losses, wanted.losses, rtol=1e-12)
    assert (measured.workers, measured.ranks, measured.exchanges) == (2, 3, STEPS)
    assert isinstance(measured.totals, Totals)
    # Gradients to the server and parameters from it; and the numbers and the norm, in recursive doubling of three
    # ranks: rank 0 tells rank 1, which talks with the server, and is told.
    gradients, *small = ([part.name, part.messages, part.bytes] for part in measured.parts)
    assert gradients == ["bucket 0", 4, 4 * 8 * measured.params]
    numbers = 2 + len(list(tiny().model.parameters()))
    assert small == [["numbers", 4, 4 * 8 * numbers], ["norm", 4, 4 * 8]]
    links = {pair: [1, 8 * measured.params] for pair in ((0, 2), (1, 2), (2, 0), (2, 1))}
    for pair in ((0, 1), (1, 0), (1, 2), (2, 1)):
        count, size = links.get(pair, [0, 0])
        links[pair] = [count + 2, size + 8 * (numbers + 1)]
    wanted_links = [(*pair, STEPS * count, STEPS * size) for pair, (count, size) in sorted(links.items())]
    assert measured.totals.links == wanted_links
    assert measured.spans is not None
    assert all(
        0 <= start <= finish for start, finish in zip(measured.spans.start_s, measured.spans.finish_s, strict=True)
    )


def test_the_command_line(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ended = run([*TRAINERS, *SERVER, "--steps", "3", "--cluster", "laptop_loopback"], folder)
    assert (ended.code, errors(ended)) == (0, []), ended.err
    assert_nothing_is_left(ended, folder)
    assert ended.out.startswith("parameter-server: 2 workers, ")
    assert "36 messages" in ended.out  # 3 steps of 2 * 2, of 4 with the numbers and of 4 with the norm
    assert_simulated_as_measured(folder / "runs", "parameter-server", capsys)
    assert record.read(folder / "runs" / "parameter-server.measured.json").configuration["strategy"] == (
        "parameter-server"
    )


LISTENERS = '''
"""Prints the addresses at which a local Ray session's processes listen, from /proc/net/tcp and tcp6."""

from trainers.ray_session import session
from trainers.ray_trainer import start_ranks


def listening():
    rows = [line.split() for name in ("tcp", "tcp6") for line in open(f"/proc/net/{name}").readlines()[1:]]
    return {row[1] for row in rows if row[3] == "0A"}


before = listening()
with session(None, 1_000_000):
    start_ranks(2)
    print(*sorted(listening() - before))
'''


def test_a_local_ray_listens_on_loopback_alone(folder: Path) -> None:
    file = folder / "listeners.py"
    file.write_text(LISTENERS)
    ended = run([sys.executable, str(file)], folder)
    assert ended.code == 0, ended.err
    addresses = {address.rpartition(":")[0] for address in ended.out.split()}
    assert addresses, ended.err
    assert addresses <= {"0100007F", "0000000000000000FFFF00000100007F"}  # 127.0.0.1, and the same within IPv6
    assert_nothing_is_left(ended, folder)


def test_a_user_error_within_an_actor_is_one_message_and_leaves_nothing(folder: Path) -> None:
    """The temporary folder's path is longer than Ray's sockets allow for."""
    deep = folder / ("deep" * 20)
    deep.mkdir()
    ended = run([*TRAINERS, *SERVER, "--steps", "5", "--optimizer", "SGD:lr=1e30"], folder, extra={"TMPDIR": str(deep)})
    (message,) = errors(ended)
    assert (ended.code, ended.out) == (2, "")
    assert re.fullmatch(f"trainers: error: {NOT_FINITE}", message)
    assert "Traceback" not in ended.err
    assert_nothing_is_left(ended, folder)


@pytest.mark.parametrize("doomed", (0, 2))
def test_an_actor_that_dies_is_named(folder: Path, doomed: int) -> None:
    """Worker 0, which is also the one asked for progress, and the server."""
    ended = run([*script(folder, doomed), *SERVER, "--steps", "1000000"], folder)
    (message,) = errors(ended)
    assert ended.code == 2
    assert f"trainers: error: the actor of rank {doomed} has died" in message
    assert "parameter-server: 2 workers" not in ended.out  # Ray itself tells its part of the story there
    assert "Traceback" not in ended.err
    assert_nothing_is_left(ended, folder)


def test_ctrl_c_leaves_nothing(folder: Path) -> None:
    ended = run([*TRAINERS, *SERVER, "--steps", "1000000"], folder, interrupt_when="loss")
    assert (ended.code, ended.out) == (130, "")
    assert "Traceback" not in ended.err
    assert_nothing_is_left(ended, folder)


@pytest.mark.parametrize(
    ("address", "complaint"),
    (
        ("127.0.0.1:1", "no Ray cluster answers there"),
        ("no-such-host.invalid:6379", "no Ray cluster answers there"),
        ("nonsense", "expected HOST:PORT, or auto"),
        ("127.0.0.1:70000", "expected HOST:PORT, or auto"),
    ),
)
def test_an_address_without_a_cluster(
    address: str, complaint: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from trainers.__main__ import main

    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    assert main([*SERVER, "--ray-address", address]) == 2
    (message,) = re.findall("trainers: error: .*", capsys.readouterr().err)
    assert message.startswith(f"trainers: error: --ray-address {address}: {complaint}")


def test_a_cluster_that_is_joined_goes_on_running(folder: Path) -> None:
    marker, ray = uuid.uuid4().hex, Path(sys.executable).with_name("ray")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    address = f"127.0.0.1:{port}"
    start = [ray, "start", "--head", "--node-ip-address", "127.0.0.1", "--port", port, "--temp-dir", folder]
    options = ["--include-dashboard", "false", "--num-cpus", 2, "--object-store-memory", 100_000_000]
    authenticated = {
        "RAY_AUTH_MODE": "token"
    }  # Ray asks for it where an address is given; the token is in the environment
    started = subprocess.Popen(
        [str(part) for part in (*start, *options, "--disable-usage-stats")],
        cwd=folder,
        env={**environment(folder, marker), **authenticated},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        assert started.wait(60) == 0
        daemons = set(marked(marker))
        assert daemons
        ended = run([*TRAINERS, *SERVER, "--steps", "3", "--ray-address", address], folder, extra=authenticated)
        assert (ended.code, errors(ended), ended.left) == (0, [], []), ended.err
        assert "36 messages" in ended.out
        assert daemons <= set(marked(marker))
        _wait_until_no_actor_is_left(marker)
    finally:
        kill(marker, started)
    end = time.monotonic() + 10
    while marked(marker) and time.monotonic() < end:
        time.sleep(0.1)
    assert marked(marker) == {}


def _wait_until_no_actor_is_left(marker: str) -> None:
    """The cluster lives on, the actors of the training do not."""
    end = time.monotonic() + 30
    while actors := [command for command in marked(marker).values() if "Rank" in command]:
        assert time.monotonic() < end, actors
        time.sleep(0.1)
