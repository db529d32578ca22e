"""A simulated exchange as a trace for ui.perfetto.dev: every message where it leaves, passes and arrives.

The file is in the Trace Event Format (Google's document of that name: the JSON that chrome://tracing and Perfetto
read): complete events (`X`) for what holds a link, a processor or a host, flow events (`s`, `f`) for the arrow
from a message's sender to its receiver, and metadata (`M`) for names and order. Times are in microseconds with
three decimals: Perfetto counts in nanoseconds.

Each rank is a process: a thread for each link by which its messages leave or arrive, its processor, its host. The
links between are threads of the process "network". Events of a thread have to lie within or beside each other, so
messages that share a link at one time are drawn on as many threads ("#2", "#3", ...). Numbers of threads are
unique in the whole file, because readers differ in whether a thread's number belongs to its process.
"""

from __future__ import annotations

import gzip
import io
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from heapq import heappop, heappush
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np
import numpy.typing as npt

from distsim.critical import held
from distsim.errors import ConfigError
from distsim.schedule import ITEMSIZE, Op, Source
from distsim.step import Simulation
from distsim.units import format_bytes

Index = npt.NDArray[np.int64]

MOST = 1_000_000
"""Messages that a trace may have."""


class Slices(NamedTuple):
    """What a thread shows, or several that share a resource: columns with an entry for each slice, by time."""

    process: int
    """A rank, or the number of ranks for the network."""
    thread: str
    kind: str
    """`send`, `pass`, `receive`, `apply` or `post`."""
    task: Index
    begin_ns: Index
    end_ns: Index


class Table(NamedTuple):
    """Columns with an entry for each message, those of the first schedule first."""

    schedule: Index
    row: Index
    step: Index
    src: Index
    dst: Index
    first: Index
    last: Index
    """Its first and last chunk."""
    bytes: Index
    op: Index
    source: Index


def write(simulation: Simulation, path: Path) -> None:
    """Write the trace, compressed if the name ends in .gz: whole or not at all.

    Raises: ConfigError for too many messages, for a simulation of representatives only, and naming the file if it
    cannot be written.
    """
    messages = sum(part.messages.count for part in simulation.lowered.parts)
    if simulation.copies > 1:
        raise ConfigError(
            f"each transfer of this simulation stands for {simulation.copies}, and a trace needs every one; "
            "expected fewer ranks, or a simulation of the whole"
        )
    if messages > MOST:
        raise ConfigError(
            f"a trace of {messages:,} messages is too large to be looked at; expected at most {MOST:,}: "
            "use fewer ranks (a ring of n has 2n(n-1) messages), fewer channels or fewer chunks"
        )
    with written_whole(path) as file:
        about = json.dumps({"simulator": "distsim", "exchange": simulation.exchange.strategy})
        file.write(f'{{"displayTimeUnit":"ns","otherData":{about},"traceEvents":[\n')
        for number, event in enumerate(_events(simulation)):
            file.write(f",\n{event}" if number else event)
        file.write("\n]}\n")


