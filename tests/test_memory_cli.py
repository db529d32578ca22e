"""`distsim memory` as users type it: the issue's commands, files, fronts, traces and mistakes."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from distsim.cli import main
from distsim.memory import chain as chains
from distsim.memory.plan import parse
from distsim.memory.replay import replay

CHAIN = {
    "fwd": [16, 21, 13, 26, 7, 4],
    "bwd": [32, 2, 58, 54, 25, 28],
    "size": [5, 19, 3, 9, 4, 16, 15],
}
FRONT = [(52, 378), (55, 341), (56, 336), (59, 315), (68, 302), (78, 299), (87, 286)]
"""Of this chain, from an exact search that is not ours."""
DISK = {
    "fwd": [6, 6, 12, 7, 3],
    "bwd": [12, 14, 18, 9, 7],
    "size": [4, 1, 5, 5, 4, 3],
    "write": [1, 5, 5, 4, 3],
    "read": [1, 5, 5, 4, 3],
}


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    exam, slots = {"L": 10, "k": 5, "fwd_ns": 20, "loadmem_ns": 10}, {"n": 7, "s": 2}
    chains_of = {"chain": CHAIN, "disk": DISK, "seconds": {**CHAIN, "unit": "SI"}, "exam": exam, "slots": slots}
    for name, values in chains_of.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(values, indent=1))
    return tmp_path


def answer(capsys: pytest.CaptureFixture[str], arguments: str) -> dict[str, Any]:
    assert main(f"memory {arguments} --json".split()) == 0
    values: dict[str, Any] = json.loads(capsys.readouterr().out)  # progress may be on stderr
    return values


def test_the_exam(capsys: pytest.CaptureFixture[str]) -> None:
    found = answer(capsys, "--layers 10 --policy periodic:5 --fwd 20ns --loadmem 10ns")
    assert (found["forwards"], found["loads"], found["time_s"]) == (20, 10, 5e-7)
    assert (found["breakeven_loaddisk_s"], found["mixed_time_s"]) == (5e-8, 3.8e-7)
    cached = answer(capsys, "--layers 10 --policy periodic:5 --fwd 20ns --loadmem 10ns --convention cached")
    assert (cached["forwards"], cached["time_s"]) == (8, 2.6e-7)


def test_a_plan_is_what_its_numbers_say(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = answer(capsys, "chain.json --policy optimal --budget 59")
    assert (found["time"], found["forwards"], found["loads"], found["stores"]) == (315, 8, 0, 0)
    again = replay(chains.read("chain.json"), parse(found["plan"], 6), 59)
    assert (again.time, again.peak_memory) == (found["time"], found["peak_memory"])
    without_drops = [word for word in found["plan"].split() if not word.startswith("D")]
    assert found["schedule"].split() == without_drops


def test_every_policy_plans_or_says_what_it_needs(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for policy in ("auto", "optimal", "optimal-recompute", "optimal-offload", "fast", "mixed", "persistent"):
        found = answer(capsys, f"chain.json --policy {policy}")
        assert (found["time"], found["policy"]) == (286, policy)
    for policy in ("store-all", "periodic:2", "sqrt", "revolve:2"):
        assert answer(capsys, f"chain.json --policy {policy}")["time"] >= 286
    assert main(["memory", "chain.json", "--policy", "store-all", "--budget", "60"]) == 2
    assert "no plan of store-all fits into a budget of 60; the least that is feasible is 87" in capsys.readouterr().err


def test_the_fast_planner_says_how_far_it_may_be_off(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for budget, time in FRONT:
        found = answer(capsys, f"chain.json --policy fast --budget {budget}")
        assert found["lower_bound"] <= time <= found["time"]
        assert found["gap"] == pytest.approx(found["time"] / found["lower_bound"] - 1)


def test_fronts(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = answer(capsys, "chain.json --pareto")
    assert [(point["budget"], point["time"]) for point in found["frontier"]] == FRONT
    assert found["plain_time"] == 286
    for policy in ("fast", "mixed", "persistent", "periodic", "revolve", "sqrt"):
        found = answer(capsys, f"chain.json --pareto --policy {policy}")["frontier"]
        points = [(point["budget"], point["time"]) for point in found]
        assert all(point["peak_memory"] == point["budget"] for point in found)
        assert points == sorted(points) and points
        for budget, time in points:
            assert time >= min(least for at, least in FRONT if at <= budget)
    for overlap, least in (("none", 112), ("half", 105), ("full", 105)):
        points = answer(capsys, f"disk.json --pareto --overlap {overlap}")["frontier"]
        assert [point["time"] for point in points if point["budget"] <= 19][-1] == least
    assert main(["memory", "chain.json", "--pareto"]) == 0
    assert "+0.0%" in capsys.readouterr().out


def test_overlapped_offload(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = answer(capsys, "disk.json --budget 20 --overlap full")
    assert found["time"] == 99
    assert answer(capsys, "disk.json --budget 20 --policy optimal-recompute")["time"] == 106


def test_the_timeline_opens_in_perfetto(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = answer(capsys, "disk.json --budget 19 --overlap full --trace plan.json")
    events = json.loads((files / "plan.json").read_text())["traceEvents"]
    spans = [event for event in events if event["ph"] == "X"]
    assert sorted(event["name"] for event in spans) == sorted(found["schedule"].split())
    threads = {event["tid"]: event["args"]["name"] for event in events if event.get("name") == "thread_name"}
    for thread, name in threads.items():  # an engine does one thing at a time
        own = sorted((event["ts"], event["ts"] + event["dur"]) for event in spans if event["tid"] == thread)
        assert all(before[1] <= after[0] for before, after in pairwise(own)), name
    assert set(threads.values()) <= {"compute", "disk write", "disk read"}
    assert max(event["ts"] + event["dur"] for event in spans) == found["time"]
    assert max(event["args"]["resident"] for event in events if event["ph"] == "C") == found["peak_memory"]
    answer(capsys, "--layers 4 --policy periodic:2 --fwd 1us --loadmem 2us --trace exam.json.gz")
    assert (files / "exam.json.gz").exists()


def test_fractions_and_nothing_at_all(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Sums of decimal fractions differ in their last bits; users see no trace of it."""
    whole = answer(capsys, "chain.json --pareto")["frontier"]
    tenths = {key: [number / 10 for number in column] for key, column in CHAIN.items()}
    Path("tenths.json").write_text(json.dumps(tenths))
    found = answer(capsys, "tenths.json --pareto")["frontier"]
    assert [point["budget"] for point in found] == [point["budget"] / 10 for point in whole]
    assert [point["time"] for point in found] == pytest.approx([point["time"] / 10 for point in whole])
    for policy in ("optimal", "fast"):
        assert answer(capsys, f"tenths.json --budget 5.9 --policy {policy}")["time"] == pytest.approx(31.5)
    Path("nothing.json").write_text('{"fwd": [0, 0], "bwd": [0, 0], "size": [0, 0, 0]}')
    for policy in ("optimal", "fast", "persistent", "mixed", "store-all"):
        assert answer(capsys, f"nothing.json --policy {policy} --budget 0")["time"] == 0
        assert main(["memory", "nothing.json", "--policy", policy]) == 0
        assert "+0.0%" in capsys.readouterr().out


