"""Sweeps: every executor gives the same bytes, in one go or interrupted and resumed; nothing is computed twice."""

from __future__ import annotations

import csv
import json
import os
import random
import signal
import sys
import tempfile
import time
import uuid
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from processes import marked, run, short_folder, started

from distsim import exchanges, step, sweeps, tables
from distsim.cli import main
from distsim.cluster import ideal, load
from distsim.errors import ConfigError, TooFewDevices
from distsim.executors import InProcess, processes
from distsim.journal import Journal

Capture = pytest.CaptureFixture[str]
DISTSIM = (sys.executable, "-m", "distsim.cli")

GRID: dict[str, Any] = {
    "clusters": ["ideal", "dgx_h100"],
    "strategies": ["ring", "parameter-server", "auto"],
    "ranks": [2, 8],
    "sizes_bytes": [1000, 1_000_000],
}
FLAGS = "--clusters ideal,dgx_h100 --strategies ring,parameter-server,auto --ranks 2,8 --sizes 1kB,1MB"


class Counting(InProcess):
    """Runs everything here, and counts it; stops as Ctrl-C does before the point number `stop_before`."""

    def __init__(self, stop_before: int | None = None) -> None:
        self.submitted = 0
        self._stop_before = stop_before

    def submit(self, function: Callable[..., Any], /, *arguments: Any) -> Future[Any]:
        if self.submitted == self._stop_before:
            raise KeyboardInterrupt
        self.submitted += 1
        return super().submit(function, *arguments)


class Backwards(InProcess):
    """Runs nothing before `total` points are there, and then the last one first."""

    def __init__(self, total: int) -> None:
        self._total = total
        self._held: list[tuple[Future[Any], Callable[..., Any], tuple[Any, ...]]] = []

    def submit(self, function: Callable[..., Any], /, *arguments: Any) -> Future[Any]:
        future: Future[Any] = Future()
        self._held.append((future, function, arguments))
        if len(self._held) == self._total:
            for waiting, call, with_ in reversed(self._held):
                waiting.set_result(call(*with_))
        return future


