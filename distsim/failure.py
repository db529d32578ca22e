"""A rank that fails in the middle of an exchange: who waits for it, and who waits behind them.

A failure is addressed as (rank, step): the rank stops before its transfers of that step. From then on it neither
sends nor receives nor applies. Steps of a second schedule (the parameters that follow an update) count on from
those of the first. Nothing is handed over without its receiver, as with gloo and NCCL, so that whoever sends to
the failed rank waits as well as whoever receives from it.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from distsim import engine
from distsim.errors import ConfigError, RankFailed
from distsim.lower import Lowered, Part
from distsim.schedule import Exchange
from distsim.taskgraph import Floats, TaskGraph
from distsim.units import format_time

Bools = npt.NDArray[np.bool_]
SHOWN = 20
"""Lines and ranks that a message names."""


def survive(exchange: Exchange, lowered: Lowered, rank: int, step: int) -> None:
    """Run an exchange in which `rank` fails at `step`; return if it finishes all the same.

    It does where the rank has nothing left to do.

    Raises: RankFailed that names who waits for the rank; ConfigError for a rank that the exchange does not have.
    """
    if not 0 <= rank < exchange.ranks:
        raise ConfigError(f"rank {rank} cannot fail: {exchange.strategy} has ranks 0..{exchange.ranks - 1}")
    if step < 0:
        raise ConfigError(f"a rank cannot fail at step {step}; steps count from 0")
    stopped = _stopped(lowered, rank, step)
    if not stopped.any():
        return
    finish_s = engine.run(lowered.graph, stopped=stopped).finish_s
    raise RankFailed(_report(exchange, lowered, finish_s, stopped, (rank, step)))


def _stopped(lowered: Lowered, rank: int, step: int) -> Bools:
    """Return which messages the failed rank no longer sends or receives, shape (tasks,).

    Its applies need no mention: what they apply never comes.
    """
    stopped = np.zeros(lowered.graph.tasks, np.bool_)
    for part, begins in _parts(lowered):
        first = part.messages.first
        late = part.schedule.step[first] + begins >= step
        stopped[part.sends] = late & ((part.schedule.src[first] == rank) | (part.schedule.dst[first] == rank))
    return stopped


def _parts(lowered: Lowered) -> Iterator[tuple[Part, int]]:
    """Yield the parts, each with the number of steps before it."""
    begins = 0
    for part in lowered.parts:
        yield part, begins
        begins += part.schedule.steps


def _report(exchange: Exchange, lowered: Lowered, finish_s: Floats, stopped: Bools, failed: tuple[int, int]) -> str:
    """Say who waits for the failed rank, who waits behind them, and how far the exchange came."""
    rank, step = failed
    undone, last_s = np.isnan(finish_s), 0.0
    blocked = _blocked_by_others(lowered.graph, undone)
    direct: dict[int, dict[bool, str]] = {}
    waiting = np.zeros(exchange.ranks, np.bool_)
    made = total = 0
    for part, begins in _parts(lowered):
        schedule, first = part.schedule, part.messages.first
        left = undone[part.sends]
        last_s = max(last_s, float(np.fmax.reduce(finish_s[part.sends], initial=0.0)))
        made, total = made + int((~left).sum()), total + len(left)
        waiting[schedule.src[first[left]]] = waiting[schedule.dst[first[left]]] = True
        for message in np.flatnonzero(stopped[part.sends] & ~blocked[part.sends]).tolist():  # only the rank lacks
            row, chunks = first[message], part.chunks(message)
            sends = int(schedule.dst[row]) == rank
            other = int(schedule.src[row] if sends else schedule.dst[row])
            does = f"send {chunks} to" if sends else f"receive {chunks} from"
            direct.setdefault(other, {}).setdefault(sends, f"to {does} it at step {schedule.step[row] + begins}")
    waiting[[rank, *direct]] = False
    behind = np.flatnonzero(waiting).tolist()
    lines = [f"rank {other} waits {' and '.join(direct[other].values())}" for other in sorted(direct)[:SHOWN]]
    if len(direct) > SHOWN:
        lines.append(f"and so do {len(direct) - SHOWN} more ranks")
    if behind:
        lines.append(f"behind them {'wait' if len(behind) > 1 else 'waits'} {_ranks(behind)}")
    after = f", the last of them by {format_time(last_s)}" if made else ""
    lines.append(f"{made:,} of {total:,} transfers were made{after}")
    head = f"{exchange.strategy}: rank {rank} fails at step {step}, and the exchange cannot finish:"
    return "\n  ".join([head, *lines])


def _blocked_by_others(graph: TaskGraph, undone: Bools) -> Bools:
    """Return which tasks wait for another task that is never done, shape (tasks,)."""
    blocked = np.zeros(graph.tasks, np.bool_)
    blocked[graph.following[np.repeat(undone, np.diff(graph.next_ptr))]] = True
    return blocked


def _ranks(ranks: list[int]) -> str:
    names = ", ".join(map(str, ranks[:SHOWN])) + (", ..." if len(ranks) > SHOWN else "")
    return f"rank {names}" if len(ranks) == 1 else f"{len(ranks)} ranks: {names}"
