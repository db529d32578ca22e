"""Tensors to disk or host memory and back, while the computation goes on: one thread writes, another one reads.

    with disk_store(Path("/scratch"), capacity_bytes=2**30) as store:
        written = store.write("a", [activation])   # returns at once
        written.wait()                              # now the activation may go
        read = store.read("a")                      # returns at once: the prefetch
        (activation,) = read.result()

What comes back has the same bits, sizes and strides, and tensors that overlapped in memory overlap again.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

import torch
from torch import Tensor

from distsim.errors import ConfigError
from trainers.spool import File, Memory, room_bytes

__all__ = ["Handle", "Store", "disk_store", "host_store", "room_bytes", "stored_bytes"]

BLOCK_BYTES = 16 * 1024 * 1024
"""What is copied between two looks at whether the store has been closed."""
ALIGNED_BYTES = 64
"""A tensor comes back as far from a multiple of this as it was: kernels may sum in another order where it is not."""


class Stretch(NamedTuple):
    """A stretch of memory that is stored as one."""

    device: torch.device
    size: int
    """Bytes."""


class View(NamedTuple):
    """A tensor within its stretch, without its data."""

    stretch: int | None
    """None where the tensor has no elements."""
    offset: int
    """Bytes from the stretch's beginning."""
    dtype: torch.dtype
    device: torch.device
    size: tuple[int, ...]
    stride: tuple[int, ...]
    conjugated: bool
    negated: bool


@dataclass(slots=True)
class _Entry:
    """What one write has stored."""

    place: int
    stretches: list[Stretch]
    views: list[View]
    written: Future[None]
    read: Future[None] | None = None
    """The last one; those before have ended when it has."""

    @property
    def size(self) -> int:
        return sum(each.size for each in self.stretches)


@dataclass(frozen=True, slots=True)
class Handle:
    """A copy that is under way, or has ended."""

    future: Future[None]
    tensors: list[Tensor]

    @property
    def done(self) -> bool:
        """Whether the copy has ended, in success or not."""
        return self.future.done()

    def wait(self) -> None:
        """Wait for the copy's end, however long the disk takes; a signal may interrupt that.

        ConfigError, which names path and bytes, if the copy has failed or one before it has.
        """
        try:
            self.future.result()
        except CancelledError:
            raise ConfigError("the store of offloaded tensors was closed before it had copied this one") from None

    def result(self) -> list[Tensor]:
        """Wait, and return the tensors that were read, in the order in which they were written; none after a write."""
        self.wait()
        return self.tensors


class Store:
    """Tensors by key, outside of the memory in which a model computes; used by one thread at a time."""

    def __init__(self, medium: File | Memory) -> None:
        """Take the medium over; `close` closes it."""
        self.medium = medium
        self.writes = self.reads = 0
        """Copies that have ended in success."""
        self.written_bytes = self.read_bytes = 0
        """Bytes that were really moved."""
        self._entries: dict[Hashable, _Entry] = {}
        self._failure: str | None = None
        self._writer = ThreadPoolExecutor(1, "offload-write")
        self._reader = ThreadPoolExecutor(1, "offload-read")

    def write(self, key: Hashable, tensors: Sequence[Tensor]) -> Handle:
        """Begin to store tensors, after all writes begun before; nobody may change them until that has ended.

        Memory that several of them share is stored once. ConfigError if there is no room or an earlier copy has
        failed; KeyError if the key is in use.
        """
        self._check()
        if key in self._entries:
            raise KeyError(f"{key!r} is stored already; discard it first")
        pieces, views = _pack(tensors)
        stretches = [Stretch(each.device, each.numel()) for each in pieces]
        place = self.medium.reserve(sum(each.size for each in stretches))
        written = self._writer.submit(self._write, place, [(each, _ready(each.device)) for each in pieces])
        self._entries[key] = _Entry(place, stretches, views, written)
        return Handle(written, [])

    def read(self, key: Hashable) -> Handle:
        """Begin to read what `write` has stored, after all reads begun before; its memory is taken now.

        ConfigError if an earlier copy has failed; KeyError if nothing is stored under the key.
        """
        self._check()
        entry = self._entries[key]
        pieces = [torch.empty(size, dtype=torch.uint8, device=device) for device, size in entry.stretches]
        tensors = [_unpacked(each, pieces) for each in entry.views]
        ready = [(each, _ready(each.device)) for each in pieces]
        entry.read = self._reader.submit(self._read, entry.written, entry.place, ready)
        return Handle(entry.read, tensors)

    def discard(self, key: Hashable) -> None:
        """Free the room of a key, after copies of it that are under way; errors as in `read`."""
        self._check()
        entry = self._entries[key]
        for copy in (entry.written, entry.read):
            if copy is not None:
                copy.result()
        self.medium.release(entry.place, entry.size)
        del self._entries[key]

    def close(self) -> None:
        """Give up copies that have not ended, but for the block now moved; end the threads and give all room back."""
        self._failure = self._failure or "the store of offloaded tensors is closed"
        self._writer.shutdown(cancel_futures=True)
        self._reader.shutdown(cancel_futures=True)
        self._entries.clear()
        self.medium.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _check(self) -> None:
        if self._failure is not None:
            raise ConfigError(self._failure)

    def _write(self, place: int, pieces: list[tuple[Tensor, torch.cuda.Event | None]]) -> None:
        self.written_bytes += self._copied(self.medium.put, place, pieces)
        self.writes += 1

    def _read(self, written: Future[None], place: int, pieces: list[tuple[Tensor, torch.cuda.Event | None]]) -> None:
        written.result()
        self.read_bytes += self._copied(self.medium.get, place, pieces)
        self.reads += 1

    def _copied(
        self,
        copy: Callable[[int, int, Tensor, torch.cuda.Event | None], None],
        place: int,
        pieces: list[tuple[Tensor, torch.cuda.Event | None]],
    ) -> int:
        """Copy one piece after the other and let go of them: whoever waits for this may count on their memory."""
        at = 0
        try:
            self._check()
            while pieces:
                piece, ready = pieces.pop(0)
                for first in range(0, piece.numel(), BLOCK_BYTES):
                    self._check()
                    block = piece[first : first + BLOCK_BYTES]
                    copy(place, at, block, ready)
                    at += block.numel()
        except ConfigError as error:
            self._failure = self._failure or str(error)
            raise
        finally:
            pieces.clear()
        return at


