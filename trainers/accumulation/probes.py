"""Looking at, and changing, what the modules of a model give and get.

with watched(model, sight) as watch:
    watch.begin()
    loss(model, batch).backward()

Modules are watched by their hooks, so the ones that are called as `module(...)`; what a compiled or scripted module
does inside, what runs under torch.func's transforms and tensors in objects that torch.utils._pytree does not know
(dataclasses of one's own) go unseen. Activation checkpointing calls modules again in backward: these are calls of
their own, after those of the forward.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils.hooks import RemovableHandle


class Place(NamedTuple):
    """One tensor that a module gives or gets."""

    module: str
    """Dotted name in the model; "" is the model itself. A module with two names has the first one."""
    call: int
    """Which of the module's calls since `Watch.begin`, from 0."""
    which: int
    """Of the floating-point tensors in its output, or in its inputs (args, then kwargs), however nested. A tensor
    that is there twice is at the first place only."""


class Sight:
    """Who looks. This one looks at nothing and changes nothing.

    Methods run without autograd and must not draw from torch's global random numbers. Tensors handed to them are
    changed later by modules that work in place: keep clones.
    """

    def output(self, place: Place, tensor: Tensor) -> Tensor:
        """Return what goes on in place of a module's output: the same tensor, or another one of its shape."""
        return tensor

    def output_gradient(self, place: Place, gradient: Tensor) -> Tensor:
        """Return what the module's backward gets for its output: the same gradient, or another one of its shape."""
        return gradient

    def input_gradient(self, place: Place, gradient: Tensor) -> Tensor | None:
        """See what the module's backward gave for its input, and return what goes on in its place: None, as it is.

        Not called if the module changes this input in place.
        """
        return None


class Record(Sight):
    """Keeps all there is to see: of a full batch.

    A place whose gradient comes more than once (gradients of gradients, a second backward) has none here.
    """

    def __init__(self) -> None:
        self.outputs: dict[Place, Tensor] = {}
        self.output_gradients: dict[Place, Tensor] = {}
        self.input_gradients: dict[Place, Tensor] = {}
        self._last: tuple[object, Tensor, Tensor] | None = None
        self._again: set[tuple[int, Place]] = set()

    def output(self, place: Place, tensor: Tensor) -> Tensor:
        self.outputs[place] = tensor.clone()
        return tensor

    def output_gradient(self, place: Place, gradient: Tensor) -> Tensor:
        self._keep(self.output_gradients, place, gradient)
        return gradient

    def input_gradient(self, place: Place, gradient: Tensor) -> None:
        self._keep(self.input_gradients, place, gradient)

    def _keep(self, kept: dict[Place, Tensor], place: Place, gradient: Tensor) -> None:
        """Keep a clone; one for all modules that a gradient passes through as it is, one after the other."""
        if place in kept or (id(kept), place) in self._again:
            self._again.add((id(kept), place))
            kept.pop(place, None)
            return
        if self._last is None or self._last[0] != _memory(gradient):
            self._last = _memory(gradient), gradient, gradient.clone()
        kept[place] = self._last[2]


