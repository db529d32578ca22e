"""Processes for sweeps: they end when their parent says so, when it dies, and without a word of their own."""

from __future__ import annotations

import multiprocessing
import os
import sys
import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
from processes import run

from distsim import sweeps
from distsim.errors import DistsimError
from distsim.executors import processes

AT_ONCE = """
import os, signal, time
from distsim.executors import processes
if __name__ == "__main__":
    for already_s in (0.02, 0.05, 0.1, 0.3):
        try:
            with processes(2):
                time.sleep(already_s)
                os.killpg(0, signal.SIGINT)
                time.sleep(30)
        except KeyboardInterrupt:
            print("stopped")
"""


def test_ctrl_c_while_processes_start_is_the_parents_alone(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(AT_ONCE)
    ended = run([sys.executable, tmp_path / "script.py"], tmp_path)
    assert (ended.code, ended.out, ended.err, ended.left) == (0, 4 * "stopped\n", "", [])


def test_leaving_by_an_exception_stops_what_runs(caplog: pytest.LogCaptureFixture) -> None:
    began_s = time.monotonic()
    with pytest.raises(KeyboardInterrupt), processes(2) as pool:
        futures = [pool.submit(time.sleep, 100) for _ in range(9)]
        time.sleep(0.5)
        for future in futures[::2]:
            future.cancel()
        raise KeyboardInterrupt
    while multiprocessing.active_children():  # two threads wait for each; who comes second learns it a moment later
        assert time.monotonic() - began_s < 50
        time.sleep(0.01)
    assert caplog.records == []  # where exceptions in the callbacks of futures end


def test_a_process_that_dies_is_an_error() -> None:
    points = sweeps.grid(clusters=["ideal"], strategies=["ring"], ranks=[2, 3, 4], sizes_bytes=[8])
    with pytest.raises(DistsimError, match="a process of the sweep has died"), processes(2) as pool:

        class Deadly:
            def submit(self, function: Callable[..., Any], /, *arguments: Any) -> Future[Any]:
                return pool.submit(os._exit, 1)

        sweeps.run(points, Deadly())
