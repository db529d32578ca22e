"""Losses across the batch, such as InfoNCE or a balance of load, in micro-batches: the large batch's gradient.

    loss = accumulate(model, encode, info_nce, batches)    # instead of info_nce(encode(model, batch)).backward()
    optimizer.step()

Summing the micro-batches' own losses is no substitute: such a loss compares samples of different micro-batches. But
it depends on the model only through the samples' representations, which are small. So every micro-batch runs forward
without a graph; then come the loss of all representations and its gradient for them; then every micro-batch runs
forward again, with a graph, and backward from its own rows of that gradient. By the chain rule the sum is the large
batch's gradient, for a second forward and with the memory of one micro-batch. The idea is that of Gao, Zhang, Han and
Callan, "Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup", 2021, arXiv:2101.06983.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from distsim.errors import ConfigError
from trainers.recompute import FirstRun

Encode = Callable[[nn.Module, Any], Tensor | Sequence[Tensor]]


def accumulate(model: nn.Module, encode: Encode, loss: Callable[..., Tensor], batches: Iterable[Any]) -> Tensor:
    """Add the gradient of a loss of all samples to `.grad`, one micro-batch at a time; return the loss, detached.

    `encode(model, batch)` returns the representations of a micro-batch's samples: one tensor or several (two towers,
    labels), samples in the first dimension. `loss` gets as many arguments, each with the rows of all micro-batches,
    and returns a scalar; parameters that it uses itself (a temperature) get their gradients, too.

    A second forward has the first one's random numbers, so that dropout drops the same, and the first one's buffers;
    both are in the end as one forward of each micro-batch leaves them. Whatever else `encode` depends on must stay as
    it is. What mixes samples of a batch within the encoder (batch normalisation) sees a micro-batch at a time.

    Raises: ConfigError if there are no batches, if representations or loss are no such tensors, if no representation
    depends on what is trained, or if a second forward gives something else than the first.
    """
    parts = list(batches)
    if not parts:
        raise ConfigError("there are no micro-batches; expected at least one")
    device = next((each.device for each in model.parameters()), torch.device("cpu"))
    firsts: list[FirstRun] = []
    encoded: list[list[Tensor]] = []
    for place, batch in enumerate(parts):
        firsts.append(FirstRun(model, device))
        with torch.no_grad():
            encoded.append(_tensors(encode(model, batch)))
        firsts[-1].ended()
        _check_alike(place, encoded[0], encoded[-1])
    # Torch of before December 2025 uses the weights again that autocast has cast without a graph, so that they get no
    # gradients (issue 158232 of pytorch).
    torch.clear_autocast_cache()
    value, slopes = _slopes(loss, encoded)

    def backward(place: int) -> bool:
        """Run a micro-batch forward again and backward; return whether there was anything to run backward through."""
        with firsts[place].again():
            tensors = _tensors(encode(model, parts[place]))
        _check_repeated(place, encoded[place], tensors)
        trained = [each for each in zip(tensors, slopes[place], strict=True) if each[0].requires_grad]
        reached = [(tensor, slope) for tensor, slope in trained if slope is not None]
        torch.autograd.backward([tensor for tensor, _ in reached], [slope for _, slope in reached])
        return bool(trained)

    # A function of its own: when it returns no graph is left, not even of representations that the loss leaves out.
    learned = [backward(place) for place in range(len(parts))]
    if not any(learned):
        raise ConfigError("nothing that encode returns depends on a parameter that is trained; is it detached?")
    return value


def _slopes(
    loss: Callable[..., Tensor], encoded: Sequence[Sequence[Tensor]]
) -> tuple[Tensor, list[tuple[Tensor | None, ...]]]:
    """Return the loss and, for every micro-batch, its gradient for each representation; None where it has none."""
    wholes = [torch.cat(tensors) for tensors in zip(*encoded, strict=True)]
    for whole in wholes:
        whole.requires_grad_(_differentiable(whole))
    with torch.enable_grad():
        value = loss(*wholes)
    if not isinstance(value, Tensor) or value.numel() != 1 or not value.requires_grad:
        raise ConfigError(
            f"the loss is {_kind(value)}; expected a tensor of one number that depends on the representations"
        )
    torch.autograd.backward(value)
    slopes: list[Sequence[Tensor | None]] = []
    for whole, tensors in zip(wholes, zip(*encoded, strict=True), strict=True):
        lengths = [len(tensor) for tensor in tensors]
        slopes.append([None] * len(lengths) if whole.grad is None else torch.split(whole.grad, lengths))
    return value.detach(), list(zip(*slopes, strict=True))


def _tensors(encoded: object) -> list[Tensor]:
    found: list[Tensor] = []
    for each in encoded if isinstance(encoded, list | tuple) else [encoded]:
        if not isinstance(each, Tensor) or not each.dim():
            raise ConfigError(
                f"encode returned {_kind(each)}; expected a tensor with the samples in its first dimension, or several "
                "in a list or tuple"
            )
        found.append(each)
    if not found:
        raise ConfigError("encode returned no tensors; expected at least one")
    return found


def _kind(value: object) -> str:
    return f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"


def _check_alike(place: int, first: Sequence[Tensor], other: Sequence[Tensor]) -> None:
    """Raise ConfigError unless two micro-batches' representations can be put together."""
    one, two = ([(each.dtype, tuple(each.shape[1:])) for each in tensors] for tensors in (first, other))
    if one != two:
        raise ConfigError(
            f"micro-batch {place + 1}: encode returned {_listed(two)}, but {_listed(one)} for the first one; expected "
            "the same types and shapes, apart from the first dimension"
        )


def _listed(kinds: Sequence[tuple[torch.dtype, tuple[int, ...]]]) -> str:
    return " and ".join(f"{dtype} ({', '.join(map(str, ('samples', *shape)))})" for dtype, shape in kinds)


def _check_repeated(place: int, before: Sequence[Tensor], now: Sequence[Tensor]) -> None:
    """Raise ConfigError if a second forward gave other representations than the first."""
    if len(before) != len(now):
        raise ConfigError(f"micro-batch {place + 1}: encode returned {len(before)} tensors and then {len(now)}")
    for one, other in zip(before, now, strict=True):
        far = _apart(one, other)
        # With a graph other kernels may run, which round in another way: half of the digits must be right.
        if far > (math.sqrt(torch.finfo(one.dtype).eps) if _differentiable(one) else 0):
            raise ConfigError(
                f"micro-batch {place + 1}: a second forward gave others, relative difference {far:.1g}; what encode "
                "returns may depend on the batch, the model's parameters and buffers, and the random numbers of torch, "
                "numpy and random, and on nothing else that changes"
            )


def _apart(one: Tensor, other: Tensor) -> float:
    if one.shape != other.shape or one.dtype != other.dtype:
        return math.inf
    if torch.equal(one, other):
        return 0.0
    return float((other.detach() - one).norm() / one.norm()) if _differentiable(one) else math.inf


def _differentiable(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()