def _events(simulation: Simulation) -> Iterator[str]:
    """Yield the events, each as JSON."""
    ranks, devices = simulation.exchange.ranks, simulation.cluster.devices
    for process in range(ranks + 1):
        name = f"rank {process} ({devices[process]})" if process < ranks else "network"
        yield metadata("process", process, 0, name, process)
    table = _table(simulation)
    threads = 0
    for slices in _slices(simulation):
        lanes = 0
        busy: list[tuple[int, int]] = []
        spare: list[int] = []
        columns = (slices.begin_ns.tolist(), slices.end_ns.tolist(), _labels(simulation, table, slices))
        for begin, end, (number, name, details) in zip(*columns, strict=True):
            while busy and busy[0][0] <= begin:
                heappush(spare, heappop(busy)[1])
            if not spare:
                lanes += 1
                title = slices.thread + (f" #{lanes}" if lanes > 1 else "")
                yield metadata("thread", slices.process, threads + lanes, title, threads + lanes)
                heappush(spare, threads + lanes)
            thread = heappop(spare)
            heappush(busy, (end, thread))
            where = f'"pid":{slices.process + 1},"tid":{thread}'
            span = f'"ts":{microseconds(begin)},"dur":{microseconds(end - begin)}'
            yield f'{{"ph":"X","cat":"{slices.kind}","name":"{name}",{where},{span},"args":{{{details}}}}}'
            if slices.kind in ("send", "receive"):
                phase = '"ph":"s"' if slices.kind == "send" else '"ph":"f","bp":"e"'
                middle = microseconds((begin + end) // 2)  # where no neighbour of the slice can be meant
                yield f'{{{phase},"cat":"message","name":"message","id":{number + 1},{where},"ts":{middle}}}'
        threads += lanes


def _slices(simulation: Simulation) -> Iterator[Slices]:
    """Yield what happens on each link, as ranks see it and in between, then on processors and hosts."""
    graph, net, ranks = simulation.lowered.graph, simulation.lowered.network, simulation.exchange.ranks
    ptr, resources = graph.routes.ptr, graph.routes.resources
    by_route = np.argsort(graph.route, kind="stable")
    bounds = np.searchsorted(graph.route[by_route], np.arange(len(ptr)))
    sender, receiver = np.zeros((2, len(ptr) - 1), np.int64)
    for part, routes in zip(simulation.lowered.parts, net.route_of_rows, strict=True):
        sender[routes], receiver[routes] = part.schedule.src, part.schedule.dst
    entry = np.arange(len(resources))
    route = np.searchsorted(ptr, entry, side="right") - 1
    first, last, link = entry == ptr[route], entry == ptr[route + 1] - 1, route < net.processor_route
    for kind, process, chosen in (
        ("send", sender[route], link & first),
        ("receive", receiver[route], link & last),
        ("pass", np.full(len(entry), ranks), link & ~first & ~last),
        ("apply", route - net.processor_route, ~link & (route < net.host_route)),
        ("post", route - net.host_route, route >= net.host_route),
    ):
        where = np.flatnonzero(chosen)
        where = where[np.lexsort((resources[where], process[where]))]
        pairs = np.stack((process[where], resources[where]))
        for entries in np.split(where, 1 + np.flatnonzero((np.diff(pairs) != 0).any(axis=0))):
            task = [by_route[bounds[each] : bounds[each + 1]] for each in route[entries].tolist()]
            found = np.concatenate([np.zeros(0, np.int64), *task])
            if len(found):
                yield _of(simulation, kind, int(process[entries[0]]), found, int(resources[entries[0]]))


def _of(simulation: Simulation, kind: str, process: int, task: Index, resource: int) -> Slices:
    """Return the slices of tasks on a resource."""
    graph, finish_s = simulation.lowered.graph, simulation.timeline.finish_s[task]
    begin_s, end_s = held(graph, simulation.timeline, task, resource)
    if kind == "receive":  # it arrives as it leaves, but later; the last of it when the message is there
        begin_s, end_s = finish_s - (end_s - begin_s), finish_s
    begin_ns, end_ns = (np.rint(column * 1e9).astype(np.int64) for column in (begin_s, end_s))
    order = np.lexsort((task, end_ns, begin_ns))
    if kind in ("send", "pass", "receive"):
        thread = {"send": "out: ", "pass": "", "receive": "in: "}[kind] + simulation.cluster.link_name(resource)
    else:
        thread = {"apply": "processor", "post": "host"}[kind]
    return Slices(process, thread, kind, task[order], begin_ns[order], end_ns[order])


def _table(simulation: Simulation) -> Table:
    """Return what there is to say of each message."""
    columns: list[list[npt.NDArray[np.integer]]] = []
    for which, part in enumerate(simulation.lowered.parts):
        schedule, first = part.schedule, part.messages.first
        last = part.messages.last
        size = part.messages.totals(schedule.elements()) * ITEMSIZE[simulation.dtype]
        ends = (schedule.chunk[first], schedule.chunk[last])
        named = (schedule.step[first], schedule.src[first], schedule.dst[first])
        how = (schedule.op[first], schedule.source[first])
        columns.append([np.full(len(first), which), first, *named, *ends, size, *how])
    return Table(*(np.concatenate(parts).astype(np.int64) for parts in zip(*columns, strict=True)))


def _labels(simulation: Simulation, table: Table, slices: Slices) -> Iterator[tuple[int, str, str]]:
    """Yield the number of each slice's message or apply, its name, and its details as the inside of a JSON object."""
    parts, task = simulation.lowered.parts, slices.task
    title = ("gradients, ", "parameters, ") if len(parts) > 1 else ("",)
    if slices.kind == "apply":
        for number in task.tolist():
            which = sum(number > part.groups[-1] for part in parts if len(part.groups))
            waits, group = parts[which].waits, number - int(parts[which].groups[0])
            yield group, f"{title[which]}step {waits.step[group]}: apply chunk {waits.chunk[group]}", ""
        return
    message = task - (parts[0].posts.start if slices.kind == "post" and parts[0].posts is not None else 0)
    timeline = simulation.timeline
    times = (timeline.start_s[message].tolist(), timeline.finish_s[message].tolist())
    columns = zip(message.tolist(), *(column[message].tolist() for column in table), *times, strict=True)
    for number, which, row, step, src, dst, first, last, size, op, source, start_s, finish_s in columns:
        chunks = f"chunk {first}" if first == last else f"chunks {first}-{last}"
        ends = {"receive": f"from rank {src}", "pass": f"from rank {src} to rank {dst}"}
        where = ends.get(slices.kind, f"to rank {dst}")
        details = f'"message":{number}'
        if slices.kind == "send":
            details += (
                f',"row":{row},"step":{step},"src":{src},"dst":{dst},"first chunk":{first},"last chunk":{last}'
                f',"bytes":{size},"op":"{Op(op).name.lower()}","source":"{Source(source).name.lower()}"'
                f',"start_s":{start_s!r},"finish_s":{finish_s!r}'
            )
        post = "post " if slices.kind == "post" else ""
        yield number, f"{title[which]}step {step}: {post}{chunks} {where}, {format_bytes(size)}", details


def metadata(what: str, process: int, thread: int, name: str, place: int) -> str:
    """Return events that name a process or a thread, and say where in order it stands."""
    where = f'"ph":"M","pid":{process + 1},"tid":{thread}'
    named = f'{{"name":"{what}_name",{where},"args":{{"name":{json.dumps(name)}}}}}'
    return f'{named},\n{{"name":"{what}_sort_index",{where},"args":{{"sort_index":{place}}}}}'


def microseconds(time_ns: int) -> str:
    """Return a time as traces have it."""
    return f"{time_ns // 1000}.{time_ns % 1000:03d}"


@contextmanager
def written_whole(path: Path) -> Iterator[IO[str]]:
    """Yield a file to write to; it takes its place once all is written, as with `files.write_whole`.

    It is compressed if its name ends in .gz.

    Raises: ConfigError naming the file if it cannot be written.
    """
    partial = path.parent / f".{path.name}.{os.getpid()}"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with partial.open("wb") as file:
                if path.suffix == ".gz":  # without name and time: the same trace gives the same bytes
                    packed = gzip.GzipFile("", "wb", compresslevel=5, fileobj=file, mtime=0)
                    with packed, io.TextIOWrapper(packed, encoding="utf-8", newline="\n") as text:
                        yield text
                else:
                    with io.TextIOWrapper(file, encoding="utf-8", newline="\n") as text:
                        yield text
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
    except OSError as error:
        raise ConfigError(f"{path}: cannot write it: {error.strerror}") from error
