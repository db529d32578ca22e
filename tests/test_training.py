"""Real training on real processes: whatever the strategy and the number of ranks, it is single-process training.

The reference is a plain PyTorch loop on the union of the batches, written here; it shares the model and nothing
else with the trainers. Every training below ran under torchrun, rank by rank in its own process, over gloo.
"""

from __future__ import annotations

import json
import sysconfig
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from processes import TRAINERS, Seen, batch, run, short_folder
from torch.nn import functional

from distsim import exchanges
from trainers.config import RunConfig
from trainers.workloads import language_model

pytestmark = pytest.mark.timeout(120)

STEPS, CONTEXT, SEED, LEARNING_RATE, MOMENTUM = 5, 16, 3, 0.3, 0.9
Floats = npt.NDArray[np.float64]


@cache
def reference(sequences: int) -> tuple[Floats, list[float]]:
    """Final parameters and losses of plain training in one process, `sequences` sequences a step."""
    sources = b"".join(file.read_bytes() for file in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")))
    text = np.frombuffer(sources, dtype=np.uint8)
    config = RunConfig(strategy="ring", workers=1, layers=1, width=32, context=CONTEXT, seed=SEED, dtype="float64")
    model = language_model.build(config)
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE, momentum=MOMENTUM)
    losses = []
    for step in range(STEPS):
        first = np.random.default_rng((SEED, step)).integers(0, len(text) - CONTEXT, size=sequences)
        tokens = torch.tensor(np.array([text[start : start + CONTEXT + 1] for start in first]).astype(np.int64))
        optimizer.zero_grad()
        loss = functional.cross_entropy(model(tokens[:, :-1]).transpose(1, 2), tokens[:, 1:])
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        losses.append(float(loss.detach()))
    return torch.nn.utils.parameters_to_vector(model.parameters()).detach().numpy(), losses


def command(strategy: str, per_worker: int, out: Path, *more: str) -> list[str]:
    flags: dict[str, object] = {
        "layers": 1,
        "width": 32,
        "context": CONTEXT,
        "seed": SEED,
        "steps": STEPS,
        "learning-rate": LEARNING_RATE,
    }
    flags |= {"batch-size": per_worker, "dtype": "float64"}
    numbers = [part for name, value in flags.items() for part in (f"--{name}", str(value))]
    return ["--strategy", strategy, *numbers, "--out", str(out), "--json", *more]


SPECS = ("halving-doubling", "double-tree:segments=2", "hierarchical:node=1", "ring:channels=2,bidirectional=true")


class Trainings:
    """The trainings of one torchrun: ring, all-to-all, the ring's library all-reduce, and some of the others."""

    def __init__(self, workers: int, per_worker: int, folder: Path) -> None:
        self.workers, self.sequences = workers, workers * per_worker
        commands = {spec: command(spec, per_worker, folder / "others") for spec in SPECS}
        commands |= {
            "ring": command("ring", per_worker, folder / "ring"),
            "all-to-all": command("all-to-all", per_worker, folder / "all-to-all"),
            "library": command("ring", per_worker, folder / "library", "--transport", "library"),
        }
        self.seen: dict[str, list[Seen]] = dict(
            zip(commands, batch(workers, folder, list(commands.values())), strict=True)
        )

    def record(self, name: str) -> dict[str, Any]:
        """The record that rank 0 printed; the other ranks print nothing."""
        assert [rank.code for rank in self.seen[name]] == [0] * self.workers, self.seen[name]
        assert all(rank.out == "" for rank in self.seen[name][1:])
        record: dict[str, Any] = json.loads(self.seen[name][0].out)
        return record


