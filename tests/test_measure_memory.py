"""Plans that are run and measured: order, counts, peaks, and `python -m trainers.measure_memory`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import planned
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from analysis import fronts
from benchmarks.memory_execution import offload_all
from distsim.cli import main as distsim
from distsim.errors import ConfigError
from distsim.memory import simple
from distsim.memory.chain import Chain
from distsim.memory.plan import MemoryPlan, Op
from distsim.memory.plan import parse as parse_plan
from distsim.memory.replay import Overlap, replay
from trainers import measure_memory, memory_trials, profile
from trainers.memory_trials import Measured, measure, trial
from trainers.precision import Precision
from trainers.workload import Workload

CPU = torch.device("cpu")
FULL = Precision("full", CPU)
ROOT = Path(__file__).resolve().parent.parent


def chain_of(numbers: list[int], layers: int) -> Chain:
    """A chain with saved intermediates and copies."""
    take = iter(numbers)

    def column(count: int) -> Any:
        return np.array([next(take) for _ in range(count)], np.float64)

    size = column(layers + 1)
    return Chain(
        forward=column(layers),
        backward=column(layers),
        size=size,
        saved=size[1:] + column(layers),
        write=column(layers),
        read=column(layers),
        write_saved=column(layers),
        read_saved=column(layers),
    )


@given(st.data(), st.integers(1, 5), st.sampled_from(["none", "half", "full"]), st.integers(0, 12))
def test_a_trial_takes_what_its_plan_takes(data: st.DataObject, layers: int, overlap: Overlap, spare: int) -> None:
    chain = chain_of(data.draw(st.lists(st.integers(0, 9), min_size=9 * layers, max_size=9 * layers)), layers)
    plan = planned.walk(layers, lambda count: data.draw(st.integers(0, count - 1)))
    budget = replay(chain, plan).peak_memory + spare
    before = replay(chain, plan, budget, overlap)
    found = trial(chain, plan, budget, overlap)
    assert found.replay.time <= before.time
    assert found.replay.peak_memory <= budget
    ours, theirs = ([row for row in each.rows() if row[0] < Op.DROP] for each in (found.plan, plan))
    assert sorted(ours) == sorted(theirs)


def test_a_copy_is_issued_before_what_it_goes_on_beside() -> None:
    ones = np.ones(3)
    chain = Chain(
        forward=4 * ones,
        backward=9 * ones,
        size=np.ones(4),
        saved=2 * ones,
        forward_tmp=10 * ones,
        write=ones,
        read=ones,
        write_saved=ones,
        read_saved=ones,
    )
    plan = parse_plan("Fall_1 Wall_1 Dall_1 Fall_2 D_1 Fall_3 LOSS B_3 Rall_1 B_2 B_1", 3)

    def order(budget: float, overlap: Overlap) -> str:
        return trial(chain, plan, budget, overlap).plan.schedule()

    assert order(100, "none") == plan.schedule()
    # Memory is given out in the plan's order: the copy back starts when LOSS and B_3 do, and not earlier.
    assert order(100, "full") == "Fall_1 Wall_1 Fall_2 Fall_3 Rall_1 LOSS B_3 B_2 B_1"
    found = trial(chain, plan, 100, "full")
    assert (found.written_bytes, found.read_bytes) == (2, 2)


class Noisy(nn.Module):
    """A layer that does something else each time."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.calls = 0

    def forward(self, inputs: Tensor) -> Tensor:
        self.calls += 1
        out: Tensor = self.linear(inputs) * self.calls
        return out


def workload_of(*layers: nn.Module) -> tuple[Workload, Tensor]:
    torch.manual_seed(1)
    data = list(torch.randn(6, 8))
    return Workload(model=nn.Sequential(*layers), data=data, loss=lambda model, batch: model(batch).sum()), torch.stack(
        data
    )


def measured(layers: list[nn.Module], folder: Path, plan: MemoryPlan | None = None) -> tuple[Any, Measured, Measured]:
    workload, batch = workload_of(*layers)
    assert isinstance(workload.model, nn.Sequential)
    chain = profile.profile(workload.model, batch, rounds=1, folder=folder)
    expected = trial(chain, plan or offload_all(chain), np.inf, "full")
    plain, (found,) = measure(workload, batch, [expected], rounds=3, folder=folder, precision=FULL)
    return expected, plain, found


def blocks(count: int = 3) -> list[nn.Module]:
    return [
        nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.GELU(), nn.Dropout(0.5), nn.Linear(8, 8))
        for _ in range(count)
    ]


