"""A memory plan, executed: to the bit what the plain layers do, and as often and as much as the plan says."""

from __future__ import annotations

import copy
import gc
import random
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import planned
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from memory_models import (
    KEEP,
    MODELS,
    OFFLOAD,
    PRECISIONS,
    RECOMPUTE,
    Ran,
    assert_same,
    chain_of,
    frozen_first,
    gradients,
    loss_of,
    made,
    seen,
    three,
    tidied,
    waits_of,
)
from processes import batch
from torch import Tensor, nn

from distsim.errors import ConfigError
from distsim.memory import exact
from distsim.memory.chain import Chain
from distsim.memory.plan import Op, parse
from distsim.memory.replay import READS, WRITES, replay
from trainers.memory import Applied, apply
from trainers.meter import Meter
from trainers.offload import disk_store, host_store, room_bytes


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """The layers here are too small for two."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@settings(max_examples=80)
@given(
    seed=st.integers(0, 2**32),
    kind=st.sampled_from(MODELS),
    overlap=st.sampled_from((None, "none", "half", "full")),
    precision=st.sampled_from(tuple(PRECISIONS)),
    order=st.sampled_from(("in turn", "alive at once", "within autocast")),
    tidy=st.booleans(),
)
def test_any_plan_does_what_the_plain_layers_do(
    seed: int, kind: Any, overlap: Any, precision: str, order: str, tidy: bool
) -> None:
    """To the bit: losses, gradients, statistics, random numbers; and the numbers of operations are the plan's."""
    model, inputs = made(kind)
    layers = len(model.layers)
    plan = planned.walk(layers, random.Random(seed).randrange)
    if tidy:
        plan = tidied(plan, chain_of(layers))
    waits = waits_of(plan, layers, overlap, tidy)  # and the checker accepts it
    expected = seen(copy.deepcopy(model), inputs, precision=precision, order=order)
    with host_store() as store:
        ran = Ran(model.layers)
        applied = apply(model.layers, plan, waits=waits, store=store)
        assert_same(seen(model, inputs, precision=precision, order=order), expected)
        moved = store.reads, store.writes, store.read_bytes, store.written_bytes
    if kind is frozen_first:  # nothing to be done for the backward of what needs none
        return
    forwards = [sum(row in ((Op.FORWARD, i), (Op.RECORD, i)) for row in plan.rows()) for i in range(1, layers + 1)]
    assert applied.last.forwards == forwards
    assert applied.total.forwards == ran.calls == [4 * each for each in forwards]
    assert sum(applied.last.loads) == plan.count(*READS) and sum(applied.last.stores) == plan.count(*WRITES)
    total = applied.total
    assert (sum(total.loads), sum(total.stores), total.read_bytes, total.written_bytes) == moved


ROWS = 4


def sized() -> tuple[nn.Sequential, Chain]:
    """Layers whose sizes follow from what they save: a linear one its input, tanh its output, GELU its input."""
    layers = nn.Sequential(nn.Linear(2, 3), nn.Sequential(nn.Linear(3, 5), nn.GELU()), nn.Tanh(), nn.Linear(5, 1))
    size = [float(ROWS * 4 * width) for width in (2, 3, 5, 5, 1)]
    return layers, chain_of(4, size, [size[1], 2 * size[2], size[3], size[4]])


@settings(max_examples=60)
@given(seed=st.integers(0, 2**32), transfers=st.booleans(), learns=st.booleans())
def test_what_is_resident_is_what_the_plan_says_row_by_row(seed: int, transfers: bool, learns: bool) -> None:
    """But for g_0, which is not there if the input needs no gradient."""
    layers, chain = sized()
    plan = tidied(planned.walk(4, random.Random(seed).randrange, transfers=transfers), chain)
    expected = np.nan_to_num(replay(chain, plan).memory_at)
    if not learns:
        expected[plan.rows().index((Op.BACKWARD, 1))] -= chain.size[0]
    with host_store() as store:
        applied = apply(layers, plan, store=store)
        torch.autograd.backward(layers(torch.randn(ROWS, 2, requires_grad=learns)).square().sum())
    assert applied.last.resident_bytes == expected.tolist()


@pytest.mark.parametrize("offload", [False, True])
def test_optimal_plans_stay_within_their_budgets(offload: bool) -> None:
    """On the whole front of a chain, from the least memory to all that there is to keep."""
    layers, chain = sized()
    inputs = torch.randn(ROWS, 2, requires_grad=True)
    expected = gradients(layers, inputs)
    points = exact.front(chain, offload=offload)
    assert len(points) > 3 and points[-1].time == chain.plain_time
    for point in points:
        with host_store() as store:
            applied = apply(layers, point.plan, store=store)
            inputs.grad = None
            assert_same(gradients(layers, inputs), expected)
            applied.remove()
        assert max(applied.last.resident_bytes) <= point.budget


