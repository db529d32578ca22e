"""Segments: any schedule with its chunks cut into pieces that follow each other, one step apart."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from distsim.schedule import Bools, Schedule


def segment(schedule: Schedule, k: int) -> Schedule:
    """Cut each chunk into k nearly equal pieces; a row at step s becomes rows at steps s, ..., s + k - 1.

    The pieces never meet, so what was right stays right. Piece j of chunk c is chunk j * chunks + c: the pieces
    lie in k blocks, in each of which part c belongs to whom it belonged before.
    """
    piece = np.arange(k, dtype=np.int32)[::-1, None]  # of one step, the piece that set out first comes first
    whole, rest = np.divmod(schedule.chunk_elements, k)  # as `split` does, for all chunks
    table = Schedule.of(
        ranks=schedule.ranks,
        chunk_elements=(whole + (piece[::-1] < rest)).reshape(-1),
        step=schedule.step + piece,
        src=schedule.src,
        dst=schedule.dst,
        chunk=schedule.chunk + piece * np.int32(schedule.chunks),
        op=schedule.op,
        source=schedule.source,
        coalesced=schedule.coalesced,
    )
    # Not through `of`, which copies flags: views of them are small, however many ranks there are.
    return replace(table, contributes=repeated(schedule.contributes, k), must_hold=repeated(schedule.must_hold, k))


def repeated(flags: Bools, k: int) -> Bools:
    """Repeat flags for each block of chunks, without a copy where they are the same for all chunks."""
    ranks, chunks = flags.shape
    return np.broadcast_to(flags[:, None, :], (ranks, k, chunks)).reshape(ranks, k * chunks)
