"""Schedule: a gradient exchange as a table of transfers, read by checker, simulator and trainers alike.

A row `(step, src, dst, chunk, op, source)` says: at `step`, rank `src` sends its value of `chunk` to rank
`dst`, which adds it to its own running value (`reduce`) or overwrites that (`copy`). `source` says which of
the sender's two values goes out: `input`, its own contribution, which nothing ever changes, or `work`, the
running value. What must wait for what follows from the rows alone and is derived here, once, by
`dependencies`; no interpreter adds rules of its own.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
import numpy.typing as npt

from distsim.errors import ScheduleError
from distsim.traffic import Traffic

Ints = npt.NDArray[np.int32]
Bools = npt.NDArray[np.bool_]


class Op(IntEnum):
    """What the receiver does with a chunk that has arrived."""

    REDUCE = 0
    COPY = 1


class Source(IntEnum):
    """Which of the sender's values is sent."""

    INPUT = 0
    WORK = 1


ITEMSIZE = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}
"""Bytes of an element by the name of its type."""

COLUMNS = ("step", "src", "dst", "chunk", "op", "source")


def split(params: int, chunks: int) -> npt.NDArray[np.int64]:
    """Sizes of `chunks` nearly equal parts of `params` elements, the larger ones first; shape (chunks,).

    Some are 0 when there are more chunks than parameters.
    """
    whole, rest = divmod(params, chunks)
    return whole + (np.arange(chunks, dtype=np.int64) < rest)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Schedule:
    """A frozen table of transfers between ranks, with what is there before it and what must be there after."""

    ranks: int
    chunk_elements: npt.NDArray[np.int64]
    """Elements of each chunk, shape (chunks,). Chunks lie one behind another in a flat array."""
    step: Ints
    src: Ints
    dst: Ints
    chunk: Ints
    op: npt.NDArray[np.int8]
    source: npt.NDArray[np.int8]
    """The columns, one entry a transfer, in step order."""
    contributes: Bools
    """Initial holders: who contributes a value to which chunk, shape (ranks, chunks)."""
    must_hold: Bools
    """Postcondition: who must hold the sum of all contributions to a chunk afterwards, shape (ranks, chunks)."""

    @staticmethod
    def of(
        *,
        ranks: int,
        chunk_elements: npt.NDArray[np.int64],
        step: npt.ArrayLike,
        src: npt.ArrayLike,
        dst: npt.ArrayLike,
        chunk: npt.ArrayLike,
        op: npt.ArrayLike,
        source: npt.ArrayLike,
        contributes: npt.ArrayLike = True,
        must_hold: npt.ArrayLike = True,
    ) -> Schedule:
        """Build a schedule from columns in any order that broadcast against each other.

        Rows are put in step order (kept in the given order within a step); rows of chunks without
        parameters are left out: they are neither sent nor counted.

        Raises: ScheduleError if the table is malformed (see `Schedule`).
        """
        table = np.broadcast_arrays(*np.atleast_1d(step, src, dst, chunk, op, source))
        columns = [_integers(name, column) for name, column in zip(COLUMNS, table, strict=True)]
        shape = (ranks, len(chunk_elements))
        if columns[3].size and not 0 <= columns[3].min() <= columns[3].max() < shape[1]:
            raise ScheduleError(f"a transfer names a chunk outside 0..{shape[1] - 1}")
        sent = np.flatnonzero(chunk_elements[columns[3]] > 0)
        rows = sent[np.argsort(columns[0][sent], kind="stable")]
        steps, senders, receivers, chunks = (column[rows].astype(np.int32) for column in columns[:4])
        return Schedule(
            ranks=ranks,
            chunk_elements=np.array(chunk_elements),
            step=steps,
            src=senders,
            dst=receivers,
            chunk=chunks,
            op=columns[4][rows].astype(np.int8),
            source=columns[5][rows].astype(np.int8),
            contributes=_flags("contributes", contributes, shape),
            must_hold=_flags("must_hold", must_hold, shape),
        )

    def __post_init__(self) -> None:
        """Refuse a malformed table; whether a well-formed one is right is for the checker to prove."""
        for name in COLUMNS:
            column = getattr(self, name)
            column.flags.writeable = False
            if column.shape != self.step.shape:
                raise ScheduleError(f"column {name} has shape {column.shape}, step has {self.step.shape}")
        self.chunk_elements.flags.writeable = False
        if self.chunk_elements.dtype != np.int64 or self.chunk_elements.ndim != 1 or (self.chunk_elements < 0).any():
            raise ScheduleError("chunk_elements must be a row of 64-bit integers, none of them negative")
        if self.ranks < 1:
            raise ScheduleError(f"a schedule needs at least 1 rank, not {self.ranks}")
        for name in ("contributes", "must_hold"):
            getattr(self, name).flags.writeable = False
            if getattr(self, name).shape != (self.ranks, self.chunks):
                raise ScheduleError(f"{name} must have shape (ranks, chunks) = {(self.ranks, self.chunks)}")
        limits = {"src": self.ranks, "dst": self.ranks, "chunk": self.chunks, "op": 2, "source": 2}
        for name, limit in limits.items():
            column = getattr(self, name)
            self._refuse((column < 0) | (column >= limit), f"{name} outside 0..{limit - 1}")
        self._refuse(self.step < 0, "negative step")
        self._refuse(np.diff(self.step, prepend=0) < 0, "rows out of step order")
        self._refuse(self.src == self.dst, "a rank sends to itself")
        self._refuse(self.chunk_elements[self.chunk] <= 0, "a chunk without parameters is sent")
        self._refuse_mixed_copies()

    def _refuse(self, bad: Bools, what: str) -> None:
        if bad.any():
            raise ScheduleError(f"{what}: {self.describe(int(np.argmax(bad)))}")

    def _refuse_mixed_copies(self) -> None:
        """At most one copy may land at a (step, dst, chunk), and none beside a reduce: order would decide."""
        _, where, members = np.unique(
            (self.step.astype(np.int64) * self.ranks + self.dst) * self.chunks + self.chunk,
            return_inverse=True,
            return_counts=True,
        )
        self._refuse((self.op == Op.COPY) & (members[where] > 1), "a copy lands beside another transfer")

    @property
    def chunks(self) -> int:
        """Number of chunks."""
        return len(self.chunk_elements)

    @property
    def params(self) -> int:
        """Elements of the exchanged array."""
        return int(self.chunk_elements.sum())

    @property
    def messages(self) -> int:
        """Number of transfers."""
        return len(self.step)

    @property
    def steps(self) -> int:
        """Number of steps (1 + the last one)."""
        return int(self.step[-1]) + 1 if self.messages else 0

    def elements(self) -> npt.NDArray[np.int64]:
        """Elements of each transfer, shape (messages,)."""
        return self.chunk_elements[self.chunk]

    def traffic(self, itemsize: int) -> Traffic:
        """Count messages and bytes row by row, for elements of `itemsize` bytes."""
        return Traffic.of(self.ranks, self.src, self.dst, self.elements() * itemsize)

    def digest(self) -> str:
        """SHA-256 of the whole description, in hexadecimal; the same on every machine."""
        digest = hashlib.sha256(f"schedule 1 {self.ranks} {self.chunks} {self.messages}".encode())
        digest.update(self.chunk_elements.astype("<i8").tobytes())
        for name in COLUMNS:
            digest.update(getattr(self, name).astype("<i4").tobytes())
        for name in ("contributes", "must_hold"):
            digest.update(np.packbits(getattr(self, name)).tobytes())
        return digest.hexdigest()

    def describe(self, row: int) -> str:
        """Say in words what one row does."""
        verb = "reduces into" if self.op[row] == Op.REDUCE else "copies to"
        value = "input" if self.source[row] == Source.INPUT else "work"
        return (
            f"row {row} (step {self.step[row]}: rank {self.src[row]} {verb} rank {self.dst[row]}, "
            f"chunk {self.chunk[row]}, from {value})"
        )


