"""The benchmarks run, and both sides simulate the same thing. How fast they are is nothing for a test."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import __main__ as command
from benchmarks import building, cases, full_ring, hosts, memory_planning, peers, report, speed
from distsim import engine, exchanges
from distsim.errors import ConfigError, DistsimError
from distsim.lower import lower
from distsim.memory import revolve

ROOT = Path(__file__).resolve().parent.parent


def quick(*arguments: str) -> str:
    """Run the benchmarks at tiny sizes and return what they print."""
    # In a process of its own, as it keeps to one core.
    shell = [sys.executable, "-W", "error", "-m", "benchmarks", "--quick", "--runs", "1", *arguments]
    return subprocess.run(shell, cwd=ROOT, capture_output=True, text=True, check=True).stdout


SIMULATED = ("full-ring", "speed", "peers", "symmetry", "building")
TRAINED = ("transports", "training", "links", "gpt2")
PLANNED = ("memory-planning",)
EXECUTED = ("offload", "memory-execution")


def test_simulations_run_on_one_core_and_say_where_when_and_with_what() -> None:
    printed = json.loads(quick("--json", *SIMULATED))
    machine = printed["machine"]
    assert machine["runs"] == 1 and 0 < machine["core_ours"] < 1.5
    for key in (
        "date",
        "cpu",
        "cores",
        "core",
        "load_before",
        "system",
        "python",
        "distsim",
        "numpy",
        "numba",
        "simpy",
    ):
        assert key in machine
    titles = assert_tables(printed)
    assert len(titles) == len(set(titles)) == 7  # speed and symmetry have two


def assert_tables(printed: dict[str, Any]) -> list[str]:
    """Every table is whole, and what is measured is positive; return the titles."""
    for table in printed["tables"]:
        assert table["included"]
        lengths = {len(values) for values in table["columns"].values()}
        assert len(lengths) == 1 and 0 not in lengths
        for name, values in table["columns"].items():
            if name.endswith("_s") or name.startswith("ratio"):
                assert all(value is None or value > 0 for value in values), name
    return [table["title"] for table in printed["tables"]]


@pytest.mark.timeout(200)
def test_trainings_run_beside_their_peers() -> None:
    """Over sockets and gloo, beside DDP, between hosts (where that is permitted) and on a GPU (where there is one)."""
    titles = assert_tables(json.loads(quick("--json", *TRAINED)))
    tables = 4 if hosts.unavailable() else 5  # links has two where hosts can be made
    assert len(titles) == len(set(titles)) == tables


@pytest.mark.slow
@pytest.mark.timeout(200)
def test_plans_run_beside_their_predictions() -> None:
    printed = json.loads(quick("--json", *EXECUTED))
    titles = assert_tables(printed)
    assert len(titles) == len(set(titles)) == 4
    *_, plans, hidden = (table["columns"] for table in printed["tables"])
    assert set(plans["model"]) == {"MLP", "transformer", "ResNet"} and set(plans["policy"]) == {"fast", "mixed"}
    assert list(hidden["page_cache"]) == ["kept", "dropped"] and all(hidden["copied_bytes"])


def test_no_benchmark_is_left_out() -> None:
    assert {*SIMULATED, *TRAINED, *PLANNED, *EXECUTED} == command.BENCHMARKS.keys()


def test_tables_for_humans_have_units() -> None:
    text = quick("speed", "peers")
    assert "Against peers" in text and "numba: " in text and "Building" not in text
    assert " M/s" in text and "x  " in text and " ms" in text


@pytest.mark.parametrize("which", ["equal", "unequal"])
@pytest.mark.parametrize("ranks", [2, 3, 5, 16])
def test_peers_and_engine_give_the_same_time(ranks: int, which: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cases, "PARAMS", 11 * ranks - 1)  # one chunk is smaller
    monkeypatch.setattr(cases, "LINK", cases.LINK.replace("50 GB/s", "5 MB/s"))  # so that sizes matter
    cluster = cases.ring_of_links(ranks)
    if which == "unequal":
        cluster = cases.unequal(cluster)
    ring = peers.ring_on(cluster)
    assert len(set(ring.chunk_bytes)) == 2
    assert len(set(ring.bandwidth_Bps)) == (1 if which == "equal" else ranks)
    times = [peer(ring) for peer in peers.PEERS.values()]
    times.append(engine.run(lower(cases.ring(ranks), cluster, cases.ITEMSIZE, sharing="fifo").graph).makespan_s)
    assert times == pytest.approx([times[0]] * 3, rel=1e-9)


@pytest.mark.parametrize("peer", peers.PEERS)
def test_a_peer_that_simulates_something_else_is_caught(peer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right = peers.PEERS[peer]
    monkeypatch.setitem(peers.PEERS, peer, lambda ring: right(ring) * (1 + 2e-9))
    with pytest.raises(AssertionError, match=peer):
        peers.measure(1, quick=True)


def test_without_simpy_the_error_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "simpy", None)
    with pytest.raises(ConfigError, match=r"pip install 'distsim\[bench\]'"):
        peers.measure(1, quick=True)


def test_unequal_links_differ_and_stay_within_bounds() -> None:
    equal = cases.switch(16)
    factor = cases.unequal(equal).bandwidth_Bps / equal.bandwidth_Bps
    assert len(set(factor.tolist())) == len(factor) and 0.5 <= factor.min() < factor.max() <= 1.5


def test_fat_tree_is_oversubscribed_four_to_one() -> None:
    tree = cases.fat_tree(64)
    up = (tree.tail >= 64) & (tree.tail < 68) & (tree.head >= 68)  # from the four leaves to the spines
    assert up.sum() == 16
    assert tree.bandwidth_Bps[up].sum() * 4 == pytest.approx(64 * tree.egress_Bps([0])[0])


def test_shifts_are_what_build_builds() -> None:
    built = exchanges.build("direct", 16, cases.PARAMS, "personalised-all-to-all")
    assert cases.shifts(16).gradients.digest() == built.gradients.digest()


def test_every_strategy_is_built() -> None:
    (table,) = building.measure(1, quick=True)
    shown = {strategy.partition(" ")[0] for strategy in table.columns["strategy"]}
    assert shown == {name for strategies in exchanges.ALGORITHMS.values() for name in strategies}


def test_speed_measures_the_interpreted_loop_apart() -> None:
    _, crowded = speed.measure(1, quick=True)
    assert list(crowded.columns["loop"]) == ["compiled", "default"] * 4 + ["compiled"] * 4


def test_full_ring_is_measured_from_outside() -> None:
    """From a process that is small itself: Linux counts the memory of who starts another one as that one's."""
    code = "import json; from benchmarks import full_ring; print(json.dumps(full_ring.start(8)))"
    ran = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True, timeout=120
    )
    found = json.loads(ran.stdout)
    assert found["transfers"] == 8 * 2 * 7
    assert found["all_s"] > sum(found["parts"].values()) > 0
    assert 20e6 < found["peak_bytes"] < 1e9


