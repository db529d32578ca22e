"""Where offloaded bytes lie: in one preallocated file without a name, or in host memory.

Both hand out room and copy blocks of bytes into it and out of it, on the thread that asks for it.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from itertools import count
from pathlib import Path
from tempfile import TemporaryFile

import numpy as np
import torch
from torch import Tensor

from distsim.errors import ConfigError
from distsim.units import format_bytes

PAGE_BYTES = 4096
"""Room begins and ends with a page: a page of two owners may have to be read before half of it can be written."""


def room_bytes(stored: int) -> int:
    """Return how much of a file's capacity is taken by one write of `stored` bytes."""
    return -(-stored // PAGE_BYTES) * PAGE_BYTES


class File:
    """Room in one file, which has its whole size from the start.

    So a full disk is an error before anything is computed. The file has no name: its room is free again when the
    process ends, however it ends.
    """

    def __init__(self, folder: Path, capacity_bytes: int) -> None:
        """Make the file; ConfigError, which names the folder and the bytes, where it cannot be."""
        if capacity_bytes < 1:
            raise ConfigError(f"{folder}: a file for offloaded tensors needs a capacity, not {capacity_bytes} bytes")
        self.folder = folder
        self.capacity_bytes = room_bytes(capacity_bytes)
        self._holes = [(0, self.capacity_bytes)]
        try:
            self._file = TemporaryFile(buffering=0, dir=folder)  # noqa: SIM115
        except OSError as error:
            raise ConfigError(f"{folder}: cannot make a file for offloaded tensors here: {error.strerror}") from None
        try:
            os.posix_fallocate(self._file.fileno(), 0, self.capacity_bytes)
        except OSError as error:
            self._file.close()
            raise ConfigError(
                f"{folder}: cannot reserve {self.capacity_bytes} bytes ({format_bytes(self.capacity_bytes)}) for "
                f"offloaded tensors: {error.strerror}; {format_bytes(_free_bytes(folder))} are free"
            ) from None

    def fileno(self) -> int:
        """Return the number of the open file."""
        return self._file.fileno()

    def reserve(self, size: int) -> int:
        """Return where `size` bytes may be put: in the first hole that is large enough; ConfigError if none is."""
        size = room_bytes(size)
        for number, (start, length) in enumerate(self._holes):
            if length >= size:
                self._holes[number : number + 1] = [(start + size, length - size)] if length > size else []
                return start
        if size == 0:
            return 0
        free, largest = sum(length for _, length in self._holes), max((each for _, each in self._holes), default=0)
        raise ConfigError(
            f"{self.folder}: no room for {size} bytes more of offloaded tensors: of the {self.capacity_bytes} bytes "
            f"reserved {free} are free, at most {largest} of them in one piece"
        )

    def release(self, place: int, size: int) -> None:
        """Take back what `reserve(size)` has handed out."""
        holes: list[tuple[int, int]] = []
        for start, length in sorted([*self._holes, (place, room_bytes(size))]):
            if holes and sum(holes[-1]) == start:
                start, length = holes[-1][0], holes.pop()[1] + length
            if length:
                holes.append((start, length))
        self._holes = holes

    def put(self, place: int, at: int, block: Tensor, ready: torch.cuda.Event | None) -> None:
        """Write a block of uint8 to byte `at` of the room; ConfigError, with path and bytes, where that fails."""
        host = block
        if ready is not None:
            host = torch.empty(block.numel(), dtype=torch.uint8, pin_memory=True)
            copy(host, block, ready)
        self._all_of("write", os.pwrite, place + at, host)

    def get(self, place: int, at: int, block: Tensor, ready: torch.cuda.Event | None) -> None:
        """Read from byte `at` of the room into a block of uint8; errors as in `put`."""
        host = block if ready is None else torch.empty(block.numel(), dtype=torch.uint8, pin_memory=True)
        self._all_of("read", lambda file, view, offset: os.preadv(file, [view], offset), place + at, host)
        if ready is not None:
            copy(block, host, ready)

    def close(self) -> None:
        """Give the disk its room back."""
        self._file.close()

    def _all_of(self, verb: str, call: Callable[[int, memoryview, int], int], start: int, block: Tensor) -> None:
        """Repeat `call` until it has moved the whole block: the kernel may stop earlier, as it does at signals."""
        view = block.numpy().data
        done = 0
        while done < len(view):
            try:
                moved = call(self._file.fileno(), view[done:], start + done)
                if moved == 0:
                    raise OSError(errno.EIO, "nothing was moved and no reason given")
            except OSError as error:
                raise ConfigError(
                    f"{self.folder}: cannot {verb} {len(view) - done} bytes of offloaded tensors at byte "
                    f"{start + done} of {self.capacity_bytes}: {error.strerror}"
                ) from None
            done += moved


class Memory:
    """Room in host memory, pinned where there is a GPU: only then does a copy go on beside its computations."""

    def __init__(self) -> None:
        self._blocks: dict[int, Tensor] = {}
        self._numbers = count()

    def reserve(self, size: int) -> int:
        """Return the number of a new block of `size` bytes; ConfigError if there is no memory for it."""
        number = next(self._numbers)
        try:
            self._blocks[number] = torch.empty(size, dtype=torch.uint8, pin_memory=torch.cuda.is_available())
        except RuntimeError:
            raise ConfigError(f"host memory: no room for {size} bytes more of offloaded tensors") from None
        return number

    def release(self, place: int, size: int) -> None:
        """Give the memory of a block back."""
        assert self._blocks.pop(place).numel() == size

    def put(self, place: int, at: int, block: Tensor, ready: torch.cuda.Event | None) -> None:
        """Copy a block of uint8 to byte `at` of the room."""
        copy(self._blocks[place][at : at + block.numel()], block, ready)

    def get(self, place: int, at: int, block: Tensor, ready: torch.cuda.Event | None) -> None:
        """Copy from byte `at` of the room to a block of uint8."""
        copy(block, self._blocks[place][at : at + block.numel()], ready)

    def close(self) -> None:
        """Give all memory back."""
        self._blocks.clear()


def copy(target: Tensor, source: Tensor, ready: torch.cuda.Event | None) -> None:
    """Copy bytes from host to host or, where `ready` is an event of a GPU, between the host and that GPU.

    Then the copy waits for the event, on a stream of its own, and this thread for the copy.
    """
    if ready is None:
        np.copyto(target.numpy(), source.numpy())  # PyTorch would start threads of its own for each of ours
        return
    device = source.device if source.is_cuda else target.device
    stream: torch.cuda.Stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    stream.wait_event(ready)
    with torch.cuda.stream(stream):
        target.copy_(source, non_blocking=True)
    stream.synchronize()


def _free_bytes(folder: Path) -> int:
    disk = os.statvfs(folder)
    return disk.f_bavail * disk.f_frsize