class Watch:
    """What is seen beside the sight."""

    def __init__(self, model: nn.Module, sight: Sight) -> None:
        self.random: dict[str, int] = {}
        """Modules whose own code, not that of modules in them, drew from torch's random numbers: how often, counting
        all draws between two calls of modules as one."""
        self.changed: dict[str, set[str]] = {}
        """Modules whose calls changed the values of buffers of their own: which."""
        self._sight = sight
        self._looks_at_inputs = type(sight).input_gradient is not Sight.input_gradient
        self._looks_at_gradients = type(sight).output_gradient is not Sight.output_gradient
        self._names = {
            module: name for name, module in model.named_modules() if not isinstance(module, torch.jit.ScriptModule)
        }
        self._cuda = sorted({each.device.index or 0 for each in model.parameters() if each.device.type == "cuda"})
        self._handles: list[RemovableHandle] = []
        self.begin()

    def begin(self) -> None:
        """Begin a new (micro-)batch: calls are counted from 0 again."""
        self._calls: Counter[str] = Counter()
        self._stack: list[_Frame] = []
        self._drawn = self._random_states()

    def attach(self) -> None:
        """Hook the modules: before their own hooks where they are called, after these where they return."""
        for module in self._names:
            self._handles += [
                module.register_forward_pre_hook(self._called, with_kwargs=True, prepend=True),
                module.register_forward_hook(self._returned, always_call=True),
            ]

    def detach(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _called(self, module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any] | None:
        if torch._C._are_functorch_transforms_active():
            return None
        self._note_draws()
        name = self._names[module]
        buffers = {key: each.clone() for key, each in module._buffers.items() if each is not None}
        self._stack.append(_Frame(name, self._calls[name], buffers))
        self._calls[name] += 1
        if not (self._looks_at_inputs and torch.is_grad_enabled()):
            return None
        call = self._calls[name] - 1
        seen: tuple[Any, Any] = _replaced(
            (args, kwargs), lambda which, each: self._input(Place(name, call, which), each)
        )
        return seen

    def _returned(self, module: nn.Module, args: Any, output: Any) -> Any:
        if torch._C._are_functorch_transforms_active():
            return None
        self._note_draws()
        name = self._names[module]
        if not self._stack or self._stack[-1].module != name:
            return None  # a hook of its own has raised an error before it was called
        frame = self._stack.pop()
        now = module._buffers
        changed = {key for key, was in frame.buffers.items() if not _same(was, now.get(key))}
        if changed:
            self.changed.setdefault(name, set()).update(changed)
        return _replaced(output, lambda which, each: self._output(Place(name, frame.call, which), each))

    def _input(self, place: Place, tensor: Tensor) -> Tensor:
        if not tensor.requires_grad or isinstance(tensor, nn.Parameter):
            return tensor
        seen = tensor.view_as(tensor)  # not a copy: a module may work on its input in place

        def given(gradient: Tensor) -> Tensor:
            return in_place_of(gradient, self._sight.input_gradient(place, _detached(gradient)))

        seen.register_hook(given)  # type: ignore[no-untyped-call]
        return seen

    def _output(self, place: Place, tensor: Tensor) -> Tensor:
        with torch.no_grad():
            was = tensor.detach()
            value = self._sight.output(place, was)
        gated = tensor.requires_grad and torch.is_grad_enabled()
        if value is was and not (gated and self._looks_at_gradients):
            return tensor
        fresh = torch.empty_like(was).copy_(value)
        if not gated:
            return fresh
        gate: Tensor = _Gate.apply(  # type: ignore[no-untyped-call]
            tensor, [fresh], lambda gradient: self._gradient(place, gradient)
        )
        return gate

    def _gradient(self, place: Place, gradient: Tensor) -> Tensor:
        return in_place_of(gradient, self._sight.output_gradient(place, _detached(gradient)))

    def _note_draws(self) -> None:
        now = self._random_states()
        if self._stack and not all(map(torch.equal, now, self._drawn)):
            name = self._stack[-1].module
            self.random[name] = self.random.get(name, 0) + 1
        self._drawn = now

    def _random_states(self) -> list[Tensor]:
        return [torch.get_rng_state(), *(torch.cuda.get_rng_state(device) for device in self._cuda)]


@contextmanager
def watched(model: nn.Module, sight: Sight) -> Iterator[Watch]:
    """Let a sight look at all modules of a model within this context.

    A sight that changes nothing changes no value, not by a bit; nor does it change gradients, save for the order in
    which three or more parts of the gradient of one tensor are added if it is used several times within a module and
    outside of it, too.
    """
    watch = Watch(model, sight)
    try:
        watch.attach()
        yield watch
    finally:
        watch.detach()


class _Frame(NamedTuple):
    """A module that has been called and has not returned."""

    module: str
    call: int
    buffers: dict[str, Tensor]
    """As they were."""


class _Gate(torch.autograd.Function):
    """Puts a value in another one's place, and a gradient in place of the one that comes for it."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, value: list[Tensor], look: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.look = look
        return value[0]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return ctx.look(gradient), None, None


def _replaced(tree: Any, replace: Callable[[int, Tensor], Tensor]) -> Any:
    """Return a nest of containers with its floating-point tensors replaced; one that is there twice stays so."""
    leaves, spec = tree_flatten(tree)
    done: dict[int, Tensor] = {}
    which = 0
    for index, leaf in enumerate(leaves):
        if (
            isinstance(leaf, Tensor)
            and leaf.is_floating_point()
            and leaf.layout is torch.strided
            and not leaf.is_nested
        ):
            if id(leaf) not in done:
                done[id(leaf)] = replace(which, leaf)
            leaves[index] = done[id(leaf)]
            which += 1
    return tree_unflatten(leaves, spec) if done else tree


def in_place_of(gradient: Tensor, value: Tensor | None) -> Tensor:
    """Return a value that goes on in place of a gradient; in a double backward it depends on what the gradient does."""
    if value is None or value.data_ptr() == gradient.data_ptr():
        return gradient
    return gradient + (value - gradient).detach() if gradient.requires_grad else value


def _detached(tensor: Tensor) -> Tensor:
    return tensor.detach() if tensor.requires_grad else tensor


def _memory(tensor: Tensor) -> object:
    """Return what two tensors have in common that are the same numbers in the same memory."""
    return tensor.data_ptr(), tensor.shape, tensor.stride(), tensor._version


def _same(one: Tensor, other: Tensor | None) -> bool:
    return other is not None and one.shape == other.shape and one.dtype == other.dtype and torch.equal(one, other)
