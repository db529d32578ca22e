"""What a run writes while it goes on: JSON lines, TensorBoard, the progress line, and traces of steps."""

from __future__ import annotations

import json
import math
import queue
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.profiler import record_function

from distsim.errors import ConfigError
from trainers.metrics import Metrics
from trainers.profiling import traced

STEP: dict[str, Any] = {
    "loss": 2.5,
    "count": 1000,
    "learning_rate": 0.1,
    "grad_norm": 1.25,
    "step_s": 0.5,
    "exchange_s": 0.25,
    "exposed_s": 0.125,
    "messages": 6,
    "bytes": 4096,
    "mfu": 0.31,
    "skipped": False,
}


def no_constant(name: str) -> None:
    raise AssertionError(f"{name} is not JSON")


def read(file: Path) -> list[dict[str, Any]]:
    """Read lines, each of which must be whole and strict JSON."""
    text = file.read_text("utf-8")
    assert not text or text.endswith("\n")
    return [json.loads(line, parse_constant=no_constant) for line in text.splitlines()]


def start(folder: Path | None, **changed: Any) -> Metrics:
    return Metrics(**({"folder": folder, "name": "ring", "steps": 3, "tensorboard": False, "show": False} | changed))


def test_a_line_for_every_step_and_evaluation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("trainers.metrics.time.monotonic", lambda: now[0])
    metrics = start(tmp_path / "new" / "folder")
    now[0] = 101.0
    metrics.step(0, **STEP)
    now[0] = 103.5
    metrics.evaluation(0, loss=2.25, count=77)
    file = tmp_path / "new" / "folder" / "ring.metrics.jsonl"
    first = {"event": "step", "step": 0, **STEP, "tokens_per_s": 2000.0, "time_s": 1.0}
    second = {"event": "evaluation", "step": 0, "loss": 2.25, "count": 77, "time_s": 3.5}
    assert read(file) == [first, second]  # before it is closed
    metrics.close()
    assert read(file) == [first, second]
    assert [path.name for path in file.parent.iterdir()] == ["ring.metrics.jsonl"]


def test_numbers_that_json_has_not(tmp_path: Path) -> None:
    metrics = start(tmp_path)
    metrics.step(0, **(STEP | {"loss": math.nan, "grad_norm": math.inf, "learning_rate": -math.inf, "skipped": True}))
    metrics.step(1, **(STEP | {"mfu": None, "messages": None, "step_s": 0.0}))
    metrics.close()
    bad, unknown = read(tmp_path / "ring.metrics.jsonl")
    assert (bad["loss"], bad["grad_norm"], bad["learning_rate"]) == ("NaN", "Infinity", "-Infinity")
    assert math.isnan(float(bad["loss"])) and float(bad["learning_rate"]) == -math.inf  # Python and NumPy read them
    assert (unknown["mfu"], unknown["messages"], unknown["tokens_per_s"]) == (None, None, "NaN")


def test_a_later_run_of_the_name_begins_anew(tmp_path: Path) -> None:
    for steps in (3, 1):
        metrics = start(tmp_path)
        for step in range(steps):
            metrics.step(step, **STEP)
        metrics.close()
    assert len(read(tmp_path / "ring.metrics.jsonl")) == 1


def test_other_ranks_write_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any) -> None:
    monkeypatch.chdir(tmp_path)
    metrics = start(None, tensorboard=True)
    metrics.step(0, **STEP)
    metrics.evaluation(0, loss=1.0, count=1)
    metrics.close()
    assert not list(tmp_path.iterdir())
    assert capfd.readouterr() == ("", "")


ENDLESS = """
import itertools, sys
from pathlib import Path
from trainers.metrics import Metrics
metrics = Metrics(folder=Path(sys.argv[1]), name="ring", steps=10, tensorboard=False, show=False)
for step in itertools.count():
    metrics.step(step, loss=step / 3, count=step, learning_rate=0.1, grad_norm=step / 7, step_s=0.5, exchange_s=0.1,
                 exposed_s=None, messages=3, bytes=3, mfu=None, skipped=False)
"""


def test_a_killed_run_leaves_whole_lines(tmp_path: Path) -> None:
    file = tmp_path / "ring.metrics.jsonl"
    process = subprocess.Popen([sys.executable, "-c", ENDLESS, str(tmp_path)])
    while process.poll() is None and not (file.exists() and file.stat().st_size > 50_000):
        time.sleep(0.01)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    lines = read(file)
    assert [line["step"] for line in lines] == list(range(len(lines))) and len(lines) > 100


@pytest.mark.parametrize("where", ["folder", "file", "board"])
def test_what_cannot_be_written_is_said_before_training(where: str, tmp_path: Path) -> None:
    if where == "folder":
        folder = tmp_path / "a file"
        folder.touch()
    else:
        folder = tmp_path
    if where == "file":
        (folder / "ring.metrics.jsonl").mkdir()
    if where == "board":
        pytest.importorskip("tensorboard")
        (folder / "ring.tensorboard").touch()
    with pytest.raises(ConfigError, match="cannot write"):
        start(folder, tensorboard=where == "board")


def test_a_full_disk(tmp_path: Path) -> None:
    (tmp_path / "ring.metrics.jsonl").symlink_to("/dev/full")
    metrics = start(tmp_path)
    with pytest.raises(ConfigError, match=r"ring\.metrics\.jsonl: cannot write it: No space left"):
        metrics.step(0, **STEP)
    metrics.close()


