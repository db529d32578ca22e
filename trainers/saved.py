"""What the nodes of a layer save for its backward, apart from what is in memory anyway."""

from __future__ import annotations

from collections.abc import Container, Iterable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn


class _Part(NamedTuple):
    """A saved tensor that lies in its layer's input, which by the backward may be another copy of it."""

    size: torch.Size
    stride: tuple[int, ...]
    offset: int
    """From that of the input, in elements."""


class _Constant(NamedTuple):
    """A saved parameter or buffer."""

    tensor: Tensor
    version: int


Entry = _Part | _Constant | int
"""Of one saved tensor: where it lies. A number is a place among the layer's own ones."""


@dataclass(slots=True)
class Saved:
    """What a layer's nodes save, in their order: abar_i without a_i."""

    entries: list[Entry]
    own: list[Tensor | None]
    """Those that are neither parameter, buffer nor part of the input; some may share memory with each other or a_i.
    None: released."""
    versions: list[int]
    """Of `own`, for what is changed in place: plain autograd looks for that, but not in what is handed back to it."""

    def add(self, tensor: Tensor, inputs: Tensor, held: Container[int]) -> None:
        """Add a detached tensor that is saved; `held` are the `constants` of the layer."""
        if tensor.layout is torch.strided:
            pointer = tensor.untyped_storage().data_ptr()
            if pointer in held:
                self.entries.append(_Constant(tensor, tensor._version))
                return
            plain = tensor.dtype == inputs.dtype and not tensor.is_conj() and not tensor.is_neg()
            if plain and pointer == inputs.untyped_storage().data_ptr():
                offset = int(tensor.storage_offset() - inputs.storage_offset())
                self.entries.append(_Part(tensor.shape, tensor.stride(), offset))
                return
        self.entries.append(len(self.own))
        self.own.append(tensor)
        self.versions.append(tensor._version)

    def tensors(self) -> list[Tensor]:
        """Return the layer's own ones that are not yet released."""
        return [each for each in self.own if each is not None]

    def get(self, place: int, inputs: Tensor) -> tuple[Tensor | None, bool]:
        """Return a saved tensor, None if it is released, and whether it is as it was.

        `inputs` is the layer's input as it is in memory now.
        """
        entry = self.entries[place]
        if isinstance(entry, int):
            own = self.own[entry]
            return own, own is None or own._version == self.versions[entry]
        if isinstance(entry, _Constant):
            return entry.tensor, entry.tensor._version == entry.version
        return inputs.as_strided(entry.size, entry.stride, int(inputs.storage_offset()) + entry.offset), True

    def release(self, place: int) -> None:
        """Let go of a saved tensor that is one of the layer's own."""
        entry = self.entries[place]
        if isinstance(entry, int):
            self.own[entry] = None


def constants(module: nn.Module) -> frozenset[int]:
    """Return where the parameters and buffers of a module lie in memory."""
    return frozenset(each.untyped_storage().data_ptr() for each in (*module.parameters(), *module.buffers()))


def bytes_of(tensors: Iterable[Tensor]) -> int:
    """Return the memory that some tensors lie in, which several may share."""
    storages = [each.untyped_storage() for each in tensors if each.layout is torch.strided]
    return sum({each.data_ptr(): each.nbytes() for each in storages}.values())
