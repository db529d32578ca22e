"""One forward and backward by a memory plan.

Autograd's own graph is left as it is, so everything that hangs on it works as ever. Only what it would save is
replaced: a node saves a `Slot`, and what belongs into it is kept, recorded again or read back by the time its layer's
backward begins. Between two layers is a node that the gradient comes by: when g_i is there, B_(i+1) is over, and the
rows up to B_i are run. So no tensor is in the graph, and the plan alone decides what is in memory.
"""

from __future__ import annotations

import weakref
from collections.abc import Hashable
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.graph import saved_tensors_hooks

from distsim.errors import ConfigError
from distsim.memory.plan import DROPS, Op, PlanError, name
from distsim.memory.replay import READS, WRITES
from trainers.memory_program import Counts, Program
from trainers.offload import Handle, Store, stored_bytes
from trainers.recompute import FirstRun
from trainers.saved import Entry, Saved, bytes_of, constants


class _Slot(NamedTuple):
    """What a node has in place of a saved tensor."""

    run: Pass
    layer: int
    place: int
    shape: torch.Size
    dtype: torch.dtype


class _Copy(NamedTuple):
    """What is in the store: a_i or, with entries, abar_i."""

    key: Hashable
    entries: list[Entry] | None
    stored_bytes: int
    resident_bytes: int


