"""What a strategy's file makes: the rows of any source ranks as columns, and the symmetry that it proposes."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

from distsim.errors import ConfigError
from distsim.schedule import Bools, Ints, Source

Integer = TypeVar("Integer", np.int32, np.int64)
Column = npt.NDArray[np.signedinteger] | np.signedinteger | int


class Rows(NamedTuple):
    """Columns of a schedule, which broadcast against each other; in any order of steps.

    Inside a group of ranks that stand at positions 0..n-1, `src` is an index into the positions that were asked
    for, `dst` is a position, and `chunk` is the position whose part is sent.
    """

    step: Column
    src: Column
    dst: Column
    chunk: Column
    op: Column
    source: Column = Source.WORK


@dataclass(frozen=True, kw_only=True, slots=True)
class Symmetry:
    """A proposal: these maps of ranks and chunks turn the set of a schedule's rows into itself.

    Ranks stand in units (nodes, rows of a torus) of `unit` ranks, and element k of the group moves each unit u
    to u + k (`rotation`, modulo the number of units) or u xor k (`xor`). In each block of as many parts as there
    are ranks, part c moves as its rank does, which `parts` tells: rank c (`ranks`), the one at place c // units of
    unit c mod units (`places`), or the one with c's bits in reverse order (`reversed`); or chunks stay (`fixed`).
    """

    kind: Literal["rotation", "xor"]
    workers: int
    unit: int = 1
    parts: Literal["ranks", "places", "reversed", "fixed"] = "ranks"

    @property
    def elements(self) -> int:
        """How many maps there are, the identity, k = 0, among them; so many ranks look alike."""
        return self.workers // self.unit

    def rank(self, k: npt.ArrayLike, rank: npt.ArrayLike) -> npt.NDArray[np.int64]:
        """Return where element k, 0 <= k < elements, takes ranks; k is one number, or one for each rank."""
        unit = np.asarray(rank, dtype=np.int64)
        local: npt.NDArray[np.int64] | int = 0
        if self.unit > 1:
            unit, local = np.divmod(unit, self.unit)
        return np.asarray(self._moved(k, unit) * self.unit + local)

    def chunk(self, k: npt.ArrayLike, chunk: npt.ArrayLike) -> npt.NDArray[np.int64]:
        """Return where element k takes chunks."""
        part = np.asarray(chunk, dtype=np.int64)
        if self.parts == "fixed":
            return part
        block = part // self.workers * self.workers if part.size and part.max() >= self.workers else np.int64(0)
        part = part - block
        if self.parts == "ranks":
            moved = self.rank(k, part)
        elif self.parts == "places":
            place, unit = np.divmod(part, self.elements)
            moved = place * self.elements + self._moved(k, unit)
        else:
            bits = self.workers.bit_length() - 1
            moved = reversed_bits(self.rank(k, reversed_bits(part, bits)), bits)
        return np.asarray(block + moved)

    def _moved(self, k: npt.ArrayLike, unit: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Return where element k takes units."""
        if self.kind == "xor":
            return np.asarray(unit ^ np.asarray(k, dtype=np.int64))
        moved = unit + np.asarray(k, dtype=np.int64)
        return np.asarray(moved - self.elements * (moved >= self.elements))  # a division would take longer


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """A schedule that can be built, whole or in part."""

    chunks: int
    rows: Callable[[Ints], Rows]
    """Source ranks, without repetition -> the rows that these ranks send."""
    symmetry: Symmetry | None = None
    coalesced: bool = False
    """Whether chunks that lie side by side travel together; their rows then stand side by side, too."""
    servers: int = 0
    """Ranks beyond the workers."""
    contributes: Bools | None = None
    must_hold: Bools | None = None
    """Flags, where they are not the collective's own; they broadcast to (ranks, chunks)."""
    parameters: Recipe | None = None
    """The second schedule of an exchange: it shares what has been updated."""


def joined(parts: Iterable[Rows]) -> Rows:
    """Put rows one behind another, as flat columns."""
    none = np.empty(0, dtype=np.int32)
    flat = [_flat(part) for part in (Rows(none, none, none, none, none), *parts)]
    return Rows(*(np.concatenate(columns) for columns in zip(*flat, strict=True)))


def chosen(rows: Rows, keep: npt.NDArray[np.bool_]) -> Rows:
    """Return the rows of which `keep`, which broadcasts with the columns, is true, as flat columns."""
    shape = np.broadcast_shapes(*(np.shape(column) for column in rows))
    flags = np.broadcast_to(keep, shape)
    return Rows(*(np.broadcast_to(column, shape)[flags] for column in rows))


def _flat(rows: Rows) -> list[npt.NDArray[np.signedinteger]]:
    kinds = (np.int32, np.int32, np.int32, np.int32, np.int8, np.int8)
    columns = (np.asarray(column, dtype=kind) for column, kind in zip(rows, kinds, strict=True))
    return [np.ravel(column) for column in np.broadcast_arrays(*columns)]


def reversed_bits(number: npt.NDArray[Integer], bits: int) -> npt.NDArray[Integer]:
    """Return numbers of so many bits with these in reverse order."""
    reverse = number & 0
    for bit in range(bits):
        reverse |= (number >> bit & 1) << (bits - 1 - bit)
    return reverse


def divides(option: str, value: int, workers: int) -> int:
    """Return an option's `value` if it divides the workers.

    Raises: ConfigError naming the values that would.
    """
    if workers % value:
        fits = ", ".join(str(number) for number in range(1, workers + 1) if workers % number == 0)
        raise ConfigError(f"{option}={value} does not divide {workers} workers; use one of: {fits}")
    return value
