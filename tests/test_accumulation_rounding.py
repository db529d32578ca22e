"""Tolerances hold for rounding as it is really measured, and are not much larger."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator

import pytest
import torch
from rounded import CASES, Case, Raw, classes, made, ratios
from torch import Tensor, nn
from torch.nn import functional

from trainers.accumulation.outcome import Outcome
from trainers.accumulation.probes import Place, Record, Watch, watched
from trainers.accumulation.rounding import REPEATED, Lengths, lengths, noise_of, rounding, tolerance, unit_roundoff


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Small models are faster so, and sums the same on every machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("name", CASES)
def test_tolerances_hold_and_are_not_idle(name: str) -> None:
    """The float32 that libraries compute is within the tolerances of the float64, and so is all accumulation."""
    case = made(name)
    scales = case.scales()
    assert scales.coarsest == (torch.float32 if name == "float32 within" else torch.float64)
    right = {dtype: case.step(dtype) for dtype in (torch.float64, torch.float32)}
    found = ratios(right[torch.float32], right[torch.float64], scales, torch.float32)
    assert max(found.values()) < 0.5, found
    assert statistics.median(found.values()) > 1e-3, found
    for dtype, reference in right.items():
        for size in (1, 3, len(case.batch[0]) // 2):
            found = ratios(case.step(dtype, size), reference, scales, dtype)
            assert max(found.values()) < 0.5, (dtype, size, found)


@pytest.mark.parametrize("name", ["perceptron", "language model", "instance norm", "residual", "float32 within"])
def test_errors_are_far_beyond_the_tolerances(name: str) -> None:
    """Two micro-batches, one a bit larger, weigh the same: an error that loops do make."""
    case = made(name)
    scales = case.scales()
    for dtype in (torch.float64, torch.float32):
        found = case.step(dtype, len(case.batch[0]) // 2 + 1, power=0)
        off = ratios(found, case.step(dtype), scales, dtype)
        assert statistics.median(off.values()) > 100, off


@pytest.mark.parametrize("name", ["language model", "group norm", "encoder"])
def test_scales_of_what_modules_give_hold(name: str) -> None:
    case = made(name)
    scales, right, found = case.scales(), case.record(), Record()
    with watched(case.model, found) as watch:
        case.step(torch.float32, watch=watch)
    for measured, exact, coarse in (
        (scales.places, right.outputs, found.outputs),
        (scales.output_gradients, right.output_gradients, found.output_gradients),
        (scales.input_gradients, right.input_gradients, found.input_gradients),
    ):
        assert measured.keys() == exact.keys() == coarse.keys()
        share = [
            float((coarse[place].double() - exact[place]).norm()) / tolerance(scale, torch.float32)
            for place, scale in measured.items()
            if scale
        ]
        assert max(share) < 0.5 and statistics.median(share) > 1e-3, share


def sums(terms: Tensor) -> Tensor:
    """Return errors of float32 sums along the last dimension, one term after another, in units of u."""
    total = torch.zeros(terms.shape[:-1])
    for term in terms.unbind(-1):
        total += term
    return (total.double() - terms.double().sum(-1)) / unit_roundoff(torch.float32)


@pytest.mark.parametrize("terms", [10, 300, 3000])
def test_noise_is_that_of_sums(terms: int) -> None:
    torch.manual_seed(terms)
    drawn = torch.randn(1000, terms)
    size = drawn.double().sum(-1).square().mean().sqrt()
    assert 0.5 < sums(drawn).square().mean().sqrt() / size / noise_of(terms) < 1
    equal = torch.rand(1000, 1) + 0.5
    of_equal = noise_of(terms**2 / REPEATED) * equal[:, 0].double() * terms
    assert 0.3 < (sums(equal.expand(-1, terms)) / of_equal).square().mean().sqrt() < 1
    before = torch.cat([torch.full((1000, 1), 2.0 * terms), equal.expand(-1, terms)], -1)  # all find one exponent
    assert 0.4 < (sums(before) / (noise_of(terms**2 / REPEATED) * 2.5 * terms)).square().mean().sqrt() < 1.5


@pytest.mark.parametrize("samples", [64, 1024, 16384])
def test_equal_samples_err_alike(samples: int) -> None:
    """Their errors add up, as those of different ones do not."""
    torch.manual_seed(samples)
    model = nn.Sequential(nn.Linear(7, 9), nn.Tanh(), nn.Linear(9, 5))
    given = torch.randn(1, 7).expand(samples, 7).contiguous(), torch.zeros(samples, 5)
    case = Case(model, given, lambda model, batch: (model(batch[0]) - batch[1]).square().sum())
    scales = case.scales()
    for dtype in (torch.float64, torch.float32):
        found = ratios(case.step(dtype, samples // 4), case.step(dtype), scales, dtype)
        assert max(found.values()) < 0.5, found
    relative = [
        scales.gradients[name] / float(each.norm()) for name, each in case.step(torch.float64).gradients.items()
    ]
    assert max(relative) < samples  # beyond which no sum can err


class Gate(nn.Module):
    """Lets nothing pass, at first."""

    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.zeros(1))

    def forward(self, given: Tensor) -> Tensor:
        return given * self.factor


def test_zeros_stay_zeros() -> None:
    """Noise on them would open ReLUs that are shut, and sums of zeros have no rounding errors."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6), Gate(), nn.Linear(6, 6, bias=False), nn.ReLU(), nn.Linear(6, 5))
    scales = Case(model, (torch.randn(16, 6), classes(16))).scales()
    for name in ("0.weight", "1.factor", "2.weight"):
        assert scales.gradients[name] == 0, name
    assert scales.gradients["4.bias"] > 0


