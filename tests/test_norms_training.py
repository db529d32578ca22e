"""Whole trainings with batch normalisation over all ranks, held against plain PyTorch in one process.

The reference is nn.BatchNorm, or nn.GroupNorm, on the union of the ranks' micro-batches.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache, partial
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from processes import TRAINERS, Seen, batch, run, short_folder, torchrun
from test_norms import Activated
from torch import nn
from torch.nn import functional

from distsim.errors import ConfigError
from trainers import norms
from trainers.config import RunConfig
from trainers.workload import Samples, Workload
from trainers.workloads import resnet

pytestmark = pytest.mark.timeout(120)

STEPS, SEED, SAMPLES, WHOLE = 3, 3, 15, 8
"""The second step has the 7 samples that are left; the third begins again."""

CHAIN = '''
"""A chain of equal layers, of which a tight budget has some run again."""

import torch
from torch import nn
from torch.nn import functional

from trainers.workload import Workload


def build(*, depth: int, width: int, samples: int) -> Workload:
    def layer(channels):
        return nn.Sequential(nn.Conv2d(channels, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Tanh())

    model = nn.Sequential(layer(1), *(layer(4) for _ in range(7)), nn.Flatten(), nn.Linear(4 * 8 * 8, 3))
    data = [(torch.randn(1, 8, 8, dtype=torch.float64), at % 3) for at in range(24)]
    return Workload(model=model, data=data, loss=loss, evaluation=data[:8])


def loss(model, batch):
    images, wanted = batch
    return functional.cross_entropy(model(images), wanted, reduction="sum")
'''
GROUP = ("--batch-size", "1", "--batch-norm", "group")
CHAINED = ("--workload", "chain:build", "--batch-size", "6")


@dataclass
class Trained:
    """What plain training has come to."""

    parameters: npt.NDArray[np.float64] = field(default_factory=lambda: np.zeros(0))
    losses: list[float] = field(default_factory=list)
    evaluation: float = 0.0
    """Mean loss with running statistics, after the last step."""


@cache
def reference(norm: resnet.Norm, parts: int = 1, samples: int = SAMPLES) -> Trained:
    """Train in one process, steps of `WHOLE` samples that go through the model in `parts` equal parts."""
    torch.set_num_threads(1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        work: Workload = resnet.build(depth=18, width=4, norm=norm, samples=samples)
    model, seen, waiting = work.model.double(), Trained(), np.zeros(0, dtype=np.int64)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    epoch = 0
    for _ in range(STEPS):
        if not len(waiting):
            waiting, epoch = np.random.default_rng((SEED, epoch)).permutation(samples), epoch + 1
        taken, waiting = waiting[:WHOLE], waiting[WHOLE:]
        optimizer.zero_grad()
        loss = sum(cross_entropy(model, work.data, part) for part in np.split(taken, parts)) / len(taken)
        torch.autograd.backward(loss)
        optimizer.step()
        seen.losses.append(float(loss.detach()))
    seen.parameters = nn.utils.parameters_to_vector(model.parameters()).detach().numpy()
    assert work.evaluation is not None
    held_out = np.arange(len(work.evaluation))
    with torch.no_grad():
        seen.evaluation = float(cross_entropy(model.eval(), work.evaluation, held_out)) / len(held_out)
    return seen


def cross_entropy(model: nn.Module, samples: Samples, chosen: npt.NDArray[np.int64]) -> Any:
    images, wanted = zip(*(samples[int(at)] for at in chosen), strict=True)
    return functional.cross_entropy(model(torch.stack(images).double() / 255), torch.stack(wanted), reduction="sum")


CHAINS = {
    "kept": (),
    "recomputed": ("--memory-budget", "175kB"),
    "library": ("--transport", "library"),
    "torch": ("--transport", "torch"),
    "colocated": ("--strategy", "parameter-server:servers=2,placement=colocated"),
}
REFERENCES: dict[str, Callable[[], Trained]] = {
    "sync": partial(reference, "batch"),
    "accumulated": partial(reference, "batch", 2, 2 * WHOLE),
    "group": partial(reference, "group"),
}


def command(out: Path, *more: str, samples: int = SAMPLES) -> list[str]:
    """Command line of a training of the network; later flags replace earlier ones."""
    flags = ["--strategy", "ring", "--workload", "resnet", "--options", f"depth=18,width=4,samples={samples}"]
    numbers = ["--steps", str(STEPS), "--seed", str(SEED), "--evaluate-every", str(STEPS), "--bucket-mb", "0.1"]
    rate = ["--dtype", "float64", "--optimizer", "SGD:lr=0.02,momentum=0.9"]
    return [*flags, *numbers, *rate, "--out", str(out), "--json", *more]


class Trainings:
    """The trainings of one torchrun."""

    def __init__(self, workers: int, folder: Path) -> None:
        self.workers, self.folder = workers, folder
        each, sync = WHOLE // workers, ("--batch-norm", "sync")
        halves = ("--batch-size", str(each // 2), "--accumulate", "2", *sync)
        commands = {
            "sync": command(folder / "sync", "--batch-size", str(each), *sync),
            "keep": command(folder / "keep", "--batch-size", str(each)),
            "accumulated": command(folder / "accumulated", *halves, samples=2 * WHOLE),
            "refused": command(folder / "refused", *halves, samples=2 * WHOLE + 1),
            "group": command(folder / "group", *GROUP, "--accumulate", str(each)),
        }
        if workers == 2:
            commands |= {name: command(folder / name, *CHAINED, *sync, *more) for name, more in CHAINS.items()}
        folder.mkdir()
        (folder / "chain.py").write_text(CHAIN)
        seen = batch(workers, folder, list(commands.values()))
        self.seen: dict[str, list[Seen]] = dict(zip(commands, seen, strict=True))

    def record(self, name: str) -> dict[str, Any]:
        """The record that rank 0 printed."""
        assert [rank.code for rank in self.seen[name]] == [0] * self.workers, self.seen[name][0].err
        record: dict[str, Any] = json.loads(self.seen[name][0].out)
        return record

    def evaluation(self, name: str) -> float:
        """The loss after the last step, with running statistics."""
        (file,) = (self.folder / name).glob("*.metrics.jsonl")
        (told,) = (line for line in map(json.loads, file.read_text().splitlines()) if line["event"] == "evaluation")
        return float(told["loss"])


@pytest.fixture(scope="module", params=(2, 4))
def trainings(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Trainings:
    return Trainings(request.param, tmp_path_factory.mktemp("norms") / f"ranks{request.param}")


def distance(found: npt.NDArray[np.float64], wanted: npt.NDArray[np.float64]) -> float:
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))


@pytest.mark.parametrize("name", REFERENCES)
def test_training_is_single_process_training_on_the_union_of_the_micro_batches(trainings: Trainings, name: str) -> None:
    """Synchronised, of each micro-batch; with group normalisation, of all that a step accumulates."""
    wanted, record = REFERENCES[name](), trainings.record(name)
    for rank in trainings.seen[name]:
        assert distance(rank.parameters, wanted.parameters) <= 1e-12
    assert len({rank.parameters.tobytes() for rank in trainings.seen[name]}) == 1
    np.testing.assert_allclose(record["losses"], wanted.losses, rtol=1e-12)
    assert trainings.evaluation(name) == pytest.approx(wanted.evaluation, rel=1e-12)
    assert record["configuration"]["batch_norm"] == ("group" if name == "group" else "sync")


def test_without_it_ranks_train_another_model(trainings: Trainings) -> None:
    """And so do micro-batches that follow one another, synchronised or not."""
    trainings.record("keep")
    wanted = reference("batch").parameters
    assert distance(trainings.seen["keep"][0].parameters, wanted) > 1e-3
    assert distance(REFERENCES["accumulated"]().parameters, reference("batch", 1, 2 * WHOLE).parameters) > 1e-3


def test_a_rank_that_others_would_wait_for_is_refused_before_they_meet(trainings: Trainings) -> None:
    for rank in trainings.seen["refused"]:
        assert rank.code == 2 and not rank.connected
    told = trainings.seen["refused"][0].err
    assert told.startswith("trainers: error: --batch-norm sync: step 2 has the epoch's last 1 samples, of which some ")
    assert told.endswith("whose statistics they would wait for; use --uneven drop\n")


@pytest.mark.parametrize("trainings", (2,), indirect=True)
@pytest.mark.parametrize("name", CHAINS)
def test_statistics_go_beside_any_exchange_and_when_layers_run_again(trainings: Trainings, name: str) -> None:
    """Two ranks' numbers have one order only: the same bits."""
    record, wanted = trainings.record(name), trainings.record("kept")
    assert record["losses"] == wanted["losses"] and record["losses"][-1] < record["losses"][0]
    for rank in range(2):
        assert np.array_equal(trainings.seen[name][rank].parameters, trainings.seen["kept"][rank].parameters)
    assert trainings.evaluation(name) == trainings.evaluation("kept")
    if name == "recomputed":
        assert record["environment"]["memory"]["recomputed"] > 1