def complete(points: list[sweeps.Point], out: Path, executor: Any) -> sweeps.Outcome:
    """Run a sweep with a file on an executor."""
    return sweeps.complete(points, out, lambda missing: nullcontext(executor))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The CSV of GRID, made in one go."""
    out = tmp_path_factory.mktemp("whole") / "table.csv"
    complete(sweeps.grid(**GRID), out, InProcess())
    return out.read_bytes()


def test_rows_are_those_of_four_loops(whole: bytes) -> None:
    rows = iter(list(csv.DictReader(whole.decode().splitlines())))
    for name in ("ideal", "dgx_h100"):
        for strategy in ("ring", "parameter-server", "auto"):
            for ranks in (2, 8):
                for size in (1000, 1_000_000):
                    row = next(rows)
                    asked = (row["cluster"], row["strategy"], row["ranks"], row["size_bytes"])
                    assert asked == (name, strategy, str(ranks), str(size))
                    times = {}
                    for candidate in exchanges.STRATEGIES if strategy == "auto" else [strategy]:
                        exchange = exchanges.build(candidate, ranks, size // 4)
                        try:
                            simulation = step.simulate(
                                exchange, ideal(exchange.ranks) if name == "ideal" else load(name)
                            )
                        except TooFewDevices as error:
                            if strategy != "auto":
                                assert row["error"] == str(error)
                                assert {row[key] for key in sweeps.TYPES if key not in asked_or_error} == {""}
                        else:
                            times[candidate] = simulation.time_s
                    if times:
                        assert row["error"] == ""
                        assert float(row["time_s"]) == min(times.values()) == times[row["algorithm"]]
                        assert int(row["params"]) == size // 4
    assert next(rows, None) is None


asked_or_error = {"cluster", "strategy", "ranks", "size_bytes", "dtype", "collective", "sharing", "posting", "error"}


def test_any_executor_gives_the_same_bytes(whole: bytes, tmp_path: Path) -> None:
    points = sweeps.grid(**GRID)

    class Sometime(ThreadPoolExecutor):
        def submit(self, function: Any, /, *arguments: Any, **more: Any) -> Future[Any]:
            def later() -> Any:
                time.sleep(random.Random(repr(arguments)).random() / 50)
                return function(*arguments)

            return super().submit(later)

    with Sometime(5) as threads, processes(2) as two:
        for number, executor in enumerate((Backwards(len(points)), threads, two)):
            out = tmp_path / f"{number}.csv"
            assert complete(points, out, executor).reused == 0
            assert out.read_bytes() == whole


@settings(max_examples=25)
@given(stops=st.lists(st.integers(0, 9), max_size=4), torn=st.integers(0, 400))
def test_however_often_it_is_interrupted_the_bytes_are_the_same(stops: list[int], torn: int) -> None:
    points = sweeps.grid(clusters=["ideal"], strategies=["ring", "auto"], ranks=[1, 2, 3], sizes_bytes=[4, 40])
    with tempfile.TemporaryDirectory() as folder:
        out, fresh = Path(folder, "table.csv"), Path(folder, "fresh.csv")
        complete(points, fresh, InProcess())
        kept = 0
        for stop in stops:
            executor = Counting(stop)
            if kept + stop < len(points):
                with pytest.raises(KeyboardInterrupt):
                    complete(points, out, executor)
                assert not out.exists()
            else:
                complete(points, out, executor)
            kept += executor.submitted
            assert kept == min(len(points), kept)
            with Journal(sweeps.journal_of(out)) as journal:
                assert len(journal.rows) == kept
        journal_file = sweeps.journal_of(out)
        if journal_file.exists():  # and its last line is torn, as when the machine goes down
            content = journal_file.read_bytes()
            last = len(content) - content[:-1].rfind(b"\n") - 1
            cut = torn % last
            journal_file.write_bytes(content[: len(content) - cut])
            kept -= cut > 0 and kept > 0
        executor = Counting()
        outcome = complete(points, out, executor)
        assert (executor.submitted, outcome.reused) == (len(points) - kept, kept)
        assert out.read_bytes() == fresh.read_bytes()


def test_a_changed_grid_reuses_what_it_can(tmp_path: Path) -> None:
    out = tmp_path / "table.csv"
    base: dict[str, Any] = {"clusters": ["ideal"], "strategies": ["ring"], "ranks": [2, 3], "sizes_bytes": [8, 80]}
    for change, missing in (
        ({}, 4),
        ({"sizes_bytes": [80, 8]}, 0),
        ({"ranks": [3, 4], "sizes_bytes": [80, 8, 8]}, 2),
        ({"strategies": ["ring:channels=2", "ring"]}, 4),
        ({"dtype": "float64"}, 4),
        ({"collective": "all-gather"}, 4),
        ({}, 0),
    ):
        executor = Counting()
        points = sweeps.grid(**{**base, **change})
        outcome = complete(points, out, executor)
        assert (executor.submitted, len(outcome.rows)) == (missing, len(points))
        columns = outcome.columns()
        assert list(zip(columns["ranks"], columns["size_bytes"], strict=True)) == [
            (point.ranks, point.size_bytes) for point in points
        ]
        assert len({len(column) for column in columns.values()}) == 1


def test_a_changed_cluster_or_simulator_is_simulated_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, out = tmp_path / "mine.yaml", tmp_path / "table.csv"

    def submitted(latency: str) -> int:
        file.write_text(
            "title: mine\nsource: s\ntopology: {kind: switch, devices: 4, link: wire}\nlinks:\n  wire:\n"
            f'    bandwidth: {{value: "1 GB/s", source: s}}\n    latency: {{value: "{latency}", source: s}}\n'
        )
        executor = Counting()
        points = sweeps.grid(clusters=[str(file)], strategies=["ring"], ranks=[2], sizes_bytes=[8])
        (row,) = complete(points, out, executor).rows
        assert row["time_s"] == pytest.approx(2 * (int(latency.split()[0]) * 1e-6 + 4e-9), rel=1e-9)
        return executor.submitted

    assert [submitted("1 us"), submitted("2 us"), submitted("1 us")] == [1, 1, 0]
    for name, value in (("__version__", "0.0.0"), ("_code", lambda: "other")):
        monkeypatch.setattr(sweeps, name, value)
        assert submitted("1 us") == 1


def test_parquet_holds_what_csv_holds(whole: bytes, tmp_path: Path) -> None:
    out = tmp_path / "table.parquet"
    complete(sweeps.grid(**GRID), out, InProcess())
    first = out.read_bytes()
    table = pyarrow.parquet.read_table(out)
    kinds = {int: "int64", float: "double", str: "string"}
    assert {field.name: str(field.type) for field in table.schema} == {
        name: kinds[kind] for name, kind in sweeps.TYPES.items()
    }
    assert tables.csv_text(table.to_pydict()).encode() == whole
    complete(sweeps.grid(**GRID), out, Counting(0))  # nothing is left to simulate
    assert out.read_bytes() == first


def test_parquet_without_pyarrow_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert main([*f"sweep {FLAGS} --out".split(), str(tmp_path / "table.parquet")]) == 2
    assert "pip install 'distsim[parquet]'" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_counts_beyond_64_bits_are_for_csv(tmp_path: Path) -> None:
    columns = {"bytes": [2**70]}
    tables.write(tmp_path / "table.csv", columns, {"bytes": int})
    assert (tmp_path / "table.csv").read_text() == f"bytes\n{2**70}\n"
    with pytest.raises(ConfigError, match=r"table.parquet: cannot write it: .*\.csv takes any"):
        tables.write(tmp_path / "table.parquet", columns, {"bytes": int})
    assert [file.name for file in tmp_path.iterdir()] == ["table.csv"]


def test_the_command(whole: bytes, tmp_path: Path, capsys: Capture) -> None:
    out = tmp_path / "new" / "table.csv"
    assert main([*f"sweep {FLAGS} --jobs 2 --out".split(), str(out)]) == 0
    text, err = capsys.readouterr()
    lines = text.splitlines()
    assert lines[0].startswith(f"{out}: 24 points, 24 simulated, 0 reused, in ")
    assert lines[1].startswith("2 do not fit, for example: cluster dgx_h100 has 8 devices, but parameter-server")
    assert (len(lines), err) == (2, "")  # no bar for less than a second
    assert out.read_bytes() == whole
    out.unlink()
    assert main([*f"sweep {FLAGS} --json --out".split(), str(out)]) == 0
    values = json.loads(capsys.readouterr().out)
    assert values == {"out": str(out), "points": 24, "simulated": 0, "reused": 24, "errors": 2}
    assert out.read_bytes() == whole


def test_a_grid_of_which_nothing_fits_is_an_error(tmp_path: Path, capsys: Capture) -> None:
    out = tmp_path / "table.csv"
    command = f"sweep --clusters dgx_h100 --strategies ring --ranks 9,10 --sizes 8B --jobs 1 --out {out}"
    assert main(command.split()) == 2
    assert "no point of the grid can be simulated" in capsys.readouterr().err
    assert len(out.read_text().splitlines()) == 3


GOOD = {"--strategies": "ring", "--ranks": "2", "--sizes": "8B", "--out": "table.csv"}
MISTAKES = [
    ({"--strategies": "rign"}, "unknown strategy 'rign'; did you mean 'ring'?"),
    ({"--strategies": "ring,"}, "unknown strategy ''"),
    ({"--clusters": "dgx_h10"}, "unknown cluster 'dgx_h10'; did you mean 'dgx_h100'?"),
    ({"--clusters": "nowhere.yaml"}, "nowhere.yaml"),
    ({"--ranks": "2,x"}, "--ranks: 'x' is no whole number; expected a list such as 2,4,8"),
    ({"--ranks": "0"}, "ranks must be at least 1, not 0"),
    ({"--sizes": "8"}, "'8' has no unit"),
    ({"--jobs": "0"}, "--jobs must be at least 1, not 0"),
    ({"--jobs": "1", "--ray": "auto"}, "expected --jobs or --ray, not both"),
    ({"--collective": "gather"}, "unknown collective 'gather'; did you mean 'all-gather'?"),
    ({"--strategies": "tree", "--collective": "all-gather"}, "tree"),
    ({"--out": "table.txt"}, "table.txt: unknown ending '.txt'; expected a file that ends in .csv or .parquet"),
    ({"--out": "/dev/null/table.csv"}, "/dev/null/table.csv.journal: cannot write it"),
    ({"--ray": "127.0.0.1"}, "--ray 127.0.0.1: expected HOST:PORT"),
    ({"--ray": "127.0.0.1:1"}, "--ray 127.0.0.1:1: no Ray cluster answers there"),
]


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # where Ray is imported
@pytest.mark.parametrize(("change", "message"), MISTAKES, ids=[message[:40] for _, message in MISTAKES])
def test_mistakes_are_one_message(
    change: dict[str, str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.chdir(tmp_path)
    flags = [part for flag in {**GOOD, **change}.items() for part in flag]
    assert main(["sweep", *flags]) == 2
    out, err = capsys.readouterr()
    assert (out, "Traceback" in err) == ("", False)
    (line,) = (line for line in err.splitlines() if not line.startswith("joining Ray"))
    assert line.startswith("distsim: error: ")
    assert message in line
    assert not Path("table.csv").exists()


LONG = "--strategies ring,all-to-all --ranks 60,61,62,63 --sizes 1MB:8MB:+1MB --jobs 2"


def stopped(folder: Path, out: Path, sig: signal.Signals, to_group: bool) -> tuple[int, str]:
    """Start a sweep, send it a signal when some more points are finished; return its exit code and its stderr."""
    marker, journal = uuid.uuid4().hex, sweeps.journal_of(out)

    def lines() -> int:
        return journal.read_bytes().count(b"\n") if journal.exists() else 0

    before = lines()
    with started([*DISTSIM, "sweep", *LONG.split(), "--out", str(out)], folder, marker) as (process, _, err):
        end = time.monotonic() + 60
        while lines() < before + 8:
            assert process.poll() is None and time.monotonic() < end, err.read_text()
            time.sleep(0.01)
        (os.killpg if to_group else os.kill)(process.pid, sig)
        code = process.wait(30)
        end = time.monotonic() + 20
        while (left := marked(marker)) and time.monotonic() < end:
            time.sleep(0.05)
        assert left == {}
        assert not out.exists()
        return code, err.read_text()


def test_a_sweep_that_is_killed_resumes_to_the_same_bytes(tmp_path: Path) -> None:
    out, fresh = tmp_path / "table.csv", tmp_path / "fresh.csv"
    code, _ = stopped(tmp_path, out, signal.SIGKILL, to_group=False)
    assert code == -signal.SIGKILL
    code, err = stopped(tmp_path, out, signal.SIGINT, to_group=True)  # a terminal sends Ctrl-C to all processes
    said = [line for line in err.splitlines() if line and "point/s" not in line and "?point" not in line]
    assert said == [f"distsim: interrupted; {out}.journal keeps what is finished: the same command resumes"]
    assert code == 130
    kept = sweeps.journal_of(out).read_bytes().count(b"\n") - 1
    ended = run([*DISTSIM, "sweep", *LONG.split(), "--json", "--out", str(out)], tmp_path)
    assert (ended.code, ended.left) == (0, []), ended.err
    values = json.loads(ended.out)
    assert (values["reused"], values["simulated"]) == (kept, 64 - kept)
    assert 15 <= kept < 64
    assert run([*DISTSIM, "sweep", *LONG.split(), "--out", str(fresh)], tmp_path).code == 0
    assert out.read_bytes() == fresh.read_bytes()


@pytest.mark.timeout(150)
def test_a_local_ray_gives_the_same_bytes_and_leaves_nothing(whole: bytes) -> None:
    with short_folder() as folder:
        out = folder / "table.csv"
        ended = run([*DISTSIM, "sweep", *FLAGS.split(), "--ray", "local", "--out", str(out)], folder, timeout_s=120)
        assert (ended.code, ended.left) == (0, []), ended.err
        assert "24 simulated" in ended.out
        assert "Traceback" not in ended.err
        assert out.read_bytes() == whole
        assert sorted(file.name for file in folder.iterdir() if file.suffix not in (".out", ".err")) == [
            "table.csv",
            "table.csv.journal",
        ]


def test_names_are_split_between_strategies_not_within() -> None:
    assert sweeps.names("ring,ring:channels=2,bidirectional=true, tree:radix=4 ,auto") == [
        "ring",
        "ring:channels=2,bidirectional=true",
        "tree:radix=4",
        "auto",
    ]
    assert sweeps.names(["ring:channels=2,bidirectional=true", "tree"]) == [
        "ring:channels=2,bidirectional=true",
        "tree",
    ]
