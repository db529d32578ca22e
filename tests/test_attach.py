"""A training loop of a user's own, attached to an exchange: held against single-process training and against DDP.

Each script below runs under torchrun, rank by rank in its own process.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from processes import run, torchrun

pytestmark = pytest.mark.timeout(120)

COMMON = '''
import copy, json, os, sys
import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel
import trainers

rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
torch.set_num_threads(1)


class Branches(nn.Module):
    """Odd inputs go right and even ones left; one branch is never used."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(6, 8)
        self.left, self.right, self.never = (nn.Linear(8, 8) for _ in range(3))
        self.last = nn.Linear(8, 3)

    def forward(self, inputs, number):
        hidden = torch.tanh(self.first(inputs))
        return self.last(torch.tanh((self.right if number % 2 else self.left)(hidden)))


def model(seed=0):
    torch.manual_seed(seed)
    return Branches().double()


def inputs(step, member):
    """Of one rank and step, or of one micro-batch of a step."""
    random = torch.Generator().manual_seed(1000 * step + member)
    return torch.randn(4, 6, generator=random, dtype=torch.float64)


def same(one, other):
    """The largest relative difference of two models' parameters."""
    pairs = zip(one.parameters(), other.parameters())
    return max(float((a - b).norm() / b.norm()) for a, b in pairs)


def sgd(one):
    return torch.optim.SGD(one.parameters(), lr=0.2, momentum=0.9, weight_decay=0.1)