OWN_LOOP = """
import copy, sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

import trainers
from trainers.norms import to_synchronised

folder = Path(sys.argv[1])
dist.init_process_group("gloo")
rank = dist.get_rank()
start, inputs = torch.load(folder / "start.pt"), torch.load(folder / "inputs.pt")


def model():
    made = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 4), nn.BatchNorm1d(4)).double()
    made.load_state_dict(start)
    return made


mine = model()
exchange = trainers.attach(mine, strategy="double-tree", bucket_mb=0.0001)
to_synchronised(mine)
optimizer = torch.optim.SGD(mine.parameters(), lr=0.5)
for step in range(3):
    optimizer.zero_grad()
    exchange(inputs.chunk(4)[rank]).square().sin().mean().backward()
    optimizer.step()
exchange.close()
pair = [dist.new_group([0, 1]), dist.new_group([2, 3])][rank // 2]
again = copy.deepcopy(to_synchronised(model(), pair))
alone = to_synchronised(model(), [dist.new_group([each]) for each in range(4)][rank])
outputs = [each(inputs.chunk(4)[rank]).detach() for each in (again, alone)]
torch.save((mine.state_dict(), *outputs), folder / f"{rank}.pt")
dist.barrier()
dist.destroy_process_group()
"""


def test_an_own_loop_and_ranks_in_groups(tmp_path: Path) -> None:
    """Beside an exchange that overlaps; a copy of a model asks the ranks that the model asks."""
    (tmp_path / "own.py").write_text(OWN_LOOP)
    torch.manual_seed(0)
    build = partial(nn.Sequential, nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 4), nn.BatchNorm1d(4))
    model, inputs = build().double(), torch.randn(12, 6, dtype=torch.float64)
    torch.save(model.state_dict(), tmp_path / "start.pt")
    torch.save(inputs, tmp_path / "inputs.pt")
    wanted = {parts: torch.cat([model(part) for part in inputs.chunk(parts)]).detach() for parts in (2, 4)}
    model.load_state_dict(torch.load(tmp_path / "start.pt"))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for _ in range(3):
        optimizer.zero_grad()
        torch.autograd.backward(model(inputs).square().sin().mean())
        optimizer.step()
    ended = run(torchrun(4, tmp_path / "own.py", tmp_path), tmp_path, timeout_s=60)
    assert ended.code == 0, ended.err
    states, pairs, alone = zip(*(torch.load(tmp_path / f"{rank}.pt") for rank in range(4)), strict=True)
    for state in states:
        assert state.keys() == model.state_dict().keys()
        for name, tensor in model.state_dict().items():
            torch.testing.assert_close(state[name], tensor, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(torch.cat(pairs), wanted[2], rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(torch.cat(alone), wanted[4], rtol=1e-12, atol=1e-14)


@pytest.mark.slow
def test_on_ray_workers_and_servers_train_with_group_norms() -> None:
    more = ("--strategy", "parameter-server", "--workers", "2", *GROUP, "--accumulate", str(WHOLE // 2))
    with short_folder() as folder:
        ended = run([*TRAINERS, *command(folder / "out", *more)], folder, timeout_s=90)
    assert ended.code == 0, ended.err
    np.testing.assert_allclose(json.loads(ended.out)["losses"], reference("group").losses, rtol=1e-12)


def apply(model: nn.Module, samples: int = 16, **values: Any) -> None:
    workload: Any = SimpleNamespace(model=model, data=range(samples))
    norms.apply(RunConfig(**{"strategy": "ring", "workers": 2, **values}), workload)


def test_what_a_run_asks_for() -> None:
    model: Any = nn.Sequential(nn.BatchNorm1d(4), Activated(4))
    apply(model, batch_norm="keep")
    assert type(model[0]) is nn.BatchNorm1d
    for value in ("sync", "group"):
        with pytest.raises(ConfigError, match=rf"^--batch-norm {value}: 1 \(Activated\) has a forward"):
            apply(model, batch_norm=value)
        message = f"--batch-norm {value}: the model has no batch normalisation; leave it out"
        with pytest.raises(ConfigError) as raised:
            apply(nn.Linear(2, 2), batch_norm=value)
        assert str(raised.value) == message
    apply(model[:1], batch_norm="sync")  # the ranks are not connected yet
    assert type(model[0]) is nn.BatchNorm1d
    apply(model[:1], batch_norm="group")
    assert isinstance(model[0], nn.GroupNorm)


@given(
    samples=st.integers(1, 60),
    workers=st.integers(1, 4),
    batch_size=st.integers(1, 4),
    accumulate=st.integers(1, 3),
    uneven=st.sampled_from(("join", "drop")),
    steps=st.integers(1, 12),
)
def test_ranks_that_would_wait_for_ever_are_refused(
    samples: int, workers: int, batch_size: int, accumulate: int, uneven: str, steps: int
) -> None:
    """Samples dealt out one by one, as to players at a table."""
    whole = workers * batch_size * accumulate
    if uneven == "drop" and samples < whole:
        return
    left, unequal = samples, False
    for _ in range(steps):
        if left < (whole if uneven == "drop" else 1):
            left = samples
        hands = [[0] * accumulate for _ in range(workers)]
        for turn, worker, _ in product(range(accumulate), range(workers), range(batch_size)):
            if left:
                hands[worker][turn] += 1
                left -= 1
        unequal |= len({sum(map(bool, hand)) for hand in hands}) > 1
    values = {"workers": workers, "batch_size": batch_size, "accumulate": accumulate, "uneven": uneven, "steps": steps}
    if unequal:
        with pytest.raises(ConfigError, match=r"use --uneven drop$"):
            apply(nn.BatchNorm1d(2), samples, batch_norm="sync", **values)
    else:
        apply(nn.BatchNorm1d(2), samples, batch_norm="sync", **values)


def test_the_message_says_which_step_and_how_many() -> None:
    with pytest.raises(ConfigError) as raised:
        apply(nn.BatchNorm1d(2), samples=19, batch_norm="sync", batch_size=4, accumulate=2)
    assert str(raised.value) == (
        "--batch-norm sync: step 1 has the epoch's last 3 samples, of which some workers have more micro-batches (1) "
        "than others (0), whose statistics they would wait for; use --uneven drop"
    )


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"strategy": "parameter-server"},
            "--batch-norm sync goes over torch.distributed, and with dedicated servers workers are Ray actors; use "
            "--batch-norm group, or let workers be servers: --strategy parameter-server:placement=colocated",
        ),
        (
            {"compile": True},
            "--batch-norm sync talks to the other workers at every normalisation, where a compiled function has to "
            "end: --compile would have next to nothing to compile; leave one of the two out",
        ),
        ({"batch_norm": "synch"}, "--batch-norm must be keep or sync or group, not 'synch'; did you mean 'sync'?"),
    ],
)
def test_values_that_do_not_go_together(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as raised:
        RunConfig(**{"strategy": "ring", "workers": 2, "batch_norm": "sync", **values})
    assert str(raised.value) == message
