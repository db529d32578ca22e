"""How far apart two computations of the same gradient may be by rounding alone: derived, and measured on the model.

Let u be the unit roundoff: 2^-53 of float64, 2^-24 of float32. A sum of k terms of random sign and size s, taken one
after another, has partial sums of about sqrt(j) s, each rounded by up to u of itself, uniformly: together a standard
deviation of u s k / sqrt(6), which is sqrt(k / 6) u of the result. Terms of one sign make it sqrt(k) u / 3; blocks and
pairs, which libraries sum in, make it less. (Higham and Mary, "A new approach to probabilistic rounding error
analysis", SIAM J. Sci. Comput. 41, 2019, find sqrt(k) u, too.)

What such errors at each module do to outputs, loss and gradients of this model on this batch is measured: noise of that
size is put on what modules give, forward and backward, in float64 and with DELTA in place of u. That is large against
float64's own rounding, and so small that kinks (of a ReLU, say) stay where they are and effects are proportional.
"""

from __future__ import annotations

import math
import random
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.overrides import TorchFunctionMode

from trainers.accumulation.distances import difference, norm
from trainers.accumulation.outcome import Outcome
from trainers.accumulation.probes import Place, Record, Sight, Watch, watched

DELTA = 2.0**-46
REPEATED = 2.0
"""A sum of k equal terms errs like one of k^2 / 2 of random sign. A term is rounded the same way for as long as the sum
has the same exponent: all errors are one number. Half of the terms find the last exponent if nothing else is added up
(k^2 / 8), all do if much was there before (k^2, about).
"""
SIGMAS = 6.0
"""Beyond these an error with a normal distribution comes once in 5e8 times."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Scales:
    """Standard deviations of the full batch's rounding errors in units of u: L2 norms, absolute."""

    outputs: tuple[float, ...]
    """Of each of `Outcome.outputs`."""
    loss: float
    gradients: dict[str, float]
    places: dict[Place, float]
    """Of the outputs of modules."""
    output_gradients: dict[Place, float]
    input_gradients: dict[Place, float]
    coarsest: torch.dtype = torch.float64
    """What some of the model or of its loss is computed in even if parameters are float64: float32, where a norm or a
    loss casts to it."""

    def format(self, dtype: torch.dtype) -> torch.dtype:
        """Return the format whose tolerances hold if parameters have this one: the coarser of the two."""
        return max(dtype, self.coarsest, key=unit_roundoff)


def tolerance(scale: float, dtype: torch.dtype) -> float:
    """Return how far two computations in a format may be apart; each has errors of its own."""
    return SIGMAS * math.sqrt(2) * unit_roundoff(dtype) * scale


def unit_roundoff(dtype: torch.dtype) -> float:
    """Return the largest relative error of rounding a number to this format."""
    return torch.finfo(dtype).eps / 2


def rounding(
    model: nn.Module,
    run: Callable[[Watch], Outcome],
    record: Record,
    reference: Outcome,
    count: int,
    *,
    seed: int = 0,
    samples: int = 3,
    on_run: Callable[[], object] = lambda: None,
) -> Scales:
    """Measure how rounding errors spread, in `samples` runs with noise, at least 2; `on_run` is called after each.

    `run` is a forward and backward of the full batch in float64 under the watch given, from the same buffers and random
    numbers each time, that calls `Watch.begin`; `record` and `reference` are what it gives without noise; `count` is
    how much counts in the batch.

    Noise is of two kinds, in turn: independent numbers, and numbers that depend on the value they are put on, as
    rounding errors do: where samples, tokens or pixels repeat, these repeat as well. Their effects are added up.
    """
    sums = lengths(model, record, count)
    delta, coarsest = DELTA, torch.float64
    squares: tuple[_Squares, _Squares] = defaultdict(float), defaultdict(float)
    sample = 0
    while sample < samples:
        repeats = sample % 2
        noise = _Noise(record, sums, delta, f"{seed} {sample}" if repeats else None, seed + sample)
        with watched(model, noise) as watch, Formats() as formats:
            found = run(watch)
        if formats.coarsest != coarsest:  # seen in the first run, which is made again
            coarsest, delta = formats.coarsest, unit_roundoff(formats.coarsest)
            continue
        alike = len(range(repeats, samples, 2))
        for key, square in (*noise.squares.items(), *_squares(found, reference)):
            squares[repeats][key] += square / alike / delta**2
        sample += 1
        on_run()

    def spread(*key: Hashable) -> float:
        return math.sqrt(squares[0][key] + squares[1][key])

    def places(kind: str, there: dict[Place, Tensor]) -> dict[Place, float]:
        return {place: spread(kind, place) for place in there}

    sizes = {name: norm(each) for name, each in reference.gradients.items()}
    gradients = {}
    for name, size in sizes.items():
        alone, together = (each["gradient", name] for each in squares)
        own = sums.rows[name] / 6 * (1 + min(together / alone if alone else 0.0, sums.rows[name] / REPEATED))
        gradients[name] = math.hypot(spread("gradient", name), math.sqrt(own) * size)
    # a few samples of a gradient of few numbers may all happen to be small
    least = math.hypot(*gradients.values()) / (math.hypot(*sizes.values()) or 1.0)
    return Scales(
        outputs=tuple(spread("output", which) for which in range(len(reference.outputs))),
        loss=math.hypot(spread("loss"), noise_of(count) * abs(reference.loss)),
        gradients={name: max(scale, least * sizes[name]) for name, scale in gradients.items()},
        places=places("outputs", record.outputs),
        output_gradients=places("output_gradients", record.output_gradients),
        input_gradients=places("input_gradients", record.input_gradients),
        coarsest=coarsest,
    )