class Pass:
    """The state of one call of the layers until its backward has ended."""

    def __init__(
        self,
        program: Program,
        layers: list[nn.Module],
        store: Store | None,
        stale: list[Hashable],
        tallies: tuple[Counts, ...],
    ) -> None:
        """Begin with nothing resident; `stale` gets the keys of copies that nobody needs any more."""
        self.program, self.layers, self.store, self.stale, self.tallies = program, layers, store, stale, tallies
        count = len(layers)
        self.at = 0  # the next row
        self.arrived_at = count + 1  # the last gradient that has come by
        self.values: list[Tensor | None] = [None] * (count + 1)
        self.saved: list[Saved | None] = [None] * (count + 1)
        self.resident_bytes = [0] * (count + 1)
        self.gradient_bytes = 0
        # Where each activation is in the graph, without its memory. The graph refers to us: let go of it in time.
        self.links: list[Tensor | None] = [None] * (count + 1)
        self.slots: list[int | None] = [None] * (count + 1)  # how many tensors a layer's first run saves
        self.learns = [False] * (count + 1)  # whether its input then had a gradient to get
        self.first: dict[int, FirstRun] = {}
        self.reading: dict[int, tuple[Handle, _Copy]] = {}
        self.writing: dict[int, tuple[Handle, int]] = {}  # by row, with the bytes that this copy alone still holds
        self.copies: dict[tuple[int, bool], _Copy] = {}
        self.output_version = 0
        self.node: int | None = None  # of the graph, that runs now, and the places of what it has got
        self.unpacked: list[int] = []
        self.keys: list[Hashable] = []
        # Only noted here: this may happen at any moment, within a call of the store as well.
        self.forget = weakref.finalize(self, stale.extend, self.keys)

    def forward(self, inputs: Tensor) -> Tensor:
        """Run the rows before LOSS; return a_L."""
        self.discard_stale()
        self.values[0], self.links[0], self.resident_bytes[0] = inputs.detach(), inputs, bytes_of([inputs])
        try:
            self.advance(self.program.loss_row)
            last = self.value(len(self.layers))
            self.output_version = last._version
            output: Tensor = _Enter.apply(self, len(self.layers), self.links[-1], last)  # type: ignore[no-untyped-call]
            return output
        except BaseException:
            self.close()
            raise
        finally:
            self.links.clear()

    def arrived(self, layer: int, gradient: Tensor) -> None:
        """g_i is there: B_(i+1) is over; do everything up to B_i, which autograd runs next."""
        if layer >= self.arrived_at:
            _refuse_second_backward()
        try:
            if layer == len(self.layers):
                self.begin_backward(gradient)
            else:
                self.note(self.program.backward_row[layer + 1], bytes_of([gradient]))
                self.drop(layer + 1)
                self.gradient_bytes = bytes_of([gradient])
            self.arrived_at = layer
            if layer:
                row = self.program.backward_row[layer]
                self.unpacked.clear()
                self.advance(row)
                self.wait(row)
                self.at = row + 1
                self.value(layer - 1)
                if self.whole(layer) is None:
                    self.refuse(row, f"it reads abar_{layer}, which is not resident")
        except BaseException:
            self.close()
            raise

    def begin_backward(self, gradient: Tensor) -> None:
        """g_L is there, which LOSS has made."""
        torch.autograd.Variable._execution_engine.queue_callback(self.finish)
        last, written = self.values[-1], any(layer == len(self.layers) for layer, _ in self.copies)
        if written and last is not None and last._version != self.output_version:
            raise ConfigError("the output of the layers was changed in place, but the memory plan offloads it")
        self.gradient_bytes = bytes_of([gradient])
        self.note(self.program.loss_row)
        self.at = self.program.loss_row + 1

    def finish(self) -> None:
        """The backward pass is over, also if it was of some layers only."""
        if self.arrived_at:  # else g_0 has told
            self.note(self.program.backward_row[self.arrived_at])
        self.close()
        self.discard_stale()

    def close(self) -> None:
        """Let go of everything."""
        self.arrived_at = -1
        self.values = [None] * len(self.values)
        self.saved = [None] * len(self.saved)
        self.first.clear()
        self.reading.clear()
        self.writing.clear()
        self.forget()

    def discard_stale(self) -> None:
        """Free the room of copies that nobody needs any more, when they have ended; raises what has failed of them."""
        while self.stale and self.store is not None:
            self.store.discard(self.stale.pop())

    def advance(self, end: int) -> None:
        """Run the rows before `end`."""
        for row in range(self.at, end):
            op, layer = self.program.rows[row]
            self.wait(row)
            if op in (Op.FORWARD, Op.RECORD):
                self.run(layer, keep=op == Op.RECORD)
            elif op in WRITES:
                self.write(row, layer, whole=op == Op.WRITE_SAVED)
            elif op in READS:
                self.read(row, layer, whole=op == Op.READ_SAVED)
            elif op == Op.DROP:
                self.drop(layer)
            else:
                assert op == Op.DROP_SAVED
                self.saved[layer], self.resident_bytes[layer] = None, bytes_of([self.value(layer)])
            if op not in DROPS:
                self.note(row)
            self.at = row + 1

    def wait(self, row: int) -> None:
        """Wait for the copies that must have ended before a row."""
        for each in self.program.copies_before[row]:
            if each in self.writing:
                self.writing[each][0].wait()
            elif self.program.rows[each][1] in self.reading:
                self.value(self.program.rows[each][1])

    def run(self, layer: int, keep: bool) -> None:
        """F_i or, if all that the backward needs is to be kept, Fall_i."""
        inputs, module = self.value(layer - 1), self.layers[layer - 1]
        for tally in self.tallies:
            tally.forwards[layer - 1] += 1
        if self.slots[layer] is not None:
            with self.first[layer].again():
                output, saved = self.record(layer, inputs, inputs.detach().requires_grad_(self.learns[layer]), keep)
        else:
            first = FirstRun(module, inputs.device) if layer in self.program.runs_again else None
            entered = _Enter.apply(self, layer - 1, self.links[layer - 1], inputs)  # type: ignore[no-untyped-call]
            output, saved = self.record(layer, inputs, entered, keep)
            self.learns[layer] = entered.requires_grad
            self.links[layer] = _Leave.apply(output)  # type: ignore[no-untyped-call]
            if first is not None:
                first.ended()
                self.first[layer] = first
        self.values[layer], self.saved[layer] = output.detach(), saved
        self.resident_bytes[layer] = bytes_of([output, *(saved.tensors() if saved is not None else ())])

    def record(self, layer: int, inputs: Tensor, entered: Tensor, keep: bool) -> tuple[Tensor, Saved | None]:
        """Run a layer on `entered`, which shares memory with its input; return its output and what it saves."""
        module = self.layers[layer - 1]
        saved, count, version = Saved([], [], []) if keep else None, 0, inputs._version
        # What `pack` refers to lives as long as the graph does, so it is to refer to no tensor in the end.
        sink = [] if saved is None else [(saved, inputs, constants(module))]

        def pack(tensor: Tensor) -> _Slot:
            nonlocal count
            count += 1
            for kept, given, held in sink:
                kept.add(tensor.detach(), given, held)
            return _Slot(self, layer, count - 1, tensor.shape, tensor.dtype)

        with saved_tensors_hooks(pack, _unpack):
            output = module(entered)
        sink.clear()
        what = self.called(layer)
        if not isinstance(output, Tensor):
            raise ConfigError(f"{what} returns a {type(output).__name__}; under a memory plan layers return one tensor")
        if inputs._version != version:
            raise ConfigError(f"{what} changes its input in place, which the memory plan may keep; use inplace=False")
        if self.slots[layer] not in (None, count):
            raise ConfigError(f"{what} {_NOT_THE_SAME}: it saves {self.slots[layer]} tensors first, then {count}")
        self.slots[layer] = count
        return output, saved

    def write(self, row: int, layer: int, whole: bool) -> None:
        """W_i or Wall_i: begin to copy."""
        assert self.store is not None
        tensors: list[Tensor] = [self.value(layer)]
        entries: list[Entry] | None = None
        if whole:
            saved = self.whole(layer)
            if saved is None:
                self.refuse(row, f"it reads abar_{layer}, which is not resident")
            tensors += saved.tensors()
            entries = saved.entries
        copy = _Copy(object(), entries, stored_bytes(tensors), bytes_of(tensors))
        self.writing[row] = self.store.write(copy.key, tensors), 0
        self.copies[layer, whole] = copy
        self.keys.append(copy.key)
        for tally in self.tallies:
            tally.stores[layer - 1] += 1
            tally.written_bytes += copy.stored_bytes

    def read(self, row: int, layer: int, whole: bool) -> None:
        """R_i or Rall_i: begin to copy back."""
        copy = self.copies.get((layer, whole))
        if copy is None or self.store is None:
            self.refuse(row, "it reads what is not in the store")
        self.reading[layer] = self.store.read(copy.key), copy
        self.resident_bytes[layer] = copy.resident_bytes
        for tally in self.tallies:
            tally.loads[layer - 1] += 1
            tally.read_bytes += copy.stored_bytes

    def value(self, layer: int) -> Tensor:
        """Return a_i, when it has been read back if it was on its way."""
        if layer in self.reading:
            handle, copy = self.reading.pop(layer)
            value, *own = handle.result()
            self.values[layer] = value
            if copy.entries is not None:
                self.saved[layer] = Saved(copy.entries, [*own], [each._version for each in own])
        value_now = self.values[layer]
        if value_now is None:
            self.refuse(self.at, f"it reads a_{layer}, which is not resident")
        return value_now

    def whole(self, layer: int) -> Saved | None:
        """Return what there is of abar_i beside a_i."""
        self.value(layer)
        return self.saved[layer]

    def drop(self, layer: int) -> None:
        """D_i: copies under way keep what they need."""
        for row, (handle, _) in self.writing.items():
            if self.program.rows[row][1] == layer and not handle.done:
                self.writing[row] = handle, self.resident_bytes[layer]
        self.reading.pop(layer, None)
        self.values[layer] = self.saved[layer] = None
        self.resident_bytes[layer] = 0

    def note(self, row: int, more: int = 0) -> None:
        """Measure what is resident."""
        copied = sum(size for handle, size in self.writing.values() if size and not handle.done)
        now = sum(self.resident_bytes) + self.gradient_bytes + copied + more
        for tally in self.tallies:
            tally.resident_bytes[row] = max(tally.resident_bytes[row], now)

    def tensor(self, slot: _Slot) -> Tensor:
        """Return the tensor that a node of the graph has saved."""
        layer = slot.layer
        saved = None if self.arrived_at < 0 else self.saved[layer]
        if saved is None:
            _refuse_second_backward()
        node = torch._C._current_autograd_node()
        number = None if node is None else node._sequence_nr()
        if number != self.node:  # the one before is done with its tensors, and autograd would free them now
            for place in self.unpacked:
                saved.release(place)
            self.node, self.unpacked = number, []
        tensor, unchanged = saved.get(slot.place, self.value(layer - 1))
        if tensor is None:
            _refuse_second_backward()
        if number is not None:
            self.unpacked.append(slot.place)
        if not unchanged:
            what = self.called(layer)
            raise ConfigError(f"a tensor that the backward of {what} needs was changed in place after its forward")
        if (tensor.shape, tensor.dtype) != (slot.shape, slot.dtype):
            raise ConfigError(
                f"{self.called(layer)} {_NOT_THE_SAME}: it saves {tuple(slot.shape)} {slot.dtype} first, then "
                f"{tuple(tensor.shape)} {tensor.dtype}"
            )
        return tensor

    def called(self, layer: int) -> str:
        """Return a layer as messages name it."""
        return f"layer {layer} ({type(self.layers[layer - 1]).__name__})"

    def refuse(self, row: int, why: str) -> NoReturn:
        raise PlanError(f"operation {row + 1} of the memory plan, {name(*self.program.rows[row])}: {why}")


_NOT_THE_SAME = "does not do the same when it is run again"


class _Enter(Function):
    """Where a layer begins: a_(i-1) for its forward, and its place in the graph. Backward: its gradient comes by."""

    @staticmethod
    def forward(ctx: Any, run: Pass, layer: int, link: Tensor, value: Tensor) -> Tensor:
        ctx.run, ctx.layer = run, layer
        return value.detach()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, None, Tensor, None]:
        ctx.run.arrived(ctx.layer, gradient)
        return None, None, gradient, None


class _Leave(Function):
    """Where a layer ends: its place in the graph, as a tensor of the same shape without memory."""

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        return value.new_empty(()).expand(value.shape)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


def _unpack(slot: _Slot) -> Tensor:
    return slot.run.tensor(slot)


def _refuse_second_backward() -> NoReturn:
    raise ConfigError(
        "a second backward through layers under a memory plan, or one that does not begin at their output: what "
        "they had saved is gone; run them forward again, or remove() the plan"
    )
