"""Records of steps that are made of several exchanges: buckets, and numbers that all ranks need."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from distsim import cluster as clusters
from distsim import exchanges
from distsim.diff import Line, agree, diff
from distsim.errors import ConfigError
from distsim.record import RunRecord, Spans, Totals, digest, from_simulation, from_simulations, read, write
from distsim.step import Simulation, simulate, simulate_strategy


def changed(one: RunRecord, **fields: Any) -> RunRecord:
    """Return a record with some fields replaced, checked as if it came from a file."""
    return RunRecord.model_validate({**one.model_dump(), **fields})


def buckets(strategy: str, n: int = 4) -> tuple[list[Simulation], list[str]]:
    """A step of two buckets and the numbers' exchange, and the names of its parts."""
    place = clusters.load("ethernet_16x10g")
    found = [simulate(exchanges.build(strategy, n, params), place) for params in (700, 300)]
    numbers = exchanges.build("recursive-doubling", found[0].exchange.ranks, 5)
    return [*found, simulate(numbers, place, "float64")], ["bucket 0", "bucket 1", "numbers"]


@pytest.mark.parametrize("strategy", exchanges.STRATEGIES)
def test_a_step_is_its_exchanges_one_after_another(strategy: str) -> None:
    """All columns, counts and times by plain loops over the records of the single exchanges."""
    simulations, names = buckets(strategy)
    step, singles = from_simulations(simulations, names), [from_simulation(each) for each in simulations]
    assert (step.strategy, step.workers, step.ranks) == (strategy, 4, simulations[0].exchange.ranks)
    assert (step.params, step.dtype, step.exchanges) == (1000, "float32", 1)
    assert step.time_s == sum(single.time_s for single in singles)

    expected: dict[str, list[float]] = {name: [] for name in Spans.model_fields}
    began_s, schedules = 0.0, 0
    sizes: dict[int, int] = {}
    links: dict[tuple[int, int], tuple[int, int]] = {}
    for simulation, single in zip(simulations, singles, strict=True):
        assert single.spans is not None and isinstance(single.totals, Totals)
        for name, column in single.spans:
            offset = {"schedule": schedules, "start_s": began_s, "finish_s": began_s}.get(name, 0)
            expected[name] += [offset + value for value in column]
        schedules += len(simulation.exchange.schedules())
        began_s += single.time_s
        for size, count in single.totals.message_sizes.items():
            sizes[size] = sizes.get(size, 0) + count
        for src, dst, count, size in single.totals.links:
            before = links.get((src, dst), (0, 0))
            links[src, dst] = (before[0] + count, before[1] + size)
    assert step.spans is not None
    assert dict(step.spans) == expected
    assert len(set(step.spans.schedule)) == (5 if strategy == "parameter-server" else 3)
    assert max(step.spans.finish_s) == pytest.approx(step.time_s)
    assert isinstance(step.totals, Totals)
    assert step.totals.message_sizes == sizes
    assert step.totals.links == [(*pair, *links[pair]) for pair in sorted(links)]
    assert step.totals.messages == len(step.spans.row) == sum(part.messages for part in step.parts)
    assert step.totals.bytes == sum(step.spans.bytes) == sum(part.bytes for part in step.parts)


def test_parts_say_what_each_exchange_was() -> None:
    simulations, names = buckets("ring")
    step = from_simulations(simulations, names)
    assert [(part.name, part.params, part.dtype, part.messages, part.bytes) for part in step.parts] == [
        ("bucket 0", 700, "float32", 24, 6 * 700 * 4),
        ("bucket 1", 300, "float32", 24, 6 * 300 * 4),
        ("numbers", 5, "float64", 8, 8 * 5 * 8),
    ]
    assert [part.time_s for part in step.parts] == [each.time_s for each in simulations]
    assert [part.schedule_digest for part in step.parts] == [each.exchange.digest() for each in simulations]


@pytest.mark.parametrize("strategy", exchanges.STRATEGIES)
def test_a_single_exchange_is_a_step_of_one_bucket(strategy: str) -> None:
    simulation = buckets(strategy)[0][0]
    one = from_simulation(simulation)
    assert one == from_simulations([simulation], ["bucket 0"])
    (part,) = one.parts
    assert isinstance(one.totals, Totals)
    assert (part.messages, part.bytes, part.params) == (one.totals.messages, one.totals.bytes, one.params)
    assert (part.time_s, part.schedule_digest) == (one.time_s, one.schedule_digest)


def test_a_digest_is_that_of_the_one_exchange_or_one_over_all_in_their_order() -> None:
    first, second = (exchanges.build("ring", 3, params) for params in (7, 8))
    assert digest([first]) == first.digest()
    both = hashlib.sha256(f"{first.digest()} {second.digest()}".encode()).hexdigest()
    assert digest([first, second]) == both
    assert len({both, digest([second, first]), digest([first, second, second]), first.digest()}) == 4
    simulations, names = buckets("tree")
    assert from_simulations(simulations, names).schedule_digest == digest([each.exchange for each in simulations])


def test_a_part_of_which_not_every_message_was_simulated_has_no_record() -> None:
    whole = simulate(exchanges.build("ring", 512, 1024), clusters.ideal(512))
    some = simulate_strategy("ring", 512, 1024, clusters.ideal(512))
    assert some.copies > 1
    with pytest.raises(ConfigError, match="stands for 512; simulate the whole"):
        from_simulations([whole, some], ["bucket 0", "bucket 1"])


def test_records_from_before_there_were_parts_are_read(tmp_path: Path) -> None:
    one = from_simulations(*buckets("ring"))
    write(one, tmp_path / "new.json")
    assert read(tmp_path / "new.json") == one
    content = one.model_dump(mode="json")
    del content["parts"]
    (tmp_path / "old.json").write_text(json.dumps(content))
    assert read(tmp_path / "old.json") == changed(one, parts=[])


@pytest.mark.parametrize(
    ("field", "value", "shown"),
    [
        ("messages", 23, "23 messages, 4,800 B"),
        ("messages", 1, "1 message, 4,800 B"),
        ("bytes", 4801, "24 messages, 4,801 B"),
        ("name", "bucket 7", "none"),
    ],
)
def test_a_part_with_other_counts_is_found(field: str, value: object, shown: str) -> None:
    place = clusters.ideal(4)
    steps = [simulate(exchanges.build("ring", 4, params), place) for params in (100, 200)]
    one = from_simulations(steps, ["bucket 0", "bucket 1"])
    first, second = (part.model_dump() for part in one.parts)
    other = changed(one, parts=[first, {**second, field: value}])
    lines = [line for line in diff(one, other) if line.name.startswith("bucket")]
    assert lines[:2] == [
        Line(name="bucket 0", first="24 messages, 2,400 B", second="24 messages, 2,400 B", verdict="equal"),
        Line(name="bucket 1", first="24 messages, 4,800 B", second=shown, verdict="DIFFERENT"),
    ]
    if field == "name":
        assert lines[2:] == [
            Line(name="bucket 7", first="none", second="24 messages, 4,800 B", verdict="DIFFERENT"),
        ]
    assert not agree(diff(one, other))


def test_parts_that_only_one_record_has_are_not_compared() -> None:
    one = from_simulations(*buckets("ring"))
    old = changed(one, parts=[])
    assert {"bucket 0", "bucket 1", "numbers"} < {line.name for line in diff(one, one)}
    for lines in (diff(one, old), diff(old, one)):
        assert agree(lines)
        assert not {"bucket 0", "bucket 1", "numbers"} & {line.name for line in lines}