def noise_of(terms: float) -> float:
    """Return the standard deviation of a sum's error, in units of u and of the sum."""
    return math.sqrt(max(terms, 1.0) / 6)


class Lengths(NamedTuple):
    """How many terms sums have. Of modules with parameters, norms, and the model itself."""

    forward: dict[str, float]
    """Behind a number in a module's output."""
    backward: dict[str, tuple[float, float]]
    """Behind a number in the gradient for this output, or with such numbers as terms; the same if terms repeat, for
    noise that does: it adds up to k times its size, not sqrt(k) times."""
    rows: dict[str, float]
    """Behind a number in the gradient of a parameter."""


def lengths(model: nn.Module, record: Record, count: int) -> Lengths:
    """Return the lengths of sums, from the shapes of parameters and outputs, rather too long than too short.

    A parameter whose module is not called as one (an attention's output projection) is its parent's.
    """
    modules = dict(model.named_modules())
    shapes: defaultdict[str, list[torch.Size]] = defaultdict(list)
    for place, tensor in record.outputs.items():
        if tensor.numel():
            shapes[place.module].append(tensor.shape)
    own: defaultdict[str, dict[str, Tensor]] = defaultdict(dict)
    for name, parameter in model.named_parameters():
        path = name.split(".")
        owner = ".".join(path[: path.index("parametrizations") if "parametrizations" in path else -1])
        while owner and owner not in shapes:
            owner = owner.rpartition(".")[0]
        own[owner][name] = parameter
    fan_out = max((_fans(modules[owner], each)[1] for owner in own for each in own[owner].values()), default=1.0)
    found = Lengths({}, {}, {})
    for name, module in modules.items():
        if not (name in own or not name or isinstance(module, NORMS)):
            continue
        parameters, elements = own[name].values(), sum(math.prod(shape) for shape in shapes[name])
        rows = max((_rows(module, each, elements) for each in parameters), default=1.0)
        rows = max(rows, float(count))
        found.rows.update(dict.fromkeys(own[name], rows))
        found.forward[name] = max(_terms(module, list(parameters), shapes[name]))
        terms = max(found.forward[name], fan_out)
        found.backward[name] = max(terms, rows), max(terms, rows / REPEATED)
    return found


NORMS = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, _BatchNorm, _InstanceNorm)
TABLES = (nn.Embedding, nn.EmbeddingBag)


def _fans(module: nn.Module, parameter: Tensor) -> tuple[float, float]:
    """Return how many terms a sum with these weights has, forward and backward."""
    shape = parameter.shape if isinstance(module, _ConvNd) else [size for size in parameter.shape if size > 1]
    if len(shape) < 2 or isinstance(module, (*NORMS, *TABLES)):
        return 1.0, 1.0
    fans = parameter.numel() / shape[0], parameter.numel() / shape[1]
    if isinstance(module, _ConvNd):
        out_first = fans[0], fans[1] / module.groups
        return (fans[1] / module.groups, fans[0]) if module.transposed else out_first
    return fans if isinstance(module, nn.Linear | nn.Bilinear | nn.RNNBase) else (max(fans), max(fans))


def _rows(module: nn.Module, parameter: Tensor, elements: int) -> float:
    """Return how many of a module's outputs, of so many elements in all, have part in a number of the gradient."""
    if isinstance(module, TABLES):
        return elements / module.embedding_dim
    if isinstance(module, nn.RNNBase):
        return elements / module.hidden_size
    return elements * _fans(module, parameter)[0] / max(parameter.numel(), 1)


def _terms(module: nn.Module, parameters: list[Tensor], shapes: list[torch.Size]) -> Iterator[float]:
    """Yield how many terms sums in a module's forward have or may have."""
    yield 1.0
    yield from (_fans(module, each)[0] for each in parameters)
    if not isinstance(module, (nn.Linear, nn.Bilinear, nn.RNNBase, _ConvNd, *NORMS, *TABLES)):
        yield from (float(each.numel()) for each in parameters if each.dim() == 1)  # may be a norm
    for shape in shapes:
        yield from map(float, shape[1:-1])  # attention before it sums over positions
        size = math.prod(shape)
        if isinstance(module, nn.LayerNorm | nn.RMSNorm):
            yield float(math.prod(module.normalized_shape))
        elif isinstance(module, nn.GroupNorm):
            yield size / shape[0] / module.num_groups
        elif isinstance(module, _BatchNorm):
            yield size / shape[1]
        elif isinstance(module, _InstanceNorm):
            yield size / shape[0] / shape[1]
        elif isinstance(module, nn.RNNBase):
            yield max(_fans(module, each)[0] for each in parameters) * max(shape[:2])