def test_tensorboard_has_the_same(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    for steps in (3, 2):
        metrics = start(tmp_path, tensorboard=True)
        for step in range(steps):
            metrics.step(step, **(STEP | {"loss": 2.5 - step, "messages": None}))
        metrics.evaluation(1, loss=2.25, count=77)
        metrics.close()
    board = accumulator.EventAccumulator(str(tmp_path / "ring.tensorboard"))
    board.Reload()
    expected = {f"step/{key}" for key in STEP} - {"step/messages"} | {"step/tokens_per_s"}
    assert set(board.Tags()["scalars"]) == expected | {"evaluation/loss", "evaluation/count"}
    assert [(each.step, each.value) for each in board.Scalars("step/loss")] == [(0, 2.5), (1, 1.5)]  # the second run
    assert [(each.step, each.value) for each in board.Scalars("evaluation/loss")] == [(1, 2.25)]


def test_tensorboard_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ConfigError, match=r"pip install 'distsim\[tensorboard\]'"):
        start(tmp_path, tensorboard=True)
    assert not list(tmp_path.iterdir())
    start(tmp_path).close()  # not needed unless asked for


def test_the_line_on_the_terminal(capfd: Any) -> None:
    metrics = start(None, show=True)
    metrics.step(0, **STEP)
    metrics.step(1, **(STEP | {"skipped": True, "loss": math.inf}))
    metrics.evaluation(1, loss=2.25, count=77)
    metrics.step(2, **(STEP | {"mfu": None, "step_s": 0.25, "loss": 1.0}))
    metrics.close()
    out, err = capfd.readouterr()
    assert out == ""
    last = err.rpartition("\r")[2].strip()
    assert last.startswith("ring: 100%") and "3/3" in last
    assert last.endswith("loss 1.0000, 4,000 tokens/s, 1 skipped, evaluation 2.2500]")


def test_the_line_shows_utilisation_and_nothing_that_did_not_happen(capfd: Any) -> None:
    metrics = start(None, show=True, steps=1)
    metrics.step(0, **STEP)
    metrics.close()
    assert capfd.readouterr().err.rstrip().endswith("step/s, loss 2.5000, 2,000 tokens/s, MFU 31.0%]")


def steps_with_exchange(file: Path, steps: int, traced_steps: int) -> list[bool]:
    """Trace some steps, each with work of its own thread; return whether the file was there after each."""
    there = []
    jobs: queue.SimpleQueue[threading.Event | None] = queue.SimpleQueue()

    def exchanges() -> None:
        while (over := jobs.get()) is not None:
            with record_function("bucket 0"):
                torch.ones(10).sum()
            over.set()

    thread = threading.Thread(target=exchanges)
    thread.start()
    try:
        with traced(traced_steps, file, enabled=True) as trace:
            for step in range(steps):
                with record_function(f"my step {step}"):
                    torch.ones(20, 20) @ torch.ones(20, 20)
                over = threading.Event()
                jobs.put(over)
                over.wait()
                trace.step()
                there.append(file.exists())
    finally:
        jobs.put(None)
        thread.join()
    return there


def events(file: Path) -> list[str]:
    return [event["name"] for event in json.loads(file.read_text())["traceEvents"] if "name" in event]


def test_a_trace_of_the_steps_asked_for(tmp_path: Path) -> None:
    file = tmp_path / "new" / "ring.trace.json"
    assert steps_with_exchange(file, 6, 2) == [False, False, False, True, True, True]
    names = events(file)
    assert [name for name in names if name.startswith("my step")] == ["my step 2", "my step 3"]
    assert names.count("aten::mm") == 2
    assert names.count("bucket 0") == 2  # other threads are seen, too
    assert [path.name for path in file.parent.iterdir()] == ["ring.trace.json"]


def test_a_run_that_ends_early_leaves_what_it_has(tmp_path: Path) -> None:
    file = tmp_path / "ring.trace.json"
    steps_with_exchange(file, 4, 5)
    assert [name for name in events(file) if name.startswith("my step")] == ["my step 2", "my step 3"]
    file.unlink()
    steps_with_exchange(file, 1, 5)
    assert not list(tmp_path.iterdir())


def test_nothing_half_written_remains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def half(self: object, path: str) -> None:
        Path(path).write_text('{"traceEvents": [')
        raise OSError(28, "No space left on device")

    (tmp_path / "x.json").write_text("an earlier one")
    monkeypatch.setattr("torch.profiler.profile.export_chrome_trace", half)
    with pytest.raises(ConfigError, match=r"x\.json: cannot write it: No space left"):
        steps_with_exchange(tmp_path / "x.json", 4, 2)
    assert [path.read_text() for path in tmp_path.iterdir()] == ["an earlier one"]


def test_no_trace_unless_asked_for(tmp_path: Path) -> None:
    with traced(2, tmp_path / "no" / "x.json", enabled=False) as trace:
        for _ in range(6):
            trace.step()
    assert not list(tmp_path.iterdir())


def test_a_trace_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="cannot write there"), traced(1, tmp_path / "file" / "x.json", enabled=True):
        pytest.fail("a step was made")


def test_a_trace_that_can_no_longer_be_written(tmp_path: Path) -> None:
    file = tmp_path / "x.json"
    file.mkdir()
    with pytest.raises(ConfigError, match=r"x\.json: cannot write it: Is a directory"):
        steps_with_exchange(file, 4, 2)
    assert list(tmp_path.iterdir()) == [file]