found = {}
'''

TRAINING = (
    COMMON
    + """
for strategy in json.loads(sys.argv[1]):
    for transport in ("tcp", "torch"):
        for overlap in (True, False):
            ours = model(seed=rank)  # attach gives everybody rank 0's
            exchange = trainers.attach(ours, strategy, bucket_mb=5e-4, overlap=overlap, transport=transport)
            alone = model(seed=0)
            optimizer, reference = sgd(ours), sgd(alone)
            for step in range(6):
                # Which branches are used changes from step to step, and differs between ranks in some.
                branch = [(step, step + member)[step % 3 == 0] for member in range(ranks)]
                optimizer.zero_grad()
                exchange(inputs(step, rank), branch[rank]).square().mean().backward()
                optimizer.step()
                reference.zero_grad()
                losses = [alone(inputs(step, each), branch[each]).square().mean() for each in range(ranks)]
                (sum(losses) / ranks).backward()
                reference.step()
            bits = [torch.zeros(1, dtype=torch.float64) for _ in range(ranks)]
            flat = nn.utils.parameters_to_vector(ours.parameters()).detach()
            everyones = [torch.empty_like(flat) for _ in range(ranks)]
            log = exchange.exchanger.log
            sent = {}
            for (schedule, src, dst, size), count in log.counts.items():
                sent.setdefault(schedule, [0, 0])
                sent[schedule][0] += count
                sent[schedule][1] += count * size
            name = f"{strategy} {transport} {overlap}"
            found[name] = {
                "error": same(ours, alone),
                "never": ours.never.weight.grad is None and bool(ours.left.weight.grad is None),
                "sent": sent,
                "buckets": [each.params for each in exchange.plan.exchanges],
                "flat": flat.numpy().tobytes().hex(),
            }
            exchange.close()
print(json.dumps(found))
"""
)

STRATEGIES = ("ring", "all-to-all", "tree", "hierarchical:node=1", "double-tree:segments=2")


def results(ended: Any, ranks: int) -> list[dict[str, Any]]:
    assert (ended.code, ended.left) == (0, []), ended.err
    decoder, text, found = json.JSONDecoder(), ended.out.strip(), []
    while text:  # several processes write to one file
        value, end = decoder.raw_decode(text)
        found.append(value)
        text = text[end:].lstrip()
    assert len(found) == ranks
    return found


@pytest.mark.parametrize("ranks", (2, 3))
def test_any_loop_trains_as_one_process_would(ranks: int, tmp_path: Path) -> None:
    """Parameters that one rank uses and another does not, that nobody uses, and that are used in some steps only."""
    script = tmp_path / "script.py"
    script.write_text(TRAINING)
    found = results(run(torchrun(ranks, script, json.dumps(STRATEGIES)), tmp_path), ranks)
    assert found[0].keys() == {f"{s} {t} {o}" for s in STRATEGIES for t in ("tcp", "torch") for o in (True, False)}
    for name in found[0]:
        assert max(rank[name]["error"] for rank in found) < 1e-13, name
        assert all(rank[name]["never"] for rank in found), name  # step 5 goes right on all ranks
        assert len({rank[name]["flat"] for rank in found}) == 1, name
        assert len(found[0][name]["buckets"]) > 3


@pytest.mark.parametrize("ranks", (2, 3))
def test_what_is_sent_is_what_the_plan_says(ranks: int, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(TRAINING)
    found = results(run(torchrun(ranks, script, '["ring"]'), tmp_path), ranks)
    for name in found[0]:
        sent = [
            [sum(rank[name]["sent"].get(str(number), [0, 0])[k] for rank in found) for k in (0, 1)]
            for number in range(len(found[0][name]["buckets"]))
        ]
        *buckets, numbers = found[0][name]["buckets"]
        for (messages, size), params in zip(sent, buckets, strict=False):
            assert messages == 6 * 2 * (ranks - 1) * min(ranks, params)
            assert size == 6 * 2 * (ranks - 1) * params * 8
        assert numbers == 2 + 10
        assert sent[-1][0] > 0


ACCUMULATION = (
    COMMON
    + """
# Micro-batches of unequal numbers of rows, as sequences of unequal length are: rank r has r + 1 + number of them.
ours, alone = model(), model()
exchange = trainers.attach(ours, "ring", bucket_mb=5e-4)
optimizer, reference = sgd(ours), sgd(alone)
for step in range(4):
    parts = {(member, number): inputs(step, 10 * member + number)[: 1 + (member + number) % 4]
             for member in range(ranks) for number in range(3)}
    optimizer.zero_grad()
    for number in range(3):
        part = parts[rank, number]
        exchange.weigh(len(part))
        if number < 2:
            with exchange.no_sync():
                exchange(part, step).square().sum().backward()
        else:
            exchange(part, step).square().sum().backward()
    optimizer.step()
    reference.zero_grad()
    rows = torch.cat(list(parts.values()))
    (alone(rows, step).square().sum() / len(rows)).backward()
    reference.step()
found["weighed"] = same(ours, alone)
log = exchange.exchanger.log
found["messages"] = log.counts.total()
found["wanted"] = 4 * sum(each.traffic(8).messages for each in exchange.plan.exchanges) // ranks
exchange.close()

# The same loop, ours and DDP's, without weights.
ours, theirs = model(), model()
dist.init_process_group("gloo")
exchange = trainers.attach(ours, "halving-doubling")
wrapped = DistributedDataParallel(theirs, find_unused_parameters=True)
optimizers = sgd(ours), sgd(theirs)
for step in range(4):
    for call, optimizer in zip((exchange, wrapped), optimizers):
        optimizer.zero_grad()
        with call.no_sync():
            call(inputs(step, rank), step).square().mean().backward()
        call(inputs(step + 50, rank), step).square().mean().backward()
        optimizer.step()
found["ddp"] = same(ours, theirs)
exchange.close()
found["still there"] = dist.is_initialized()
dist.destroy_process_group()
print(json.dumps(found))
"""
)


def test_accumulation_by_weight_is_the_large_batch_and_without_weights_it_is_ddp(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(ACCUMULATION)
    for rank in results(run(torchrun(2, script), tmp_path), 2):
        assert rank["weighed"] < 1e-13
        assert rank["messages"] == rank["wanted"] > 0  # one exchange for each step, not for each micro-batch
        assert rank["ddp"] < 1e-13
        assert rank["still there"] is True


MISTAKES = (
    COMMON
    + """
from distsim.errors import DistsimError

def complaint(make):
    try:
        make()
    except DistsimError as error:
        return str(error)

frozen = model().requires_grad_(False)
other = nn.Linear(3, 3 + rank)
found["server"] = complaint(lambda: trainers.attach(model(), "parameter-server:placement=colocated"))
found["frozen"] = complaint(lambda: trainers.attach(frozen))
found["unknown"] = complaint(lambda: trainers.attach(model(), "rign"))
found["shapes"] = complaint(lambda: trainers.attach(other))
freezing = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
freezing[1 - rank].requires_grad_(False)  # as many are trained, but not the same ones
found["frozen other"] = complaint(lambda: trainers.attach(freezing))
found["settings"] = complaint(lambda: trainers.attach(model(), "ring", bucket_mb=1 + rank))

from torch.utils.checkpoint import checkpoint

def passes(reentrant):
    layers = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    exchange = trainers.attach(layers)
    first, second = (lambda hidden, layer=layer: checkpoint(layer, hidden, use_reentrant=reentrant) for layer in layers)
    exchange.model = lambda hidden: second(first(hidden))
    exchange(torch.ones(2, 4, requires_grad=True)).sum().backward()
    alike = layers[0].weight.grad is not None
    exchange.close()
    return alike

def twice():
    layer = nn.Linear(4, 4)
    exchange = trainers.attach(layer)
    exchange(torch.ones(2, 4)).sum().backward()
    layer(torch.ones(2, 4)).sum().backward()

found["not reentrant"] = passes(False)
found["reentrant"] = complaint(lambda: passes(True))
found["direct"] = complaint(twice)
print(json.dumps(found))
"""
)


def test_mistakes_are_named(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(MISTAKES)
    for rank in results(run(torchrun(2, script), tmp_path), 2):
        assert "updates on servers, which an own loop's optimizer is not" in rank["server"]
        assert rank["frozen"] == "this model has no parameter that requires a gradient"
        assert rank["unknown"] == "unknown strategy 'rign'; did you mean 'ring'?"
        assert "rank 1: parameter weight is (4, 3) float32 with a gradient, on rank 0 it is (3, 3)" in rank["shapes"]
        assert (
            "rank 1: parameter 0.weight is (2, 2) float32, on rank 0 it is (2, 2) float32 with" in rank["frozen other"]
        )
        assert "rank 1: bucket_mb is 2, on rank 0 it is 1" in rank["settings"]
        assert rank["not reentrant"] is True
        for case in ("reentrant", "direct"):
            assert rank[case].startswith("a backward pass without a call of what attach returned"), rank[case]