@pytest.fixture(scope="module", params=((1, 8), (2, 4), (4, 2), (3, 2)), ids="{0[0]}x{0[1]}".format)
def trainings(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Trainings:
    """Eight sequences a step shared out among 1, 2 and 4 workers, and six among 3."""
    workers, per_worker = request.param
    return Trainings(workers, per_worker, tmp_path_factory.mktemp(f"ranks{workers}"))


NAMES = ("ring", "all-to-all", "library", *SPECS)


@pytest.mark.parametrize("name", NAMES)
def test_training_is_single_process_training_on_the_union_of_the_batches(trainings: Trainings, name: str) -> None:
    wanted, losses = reference(trainings.sequences)
    record = trainings.record(name)
    for rank in trainings.seen[name]:
        assert np.linalg.norm(rank.parameters - wanted) <= 1e-12 * np.linalg.norm(wanted)
    np.testing.assert_allclose(record["losses"], losses, rtol=1e-12)
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("name", NAMES)
def test_ranks_end_with_the_same_bits(trainings: Trainings, name: str) -> None:
    trainings.record(name)
    assert len({rank.parameters.tobytes() for rank in trainings.seen[name]}) == 1


@pytest.mark.parametrize("strategy", ("ring", "all-to-all"))
def test_the_messages_counted_are_those_of_the_schedule(trainings: Trainings, strategy: str) -> None:
    """From the strategies' formulas: n * 2(n - 1) messages of a chunk, and n(n - 1) of everything."""
    n, record = trainings.workers, trainings.record(strategy)
    params = record["params"]
    if n == 1:
        messages, size = 0, 0
    elif strategy == "all-to-all":
        messages, size = n * (n - 1), n * (n - 1) * params * 8
    else:
        messages, size = n * 2 * (n - 1), 2 * (n - 1) * params * 8
    totals = record["totals"]
    assert (totals["messages"], totals["bytes"]) == (STEPS * messages, STEPS * size)
    spans = record["spans"] or {"row": [], "bytes": []}
    assert (len(spans["row"]), sum(spans["bytes"])) == (messages, size)
    one = exchanges.build(strategy, n, params).traffic(8)
    assert totals["links"] == [[a, b, STEPS * count, STEPS * sent] for a, b, count, sent in one.links()]


@pytest.mark.parametrize("spec", SPECS)
def test_any_strategy_is_recorded_with_its_options(trainings: Trainings, spec: str) -> None:
    n, record = trainings.workers, trainings.record(spec)
    one = exchanges.build(spec, n, record["params"])
    assert (record["strategy"], record["schedule_digest"]) == (spec, one.digest())
    wanted = [[a, b, STEPS * count, STEPS * sent] for a, b, count, sent in one.traffic(8).links()]
    assert record["totals"]["links"] == wanted


def test_two_servers_share_the_parameters() -> None:
    """On Ray: each of two servers updates its half, and the losses are those of single-process training."""
    _, losses = reference(8)
    with short_folder() as folder:
        flags = command("parameter-server:servers=2", 4, folder / "runs")
        ended = run([*TRAINERS, *flags, "--workers", "2"], folder)
        assert (ended.code, ended.left) == (0, []), ended.err
        assert (folder / "runs" / "parameter-server_servers=2.measured.json").exists()
    record = json.loads(ended.out)
    np.testing.assert_allclose(record["losses"], losses, rtol=1e-12)
    assert (record["strategy"], record["workers"], record["ranks"]) == ("parameter-server:servers=2", 2, 4)
    halves = {2: (record["params"] + 1) // 2 * 8, 3: record["params"] // 2 * 8}
    pairs = [(worker, server) for worker in (0, 1) for server in (2, 3)]
    wanted = [[a, b, STEPS, STEPS * halves[b]] for a, b in pairs]
    wanted += [[b, a, STEPS, STEPS * halves[b]] for a, b in pairs]
    assert record["totals"]["links"] == sorted(wanted)


def test_the_librarys_messages_are_not_observable(trainings: Trainings) -> None:
    record, ring = trainings.record("library"), trainings.record("ring")
    assert record["totals"] == "not observable"
    assert record["spans"] is None
    np.testing.assert_allclose(record["losses"], ring["losses"], rtol=1e-12)
    assert len(record["exchange_time_s"]) == STEPS


def test_a_message_is_received_after_it_is_sent(trainings: Trainings) -> None:
    """One monotonic clock for all processes of a machine; nothing is said of how long it takes."""
    for strategy in ("ring", "all-to-all"):
        spans = trainings.record(strategy)["spans"] or {"start_s": [], "finish_s": []}
        assert all(0 <= start <= finish for start, finish in zip(spans["start_s"], spans["finish_s"], strict=True))