def disk_store(folder: Path, capacity_bytes: int) -> Store:
    """Return a store in a file of `capacity_bytes` in a folder; ConfigError if there is no room for it.

    A write of n bytes takes `room_bytes(n)` of the capacity.
    """
    return Store(File(folder, capacity_bytes))


def host_store() -> Store:
    """Return a store in host memory, as large as that is."""
    return Store(Memory())


def stored_bytes(tensors: Sequence[Tensor]) -> int:
    """Return how many bytes one write of these tensors moves: each stretch of memory once, gaps included."""
    return sum(piece.numel() for piece in _pack(tensors)[0])


def _ready(device: torch.device) -> torch.cuda.Event | None:
    """Return what a copy beside a GPU's stream must wait for; the CPU has no streams."""
    return torch.cuda.current_stream(device).record_event() if device.type == "cuda" else None


def _pack(tensors: Sequence[Tensor]) -> tuple[list[Tensor], list[View]]:
    """Return the stretches of memory in which some tensors lie, as uint8, and where each of the tensors lies."""
    spans = {number: _span(each) for number, each in enumerate(tensors) if each.numel()}
    pieces: list[Tensor] = []
    within: dict[int, tuple[int, int]] = {}
    last: tuple[str, int, int] | None = None
    start = stop = 0
    for number, (storage, begin, end) in sorted(spans.items(), key=lambda item: item[1]):
        if storage != last or begin >= stop:
            pieces.append(tensors[number])
            last, start, stop = storage, begin - begin % ALIGNED_BYTES, end
        stop = max(stop, end)
        pieces[-1] = _bytes_of(tensors[number], start, stop)
        within[number] = (len(pieces) - 1, begin - start)
    return pieces, [_view(each, *within.get(number, (None, 0))) for number, each in enumerate(tensors)]


def _span(tensor: Tensor) -> tuple[tuple[str, int, int], int, int]:
    """Return what tells a tensor's storage from others, and the tensor's first and last byte in it, plus one."""
    if tensor.layout is not torch.strided or tensor.is_quantized or tensor.device.type not in ("cpu", "cuda"):
        raise ConfigError(
            f"cannot offload a tensor of {tensor.layout} and {tensor.dtype} on {tensor.device}; expected a dense one "
            "on the CPU or a CUDA device"
        )
    storage = tensor.untyped_storage()
    begin = int(tensor.storage_offset())
    end = begin + 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    each = tensor.element_size()
    return (str(tensor.device), storage.data_ptr(), storage.nbytes()), begin * each, end * each


def _view(tensor: Tensor, stretch: int | None, offset: int) -> View:
    flags = tensor.is_conj(), tensor.is_neg()
    return View(stretch, offset, tensor.dtype, tensor.device, tuple(tensor.shape), tensor.stride(), *flags)


def _bytes_of(tensor: Tensor, start: int, stop: int) -> Tensor:
    empty = torch.empty(0, dtype=torch.uint8, device=tensor.device)
    return empty.set_(tensor.untyped_storage(), start, (stop - start,), (1,))


def _unpacked(view: View, pieces: Sequence[Tensor]) -> Tensor:
    """Return a tensor on the memory of its piece."""
    if view.stretch is None:
        return torch.empty_strided(view.size, view.stride, dtype=view.dtype, device=view.device)
    storage = pieces[view.stretch].untyped_storage()
    tensor = torch.empty(0, dtype=view.dtype, device=view.device)
    tensor.set_(storage, view.offset // view.dtype.itemsize, view.size, view.stride)
    tensor = tensor.conj() if view.conjugated else tensor
    return torch._neg_view(tensor) if view.negated else tensor
