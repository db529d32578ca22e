"""Start real trainings with a hard time limit, and know afterwards of every process that they have left behind.

Each run gets an own process group and a marker in its environment, which all its descendants inherit: Ray's
daemons leave the group, but not the marker.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

TINY = ("--options", "layers=1,width=32,context=16", "--batch-size", "2")
"""The smallest model that the command lines allow for: a training of a few milliseconds a step."""
IMPATIENT_S = 2
MARKER = "DISTSIM_TEST_RUN"
TORCHRUN = (sys.executable, "-m", "torch.distributed.run")
TRAINERS = (sys.executable, "-m", "trainers")


@dataclass(frozen=True)
class Run:
    """A run that has ended, by itself or not."""

    code: int
    out: str
    err: str
    left: list[str]
    """Processes that were still there a moment after the run's end, and files of theirs in shared memory."""


def torchrun(ranks: int, *arguments: str | Path) -> list[str]:
    """Command line that runs `arguments` (a script, or -m and a module) on `ranks` processes, on a free port."""
    rendezvous = ("--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0", "--local-addr", "127.0.0.1")
    return [*TORCHRUN, "--nproc-per-node", str(ranks), *rendezvous, *map(str, arguments)]


def environment(folder: Path, marker: str = "") -> dict[str, str]:
    """What every run sees: this checkout's packages, one thread, loopback, temporary files in `folder`."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "TORCHELASTIC"))}
    return {
        **inherited,
        MARKER: marker,
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo",
        "TMPDIR": str(folder),
        "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor"),  # the variable is set as soon as torch.compile is imported
        "RAY_TMPDIR": str(folder),
        "RAY_AUTH_TOKEN": uuid.uuid5(uuid.NAMESPACE_OID, str(folder)).hex,  # not the one in the user's home
        "RAY_preallocate_plasma_memory": "0",  # an exchange of a few kilobytes needs no warm pages
    }


def run(
    command: Sequence[str | Path],
    folder: Path,
    *,
    timeout_s: float = 90,
    extra: Mapping[str, str] | None = None,
    interrupt_when: str | None = None,
) -> Run:
    """Run a command in `folder` to its end, and kill whatever it has started if it takes longer than `timeout_s`.

    With `interrupt_when`: send SIGINT to the whole group, as a terminal does at Ctrl-C, once the run's stderr
    contains this text.
    """
    marker, before, end = uuid.uuid4().hex, _shared_memory(), time.monotonic() + timeout_s
    with started(command, folder, marker, extra) as (process, out, err):
        while interrupt_when is not None and interrupt_when not in err.read_text():
            assert process.poll() is None and time.monotonic() < end, f"never came to be interrupted: {err.read_text()}"
            time.sleep(0.05)
        if interrupt_when is not None:
            os.killpg(process.pid, signal.SIGINT)
        try:
            process.wait(end - time.monotonic())
        except subprocess.TimeoutExpired:
            shown = f"{out.read_text()}\n{err.read_text()}"
            raise AssertionError(f"{command} took more than {timeout_s} s:\n{shown}") from None
        left = _wait_for_none(marker)
    left += [f"/dev/shm/{name}" for name in sorted(_shared_memory() - before) if not _is_open(name)]
    return Run(process.returncode, out.read_text(), err.read_text(), left)


@contextlib.contextmanager
def started(
    command: Sequence[str | Path], folder: Path, marker: str, extra: Mapping[str, str] | None = None
) -> Iterator[tuple[subprocess.Popen[bytes], Path, Path]]:
    """Start a command; yield its process and the files of its stdout and stderr.

    When the block ends, whatever the command has started and is still there is killed.
    """
    out, err = (folder / f"{marker}.{name}" for name in ("out", "err"))
    with out.open("wb") as out_file, err.open("wb") as err_file:
        process = subprocess.Popen(
            list(map(str, command)),
            cwd=folder,
            env={**environment(folder, marker), **(extra or {})},
            stdin=subprocess.DEVNULL,
            stdout=out_file,
            stderr=err_file,
            start_new_session=True,
        )
    try:
        yield process, out, err
    finally:
        kill(marker, process)
        process.wait()


def kill(marker: str, process: subprocess.Popen[bytes]) -> None:
    """Kill a run's process group and everything that bears its marker."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    for pid in marked(marker):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def marked(marker: str) -> dict[int, str]:
    """Process id and command line of every living process with this marker in its environment."""
    found = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            with contextlib.suppress(OSError):  # it has just ended
                if f"{MARKER}={marker}".encode() in (folder / "environ").read_bytes().split(b"\0"):
                    command = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                    found[int(folder.name)] = command[:120]
    return found