def test_offload_is_exact_and_counted(tmp_path: Path) -> None:
    expected, plain, found = measured(blocks(), tmp_path)
    assert found.exact and found.as_planned(expected)
    assert (found.forwards, found.stores, found.loads) == (3, 2, 2)
    assert found.written_bytes == found.read_bytes == expected.written_bytes > 0
    assert plain[2:] == (3, 0, 0, 0, 0, True)
    assert len(found.times) == len(plain.times) == 3 and min(found.times) > 0 and found.time == sorted(found.times)[1]
    assert list(tmp_path.iterdir()) == []


def test_recompute_is_exact_and_counted(tmp_path: Path) -> None:
    plan = parse_plan("F_1 F_2 D_1 Fall_3 LOSS B_3 D_2 F_1 Fall_2 B_2 D_1 Fall_1 B_1", 3)
    expected, _, found = measured(blocks(), tmp_path, plan)
    assert found.as_planned(expected) and found.forwards == 6


def test_layers_that_are_not_the_same_again_are_found_out(tmp_path: Path) -> None:
    plan = parse_plan("F_1 Fall_2 LOSS B_2 D_1 Fall_1 B_1", 2)
    expected, _, found = measured([nn.Linear(8, 8), Noisy()], tmp_path, plan)
    assert not found.exact and not found.as_planned(expected)


def test_other_counts_than_planned_are_found_out(tmp_path: Path) -> None:
    expected, _, found = measured(blocks(2), tmp_path)
    for name in ("forwards", "loads", "stores", "written_bytes", "read_bytes"):
        assert not found._replace(**{name: getattr(found, name) + 1}).as_planned(expected)


def test_signs_of_zero_and_nans_count() -> None:
    zero, nan = torch.tensor(0.0), torch.tensor(torch.nan)
    assert memory_trials._same([zero, nan], [zero.clone(), nan.clone()])
    assert not memory_trials._same([zero], [-zero])


def test_what_between_takes_is_not_counted(tmp_path: Path) -> None:
    workload, batch = workload_of(*blocks(2))
    assert isinstance(workload.model, nn.Sequential)
    chain = profile.profile(workload.model, batch, rounds=1, folder=tmp_path)
    _, (found,) = measure(
        workload,
        batch,
        [trial(chain, offload_all(chain), np.inf, "full")],
        rounds=1,
        folder=tmp_path,
        precision=FULL,
        between=lambda store: 1000.0,
    )
    assert found.time < -900


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_most_memory_is_that_of_the_moment() -> None:
    def run() -> None:
        for count in (1, 3, 2):
            held = [torch.ones(2**24) for _ in range(count)]  # 64 MiB, which malloc always takes from the system
            del held

    most = memory_trials._most_memory(run, CPU)
    assert most is not None and abs(most / (3 * 2**26) - 1) < 0.02


def test_host_memory_on_a_cpu_is_no_place_to_offload_to() -> None:
    workload, batch = workload_of(*blocks(2))
    assert isinstance(workload.model, nn.Sequential)
    chain = profile.profile(workload.model, batch, rounds=1)
    with pytest.raises(ConfigError, match="offload to host memory, where the layers compute: give a folder"):
        measure(workload, batch, [trial(chain, offload_all(chain), np.inf, "full")], rounds=1, precision=FULL)


MLP = ["--workload", "mlp", "--options", "widths=512-1024-256-1024-512,samples=2048", "--batch-size", "2048"]


