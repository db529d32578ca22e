"""How a run is started: under torchrun or on Ray, and the one message for the wrong way."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

import pytest

import trainers
from trainers import runfile
from trainers.__main__ import main
from trainers.config import RunConfig


class Called(Exception):
    """Raised by what stands in for the trainers, with what it was given."""


@pytest.fixture
def stand_ins(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither torch nor Ray is started: their trainers say how they have been called."""
    for name in ("torch_trainer", "ray_trainer"):

        def run(*given: object, _name: str = name, **named: object) -> None:
            raise Called(_name, *given, named)

        module = ModuleType(f"trainers.{name}")
        module.__dict__["run"] = run
        monkeypatch.setitem(sys.modules, f"trainers.{name}", module)
        monkeypatch.setattr(trainers, name, module, raising=False)
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)


def under_torchrun(monkeypatch: pytest.MonkeyPatch, ranks: int) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "test")
    monkeypatch.setenv("WORLD_SIZE", str(ranks))
    monkeypatch.setenv("LOCAL_RANK", "0")


@pytest.mark.parametrize("strategy", ("ring", "parameter-server:placement=colocated"))
def test_what_has_only_workers_runs_under_torchrun(
    stand_ins: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, strategy: str
) -> None:
    under_torchrun(monkeypatch, 3)
    with pytest.raises(Called) as called:
        main(["--strategy", strategy, "--cluster", "laptop_loopback", "--out", str(tmp_path), "--tensorboard"])
    config = RunConfig(strategy=strategy, workers=3)
    assert called.value.args == ("torch_trainer", config, "laptop_loopback", tmp_path, {"tensorboard": True})


def test_dedicated_servers_run_on_ray(stand_ins: None, tmp_path: Path) -> None:
    with pytest.raises(Called) as called:
        main(["--strategy", "parameter-server", "--workers", "2", "--ray-address", "host:1"])
    config = RunConfig(strategy="parameter-server", workers=2)
    assert called.value.args == ("ray_trainer", config, None, Path("runs"), "host:1", {"tensorboard": False})
    with pytest.raises(Called) as called:
        main(["--strategy", "parameter-server"])
    assert called.value.args[1].workers == 4
    (tmp_path / "run.yaml").write_text("strategy: parameter-server:servers=2\nworkers: 3\n")
    with pytest.raises(Called) as called:
        main([str(tmp_path / "run.yaml")])
    assert (called.value.args[1].workers, called.value.args[1].servers) == (3, 2)


@pytest.mark.parametrize(
    ("ranks", "argv", "message"),
    [
        (
            0,
            ["--strategy=ring", "--steps", "9", "--workers", "3"],
            "ring runs under torchrun, one process a rank; use\n"
            "  torchrun --nproc-per-node 3 -m trainers --strategy=ring --steps 9\n",
        ),
        (
            0,
            ["{folder}/three.yaml", "--seed", "2"],
            "ring runs under torchrun, one process a rank; use\n"
            "  torchrun --nproc-per-node 3 -m trainers {folder}/three.yaml --seed 2\n",
        ),
        (
            2,
            ["--strategy", "parameter-server", "--steps", "7"],
            "the parameter server runs on Ray actors, not under torchrun; use\n"
            "  python -m trainers --strategy parameter-server --steps 7 --workers 2\n"
            "or let workers be servers: --strategy parameter-server:placement=colocated\n",
        ),
        (
            2,
            ["{folder}/three.yaml"],
            "{folder}/three.yaml is a run of 3 workers, but torchrun has started 2: its --nproc-per-node and "
            "--nnodes set them\n",
        ),
        (
            2,
            ["--strategy", "ring", "--workers", "2"],
            "--workers is for the parameter server; torchrun's --nproc-per-node and --nnodes set the ranks of ring\n",
        ),
        (
            2,
            ["--strategy", "ring", "--ray-address", "host:1"],
            "--ray-address is for the parameter server; torchrun's --nproc-per-node and --nnodes set the ranks of "
            "ring\n",
        ),
    ],
)
def test_the_wrong_way_to_start_is_one_message(
    stand_ins: None,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    ranks: int,
    argv: list[str],
    message: str,
) -> None:
    (tmp_path / "three.yaml").write_text("strategy: ring\nworkers: 3\n")
    if ranks:
        under_torchrun(monkeypatch, ranks)
    assert main([part.replace("{folder}", str(tmp_path)) for part in argv]) == 2
    assert capsys.readouterr().err == "trainers: error: " + message.replace("{folder}", str(tmp_path))


def test_a_file_that_says_how_many_ranks_runs_on_as_many(
    stand_ins: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    config = RunConfig(strategy="ring", workers=3, options={"layers": 1})
    (tmp_path / "run.yaml").write_text(runfile.text(config))
    under_torchrun(monkeypatch, 3)
    with pytest.raises(Called) as called:
        main([str(tmp_path / "run.yaml")])
    assert called.value.args[1] == config
