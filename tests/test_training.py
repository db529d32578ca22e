"""Real training on real processes: whatever the strategy and the number of ranks, it is single-process training.

The reference is a plain PyTorch loop on the union of the batches (`plain.py`). Every training below ran under torchrun,
rank by rank in its own process, on the CPU.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import plain
import pytest
import ragged
import torch
from plain import Trained
from processes import TRAINERS, Seen, batch, run, short_folder

from distsim import cli, exchanges
from trainers.workload import Workload
from trainers.workloads import language_model

pytestmark = pytest.mark.timeout(180)

STEPS, SEED = 5, 3
MODEL = {"layers": 1, "width": 32, "context": 16}
tiny: Callable[[], Workload] = partial(language_model.build, layers=1, width=32, context=16)


def command(strategy: str, per_worker: int, out: Path, *more: str) -> list[str]:
    """Command line of a training of the language model; later flags replace earlier ones."""
    options = ",".join(f"{name}={value}" for name, value in MODEL.items())
    flags = ["--strategy", strategy, "--options", options, "--optimizer", "SGD:lr=0.2,momentum=0.9"]
    numbers = ["--steps", str(STEPS), "--seed", str(SEED), "--batch-size", str(per_worker), "--dtype", "float64"]
    return [*flags, *numbers, "--out", str(out), "--json", *more]


SPECS = {
    "ring": "ring",
    "all-to-all": "all-to-all",
    "halving-doubling": "halving-doubling",
    "double-tree": "double-tree:segments=2",
    "hierarchical": "hierarchical:node=1",
    "two-way ring": "ring:channels=2,bidirectional=true",
    "colocated": "parameter-server:servers=2,placement=colocated",
}
SMALL_BUCKETS = ("--bucket-mb", "0.04")
CLIP = 1.7
SCHEDULE = "cosine:final=0.1"


def adamw(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=0.01, weight_decay=0.1)


def cosine(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
    return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=STEPS - 1, eta_min=0.1 * 0.01)


ADAMW = ("--optimizer", "AdamW:lr=0.01,weight_decay=0.1")
RAGGED = ("--workload", "ragged:build", "--options", "samples=21", *ADAMW)
REFERENCES: dict[str, Callable[[int], Trained]] = {
    "clipped": lambda samples: plain.train(tiny, samples, STEPS, seed=SEED, clip=CLIP),
    "AdamW": lambda samples: plain.train(tiny, samples, STEPS, seed=SEED, optimizer=adamw, schedule=cosine),
    "join": lambda samples: plain.train(ragged.build, samples, STEPS, seed=SEED, optimizer=adamw),
    "drop": lambda samples: plain.train(ragged.build, samples, STEPS, seed=SEED, optimizer=adamw, uneven="drop"),
}


def reference(samples: int, name: str = "") -> Trained:
    """Plain training in one process, `samples` samples a step; trainings that are not named above are all the same."""
    return _reference(samples, name if name in REFERENCES else "")


@cache
def _reference(samples: int, name: str) -> Trained:
    train = REFERENCES[name] if name else lambda samples: plain.train(tiny, samples, STEPS, seed=SEED)
    return train(samples)


class Trainings:
    """The trainings of one torchrun."""

    def __init__(self, workers: int, per_worker: int, folder: Path) -> None:
        self.workers, self.samples, self.folder = workers, workers * per_worker, folder
        self.specs = SPECS | ({"colocated": "parameter-server:placement=colocated"} if workers == 1 else {})
        of = partial(command, per_worker=per_worker, out=folder / "out")
        halves = ("--batch-size", str(per_worker // 2), "--accumulate", "2")
        commands = {name: of(spec) for name, spec in self.specs.items()} | {
            "library": [*of("ring"), "--transport", "library"],
            "torch": [*of("ring"), "--transport", "torch"],
            "no overlap": [*of("ring"), "--no-overlap", "--transport", "tcp", *SMALL_BUCKETS],
            "buckets": [*of("ring"), *SMALL_BUCKETS, "--cluster", "laptop_loopback", "--out", str(folder / "buckets")],
            "accumulate": [*of("all-to-all"), *halves, *SMALL_BUCKETS],
            "accumulate, no overlap": [*of("ring"), *halves, "--no-overlap", "--transport", "torch"],
            "clipped": [*of("halving-doubling"), "--clip-norm", str(CLIP), *SMALL_BUCKETS],
            "AdamW": [*of(self.specs["colocated"]), *ADAMW, "--schedule", SCHEDULE],
            "join": [*of("ring"), *RAGGED, *halves, "--bucket-mb", "0.001"],
            "drop": [*of(self.specs["colocated"]), *RAGGED, "--uneven", "drop"],
        }
        ragged.copy_to(folder)
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
    """Eight samples a step shared out among 1, 2 and 4 workers, and six among 3."""
    workers, per_worker = request.param
    return Trainings(workers, per_worker, tmp_path_factory.mktemp(f"ranks{workers}"))


NAMES = (
    *SPECS,
    *("library", "torch", "no overlap", "buckets", "accumulate", "accumulate, no overlap"),
    *REFERENCES,
)
COUNTED = tuple(name for name in NAMES if name != "library")


@pytest.mark.parametrize("name", NAMES)
def test_training_is_single_process_training_on_the_union_of_the_batches(trainings: Trainings, name: str) -> None:
    """And so it does not depend on the number of workers, either: eight samples are the same ones for 1, 2 and 4."""
    wanted, record = reference(trainings.samples, name), trainings.record(name)
    for rank in trainings.seen[name]:
        assert np.linalg.norm(rank.parameters - wanted.parameters) <= 1e-12 * np.linalg.norm(wanted.parameters)
    np.testing.assert_allclose(record["losses"], wanted.losses, rtol=1e-12)


def test_the_references_are_of_what_they_should_be() -> None:
    """Losses go down; clipping clips some steps and not others; lengths and experts in use change from step to step."""
    for samples in (6, 8):
        for name in ("", *REFERENCES):
            losses = reference(samples, name).losses
            assert losses[-1] < losses[0]
        clipped, never = reference(samples, "clipped"), {11, 12}  # what the sixth expert has
        assert 0 < sum(norm > CLIP for norm in clipped.norms) < STEPS
        assert reference(samples, "AdamW").rates == pytest.approx([0.01, 0.008681980515, 0.0055, 0.002318019485, 0.001])
        for name in ("join", "drop"):
            unused = reference(samples, name).unused
            assert all(never <= places for places in unused)
            assert len(set(map(frozenset, unused))) > 1
        taken = {name: reference(samples, name).counts for name in ("join", "drop")}
        assert min(taken["join"]) < min(taken["drop"])  # the last step of an epoch, which the other way has not
        assert len(set(taken["drop"])) > 1


@pytest.mark.parametrize("name", NAMES)
def test_ranks_end_with_the_same_bits(trainings: Trainings, name: str) -> None:
    trainings.record(name)
    assert len({rank.parameters.tobytes() for rank in trainings.seen[name]}) == 1


@pytest.mark.parametrize("strategy", ("ring", "all-to-all"))
def test_the_messages_counted_are_those_of_the_schedule(trainings: Trainings, strategy: str) -> None:
    """From the strategies' formulas: n * 2(n - 1) messages of a chunk, and n(n - 1) of everything; and the numbers'."""
    n, record = trainings.workers, trainings.record(strategy)
    params = record["params"]
    if n == 1:
        messages, size = 0, 0
    elif strategy == "all-to-all":
        messages, size = n * (n - 1), n * (n - 1) * params * 8
    else:
        messages, size = n * 2 * (n - 1), 2 * (n - 1) * params * 8
    exchanged, numbers = record["parts"]
    assert (exchanged["name"], exchanged["messages"], exchanged["bytes"]) == ("bucket 0", messages, size)
    # Recursive doubling, 1 -> 2 -> 4 ranks, all to each other; a third rank tells one before and is told after.
    small = {1: 0, 2: 2, 3: 4, 4: 8}[n]
    flags = len(list(tiny().model.parameters()))
    assert (numbers["name"], numbers["messages"], numbers["bytes"]) == ("numbers", small, small * 8 * (2 + flags))
    totals = record["totals"]
    assert (totals["messages"], totals["bytes"]) == (STEPS * (messages + small), STEPS * (size + numbers["bytes"]))
    spans = record["spans"] or {"row": [], "bytes": []}
    assert (len(spans["row"]), sum(spans["bytes"])) == (messages + small, size + numbers["bytes"])


@pytest.mark.parametrize("name", COUNTED)
def test_every_bucket_is_recorded_as_it_is_simulated(trainings: Trainings, name: str) -> None:
    """Digest, messages, bytes, and both for each pair of ranks; and of accumulated micro-batches just as many."""
    n, record = trainings.workers, trainings.record(name)
    one = {}
    for part in record["parts"]:
        spec = record["strategy"] if part["name"].startswith("bucket") else "recursive-doubling"
        exchange = exchanges.build(spec, n, part["params"])
        traffic = one[part["name"]] = exchange.traffic(8)
        counted = (part["dtype"], part["schedule_digest"], part["messages"], part["bytes"])
        assert counted == ("float64", exchange.digest(), traffic.messages, traffic.bytes)
    pairs: dict[tuple[int, int], list[int]] = {}
    for src, dst, count, size in (link for traffic in one.values() for link in traffic.links()):
        both = pairs.setdefault((src, dst), [0, 0])
        both[0] += STEPS * count
        both[1] += STEPS * size
    assert record["totals"]["links"] == [[*pair, *both] for pair, both in sorted(pairs.items())]
    model = ragged.build().model if name in ("join", "drop") else tiny().model
    params = sum(each.numel() for each in model.parameters())
    buckets = [part for part in record["parts"] if part["name"].startswith("bucket")]
    assert record["params"] == params == sum(part["params"] for part in buckets)
    others = ["numbers", "norm"] if "parameter-server" in record["strategy"] else ["numbers"]
    assert list(one) == [*(f"bucket {at}" for at in range(len(buckets))), *others]
    assert (len(buckets) > 1) == (name in ("no overlap", "buckets", "accumulate", "clipped", "join"))


@pytest.mark.parametrize("name", SPECS)
def test_any_strategy_is_recorded_with_its_options(trainings: Trainings, name: str) -> None:
    assert trainings.record(name)["strategy"] == trainings.specs[name]


def test_the_run_of_several_buckets_is_the_simulated_one(
    trainings: Trainings, capsys: pytest.CaptureFixture[str]
) -> None:
    """Bucket by bucket and message by message."""
    trainings.record("buckets")
    paths = [str(trainings.folder / "buckets" / f"ring.{origin}.json") for origin in ("simulated", "measured")]
    assert cli.main(["diff", *paths, "--json"]) == 0
    verdicts = {line["name"]: line["verdict"] for line in json.loads(capsys.readouterr().out)["lines"]}
    wanted = ["schedule digest", "bucket 0", "bucket 1", "bucket 2", "numbers", "message by message"]
    assert {name: verdicts[name] for name in wanted} == dict.fromkeys(wanted, "equal")


def test_two_servers_share_the_parameters() -> None:
    """On Ray: each of two servers updates its half, clipped by the norm of the whole."""
    wanted = reference(8, "clipped")
    with short_folder() as folder:
        flags = command("parameter-server:servers=2", 4, folder / "runs", "--clip-norm", str(CLIP))
        ended = run([*TRAINERS, *flags, "--workers", "2"], folder)
        assert (ended.code, ended.left) == (0, []), ended.err
        assert (folder / "runs" / "parameter-server_servers=2.measured.json").exists()
    record = json.loads(ended.out)
    np.testing.assert_allclose(record["losses"], wanted.losses, rtol=1e-12)
    assert (record["strategy"], record["workers"], record["ranks"]) == ("parameter-server:servers=2", 2, 4)
    assert [part["name"] for part in record["parts"]] == ["bucket 0", "numbers", "norm"]
    halves = {2: (record["params"] + 1) // 2 * 8, 3: record["params"] // 2 * 8}
    pairs = [(worker, server) for worker in (0, 1) for server in (2, 3)]
    links = {(a, b): [STEPS, STEPS * halves[b]] for a, b in pairs}
    links |= {(b, a): [STEPS, STEPS * halves[b]] for a, b in pairs}
    for part in record["parts"][1:]:  # among all four, by recursive doubling: those beside each other, then the others
        for a, b in ((0, 1), (2, 3), (0, 2), (1, 3)):
            for pair in ((a, b), (b, a)):
                count, size = links.get(pair, [0, 0])
                links[pair] = [count + STEPS, size + STEPS * 8 * part["params"]]
    assert record["totals"]["links"] == [[*pair, *both] for pair, both in sorted(links.items())]


def test_the_librarys_messages_are_not_observable(trainings: Trainings) -> None:
    record, ring = trainings.record("library"), trainings.record("ring")
    assert (record["totals"], record["parts"], record["spans"]) == ("not observable", [], None)
    np.testing.assert_allclose(record["losses"], ring["losses"], rtol=1e-12)
    assert len(record["exchange_time_s"]) == STEPS


@pytest.mark.parametrize("name", COUNTED)
def test_a_message_is_received_after_it_is_sent(trainings: Trainings, name: str) -> None:
    """One monotonic clock for all processes of a machine; nothing is said of how long it takes."""
    spans = trainings.record(name)["spans"] or {"start_s": [], "finish_s": []}
    assert all(0 <= start <= finish for start, finish in zip(spans["start_s"], spans["finish_s"], strict=True))
