"""Gradients in buckets: each lies in one flat tensor, is filled by backward, and handed over as soon as it is full.

A parameter's `grad` is a view into its bucket from the moment it has one. Buckets are handed over in one order on all
ranks, whatever the order in which backward comes by, so that no rank waits for another's bucket with its own in
hand; what backward has not touched is handed over as zeros at its end.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from distsim.errors import DistsimError
from trainers.plan import Plan


class Buckets:
    """The gradients of a model's parameters, those that a plan puts together in one flat tensor each."""

    def __init__(
        self,
        parameters: Sequence[nn.Parameter],
        plan: Plan,
        hand_over: Callable[[int, Tensor], object],
        before: Callable[[], None] = lambda: None,
        factor: float = 1.0,
    ) -> None:
        """Watch the parameters; `hand_over` gets a bucket's number and its gradients, shape (params,).

        `before` is called whenever backward has come by a parameter, before anything else is done about it. What is
        handed over is multiplied by `factor`, which costs nothing where a gradient is put into its place anyway.
        """
        self.parameters = parameters
        self.used = [False] * len(parameters)
        """Which parameters backward has touched since `begin`."""
        self.gradients = [_flat(parameters, places) for places in plan.buckets]
        self._views: dict[int, Tensor] = {}
        for places, flat in zip(plan.buckets, self.gradients, strict=True):
            self._views |= dict(zip(places, _views(flat, [parameters[place] for place in places]), strict=True))
        self._plan = plan
        self._hand_over, self._before, self._factor = hand_over, before, factor
        self._bucket_of = {place: number for number, places in enumerate(plan.buckets) for place in places}
        self._missing: list[set[int]] | None = None
        """Per bucket, what the backward under way has not yet come by; None while gradients only accumulate."""
        self._multiplied: set[int] = set()
        self._next = 0
        self._hooks = [
            parameter.register_post_accumulate_grad_hook(partial(self._accumulated, place))  # type: ignore[no-untyped-call]
            for place, parameter in enumerate(parameters)
        ]

    def begin(self) -> None:
        """Start a step: no gradients, and nothing used yet."""
        for parameter in self.parameters:
            parameter.grad = None
        self.used = [False] * len(self.parameters)

    def expect_last(self) -> None:
        """The backward that follows is the step's last: hand over each bucket that it completes."""
        self._missing = [set(places) for places in self._plan.buckets]

    def finish(self) -> None:
        """Backward is over: hand over what it has left."""
        for number in range(self._next, len(self.gradients)):
            for place in self._plan.buckets[number]:
                if place not in self._multiplied:
                    self.used[place] |= self.parameters[place].grad is not None  # of an earlier pass, perhaps
                    self._put(place, self._factor)
            self._hand_over(number, self.gradients[number])
        self._next, self._missing = 0, None
        self._multiplied.clear()

    def scale(self, factor: float) -> None:
        """Multiply all gradients."""
        if factor != 1.0:
            for flat in self.gradients:
                flat.mul_(factor)

    def drop(self, used_by_any: Sequence[bool]) -> None:
        """Take the gradient from parameters that no rank has used: an optimizer then leaves them alone."""
        for parameter, used in zip(self.parameters, used_by_any, strict=True):
            if not used:
                parameter.grad = None

    def close(self) -> None:
        """Stop watching."""
        for hook in self._hooks:
            hook.remove()

    def _accumulated(self, place: int, parameter: nn.Parameter) -> None:
        """Backward has added to a parameter's gradient."""
        self._before()
        number, last = self._bucket_of[place], self._missing is not None
        if place in self._multiplied or number < self._next:
            raise DistsimError(
                f"parameter {place} of shape {tuple(parameter.shape)} got more gradient when its own was already "
                "being exchanged: backward comes by it twice (reentrant checkpointing does that; "
                "use torch.utils.checkpoint with use_reentrant=False)"
            )
        self._put(place, self._factor if last else 1.0)
        self.used[place] = True
        if self._missing is not None:
            self._multiplied.add(place)
            self._missing[number].discard(place)
            while self._next < len(self._missing) and not self._missing[self._next]:
                self._next += 1
                self._hand_over(self._next - 1, self.gradients[self._next - 1])

    @torch.no_grad()  # gradients may have gradients of their own; what is exchanged has not
    def _put(self, place: int, factor: float) -> None:
        """Put a parameter's gradient into its place, times a factor; where it has none, zeros."""
        parameter, view = self.parameters[place], self._views[place]
        if parameter.grad is None:
            view.zero_()
        elif parameter.grad is not view:  # the first of a step: autograd has made a tensor of its own
            torch.mul(parameter.grad.to_dense(), factor, out=view)
        elif factor != 1.0:
            view.mul_(factor)
        parameter.grad = view


def flat_parameters(parameters: Sequence[nn.Parameter], plan: Plan) -> list[Tensor]:
    """Move parameters into one flat tensor for each bucket, shape (params,), and return these."""
    flats = []
    for places in plan.buckets:
        flat = _flat(parameters, places)
        members = [parameters[place] for place in places]
        for parameter, view in zip(members, _views(flat, members), strict=True):
            view.copy_(parameter.detach())
            parameter.data = view
        flats.append(flat)
    return flats


def _flat(parameters: Sequence[nn.Parameter], places: Sequence[int]) -> Tensor:
    first = parameters[places[0]]
    size = sum(parameters[place].numel() for place in places)
    return torch.zeros(size, dtype=first.dtype, device=first.device)


def _views(flat: Tensor, parameters: Sequence[nn.Parameter]) -> list[Tensor]:
    parts = torch.split(flat, [parameter.numel() for parameter in parameters])
    return [part.view(parameter.shape) for part, parameter in zip(parts, parameters, strict=True)]