def test_files_of_other_problems(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cases: dict[str, tuple[dict[str, object], dict[str, object]]] = {
        "exam": ({"L": 10, "k": 5, "fwd_ns": 20, "loadmem_ns": 10, "nocache": {"fwd": 20}}, {"time_s": 5e-7}),
        "slots": ({"n": 7, "s": 2, "r": 3}, {"advances": 11, "forwards": 18, "repetitions": 3}),
        "disk_slots": ({"n": 30, "cm": 2, "cdisk": 4, "uf": 1, "ub": 2, "wd": 5, "rd": 2}, {"time": 150}),
        "unlimited": ({"n": 30, "cm": 2, "cdisk": None, "uf": 1, "ub": 2, "wd": 5, "rd": 2}, {"time": 150}),
    }
    for name, (values, expected) in cases.items():
        Path(f"{name}.json").write_text(json.dumps(values, indent=1))
        assert answer(capsys, f"{name}.json").items() >= expected.items()
        assert main(["memory", f"{name}.json"]) == 0
        assert capsys.readouterr().out
    assert answer(capsys, "--layers 7 --policy revolve:2")["advances"] == 11


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("", "expected a FILE, or --layers"),
        ("none.json", "none.json: cannot read"),
        ("chain.json --policy optimul", "unknown policy 'optimul'; did you mean 'optimal'?"),
        ("chain.json --policy periodic", "policy periodic needs a number; expected --policy periodic:K"),
        ("chain.json --policy periodic:0", "K must be a whole number of at least 1"),
        ("chain.json --policy optimal:3", "policy optimal takes no number"),
        ("chain.json --budget 51", "the least that is feasible is 52"),
        ("chain.json --budget 51 --policy fast", "the least that is feasible is"),
        ("chain.json --budget 2GiB", "--budget '2GiB' is not a size; expected a number in the file's unit"),
        ("seconds.json --budget 2Gib", "'2Gib'"),
        ("chain.json --budget -1", "--budget"),
        ("chain.json --pareto --budget 60", "--pareto has all budgets"),
        ("chain.json --fwd 20ns", "--fwd goes with --layers"),
        ("chain.json --layers 3", "--layers is in place of a FILE"),
        ("--layers 3 --policy optimal", "--layers 3 is for --policy periodic:K or revolve:SLOTS"),
        ("--layers 3 --policy periodic:2", "needs --fwd"),
        ("--layers 3 --policy periodic:2 --fwd 2 --loadmem 1us", "'2'"),
        ("--layers 3 --policy periodic:2 --fwd 2us --loadmem 1us --convention cache", "did you mean 'cached'"),
        ("--layers 3 --policy periodic:2 --fwd 2us --loadmem 1us --budget 3", "--budget is not for equal layers"),
        ("--layers 3 --policy revolv:2", "not 'revolv:2'; did you mean 'revolve'?"),
        ("--layers 3", "--layers 3 is for --policy periodic:K or revolve:SLOTS; others need a FILE"),
        ("chain.json --overlap full", '--overlap full is of copies, and chain.json has no times to "write" and "read"'),
        ("chain.json --policy=", "unknown policy ''"),
        ("seconds.json --budget 20B", "fits into a budget of 20 B (20 B); the least that is feasible is 52 B (52 B)"),
        ("slots.json --trace x.json", "--trace is not for slots.json: it is for chains and periodic:K"),
        ("slots.json --overlap full", "--overlap is not for slots.json"),
        ("slots.json --policy fast", "--policy fast is not for a file with slots"),
        ("exam.json --fwd 3ns", "--fwd is not for exam.json: it is for --layers with periodic:K"),
        ("exam.json --policy periodic:3", "--policy periodic:3 is not for this file, which says periodic:5"),
        ("--layers 0 --policy periodic:2 --fwd 2us --loadmem 1us", "layers"),
        (
            "--layers 3 --policy revolve:2 --fwd 2us",
            "--fwd is not for revolve, which counts steps: it is for --layers with",
        ),
        ("disk.json --overlap ful", "--overlap"),
        ("chain.json --trace chain.json/plan.json", "chain.json/plan.json: cannot write it"),
    ],
)
def test_a_mistake_is_one_clear_line(
    arguments: str, said: str, files: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["memory", *arguments.split()]) == 2
    printed = capsys.readouterr()
    assert said in printed.err and printed.out == ""
    assert printed.err.startswith("distsim: error: ") and printed.err.count("\n") == 1