@pytest.mark.parametrize(
    "text, expected",
    [
        # a_1 to a_6, as much again that GELU saves, and the gradient behind GELU; a_0 and g_6 are there before
        (" ".join([*(f"Fall_{i}" for i in range(1, 7)), "LOSS", *(f"B_{i}" for i in range(6, 0, -1))]), 13),
        # a_6, which the caller has, and of layer 5: a_4, a_5, what GELU saves, g_5 and the gradient behind GELU
        (
            "Fall_1 Fall_2 D_1 Fall_3 D_2 Fall_4 D_3 Fall_5 D_4 Fall_6 D_5 LOSS D_6 "
            + " ".join(
                " ".join([*(f"F_{j}" + (f" D_{j - 1}" if j > 1 else "") for j in range(1, i)), f"Fall_{i} B_{i}"])
                + (f" D_{i - 1}" if i > 1 else "")
                for i in range(6, 0, -1)
            ),
            6,
        ),
    ],
    ids=["keep", "recompute"],
)
def test_the_memory_that_torch_allocates_is_the_plans(text: str, expected: int) -> None:
    layers = nn.Sequential(*(nn.Sequential(nn.Linear(16, 16), nn.GELU()) for _ in range(6)))
    inputs, given = torch.randn(4096, 16, requires_grad=True), torch.randn(4096, 16)
    apply(layers, parse(text, 6))
    torch.autograd.backward(layers(inputs), given)
    inputs.grad = None
    with Meter(torch.device("cpu")) as meter, meter.span("step"):
        torch.autograd.backward(layers(inputs), given)
    assert meter.used["step"].most / (4096 * 16 * 4) == pytest.approx(expected, abs=0.1)


def test_without_gradients_and_after_remove_the_layers_run_as_they_are() -> None:
    layers = three()
    expected, names = layers(torch.ones(2, 4)), list(layers.state_dict())
    applied = apply(layers, parse(RECOMPUTE, 3))
    with torch.no_grad():
        assert torch.equal(layers(torch.ones(2, 4)), expected)
    layers.requires_grad_(False)
    assert torch.equal(layers(torch.ones(2, 4)), expected)
    assert applied.total.forwards == [0, 0, 0] and list(layers.state_dict()) == names
    layers.requires_grad_(True)
    loss = loss_of(layers)
    applied.remove()
    torch.autograd.backward(loss)  # begun by the plan, so it ends by it
    assert applied.total.forwards == [4, 3, 2]
    gradients(layers)
    assert applied.total.forwards == [4, 3, 2] and "forward" not in vars(layers)
    apply(layers, parse(KEEP, 3))


def test_a_copy_of_a_model_runs_its_own_layers() -> None:
    layers = three()
    applied = apply(layers, parse(RECOMPUTE, 3))
    copied = copy.deepcopy(layers)
    expected = gradients(layers)
    with torch.no_grad():
        next(layers.parameters()).zero_()
    assert_same(gradients(copied), expected)
    assert applied.total.forwards == [4, 3, 2]
    other: Applied = vars(copied)["forward"].__self__
    assert other is not applied and other.total.forwards == [4, 3, 2]


def test_gradients_of_some_parameters_only() -> None:
    layers, plain = three(), three()
    applied = apply(layers, parse(RECOMPUTE, 3))
    for place, forwards in ((2, [2, 2, 2]), (0, [4, 3, 2])):
        wanted = torch.autograd.grad(loss_of(plain), list(plain[place].parameters()))
        assert_same(list(torch.autograd.grad(loss_of(layers), list(layers[place].parameters()))), list(wanted))
        assert applied.last.forwards == forwards
    assert all(each.grad is None for each in layers.parameters())


def test_hooks_of_parameters_fire_once_and_while_backward_goes_on() -> None:
    """A bucket is exchanged as soon as its gradients are there; what is to be done at the end is done at the end."""
    layers, events = three(lambda: nn.Linear(4, 4)), list[str]()
    apply(layers, parse(RECOMPUTE, 3))

    def ended() -> None:
        events.append("end")

    def accumulated(place: int) -> None:
        events.append(f"gradient {place + 1}")
        if place == 2:
            torch.autograd.Variable._execution_engine.queue_callback(ended)

    loss = loss_of(layers)
    for place, layer in enumerate(layers):
        layer.register_forward_hook(lambda *_, place=place: events.append(f"forward {place + 1}"))
        next(layer.parameters()).register_post_accumulate_grad_hook(lambda _, place=place: accumulated(place))  # type: ignore[no-untyped-call]
    torch.autograd.backward(loss)
    again = ["forward 1", "forward 2", "forward 3", "gradient 3", "forward 1", "forward 2", "gradient 2"]
    assert events == [*again, "forward 1", "gradient 1", "end"]


def test_a_loss_that_is_part_of_the_middle_as_well() -> None:
    def both(layers: nn.Sequential) -> list[Tensor]:
        middle: list[Tensor] = []
        hook = layers[1].register_forward_hook(lambda _layer, _inputs, output: middle.append(output))
        loss = loss_of(layers) + middle[0].exp().sum()
        hook.remove()
        torch.autograd.backward(loss)
        return [each.grad for each in layers.parameters() if each.grad is not None]

    layers, plain = three(), three()
    apply(layers, parse(RECOMPUTE, 3))
    assert_same(both(layers), both(plain))


