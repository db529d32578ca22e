"""A memory plan's timeline for ui.perfetto.dev: what each engine does, and what is resident meanwhile."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from distsim.engine import Timeline
from distsim.memory.lower import Timed
from distsim.trace import metadata, microseconds, written_whole


def write(path: Path, timed: Sequence[Timed], timeline: Timeline, memory: Sequence[float], second: float) -> None:
    """Write the trace, compressed if the name ends in .gz: whole or not at all.

    `memory` is what is resident as each operation starts; nothing for none to show. Times are taken `second` to the
    second: 1 for SI units, and 1e6 to show a file's own units as microseconds.

    Raises: ConfigError naming the file if it cannot be written.
    """
    with written_whole(path) as file:
        file.write('{"displayTimeUnit":"ns","otherData":{"simulator":"distsim"},"traceEvents":[\n')
        file.write(",\n".join(_events(timed, timeline, memory, second)))
        file.write("\n]}\n")


def _events(timed: Sequence[Timed], timeline: Timeline, memory: Sequence[float], second: float) -> Iterator[str]:
    resources = list(dict.fromkeys(each.resource for each in timed))
    yield metadata("process", 0, 0, "memory plan", 0)
    for place, resource in enumerate(resources):
        yield metadata("thread", 0, place + 1, resource, place)
    begin_ns, end_ns = (np.rint(times / second * 1e9).astype(int) for times in (timeline.start_s, timeline.finish_s))
    for number in np.argsort(begin_ns, kind="stable").tolist():
        each, begin = timed[number], int(begin_ns[number])
        thread = resources.index(each.resource) + 1
        span = f'"ts":{microseconds(begin)},"dur":{microseconds(int(end_ns[number]) - begin)}'
        yield f'{{"ph":"X","cat":"memory","name":{json.dumps(each.name)},"pid":1,"tid":{thread},{span}}}'
        if len(memory):
            value = f'"args":{{"resident":{json.dumps(memory[number])}}}'
            yield f'{{"ph":"C","name":"memory","pid":1,"ts":{microseconds(begin)},{value}}}'