def command(module: str, *arguments: str) -> str:
    """Run in a process of its own, whose memory nobody has used before."""
    shell = [sys.executable, "-W", "error", "-m", module, *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(shell, cwd=ROOT, env=environment, capture_output=True, text=True, check=True).stdout


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_front_is_run_and_drawn(tmp_path: Path) -> None:
    chain, front, out = (str(tmp_path / name) for name in ("chain.json", "front.json", "measured.json"))
    command("trainers.profile", *MLP, "--rounds", "2", "--folder", str(tmp_path), "--out", chain)
    planned_front = command(
        "distsim.cli", "memory", chain, "--policy", "mixed", "--overlap", "full", "--pareto", "--json"
    )
    Path(front).write_text(planned_front)
    flags = ("--chain", chain, "--folder", str(tmp_path), "--points", "3", "--rounds", "2", "--out", out)
    shown = command("trainers.measure_memory", front, *MLP, *flags)
    assert shown.splitlines()[0].split()[:4] == ["peak", "predicted", "measured", "off"] and "without a plan" in shown
    written = json.loads(Path(out).read_text())
    points = written["frontier"]
    assert 1 < len(points) <= 3 and written["origin"] == "measured" and written["measured_plain_time"] > 0
    for point in points:
        assert point["measured_exact"]
        off = point["measured_peak_memory"] / point["peak_memory"] - 1
        assert off < 0.15 and (off > -0.15 or point["stores"])  # less, where copies are over early
        for name in ("forwards", "loads", "stores"):
            assert point[f"measured_{name}"] == point[name]
    drawn = fronts.read(Path(out))
    assert drawn.measured and drawn.budgets == tuple(point["measured_peak_memory"] for point in points)
    assert drawn.times == tuple(point["measured_time"] for point in points)


SMALL = ["--workload", "mlp", "--options", "widths=8-4,samples=16", "--batch-size", "4"]


@pytest.fixture
def small(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> tuple[Path, Path]:
    """A small chain and a front of it."""
    chain, front = tmp_path / "chain.json", tmp_path / "front.json"
    assert profile.main([*SMALL, "--rounds", "1", "--folder", str(tmp_path), "--out", str(chain)]) == 0
    capsys.readouterr()
    assert distsim(["memory", str(chain), "--policy", "store-all", "--pareto", "--json"]) == 0
    front.write_text(capsys.readouterr().out)
    return chain, front


def run(front: Path, chain: Path, *flags: str) -> int:
    return measure_memory.main(
        [str(front), "--chain", str(chain), *SMALL, "--rounds", "1", "--out", str(front.parent / "out.json"), *flags]
    )


def test_json_is_the_file(small: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    chain, front = small
    assert run(front, chain, "--json", "--title", "mine") == 0
    shown = capsys.readouterr().out  # where it takes over two seconds, progress is on stderr
    assert shown == (front.parent / "out.json").read_text() and json.loads(shown)["title"] == "mine"


@pytest.mark.parametrize(
    ("change", "said"), [({"exact": False}, "gradients are not the plain ones"), ({"forwards": 9}, "counts are not")]
)
def test_what_is_not_as_planned_fails(
    small: tuple[Path, Path],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    change: dict[str, Any],
    said: str,
) -> None:
    def other(*arguments: Any, **options: Any) -> Any:
        plain, found = measure(*arguments, **options)
        return plain, [each._replace(**change) for each in found]

    monkeypatch.setattr(measure_memory, "measure", other)
    chain, front = small
    assert run(front, chain) == 1
    assert said in capsys.readouterr().err


def changed(front: Path, **changes: Any) -> None:
    front.write_text(json.dumps({**json.loads(front.read_text()), **changes}))


def test_mistakes_are_explained(small: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    chain, front = small

    def error(*flags: str) -> str:
        assert run(front, chain, *flags) == 2
        shown = capsys.readouterr()
        assert shown.out == "" and shown.err.startswith("trainers.measure_memory: error: ")
        return shown.err

    assert "--points must be at least 1, not 0" in error("--points", "0")
    assert "--rounds must be at least 1, not 0" in error("--rounds", "0")
    assert "the workload has 16 samples" in error("--batch-size", "17")
    assert "the memory plan is for 3 layers; the sequence has 4" in error("--options", "widths=8-4-2")
    text = front.read_text()
    point = json.loads(text)["frontier"][0]
    for changes, expected in (
        ({"frontier": [{**point, "time": point["time"] * 1.01}]}, "it is of another chain"),
        ({"frontier": []}, "a front without points"),
        ({"frontier": 3}, "not a front"),
        ({"frontier": [{}]}, "not a front: KeyError('plan')"),
        ({"overlap": "some"}, "not a front"),
        ({"frontier": [{**point, "plan": "F_9"}]}, "layers are 1 to 3"),
    ):
        changed(front, **changes)
        assert expected in error()
        front.write_text(text)
    front.write_text("{\n,")
    assert f"{front}:2: not JSON" in error()
    front.unlink()
    assert f"{front}: cannot read it" in error()


def test_a_chain_without_units_is_refused(small: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    chain, front = small
    data = json.loads(chain.read_text())
    del data["unit"]
    chain.write_text(json.dumps(data))
    assert run(front, chain) == 2
    assert "times and sizes without units" in capsys.readouterr().err


def test_store_all_is_what_plain_layers_do(tmp_path: Path) -> None:
    chain = Chain(forward=np.ones(2), backward=np.ones(2), size=np.ones(3), saved=np.ones(2))
    found = trial(chain, simple.store_all(chain), np.inf, "none")
    assert (found.replay.forwards, found.written_bytes, found.read_bytes) == (2, 0, 0)