def test_statistics_are_updated_once_and_in_the_mode_of_the_forward() -> None:
    def trained(layers: nn.Sequential) -> list[Tensor]:
        one = loss_of(layers)
        layers.eval()  # an evaluation before the backward pass
        other = loss_of(layers)
        layers.train()
        torch.autograd.backward(one + other)
        return [*(each.grad for each in layers.parameters() if each.grad is not None), *layers.buffers()]

    layers, plain = three(lambda: nn.BatchNorm1d(4)), three(lambda: nn.BatchNorm1d(4))
    apply(layers, parse(RECOMPUTE, 3))
    assert_same(trained(layers), trained(plain))
    assert layers[1].num_batches_tracked == 1 and all(module.training for module in layers.modules())


def test_copies_go_on_meanwhile_unless_a_row_waits_for_them(monkeypatch: pytest.MonkeyPatch) -> None:
    plan, may_write = parse(OFFLOAD, 3), threading.Event()
    with host_store() as store:
        put = store.medium.put

        def slowly(*of: Any) -> None:
            may_write.wait(60)
            time.sleep(0.02)
            put(*of)

        monkeypatch.setattr(store.medium, "put", slowly)
        layers = three()
        applied = apply(layers, plan, waits=waits_of(plan, 3, "full", False), store=store)
        loss = loss_of(layers)  # comes to an end although nothing can be written
        assert store.writes == 0
        assert applied.last.resident_bytes[5] == 4 * (3 * 4 * 4)  # dropped, and yet still there for the copy
        may_write.set()
        torch.autograd.backward(loss)
        applied.remove()
        assert store.writes == store.reads == 2

        before_third: list[int] = []
        layers[2].register_forward_pre_hook(lambda *_: before_third.append(store.writes))
        for waits, written in ((None, 4), ([(4, 5)], 6)):
            apply(layers, plan, waits=waits, store=store)
            torch.autograd.backward(loss_of(layers))
            assert before_third.pop() == written
            layers.forward.__self__.remove()  # type: ignore[attr-defined]


def test_room_in_the_store_is_given_back(tmp_path: Path) -> None:
    """Also of passes whose backward never comes or fails; there is room for the two copies of one pass."""
    one = room_bytes(3 * 4 * 4)
    with disk_store(tmp_path, 2 * one) as store:
        layers = three()
        apply(layers, parse(OFFLOAD, 3), store=store)
        expected = gradients(three())
        for _ in range(3):
            assert_same(gradients(layers), expected)
        for _ in range(3):
            loss = loss_of(layers)
            del loss
        hook = next(layers.parameters()).register_hook(lambda _: 1 / 0)  # type: ignore[no-untyped-call]
        for _ in range(3):
            with pytest.raises(ZeroDivisionError):
                gradients(layers)
        hook.remove()
        gradients(layers)
        alive = loss_of(layers)
        with pytest.raises(ConfigError, match="no room for 4096 bytes more"):
            loss_of(layers)
        del alive


def test_nothing_is_left_in_memory() -> None:
    """Neither after a backward pass nor after a graph that was given up, and without Python's collector of cycles."""
    gc.collect()
    gc.disable()
    try:
        layers = three()
        apply(layers, parse(RECOMPUTE, 3))
        inputs = torch.randn(3, 4)
        gradients(layers, inputs)
        loss_of(layers, inputs)
        held = [each for each in gc.get_objects() if type(each).__name__ in ("Pass", "FirstRun", "Saved")]
        assert held == []
    finally:
        gc.enable()


STRATEGIES = ("ring", "parameter-server:placement=colocated", "halving-doubling", "double-tree:segments=2")
BLOCKS = {
    "plain": "",
    "recompute": RECOMPUTE.replace(" ", "-"),
    "offload": OFFLOAD.replace(" ", "-") + ",copies=true",
}


@pytest.mark.timeout(180)
def test_training_by_a_plan_is_training_without(tmp_path: Path) -> None:
    """On two processes, with dropout, accumulation, small buckets, with and without overlap and mixed precision."""
    planned.copy_to(tmp_path)
    flags = ("--workload", "planned:build", "--steps", "3", "--batch-size", "2", "--accumulate", "2", "--seed", "5")
    more = ("--bucket-mb", "0.02", "--optimizer", "SGD:lr=0.1", "--out", str(tmp_path / "out"), "--json")
    cases = [(each, ()) for each in STRATEGIES] + [("ring", ("--precision", "bf16")), ("ring", ("--no-overlap",))]
    commands = [
        ["--strategy", strategy, *flags, *more, *(("--options", f"plan={plan}") if plan else ()), *options]
        for strategy, options in cases
        for plan in BLOCKS.values()
    ]
    ended = batch(2, tmp_path, commands, timeout_s=150)
    for place, ranks in enumerate(ended):
        assert [rank.code for rank in ranks] == [0, 0], ranks
        plain = ended[place - place % len(BLOCKS)]
        assert all(np.array_equal(one.parameters, other.parameters) for one, other in zip(ranks, plain, strict=True))
