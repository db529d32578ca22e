"""Measured chains: bytes against what is known of layers, times on a clock of our own, and nothing left changed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from distsim.errors import ConfigError
from distsim.memory.chain import Chain
from trainers import profile as profiling
from trainers.profile import profile
from trainers.workloads.language_model import Block
from trainers.workloads.resnet import network


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Models this small take many times longer with two threads on cores that are shared."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def measured(
    *layers: nn.Module, shape: tuple[int, ...], grad: bool = True, dtype: torch.dtype = torch.float32
) -> Chain:
    return profile(nn.Sequential(*layers), torch.ones(shape, dtype=dtype).requires_grad_(grad), rounds=1)


def column(values: Any) -> list[float]:
    return [float(value) for value in values]


@pytest.mark.parametrize(
    ("layer", "shape", "size", "saved"),
    [
        (nn.Linear(100, 50), (64, 100), 64 * 50 * 4, 0),
        (nn.ReLU(), (64, 100), 64 * 100 * 4, 0),  # its result is what it saves
        (nn.GELU(), (64, 100), 64 * 100 * 4, 0),  # saves its input, which is none of its own
        (nn.Sequential(nn.Linear(100, 50), nn.GELU()), (64, 100), 64 * 50 * 4, 64 * 50 * 4),
        (nn.Sequential(nn.Linear(100, 50), nn.ReLU()), (64, 100), 64 * 50 * 4, 0),
        (nn.LayerNorm(100), (64, 100), 64 * 100 * 4, 2 * 64 * 4),  # mean and deviation of each row
        (nn.BatchNorm2d(16), (4, 16, 8, 8), 4 * 16 * 64 * 4, 2 * 16 * 4),
        (nn.Conv2d(16, 32, 3, padding=1), (4, 16, 8, 8), 4 * 32 * 64 * 4, 0),
        (nn.MaxPool2d(2), (4, 16, 8, 8), 4 * 16 * 16 * 4, 4 * 16 * 16 * 8),  # where each maximum was, int64
        (nn.Dropout(0.5), (64, 100), 64 * 100 * 4, 64 * 100 * 4),  # on a CPU a factor for each
        (nn.Flatten(), (4, 16, 8, 8), 4 * 16 * 64 * 4, 0),  # a view: nothing new, but a_1 all the same
        (nn.Identity(), (64, 100), 64 * 100 * 4, 0),
    ],
)
def test_bytes_of_single_layers(layer: nn.Module, shape: tuple[int, ...], size: int, saved: int) -> None:
    """`saved` beside the output."""
    chain = measured(layer, shape=shape)
    assert chain.saved is not None
    assert column(chain.size) == [4 * np.prod(shape), size]
    assert column(chain.saved) == [size + saved]
    assert (chain.unit, chain.names) == ("SI", (f"0 {type(layer).__name__}",))


class Wasteful(nn.Module):
    """Records two results more than it needs, and forgets them before it makes its own."""

    def forward(self, given: Tensor) -> Tensor:
        given.exp().exp().exp()
        return given.relu()


@pytest.mark.parametrize(
    ("layer", "forward", "backward"),
    [
        (Wasteful(), 2 * 64 * 100 * 4, 0),
        (nn.Linear(100, 50), 0, (5000 + 50) * 4),  # gradients of weight and bias before they are added to others
        (nn.ReLU(), 0, 0),
        (nn.Sequential(nn.Linear(100, 50), nn.ReLU()), 64 * 50 * 4, (5000 + 50) * 4),  # the output's gradient is gone
        (nn.Sequential(nn.Linear(100, 50), nn.GELU()), 0, (5000 + 50) * 4 - 64 * 50 * 4),  # and GELU's input
    ],
)
def test_bytes_for_the_time_of_an_operation(layer: nn.Module, forward: int, backward: int) -> None:
    chain = measured(layer, shape=(64, 100))
    assert chain.forward_tmp is not None and chain.backward_tmp is not None
    assert (column(chain.forward_tmp), column(chain.backward_tmp)) == ([forward], [backward])


def saved_by_hooks(layer: nn.Module, given: Tensor) -> int:
    """Bytes of all storages that autograd keeps for a layer, and of its output; not of input and parameters."""
    found: dict[int, int] = {}
    held = []

    def pack(tensor: Tensor) -> Tensor:
        held.append(tensor)
        found[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = layer(given)
    found[out.untyped_storage().data_ptr()] = out.untyped_storage().nbytes()
    for own in (given, *layer.parameters(), *layer.buffers()):
        found.pop(own.untyped_storage().data_ptr(), None)
    return sum(found.values())


def models() -> list[tuple[nn.Sequential, Tensor]]:
    torch.manual_seed(0)
    blocks = nn.Sequential(*(Block(64, 0.1) for _ in range(2)))
    bottlenecks = network(50, width=4, classes=10)
    return [(blocks, torch.randn(2, 16, 64).requires_grad_()), (bottlenecks, torch.randn(2, 3, 64, 64))]


@pytest.mark.parametrize("number", [0, 1])
@pytest.mark.parametrize("half", [False, True])
def test_saved_is_what_autograd_keeps(number: int, half: bool) -> None:
    layers, example = models()[number]
    with torch.autocast("cpu", torch.bfloat16, enabled=half):
        chain = profile(layers, example, rounds=1)
        wanted, given = [], example
        for layer in layers:
            torch.clear_autocast_cache()
            given = given.detach().requires_grad_(given.requires_grad)
            wanted.append(saved_by_hooks(layer, given))
            given = layer(given)
    assert chain.saved is not None
    assert column(chain.saved) == wanted
    assert chain.size[-1] == given.numel() * given.element_size()
    assert (given.dtype == torch.bfloat16) == (half and number == 1)  # a transformer's residuals stay float32


def test_backward_runs_outside_of_autocast() -> None:
    layer, seen = nn.Linear(4, 4), list[bool]()
    weight: Any = layer.weight
    weight.register_hook(lambda gradient: seen.append(torch.is_autocast_enabled("cpu")))
    with torch.autocast("cpu", torch.bfloat16):
        profile(nn.Sequential(layer), torch.ones(2, 4), rounds=1)
        assert torch.is_autocast_enabled("cpu")
    assert seen and not any(seen)


class Clocked(nn.Module):
    """Adds 1, and moves a clock: each forward by one of `forward`, in turn, each backward by `backward`."""

    def __init__(self, clock: list[float], forward: list[float], backward: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))
        self.durations, self.calls = forward, 0

        class Add(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, given: Tensor, weight: Tensor) -> Tensor:
                clock[0] += self.durations[self.calls % len(self.durations)]
                self.calls += 1
                return given + weight

            @staticmethod
            def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
                clock[0] += backward
                return gradients[0], gradients[0].sum().reshape(1)

        self.add: Callable[..., Tensor] = Add.apply

    def forward(self, given: Tensor) -> Tensor:
        return self.add(given, self.weight)


class ClockedStore:
    """Takes 1 ms and 1 ns a byte to write, 2 ms and 4 ns a byte to read."""

    def __init__(self, clock: list[float]) -> None:
        self.clock, self.held = clock, dict[int, list[Tensor]]()

    def write(self, key: int, tensors: list[Tensor]) -> ClockedStore:
        self.held[key] = tensors
        self.clock[0] += 1e-3 + 1e-9 * sum(each.nbytes for each in tensors)
        return self

    def read(self, key: int) -> ClockedStore:
        self.clock[0] += 2e-3 + 4e-9 * sum(each.nbytes for each in self.held[key])
        return self

    def discard(self, key: int) -> None:
        del self.held[key]

    def wait(self) -> None: ...

    def result(self) -> None: ...

    def __enter__(self) -> ClockedStore:
        return self

    def __exit__(self, *error: object) -> None:
        assert not self.held


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [0.0]
    monkeypatch.setattr(profiling, "perf_counter", lambda: now[0])
    monkeypatch.setattr(profiling, "host_store", lambda: ClockedStore(now))
    return now


def test_times_are_medians_over_rounds(clock: list[float]) -> None:
    """Forwards: one to warm up and one to count bytes, at 100 s; then the rounds."""
    first = Clocked(clock, [100.0, 100.0, 3.0, 1.0, 2.5, 50.0, 1.5], 7.0)
    second = Clocked(clock, [0.5], 0.25)
    chain = profile(nn.Sequential(first, second), torch.ones(10, requires_grad=True), rounds=5)
    assert column(chain.forward) == [2.5, 0.5]
    assert column(chain.backward) == [7.0, 0.25]
    assert first.calls == 2 + 5


@pytest.mark.parametrize(
    ("saved", "groups"),
    [
        ([5, 5], [[0, 1]]),
        ([6, 5], [[0], [1]]),
        ([20, 20, 1, 9, 1], [[0], [1], [2, 3], [4]]),
        ([0, 10, 0, 20], [[0, 1, 2], [3]]),
        ([20], [[0]]),
    ],
)
def test_layers_are_timed_in_groups(monkeypatch: pytest.MonkeyPatch, saved: list[int], groups: list[list[int]]) -> None:
    monkeypatch.setattr(profiling, "GROUP_BYTES", 10)
    assert profiling._groups(saved) == groups


@pytest.mark.parametrize("allowed", [0, 3 * 40, 2**27])
def test_a_groups_backward_comes_after_its_forward(
    monkeypatch: pytest.MonkeyPatch, clock: list[float], allowed: int
) -> None:
    """Layers that save 40 bytes each, alone, three at a time and all together: gradients get through as ever."""
    monkeypatch.setattr(profiling, "GROUP_BYTES", allowed)
    layers = nn.Sequential(*(Clocked(clock, [float(number)], 10.0 + number) for number in range(7)))
    seen: list[int] = []
    for number, layer in enumerate(layers):
        layer.register_forward_hook(lambda *_, number=number: seen.append(number))
        weight: Any = layer.weight
        weight.register_hook(lambda gradient, number=number: seen.append(-number - 1))
    chain = profile(layers, torch.ones(10, requires_grad=True), rounds=1)
    assert column(chain.forward) == list(range(7))
    assert column(chain.backward) == [10.0 + number for number in range(7)]
    step = {0: 1, 120: 3, 2**27: 7}[allowed]
    groups = [list(range(7))[first : first + step] for first in range(0, 7, step)]
    assert seen[-14:] == [each for group in groups for each in [*group, *(-number - 1 for number in reversed(group))]]


def test_layers_before_the_first_that_learns_have_no_backward(clock: list[float]) -> None:
    layers = nn.Sequential(*(Clocked(clock, [1.0], 2.0) for _ in range(3)))
    for parameter in layers[:2].parameters():
        parameter.requires_grad_(False)
    chain = profile(layers, torch.ones(10), rounds=1)
    assert column(chain.backward) == [0.0, 0.0, 2.0]


class Detaches(nn.Module):
    def forward(self, given: Tensor) -> Tensor:
        return given.detach() * 2


def test_what_no_gradient_comes_to_has_no_backward(clock: list[float]) -> None:
    layers = nn.Sequential(Clocked(clock, [1.0], 2.0), Detaches(), Clocked(clock, [1.0], 3.0))
    chain = profile(layers, torch.ones(10), rounds=1)
    assert column(chain.backward) == [0.0, 0.0, 3.0]


def test_copies_take_a_while_and_more_for_more_bytes(clock: list[float]) -> None:
    chain = measured(nn.Sequential(nn.Linear(100, 5000), nn.GELU()), nn.Linear(5000, 10), shape=(64, 100))
    assert chain.saved is not None
    for values, bytes_, start, each in [
        (chain.write, chain.size[1:], 1e-3, 1e-9),
        (chain.read, chain.size[1:], 2e-3, 4e-9),
        (chain.write_saved, chain.saved, 1e-3, 1e-9),
        (chain.read_saved, chain.saved, 2e-3, 4e-9),
    ]:
        assert values == pytest.approx(start + each * bytes_, rel=1e-9)


def test_copies_to_a_real_disk(tmp_path: Path) -> None:
    chain = profile(nn.Sequential(nn.Linear(4, 4)), torch.ones(2, 4), rounds=2, folder=tmp_path)
    assert chain.write is not None and chain.read is not None
    assert chain.write[0] > 0 and chain.read[0] > 0
    assert not list(tmp_path.iterdir())
    with pytest.raises(ConfigError, match="none"):
        profile(nn.Sequential(nn.Linear(4, 4)), torch.ones(2, 4), folder=tmp_path / "none")


class Replaces(nn.Module):
    """Has a buffer that each forward replaces, and fails when it is told to."""

    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(1))
        self.fails_at = 1000

    def forward(self, given: Tensor) -> Tensor:
        self.count = self.count + 1
        if int(self.count) == self.fails_at:
            raise RuntimeError("no\nmore")
        return given * 1


@pytest.mark.parametrize("fails_at", [1000, 1, 2, 4])
def test_everything_is_left_as_it_was(fails_at: int) -> None:
    torch.manual_seed(3)
    last = Replaces()
    layers = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), last)
    torch.autograd.backward(layers(torch.randn(8, 4)).sum())
    gradients = [each.grad for each in layers.parameters()]
    gradients[1] = layers[0].bias.grad = None
    kept = [None if each is None else each.clone() for each in gradients]
    buffers = list(layers.buffers())
    values, parameters = ([each.detach().clone() for each in group] for group in (buffers, layers.parameters()))
    example = torch.randn(8, 4)
    added_to: list[bool] = []
    watched: Any = layers[0].weight
    watched.register_hook(lambda gradient: added_to.append(watched.grad is not None))  # as in accumulation
    state, last.fails_at = torch.get_rng_state(), 1 + fails_at
    if fails_at < 1000:
        with pytest.raises(ConfigError, match=r"layer 4, Replaces, cannot be run by itself: RuntimeError: no$"):
            profile(layers, example, rounds=2)
    else:
        profile(layers, example, rounds=2)
    assert all(added_to) and (added_to or fails_at <= 1)
    assert torch.equal(torch.get_rng_state(), state)
    for parameter, gradient, kept_one in zip(layers.parameters(), gradients, kept, strict=True):
        assert parameter.grad is gradient
        assert gradient is None or kept_one is None or torch.equal(gradient, kept_one)
    for buffer, before, value in zip(layers.buffers(), buffers, values, strict=True):
        assert buffer is before and torch.equal(buffer, value)
    for parameter, value in zip(layers.parameters(), parameters, strict=True):
        assert torch.equal(parameter, value)
    assert layers.training and example.grad is None


class Pair(nn.Module):
    def forward(self, given: Tensor) -> tuple[Tensor, Tensor]:
        return given, given


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ([nn.Linear(4, 4), Pair()], "layer 2, Pair, makes tuple; expected one tensor, which a memory plan can keep"),
        ([nn.ReLU(inplace=True)], "layer 1, ReLU, changes its input in place; expected one that leaves it to others"),
        ([nn.Linear(4, 4), nn.ReLU(inplace=True)], "layer 2, ReLU, cannot be run by itself: RuntimeError: a leaf Vari"),
        ([nn.Linear(5, 4)], "layer 1, Linear, cannot be run by itself: RuntimeError: mat1 and mat2"),
    ],
)
def test_layers_that_no_plan_applies_to(layers: list[nn.Module], message: str) -> None:
    with pytest.raises(ConfigError) as raised:
        measured(*layers, shape=(2, 4), grad=False)
    assert str(raised.value).startswith(message)


def test_rounds_are_at_least_one() -> None:
    with pytest.raises(ConfigError, match="rounds must be at least 1, not 0"):
        profile(nn.Sequential(nn.ReLU()), torch.ones(1), rounds=0)
