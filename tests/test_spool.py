"""Room for offloaded bytes: handed out and taken back; what goes wrong with a disk is one clear error."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from contextlib import closing
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from distsim.errors import ConfigError
from trainers import spool
from trainers.offload import disk_store
from trainers.spool import room_bytes

PAGE = 4096


@given(st.lists(st.one_of(st.integers(0, 4 * PAGE), st.integers(-8, -1)), max_size=40))
def test_room_is_the_first_that_is_large_enough(steps: list[int]) -> None:
    """A step of 0 or more reserves so many bytes, a negative one releases one of those reserved."""
    pages = [False] * 16
    held: list[tuple[int, int]] = []
    with tempfile.TemporaryDirectory() as folder, closing(spool.File(Path(folder), 16 * PAGE)) as file:
        for step in steps:
            if step >= 0:
                needed = -(-step // PAGE)
                starts = [first for first in range(17 - needed) if not any(pages[first : first + needed])]
                if starts:
                    place = file.reserve(step)
                    assert needed == 0 or place == starts[0] * PAGE
                    pages[place // PAGE : place // PAGE + needed] = [True] * needed
                    held.append((place, step))
                else:
                    free = pages.count(False) * PAGE
                    with pytest.raises(ConfigError, match=f"no room for {needed * PAGE} bytes .* {free} are free"):
                        file.reserve(step)
            elif held:
                place, size = held.pop(step % len(held))
                file.release(place, size)
                needed = room_bytes(size) // PAGE
                pages[place // PAGE : place // PAGE + needed] = [False] * needed


@pytest.mark.parametrize("at_most", [1, 1000, 5000])
def test_the_kernel_may_move_less_than_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at_most: int) -> None:
    pwrite, preadv = os.pwrite, os.preadv
    monkeypatch.setattr(os, "pwrite", lambda file, view, at: pwrite(file, view[:at_most], at))
    monkeypatch.setattr(os, "preadv", lambda file, views, at: preadv(file, [views[0][:at_most]], at))
    tensors = [torch.randn(1001), torch.randn(5, 7).t()]
    with disk_store(tmp_path, 4 * PAGE) as store:
        store.write(0, tensors)
        for before, after in zip(tensors, store.read(0).result(), strict=True):
            assert torch.equal(before, after)


def test_the_file_has_its_whole_size_from_the_start_and_no_name(tmp_path: Path) -> None:
    with closing(spool.File(tmp_path, 10**6)) as file:
        status = os.fstat(file.fileno())
        assert status.st_size == file.capacity_bytes == 245 * PAGE
        assert status.st_blocks * 512 >= 10**6
        assert list(tmp_path.iterdir()) == []


def test_a_file_that_ends_early_is_an_error_and_no_endless_loop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "preadv", lambda *_: 0)
    with disk_store(tmp_path, PAGE) as store:
        store.write(0, [torch.zeros(1)])
        with pytest.raises(ConfigError, match="cannot read 4 bytes"):
            store.read(0).wait()


def test_too_little_host_memory_is_an_error() -> None:
    with pytest.raises(ConfigError, match=f"host memory: no room for {2**55} bytes"):
        spool.Memory().reserve(2**55)


def command(code: str, folder: Path, *before: str) -> list[str]:
    """Return what runs a script, in which `caught(function)` prints the error that the function raises."""
    script = f"""
import os, resource, time
from pathlib import Path
import torch
from distsim.errors import ConfigError
from trainers.offload import disk_store
folder = Path({str(folder)!r})
def caught(call):
    try:
        call()
    except ConfigError as error:
        print(error)
{code}
"""
    return [*before, sys.executable, "-W", "error", "-c", script]


def python(code: str, folder: Path, *before: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(code, folder, *before), capture_output=True, text=True, timeout=120)


def test_a_limit_of_file_size_is_an_error_at_the_start(tmp_path: Path) -> None:
    done = python(
        "resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, 2**20))\ncaught(lambda: disk_store(folder, 2**21))",
        tmp_path,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"{tmp_path}: cannot reserve 2097152 bytes (2.097 MB)")
    assert "File too large" in done.stdout and done.stdout.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_limit_that_is_met_later_is_an_error_then(tmp_path: Path) -> None:
    code = """
with disk_store(folder, 2**21) as store:
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, 2**20))
    store.write(0, [torch.zeros(2**17)]).wait()
    caught(store.write(1, [torch.zeros(2**18)]).wait)
    caught(lambda: store.read(0))
"""
    done = python(code, tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    first, second = done.stdout.splitlines()
    assert first == second and first.startswith(f"{tmp_path}: cannot write 524288 bytes of offloaded tensors")
    assert first.endswith(" at byte 1048576 of 2097152: File too large")
    assert list(tmp_path.iterdir()) == []


def small_disk(folder: Path) -> tuple[str, ...]:
    """The command that runs another one with a file system of 1 MiB on a folder; skips where it may not be."""
    mount = 'mount -t tmpfs -o size=1m none "$0" && exec "$@"'
    for unshare in (("unshare", "-m"), ("unshare", "-rm")):
        prefix = (*unshare, "sh", "-c", mount, str(folder))
        try:
            if subprocess.run((*prefix, "true"), capture_output=True, timeout=30).returncode == 0:
                return prefix
        except OSError:
            pass
    pytest.skip("this machine does not permit mounts of one's own")


def test_a_full_disk_is_an_error_at_the_start(tmp_path: Path) -> None:
    code = """
(folder / "other").write_bytes(bytes(2**19))
caught(lambda: disk_store(folder, 600_000))
print(sorted(each.name for each in folder.iterdir()))
with disk_store(folder, 500_000) as store:
    caught(lambda: (folder / "more").write_bytes(bytes(2**19)))
"""
    done = python(code, tmp_path, *small_disk(tmp_path))
    assert done.stderr.strip().endswith("OSError: [Errno 28] No space left on device"), "the store has reserved it"
    message, left = done.stdout.splitlines()
    assert message.startswith(f"{tmp_path}: cannot reserve 602112 bytes (602.1 kB)")
    assert message.endswith("No space left on device; 524.3 kB are free")
    assert left == "['other']"


def test_a_disk_that_gets_full_is_an_error_then(tmp_path: Path) -> None:
    """Where a file system copies on write, room that was reserved may be missing all the same."""
    code = """
os.posix_fallocate = lambda file, start, size: os.truncate(file, size)
with disk_store(folder, 2**21) as store:
    store.write(0, [torch.ones(2**17)]).wait()
    handle = store.write(1, [torch.ones(2**18)])
    caught(handle.wait)
    caught(lambda: store.write(2, []))
print(sorted(folder.iterdir()), os.statvfs(folder).f_bavail * os.statvfs(folder).f_frsize)
"""
    done = python(code, tmp_path, *small_disk(tmp_path))
    assert (done.returncode, done.stderr) == (0, "")
    first, second, after = done.stdout.splitlines()
    assert first == second and first.startswith(f"{tmp_path}: cannot write 524288 bytes")
    assert first.endswith("No space left on device")
    assert after == f"[] {2**20}"


def test_a_killed_process_leaves_nothing_behind(tmp_path: Path) -> None:
    code = """
def slow(*arguments):
    print("writing", flush=True)
    time.sleep(60)
os.pwrite = slow
store = disk_store(folder, 2**21)
store.write(0, [torch.zeros(2**18)]).wait()
"""
    with subprocess.Popen(command(code, tmp_path), stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "writing\n"
        process.send_signal(signal.SIGKILL)
        assert process.wait(60) == -signal.SIGKILL
    assert list(tmp_path.iterdir()) == []
