"""What an exchange puts on the wire: messages, bytes, sizes, per rank and per ordered pair of ranks."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]


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
        size = np.asarray(message_bytes, dtype=np.int64)
        pair = np.asarray(src, dtype=np.int64) * ranks + np.asarray(dst, dtype=np.int64)
        sizes, size_counts = np.unique(size, return_counts=True)
        message_sizes = dict(zip(sizes.tolist(), size_counts.tolist(), strict=True))
        links, where, link_messages = np.unique(pair, return_inverse=True, return_counts=True)
        link_bytes = np.zeros(len(links), dtype=np.int64)
        np.add.at(link_bytes, where, size)
        return Traffic(
            ranks=ranks,
            messages=len(size),
            bytes=sum(each * count for each, count in message_sizes.items()),  # exact, beyond 64 bits too
            message_sizes=message_sizes,
            link_src=links // ranks,
            link_dst=links % ranks,
            link_messages=link_messages.astype(np.int64),
            link_bytes=link_bytes,
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