def _integers(name: str, column: npt.NDArray[np.generic]) -> npt.NDArray[np.int64]:
    """Flatten a column of whole numbers that fit into the table's 32 bits."""
    if column.size and column.dtype.kind not in "iu":
        raise ScheduleError(f"column {name} must hold whole numbers, not {column.dtype}")
    limit = 127 if name in ("op", "source") else 2**31 - 1
    if column.size and not -limit <= column.min() <= column.max() <= limit:
        raise ScheduleError(f"column {name} holds numbers beyond {limit}")
    return np.ascontiguousarray(column, dtype=np.int64).reshape(-1)


def _flags(name: str, value: npt.ArrayLike, shape: tuple[int, int]) -> Bools:
    """Copy a table of flags, and repeat it as often as it takes to fill `shape`."""
    given = np.array(value, dtype=bool)
    try:
        return np.broadcast_to(given, shape)
    except ValueError:
        raise ScheduleError(f"{name} has shape {given.shape}, wanted (ranks, chunks) = {shape}") from None


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Exchange:
    """One training step's communication: reduce gradients, update, and share parameters where that is needed.

    Whoever `gradients` leaves with the complete sum makes the update; `parameters`, if there is one, then
    takes the updated values to the others. An all-reduce needs no second schedule, a parameter server does.
    """

    strategy: str
    workers: int
    """Ranks 0..workers-1 compute gradients; further ranks are servers."""
    gradients: Schedule
    parameters: Schedule | None = None

    @property
    def ranks(self) -> int:
        """Workers and servers."""
        return self.gradients.ranks

    @property
    def params(self) -> int:
        """Elements of the exchanged array."""
        return self.gradients.params

    def schedules(self) -> tuple[Schedule, ...]:
        """The schedules in the order in which they run."""
        return (self.gradients,) if self.parameters is None else (self.gradients, self.parameters)

    def updates(self) -> Bools:
        """Which ranks hold a complete gradient sum after `gradients` and so update, shape (ranks,)."""
        return np.asarray(self.gradients.must_hold.any(axis=1))

    def traffic(self, itemsize: int) -> Traffic:
        """Count the messages and bytes of both schedules."""
        parts = self.schedules()
        return Traffic.of(
            self.ranks,
            np.concatenate([part.src for part in parts]),
            np.concatenate([part.dst for part in parts]),
            np.concatenate([part.elements() for part in parts]) * itemsize,
        )

    def digest(self) -> str:
        """SHA-256 over the schedules' digests, in hexadecimal."""
        text = " ".join([self.strategy, str(self.workers), *(part.digest() for part in self.schedules())])
        return hashlib.sha256(text.encode()).hexdigest()


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Dependencies:
    """What each transfer and each apply waits for; rows are transfers, groups are applies.

    A group is all that lands at one (step, dst, chunk): one copy, or the reduces that are summed together in
    ascending rank with the receiver's own value in its place.
    """

    after_group: Ints
    """Per row: the group whose apply must be over before the row reads its value, -1 for none."""
    group_of_row: Ints
    """Per row: the group that applies it."""
    gates_group: Ints
    """Per row: the group that overwrites what this row reads and so waits for the read's end, -1 for none."""
    member_ptr: Ints
    members: Ints
    """Rows of group g in ascending sender: members[member_ptr[g]:member_ptr[g + 1]]."""
    previous: Ints
    """Per group: the group that is applied at the same (dst, chunk) before it, -1 for none."""
    step: Ints
    dst: Ints
    chunk: Ints
    op: npt.NDArray[np.int8]
    """Per group: where and how it is applied."""
    joins_own: Bools
    """Per group: whether the receiver has a value of its own by then that joins the sum; never for a copy."""

    @property
    def groups(self) -> int:
        """Number of applies."""
        return len(self.step)

    def rows_of(self, group: int) -> Ints:
        """Rows of a group in ascending sender."""
        return self.members[self.member_ptr[group] : self.member_ptr[group + 1]]


