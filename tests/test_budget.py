"""`trainers.budget` in one process: what measuring leaves behind, what ranks tell each other, what closing ends."""

from __future__ import annotations

import random
import re
import threading
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch.distributed import HashStore  # type: ignore[attr-defined]
from torch.utils.data import default_collate

from distsim.errors import ConfigError
from distsim.memory.plan import Op, parse
from trainers import budget, workload
from trainers.budget import Memory, Planned
from trainers.config import RunConfig

CPU = torch.device("cpu")
OPTIONS = {"layers": 4, "width": 64, "context": 64, "dropout": 0.1}


def config(**values: Any) -> RunConfig:
    given = {"strategy": "ring", "workers": 1, "options": OPTIONS, "batch_size": 2, "memory_budget": "2MB"}
    return RunConfig(**{**given, **values})


def loaded(of: RunConfig) -> workload.Workload:
    return workload.load(of.workload, of.options, of.seed, of.dtype)


def test_measuring_leaves_no_trace() -> None:
    """Parameters, gradients, statistics, modes and random numbers of all three kinds."""
    of = config(workload="resnet", options={}, memory_budget="1GB")
    drawn: list[object] = []

    def collate(samples: list[Any]) -> Any:
        drawn.append((torch.rand(1), random.random(), np.random.random()))
        return default_collate(samples)

    work = replace(loaded(of), collate=collate)
    parameters = list(work.model.parameters())
    parameters[0].grad = torch.full_like(parameters[0], 7.0)
    before = [each.clone() for each in work.model.state_dict().values()]
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()  # type: ignore[index]
    planned = budget.plan(of, work, CPU)
    assert all(torch.equal(one, two) for one, two in zip(before, work.model.state_dict().values(), strict=True))
    assert bool((parameters[0].grad == 7).all()) and all(each.grad is None for each in parameters[1:])
    assert torch.equal(states[0], torch.get_rng_state()) and states[1] == random.getstate()
    assert states[2] == np.random.get_state()[1].tolist()  # type: ignore[index]
    assert all(module.training for module in work.model.modules())
    assert len(drawn) == 1
    assert parse(planned.plan, planned.layers).count(Op.FORWARD, Op.RECORD) == planned.layers  # nothing runs twice


def test_the_least_feasible_budget_is_feasible() -> None:
    work = loaded(config())
    with pytest.raises(ConfigError) as raised:
        budget.plan(config(memory_budget=1), work, CPU)
    (least,) = map(int, re.findall(r"feasible is (\d+) bytes", str(raised.value)))
    assert budget.plan(config(memory_budget=least), work, CPU).peak_bytes == least
    with pytest.raises(ConfigError):
        budget.plan(config(memory_budget=least - 1), work, CPU)


@pytest.fixture(scope="module")
def planned() -> Planned:
    """A plan that copies one layer, whatever this machine would choose."""
    plan = "Fall_1 Wall_1 Dall_1 Fall_2 Fall_3 Fall_4 LOSS B_4 B_3 B_2 D_1 Rall_1 B_1"
    return Planned(layers=4, plan=plan, waits=[], room_bytes=2**20, peak_bytes=1, time_s=1.0, plain_time_s=1.0)


def threads() -> list[str]:
    return [each.name for each in threading.enumerate() if each.name.startswith("offload")]


def test_closing_ends_the_threads_and_the_plan(planned: Planned, tmp_path: Path) -> None:
    of = config(offload=str(tmp_path))
    work = loaded(of)
    memory = Memory(of, work, planned, 0)
    loss = work.loss(work.model, work.collate([work.data[0]]))
    torch.autograd.backward(loss)
    assert sorted(threads())[0].startswith("offload-read") and len(threads()) == 2
    assert (memory.seen()["stores"], memory.seen()["loads"], memory.seen()["forwards"]) == (1, 1, 4)
    memory.close()
    assert threads() == [] and list(tmp_path.iterdir()) == []
    work.loss(work.model, work.collate([work.data[0]]))
    assert memory.seen()["forwards"] == 4


def in_turn(of: RunConfig, ranks: int, fails: Any = None) -> list[BaseException | None]:
    """Agree on a plan on several ranks, each a thread; return what each has raised."""
    store, ended = HashStore(), list[BaseException | None]([None] * ranks)

    def rank_runs(rank: int) -> None:
        group: Any = SimpleNamespace(rank=rank, world_size=ranks, store=store)
        try:
            with budget.applied(group, of, loaded(of), CPU) as memory:
                assert memory is not None
                if fails is not None:
                    fails(rank)
        except BaseException as error:
            ended[rank] = error

    started = [threading.Thread(target=rank_runs, args=(rank,)) for rank in range(ranks)]
    for each in started:
        each.start()
    for each in started:
        each.join(60)
    assert not any(each.is_alive() for each in started)
    return ended


@pytest.mark.parametrize("doomed", (0, 2))
def test_a_rank_without_room_is_named_on_all_ranks(
    planned: Planned, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, doomed: int
) -> None:
    full, memory = ConfigError("/scratch: cannot reserve 4096 bytes"), budget.Memory

    def of_rank(of: RunConfig, work: workload.Workload, plan: Planned, rank: int) -> Memory:
        if rank == doomed:
            raise full
        return memory(of, work, plan, rank)

    monkeypatch.setattr(budget, "plan", lambda *_: planned)
    monkeypatch.setattr(budget, "Memory", of_rank)
    assert [str(error) for error in in_turn(config(offload=str(tmp_path)), 3)] == [str(full)] * 3
    assert threads() == []


def test_a_full_disk_is_an_error_with_rank_path_and_bytes(planned: Planned, tmp_path: Path) -> None:
    of = config(offload=str(tmp_path))
    huge = Planned(**{**asdict(planned), "room_bytes": 2**61})
    with pytest.raises(ConfigError, match=rf"--offload, rank 1: {tmp_path}: cannot reserve {2**62} bytes"):
        Memory(of, loaded(of), huge, 1)


def test_a_training_that_fails_closes_its_store(
    planned: Planned, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(budget, "plan", lambda *_: planned)

    def fails(rank: int) -> None:
        raise ZeroDivisionError(rank)

    assert [type(error) for error in in_turn(config(offload=str(tmp_path)), 2, fails)] == [ZeroDivisionError] * 2
    assert threads() == [] and list(tmp_path.iterdir()) == []


def test_without_a_budget_nobody_is_asked() -> None:
    of = config(memory_budget=None)
    budget.check(of, loaded(config(workload="digits", options={})))
    with budget.applied(SimpleNamespace(), of, loaded(of), CPU) as memory:  # type: ignore[arg-type]
        assert memory is None