_Squares = defaultdict[tuple[Hashable, ...], float]
"""Squares of L2 distances from the full batch without noise, by what it is that differs."""


class _Noise(Sight):
    """Puts noise on what modules give, and sees what becomes of it everywhere."""

    def __init__(self, record: Record, sums: Lengths, delta: float, repeats: str | None, seed: int) -> None:
        """`repeats`: what the signs of noise depend on beside the values; None: these are independent."""
        self.squares: _Squares = defaultdict(float)
        self._record, self._delta, self._repeats = record, delta, repeats
        self._forward = {name: (terms, terms) for name, terms in sums.forward.items()}
        self._backward = sums.backward
        self._seed, self._generators = seed, dict[torch.device, torch.Generator]()
        self._arrived: defaultdict[tuple[str, int], tuple[float, float]] = defaultdict(lambda: (0.0, 0.0))

    def output(self, place: Place, tensor: Tensor) -> Tensor:
        noisy = self._noisy(place, tensor, self._forward)
        self._square("outputs", place, noisy, self._record.outputs)
        return noisy

    def output_gradient(self, place: Place, gradient: Tensor) -> Tensor:
        noisy = self._noisy(place, gradient, self._backward)
        square = self._square("output_gradients", place, noisy, self._record.output_gradients)
        if square and place.module in self._forward:
            gradients, noise = self._arrived[place[:2]]
            self._arrived[place[:2]] = gradients + float(gradient.norm()) ** 2, noise + square
        return noisy

    def input_gradient(self, place: Place, gradient: Tensor) -> Tensor | None:
        """Put noise on this, too, for the errors of the module's own backward.

        They are relative to all that it computes with, and little of that may be left: norms take means away. Noise
        goes through as a whole, and tells how large the gradient for the input would be if all were left.
        """
        square = self._square("input_gradients", place, gradient, self._record.input_gradients)
        gradients, noise = self._arrived[place[:2]]
        if not noise:
            return None
        whole = math.sqrt(square * gradients / noise / gradient.numel())
        return self._signed(place, gradient, whole, self._forward[place.module])

    def _square(self, kind: str, place: Place, tensor: Tensor, right: dict[Place, Tensor]) -> float:
        if place not in right or right[place].shape != tensor.shape:
            return 0.0
        square = _square(tensor, right[place])
        self.squares[kind, place] += square
        return square

    def _noisy(self, place: Place, tensor: Tensor, sums: Mapping[str, tuple[float, float]]) -> Tensor:
        if place.module not in sums or not tensor.numel():
            return tensor
        return self._signed(place, tensor, norm(tensor) / math.sqrt(tensor.numel()), sums[place.module])

    def _signed(self, place: Place, tensor: Tensor, rms: float, terms: tuple[float, float]) -> Tensor:
        """Add noise with random signs, but to nothing that is exactly 0: a mask, or a sum of zeros, has no errors."""
        if not rms:
            return tensor
        if self._repeats is None:
            if tensor.device not in self._generators:
                self._generators[tensor.device] = torch.Generator(tensor.device).manual_seed(self._seed)
            signs = torch.empty(tensor.shape, dtype=torch.int8, device=tensor.device)
            signs.random_(0, 2, generator=self._generators[tensor.device]).mul_(2).sub_(1).mul_(tensor != 0)
            return torch.add(tensor, signs, alpha=noise_of(terms[0]) * self._delta * rms)
        # Terms are rounded alike even if they are only equal to within the last place of their sum.
        place_of_sum = 2 * unit_roundoff(torch.float32) * terms[0] * rms
        odd = random.Random(f"{self._repeats} {place}").getrandbits(63) | 1
        signs = (tensor.double() / place_of_sum).round_().to(torch.int64).mul_(odd).sign_()  # of the low 64 bits
        return torch.add(tensor, signs, alpha=noise_of(terms[1]) * self._delta * rms)


class Formats(TorchFunctionMode):
    """Sees the coarsest number format that gradients go through."""

    def __init__(self) -> None:
        super().__init__()
        self.coarsest = torch.float64

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and result.is_floating_point() and result.requires_grad:
            self.coarsest = max(self.coarsest, result.dtype, key=unit_roundoff)
        return result


def _squares(found: Outcome, reference: Outcome) -> Iterator[tuple[tuple[Hashable, ...], float]]:
    for which, (one, other) in enumerate(zip(found.outputs, reference.outputs, strict=True)):
        yield ("output", which), _square(one, other)
    yield ("loss",), (found.loss - reference.loss) ** 2
    for name, gradient in reference.gradients.items():
        yield ("gradient", name), _square(found.gradients[name], gradient)


def _square(one: Tensor, other: Tensor) -> float:
    return difference(one, other) ** 2