def dependencies(schedule: Schedule) -> Dependencies:
    """Derive what must wait for what, by the rules that random interleavings have shown to be enough.

    1. A `work` read waits for every apply at (src, chunk) of an earlier step; a step's reads come before its
       applies.
    2. An apply waits for every `work` read of (dst, chunk) of the same or an earlier step.
    3. Applies at one (dst, chunk) run in step order, the arrivals of one step together.

    Messages of an ordered pair of ranks match in row order. Every wait points backwards in (step, read
    before apply), so with staging for what has arrived nothing can deadlock.
    """
    step = schedule.step.astype(np.int64)
    steps = schedule.steps
    landing = schedule.dst.astype(np.int64) * schedule.chunks + schedule.chunk
    reading = schedule.src.astype(np.int64) * schedule.chunks + schedule.chunk
    members = np.lexsort((schedule.src, step, landing))
    key = landing * steps + step
    group_key, first, sizes = np.unique(key[members], return_index=True, return_counts=True)
    place = group_key // max(steps, 1)

    # The groups of one place are neighbours in step order, so the last one before a read, and the first one
    # that overwrites what it read, are one binary search away.
    read_key = reading * steps + step
    following = np.searchsorted(group_key, read_key)
    work = schedule.source == Source.WORK
    after_group = np.where(work & _same(place, following - 1, reading), following - 1, -1)
    gates_group = np.where(work & _same(place, following, reading), following, -1)
    group_of_row = np.empty(len(step), dtype=np.int32)
    group_of_row[members] = np.repeat(np.arange(len(sizes)), sizes)
    before = np.arange(len(place)) - 1
    previous = np.where(_same(place, before, place), before, -1).astype(np.int32)
    dst, chunk, op = schedule.dst[members[first]], schedule.chunk[members[first]], schedule.op[members[first]]
    return Dependencies(
        after_group=after_group.astype(np.int32),
        group_of_row=group_of_row,
        gates_group=gates_group.astype(np.int32),
        member_ptr=np.concatenate(([0], np.cumsum(sizes))).astype(np.int32),
        members=members.astype(np.int32),
        previous=previous,
        step=schedule.step[members[first]],
        dst=dst,
        chunk=chunk,
        op=op,
        joins_own=(op == Op.REDUCE) & (schedule.contributes[dst, chunk] | (previous >= 0)),
    )


def _same(place: npt.NDArray[np.int64], index: npt.NDArray[np.int64], wanted: npt.NDArray[np.int64]) -> Bools:
    """Whether place[index] exists and equals `wanted`."""
    inside = (index >= 0) & (index < len(place))
    if not len(place):
        return inside
    return np.asarray(inside & (place[np.clip(index, 0, len(place) - 1)] == wanted))