def test_gradients_that_are_zero_but_for_rounding() -> None:
    """A bias in front of an instance norm: the norm takes away what the bias adds."""
    case = made("instance norm")
    scales, right = case.scales(), case.step(torch.float64).gradients
    assert float(right["6.bias"].norm()) < 1e-10 * float(right["6.weight"].norm())
    assert 1 < scales.gradients["6.bias"] / float(right["6.weight"].norm()) < 1e4


def test_dropout_is_the_same_in_noise() -> None:
    """The noise comes from random numbers of its own, and each run with it from the same as the run without."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 32), nn.Dropout(0.5), nn.Linear(32, 5))
    case = Case(model, (torch.randn(8, 6), classes(8)))
    scales = case.scales()
    state = torch.get_rng_state()
    again = case.scales()
    assert torch.equal(torch.get_rng_state(), state)
    assert again == scales != case.scales(seed=1)
    assert scales.outputs[0] < 100 * float(case.step(torch.float64).outputs[0].norm())


@pytest.mark.parametrize("name", ["perceptron", "float32 within"])
def test_samples_are_counted(name: str) -> None:
    """Also where the first is taken again, with noise that float32 can show."""
    case, runs, samples = made(name), [], []

    def run(watch: Watch) -> Outcome:
        runs.append(1)
        return case.step(torch.float64, watch=watch)

    reference, count = case.step(torch.float64), case.batch[1].numel()
    scales = rounding(case.model, run, case.record(), reference, count, samples=4, on_run=lambda: samples.append(1))
    assert len(samples) == 4 and len(runs) == (5 if name == "float32 within" else 4)
    assert scales.format(torch.float32) == torch.float32 and scales.format(torch.bfloat16) == torch.bfloat16
    assert scales.format(torch.float64) == scales.coarsest


def test_tolerance() -> None:
    assert tolerance(1.5, torch.float32) == pytest.approx(6 * math.sqrt(2) * 2**-24 * 1.5)
    assert tolerance(1.5, torch.float64) == pytest.approx(6 * math.sqrt(2) * 2**-53 * 1.5)


def of(model: nn.Module, *given: Tensor, count: int = 1) -> Lengths:
    """Return the sums of a model that is called with this."""
    record = Record()
    with watched(model, record):
        model(*given)
    return lengths(model, record, count)


LENGTHS: list[tuple[nn.Module, tuple[int, ...], float, float]] = [
    # module, shape of its input, terms forward, terms behind the gradient of its parameters
    (nn.Linear(6, 5), (4, 3, 6), 6, 12),
    (nn.utils.parametrizations.weight_norm(nn.Linear(6, 5, bias=False)), (4, 3, 6), 6, 12),
    (nn.Conv2d(4, 8, 3, groups=2), (2, 4, 10, 10), 2 * 9, 2 * 64),
    (nn.ConvTranspose2d(4, 6, 2, stride=2), (2, 4, 5, 5), 4 * 4, 2 * 100),
    (nn.LayerNorm(16), (4, 5, 16), 16, 20),
    (nn.GroupNorm(2, 4), (3, 4, 6, 6), 2 * 36, 3 * 36),
    (nn.BatchNorm2d(4), (3, 4, 6, 6), 3 * 36, 3 * 36),
    (nn.InstanceNorm2d(4), (3, 4, 6, 6), 36, 1),
    (nn.LSTM(8, 16, batch_first=True), (3, 9, 8), 9 * 16, 3 * 9 + 2 * 3),  # two states beside the output
    (Gate(), (4, 6), 1, 24),
    (Raw(), (7, 300), 300, 7),
]


@pytest.mark.parametrize(("module", "shape", "forward", "rows"), LENGTHS)
def test_lengths_of_sums(module: nn.Module, shape: tuple[int, ...], forward: float, rows: float) -> None:
    found = of(module, torch.randn(shape))
    assert found.forward == {"": forward}
    assert set(found.rows.values()) <= {rows}
    assert found.backward[""][0] >= max(forward, rows) and found.backward[""][1] >= max(forward, rows / REPEATED)
    assert set(of(module, torch.randn(shape), count=10**6).rows.values()) <= {10**6}


def test_lengths_of_several_modules() -> None:
    model = nn.Sequential(nn.Embedding(100, 8), nn.Linear(8, 50), nn.Tanh(), nn.Linear(50, 3))
    found = of(model, torch.zeros(4, 7, dtype=torch.int64))
    assert found.forward == {"": 7, "0": 7, "1": 8, "3": 50}  # of the Tanh nothing: it has no sums
    assert found.backward == dict.fromkeys(["", "0", "1", "3"], (50, 50))  # 50 is the largest fan-out
    assert found.rows == dict.fromkeys(["0.weight", "1.weight", "1.bias", "3.weight", "3.bias"], 28)
    attention = nn.MultiheadAttention(8, 2, batch_first=True)
    given = torch.randn(3, 5, 8)
    found = of(attention, given, given, given)
    assert set(found.forward) == {""}  # its output projection is not called as a module, and counts as its own
    assert found.rows.keys() == dict(attention.named_parameters()).keys()
    assert found.forward[""] == 24 and len(set(found.rows.values())) == 1


def test_a_model_that_is_never_called_itself() -> None:
    """Its loss calls the parts."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"into": nn.Linear(6, 8), "out": nn.Linear(8, 5)})

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        hidden = torch.tanh(model.get_submodule("into")(batch[0]))
        return functional.cross_entropy(model.get_submodule("out")(hidden), batch[1], reduction="sum")

    case = Case(model, (torch.randn(16, 6), classes(16)), loss)
    case.outputs_of = "out"
    scales = case.scales()
    assert Place("", 0, 0) not in scales.places and len(scales.places) == 2
    for dtype in (torch.float64, torch.float32):
        found = ratios(case.step(dtype, 2), case.step(dtype), scales, dtype)
        assert max(found.values()) < 0.5, found