def test_a_child_that_fails_is_an_error() -> None:
    with pytest.raises(DistsimError, match="ended with 1"):
        full_ring.start(0)


def test_sides_take_turns_and_must_repeat_themselves() -> None:
    calls: list[str] = []

    def side(name: str) -> float:
        calls.append(name)
        return float(calls.count(name) > 2 and name == "b")

    turns = report.in_turns({"a": lambda: side("a")}, 2)
    assert [len(turns.seconds["a"]), turns.result["a"]] == [2, 0.0] and turns.first_s["a"] > 0
    calls.clear()
    with pytest.raises(AssertionError, match=r"b: 1\.0 in one run, 0\.0 in another"):
        report.in_turns({"a": lambda: side("a"), "b": lambda: side("b")}, 2)
    assert calls == ["a", "b"] * 3


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [(["pears"], "expected some of: full-ring, speed, peers"), (["--runs", "0"], "at least 1")],
)
def test_mistakes_are_explained(arguments: list[str], expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        command.main(arguments)
    assert left.value.code == 2
    assert expected in capsys.readouterr().err


@pytest.mark.slow
def test_planners_run_beside_their_peers() -> None:
    printed = json.loads(quick("--json", *PLANNED))
    titles = assert_tables(printed)
    assert len(titles) == len(set(titles)) == 5
    _, programme, long, _, slots = (table["columns"] for table in printed["tables"])
    assert programme["milp"] == programme["exact"]
    assert all(part >= 0 for part in long["gap_percent"] + long["persistent_over_fast_percent"])
    for schedule, ratio in zip(slots["schedule"], slots["ratio_cost"], strict=True):
        assert ratio == 1 if schedule == "Revolve" else ratio >= 1


def test_an_integer_programme_that_is_better_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.checkmate.checkmate", lambda *arguments, **options: 1.0)
    with pytest.raises(AssertionError, match="is not the optimum"):
        memory_planning.beside_programme((4,), 4, 1)


def test_a_library_that_is_better_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    right = revolve.slots
    monkeypatch.setattr(revolve, "slots", lambda steps, count: right(steps, count - 1))
    with pytest.raises(AssertionError, match=r"Revolve of \(10, 2, 0\)"):
        memory_planning.beside_library(True, 1)


@pytest.mark.parametrize("package", ["scipy", "checkpoint_schedules"])
def test_without_what_planners_are_measured_against_the_error_says_how_to_get_it(
    package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ConfigError, match=rf"{package}; install it with `pip install 'distsim\[dev\]'`"):
        memory_planning.measure(1, quick=True)


def test_a_plan_command_that_fails_is_an_error(tmp_path: Path) -> None:
    file = tmp_path / "chain.json"
    file.write_text(memory_planning.random_chain(3, "saved", 0).to_json(), "utf-8")
    with pytest.raises(DistsimError, match="ended with 2: distsim: error: no plan fits"):
        memory_planning.command(file, 0)