def _wait_for_none(marker: str, patience_s: float = 10) -> list[str]:
    """Give a run's last processes a moment to end; return those that do not."""
    end = time.monotonic() + patience_s
    while (found := marked(marker)) and time.monotonic() < end:
        time.sleep(0.1)
    return [f"{pid}: {command}" for pid, command in found.items()]


def _shared_memory() -> set[str]:
    return {file.name for file in Path("/dev/shm").iterdir()}


def _is_open(name: str) -> bool:
    """Whether some process holds this file of /dev/shm: it is then no orphan, but somebody else's."""
    target = f"/dev/shm/{name}"
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            with contextlib.suppress(OSError):
                if target in (folder / "maps").read_text(errors="replace"):
                    return True
                if any(os.readlink(file) == target for file in (folder / "fd").iterdir()):
                    return True
    return not Path(target).exists()


@contextlib.contextmanager
def short_folder() -> Iterator[Path]:
    """A temporary folder with a path short enough for Ray's sockets, which pytest's own folders have not."""
    folder = Path(tempfile.mkdtemp(prefix="ds-", dir="/tmp"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


BATCH = '''
"""Several trainings in one torchrun, each as `python -m trainers` would run it; saves what every rank has seen."""

import contextlib
import functools
import io
import json
import os
import sys
import time
import traceback
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from trainers import __main__ as command_line
from trainers import flops, group, torch_trainer

rank, folder = int(os.environ["RANK"]), Path(sys.argv[1])
plan = json.loads((folder / "plan.json").read_text())
original_train, original_connect = torch_trainer.train, dist.init_process_group


def train(config, workload, *others, **named):
    result = original_train(config, workload, *others, **named)
    vector = torch.nn.utils.parameters_to_vector(workload.model.parameters())
    np.save(folder / f"{turn}.{rank}.npy", vector.detach().numpy())
    return result


def connect(*others, **named):
    global connected
    connected = True
    original_connect(*others, **named)


def all_ranks_at(name):
    (folder / f"{name}.{rank}").write_text("here")
    while not all((folder / f"{name}.{other}").exists() for other in range(int(os.environ["WORLD_SIZE"]))):
        time.sleep(0.01)


torch_trainer.train, dist.init_process_group = train, connect
flops.peak_flops = functools.cache(flops.peak_flops)  # measured once, not by each training
for turn, argv in enumerate(plan["commands"]):
    mine = argv if isinstance(argv[0], str) else argv[rank]
    all_ranks_at(f"begin {turn}")
    group.MEETING_TIMEOUT = timedelta(seconds=plan["impatient_s"] if turn in plan["impatient"] else 60)
    os.environ["TORCHELASTIC_RESTART_COUNT"] = str(turn)  # every training meets in a store of its own
    out, err, code, connected = io.StringIO(), io.StringIO(), 0, False
    if mine:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                code = command_line.main(mine)
            except BaseException:
                code = -1
                traceback.print_exc()
    seen = {"code": code, "out": out.getvalue(), "err": err.getvalue(), "connected": connected}
    (folder / f"{turn}.{rank}.json").write_text(json.dumps(seen))
'''


@dataclass(frozen=True)
class Seen:
    """What one rank has seen of one command."""

    code: int
    out: str
    err: str
    connected: bool
    """Whether it came to a process group, without which no tensor moves."""
    parameters: Any
    """Flat, at the end of training; None if it did not come to that."""


def batch(
    ranks: int,
    folder: Path,
    commands: Sequence[Sequence[str] | Sequence[Sequence[str]]],
    impatient: Sequence[int] = (),
    timeout_s: float = 90,
) -> list[list[Seen]]:
    """Run several command lines of `trainers` under one torchrun: starting torch takes longer than a tiny training.

    A command is one command line, or one for each rank, of which an empty one means that the rank does not come.
    In the `impatient` commands ranks wait for each other for IMPATIENT_S only: name those in which one does not come.
    Returns what was seen by command and rank.
    """
    folder.mkdir(exist_ok=True)
    script = folder / "batch.py"
    script.write_text(BATCH)
    (folder / "plan.json").write_text(
        json.dumps({"commands": commands, "impatient": impatient, "impatient_s": IMPATIENT_S})
    )
    ended = run(torchrun(ranks, script, folder), folder, timeout_s=timeout_s)
    assert ended.code == 0, ended.err
    assert ended.left == []
    seen = []
    for turn in range(len(commands)):
        files = [folder / f"{turn}.{rank}.npy" for rank in range(ranks)]
        parts = [json.loads((folder / f"{turn}.{rank}.json").read_text()) for rank in range(ranks)]
        vectors = [np.load(file) if file.exists() else None for file in files]
        seen.append([Seen(**part, parameters=vector) for part, vector in zip(parts, vectors, strict=True)])
    return seen
