"""The trace: read back by the rules of the Trace Event Format, and held against schedule, cluster and timeline."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from made_clusters import KINDS, flat, some_clusters

from distsim import exchanges, trace
from distsim.cli import main
from distsim.cluster import ideal, load
from distsim.errors import ConfigError
from distsim.network import Sharing
from distsim.step import Simulation, simulate, simulate_representatives

HALF_NS = 0.5001e-9


class Slice(NamedTuple):
    """A complete event; times in nanoseconds, whole ones if the file keeps to three decimals."""

    begin: int
    end: int
    kind: str
    name: str
    args: dict[str, Any]


class Arrow(NamedTuple):
    """One end of a flow, where it is and when."""

    thread: tuple[int, int]
    time: int


class Trace(NamedTuple):
    """A trace as a reader of the format sees it."""

    processes: dict[int, str]
    threads: dict[tuple[int, int], str]
    slices: dict[tuple[int, int], list[Slice]]
    begins: dict[int, Arrow]
    ends: dict[int, Arrow]

    def of(self, kind: str) -> list[tuple[tuple[int, int], Slice]]:
        return [(thread, one) for thread, each in self.slices.items() for one in each if one.kind == kind]


def nanoseconds(text: str) -> int:
    """Microseconds with three decimals, exactly."""
    whole, _, part = text.partition(".")
    assert len(part) == 3 and not text.startswith("-")
    return int(whole) * 1000 + int(part)


def read(path: Path) -> Trace:
    """Read a trace and assert what the format asks for."""
    text = gzip.decompress(path.read_bytes()).decode() if path.suffix == ".gz" else path.read_text("utf-8")
    document = json.loads(text, parse_float=lambda number: number, parse_constant=lambda name: pytest.fail(name))
    assert set(document) == {"displayTimeUnit", "otherData", "traceEvents"} and document["displayTimeUnit"] == "ns"
    found = Trace({}, {}, defaultdict(list), {}, {})
    places = Counter[tuple[str, Any]]()
    for event in document["traceEvents"]:
        thread = (event["pid"], event["tid"])
        match event["ph"]:
            case "M":
                (value,) = event["args"].values()
                if event["name"] == "process_name":
                    assert found.processes.setdefault(event["pid"], value) is value
                elif event["name"] == "thread_name":
                    assert found.threads.setdefault(thread, value) is value
                else:
                    assert event["name"] in ("process_sort_index", "thread_sort_index")
                    places[event["name"], value] += 1
            case "X":
                begin, length = nanoseconds(event["ts"]), nanoseconds(event["dur"])
                found.slices[thread].append(Slice(begin, begin + length, event["cat"], event["name"], event["args"]))
            case "s" | "f" as end:
                ends = found.begins if end == "s" else found.ends
                assert (event["cat"], event["name"]) == ("message", "message")  # readers match these and the id
                assert end == "s" or event["bp"] == "e"
                assert ends.setdefault(event["id"], Arrow(thread, nanoseconds(event["ts"]))).thread == thread
            case other:
                pytest.fail(f"an event of phase {other}")
    assert len({tid for _, tid in found.threads}) == len(found.threads), "readers may take a tid for the same thread"
    assert set(found.slices) == set(found.threads) and {pid for pid, _ in found.threads} <= set(found.processes)
    assert max(places.values()) == 1 and len(places) == len(found.threads) + len(found.processes)
    return found


def nests(slices: list[Slice]) -> bool:
    """Whether any two slices of a thread lie beside or within each other."""
    open_ends: list[int] = []
    for one in sorted(slices, key=lambda each: (each.begin, -each.end)):
        while open_ends and open_ends[-1] <= one.begin:
            open_ends.pop()
        if open_ends and one.end > open_ends[-1]:
            return False
        open_ends.append(one.end)
    return True


def holds(simulation: Simulation, found: Trace) -> None:
    """Assert that a trace shows a simulation: all of it, when it happened, where it happened."""
    cluster, ranks = simulation.cluster, simulation.exchange.ranks
    assert found.processes == {
        **{rank + 1: f"rank {rank} ({cluster.devices[rank]})" for rank in range(ranks)},
        ranks + 1: "network",
    }
    assert all(nests(slices) for slices in found.slices.values())
    rows = []
    for part in simulation.lowered.parts:
        for message, first in enumerate(part.messages.first.tolist()):
            rows.append((part.schedule, first, part.sends.start + message))
    assert len(rows) == simulation.traffic.messages
    sends = {int(one.args["message"]): (thread, one) for thread, one in found.of("send")}
    receives = {int(one.args["message"]): (thread, one) for thread, one in found.of("receive")}
    assert len(found.of("send")) == len(found.of("receive")) == len(sends) == len(receives) == len(rows)
    assert set(found.begins) == set(found.ends) == {number + 1 for number in sends}
    assert sum(int(one.args["bytes"]) for _, one in sends.values()) == simulation.traffic.bytes
    passing = Counter[str]()
    start_s, finish_s = simulation.timeline.start_s, simulation.timeline.finish_s
    for number, (schedule, row, task) in enumerate(rows):
        src, dst = int(schedule.src[row]), int(schedule.dst[row])
        links = [cluster.link_name(each) for each in cluster.routes([src], [dst])[1].tolist()]
        (out, sent), (into, received) = sends[number], receives[number]
        assert (out[0], into[0]) == (src + 1, dst + 1)
        assert found.threads[out].partition(" #")[0] == f"out: {links[0]}"
        assert found.threads[into].partition(" #")[0] == f"in: {links[-1]}"
        passing.update(links[1:-1])
        assert abs(sent.begin * 1e-9 - start_s[task]) < HALF_NS and abs(received.end * 1e-9 - finish_s[task]) < HALF_NS
        assert (float(sent.args["start_s"]), float(sent.args["finish_s"])) == (start_s[task], finish_s[task])
        assert f"step {schedule.step[row]}: chunk" in sent.name and f"to rank {dst}, " in sent.name
        assert f"from rank {src}, " in received.name
        assert {name: int(sent.args[name]) for name in ("row", "step", "src", "dst", "first chunk")} == {
            **{"row": row, "step": schedule.step[row], "src": src, "dst": dst, "first chunk": schedule.chunk[row]}
        }
        for arrow, (thread, one) in ((found.begins, (out, sent)), (found.ends, (into, received))):
            end = arrow[number + 1]
            assert end.thread == thread and one.begin <= end.time <= one.end
            if one.end - one.begin > 1:  # the arrow is where no other slice of the thread is, nor ends, nor begins
                assert [each for each in found.slices[thread] if each.begin <= end.time <= each.end] == [one]
        assert found.begins[number + 1].time <= found.ends[number + 1].time + 1  # each rounded to a nanosecond
    assert passing == Counter(found.threads[thread].partition(" #")[0] for thread, _ in found.of("pass"))
    assert all(thread[0] == ranks + 1 for thread, _ in found.of("pass"))
    posted = sum(0 if part.posts is None else part.messages.count for part in simulation.lowered.parts)
    assert len(found.of("post")) == posted
    adds = bool((cluster.reduce_bandwidth_Bps[:ranks] < float("inf")).any())
    assert len(found.of("apply")) == adds * sum(part.waits.groups for part in simulation.lowered.parts)


@settings(max_examples=120, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_trace_shows_all_that_happens_when_and_where_it_does(data: st.DataObject, tmp_path: Path) -> None:
    strategy = data.draw(st.sampled_from(list(exchanges.STRATEGIES)))
    exchange = exchanges.build(strategy, data.draw(st.sampled_from([1, 2, 4])), data.draw(st.integers(1, 5000)))
    where = data.draw(some_clusters(data.draw(st.sampled_from(KINDS))))
    assume(exchange.ranks <= len(where.devices))
    sharings: list[Sharing] = ["fair", "fifo"]
    result = simulate(exchange, where, sharing=data.draw(st.sampled_from(sharings)))
    path = tmp_path / data.draw(st.sampled_from(["a.json", "a.json.gz"]))
    trace.write(result, path)
    holds(result, read(path))
    written = path.read_bytes()
    assert path.suffix != ".gz" or written[4:8] == bytes(4), "the time of writing is not in the file"
    trace.write(result, path)
    assert path.read_bytes() == written


def test_what_shares_a_link_is_drawn_side_by_side(tmp_path: Path) -> None:
    result = simulate(exchanges.build("all-to-all", 4, 1000), load("h100_2x8_ndr"))
    trace.write(result, tmp_path / "a.json")
    found = read(tmp_path / "a.json")
    holds(result, found)
    out = [name for (process, _), name in found.threads.items() if process == 1 and name.startswith("out")]
    link = "out: node0.gpu0 -> node0.switch"
    assert out == [link, f"{link} #2", f"{link} #3"]


def test_hosts_and_processors_have_threads_and_schedules_names(tmp_path: Path) -> None:
    where = flat(4, 1e9, 1e-6, 1e-7, reduce_Bps=1e9, host_s=2e-6)
    result = simulate(exchanges.build("parameter-server", 3, 1000), where)
    trace.write(result, tmp_path / "a.json")
    found = read(tmp_path / "a.json")
    holds(result, found)
    server = [name for (process, _), name in found.threads.items() if process == 4]
    assert {"processor", "host"} <= set(server)
    assert {one.name for _, one in found.of("apply") if one.end > one.begin} == {"gradients, step 0: apply chunk 0"}
    posts = {one.name for _, one in found.of("post")}
    assert posts == {
        "gradients, step 0: post chunk 0 to rank 3, 4 kB",
        *(f"parameters, step 0: post chunk 0 to rank {rank}, 4 kB" for rank in range(3)),
    }
    assert all(one.end - one.begin == 2000 for _, one in found.of("post"))


def test_a_checker_of_nesting_that_can_fail() -> None:
    def one(begin: int, end: int) -> Slice:
        return Slice(begin, end, "", "", {})

    assert nests([one(0, 5), one(5, 9), one(1, 2), one(2, 5), one(9, 9)])
    assert not nests([one(0, 5), one(4, 9)])
    assert not nests([one(0, 9), one(1, 5), one(2, 6)])


def test_too_much_is_refused_before_it_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = simulate(exchanges.build("ring", 4, 100), ideal(4))
    monkeypatch.setattr(trace, "MOST", 23)
    with pytest.raises(ConfigError, match=r"a trace of 24 messages is too large .* at most 23: use fewer ranks"):
        trace.write(result, tmp_path / "a.json")
    monkeypatch.setattr(trace, "MOST", 24)
    trace.write(result, tmp_path / "a.json")
    some = simulate_representatives("ring", 16, 1_600_000, load("h100_2x8_ndr"))
    with pytest.raises(ConfigError, match=rf"stands for {some.copies}, and a trace needs every one"):
        trace.write(some, tmp_path / "b.json")
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


@pytest.mark.parametrize("name", ["a.json", "a.json.gz"])
def test_a_trace_is_written_whole_or_not_at_all(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = simulate(exchanges.build("ring", 4, 100), ideal(4))
    trace.write(result, tmp_path / name)
    before = (tmp_path / name).read_bytes()
    events = trace._events

    def broken(simulation: Simulation) -> Any:
        for number, event in enumerate(events(simulation)):
            if number == 20:
                raise KeyboardInterrupt
            yield event

    monkeypatch.setattr(trace, "_events", broken)
    with pytest.raises(KeyboardInterrupt):
        trace.write(result, tmp_path / name)
    assert (tmp_path / name).read_bytes() == before and len(list(tmp_path.iterdir())) == 1
    with pytest.raises(ConfigError, match=r"a\.json.*/x: cannot write it: "):
        trace.write(result, tmp_path / name / "x")


def test_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    script = (
        "import resource, sys\nfrom pathlib import Path\nfrom distsim import exchanges, trace\n"
        "from distsim.cluster import ideal\nfrom distsim.step import simulate\n"
        "result = simulate(exchanges.build('ring', 128, 1 << 20), ideal(128))\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        f"trace.write(result, Path({str(tmp_path / 'a.json')!r}))\n"
        "print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)\n"
    )
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=True)
    size = (tmp_path / "a.json").stat().st_size
    assert size > 20e6 and int(ran.stdout) < size / 2


def test_the_command_writes_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "new" / "ring.json.gz"
    assert main(f"exchange ring --ranks 4 --params 1000 --trace {path}".split()) == 0
    holds(simulate(exchanges.build("ring", 4, 1000), ideal(4)), read(path))
    assert main(f"exchange ring --ranks 4 --sizes 1KiB,2KiB --trace {path}".split()) == 2
    assert "--trace takes one exchange, but --sizes has 2" in capsys.readouterr().err
