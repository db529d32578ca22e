"""What an exchange puts on the wire: messages, bytes, sizes, per rank and per ordered pair of ranks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from distsim.compiled import call
from distsim.places import named, places

Ints = npt.NDArray[np.int64]


class Rows(NamedTuple):
    """Messages as columns: sender, receiver and kind, and how many bytes a message of each kind has."""

    src: npt.NDArray[np.int32]
    dst: npt.NDArray[np.int32]
    kind: npt.NDArray[np.int32]
    bytes_of_kind: Ints


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Traffic:
    """Counts of messages and bytes; simulated and measured runs fill the same class from their messages."""

    ranks: int
    """Devices that take part, servers included."""
    messages: int
    bytes: int
    message_sizes: dict[int, int]
    """Distinct message sizes in bytes, ascending, and how many messages have each."""
    link_src: Ints
    link_dst: Ints
    link_messages: Ints
    link_bytes: Ints
    """One entry for each ordered pair of ranks that talks, in (src, dst) order."""

    @staticmethod
    def of(ranks: int, src: npt.ArrayLike, dst: npt.ArrayLike, message_bytes: npt.ArrayLike) -> Traffic:
        """Count messages given as equally long columns of sender, receiver and size in bytes."""
        sizes, kind = np.unique(np.asarray(message_bytes, dtype=np.int64), return_inverse=True)
        rows = Rows(np.asarray(src, np.int32), np.asarray(dst, np.int32), kind.astype(np.int32), sizes)
        return Traffic.of_rows(ranks, [rows])

    @staticmethod
    def of_rows(ranks: int, parts: Sequence[Rows]) -> Traffic:
        """Count messages whose sizes are given by kind (by chunk, for a schedule), in one pass over the rows."""
        talking = [(part.src, part.dst) for part in parts]
        pairs, count = places(ranks, *talking)
        messages, total = np.zeros(count, np.int64), np.zeros(count, np.int64)
        message_sizes: Counter[int] = Counter()
        for pair, part in zip(pairs, parts, strict=True):
            columns = (
                pair,
                part.kind,
                part.bytes_of_kind,
                messages,
                total,
                np.zeros(len(part.bytes_of_kind), np.int64),
            )
            counted = call(_count, len(pair), *columns)
            messages, total, kinds = (np.asarray(column, np.int64) for column in counted)
            sizes, which = np.unique(part.bytes_of_kind[kinds > 0], return_inverse=True)
            many = np.zeros(len(sizes), np.int64)
            np.add.at(many, which, kinds[kinds > 0])
            message_sizes.update(dict(zip(sizes.tolist(), many.tolist(), strict=True)))
        links, src, dst = named(count, pairs, *talking)
        return Traffic(
            ranks=ranks,
            messages=sum(message_sizes.values()),
            bytes=sum(each * many for each, many in message_sizes.items()),  # exact, beyond 64 bits too
            message_sizes=dict(sorted(message_sizes.items())),
            link_src=src.astype(np.int64),
            link_dst=dst.astype(np.int64),
            link_messages=messages[links],
            link_bytes=total[links],
        )

    def sent_messages(self) -> Ints:
        """Messages sent by each rank, shape (ranks,)."""
        return self._per_rank(self.link_src, self.link_messages)

    def sent_bytes(self) -> Ints:
        """Bytes sent by each rank, shape (ranks,)."""
        return self._per_rank(self.link_src, self.link_bytes)

    def received_bytes(self) -> Ints:
        """Bytes received by each rank, shape (ranks,)."""
        return self._per_rank(self.link_dst, self.link_bytes)

    def links(self) -> list[tuple[int, int, int, int]]:
        """Rows (src, dst, messages, bytes) in (src, dst) order."""
        columns = (self.link_src, self.link_dst, self.link_messages, self.link_bytes)
        return list(zip(*(column.tolist() for column in columns), strict=True))

    def _per_rank(self, rank: Ints, amount: Ints) -> Ints:
        total = np.zeros(self.ranks, dtype=np.int64)
        np.add.at(total, rank, amount)
        return total


def _count(pair: Any, kind: Any, bytes_of_kind: Any, messages: Any, total: Any, kinds: Any) -> Any:
    """Add up messages and bytes per pair, and messages per kind."""
    for row in range(len(pair)):
        messages[pair[row]] += 1
        total[pair[row]] += bytes_of_kind[kind[row]]
        kinds[kind[row]] += 1
    return messages, total, kinds
