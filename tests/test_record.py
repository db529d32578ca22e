"""Run records and their comparison: round trips, files that are none, whole files or none, and verdicts."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distsim import cluster as clusters
from distsim import exchanges
from distsim.diff import Line, agree, diff
from distsim.errors import ConfigError
from distsim.record import NOT_OBSERVABLE, RunRecord, Totals, from_simulation, read, write
from distsim.step import simulate


def simulated(strategy: str = "ring", n: int = 3, params: int = 7) -> RunRecord:
    return from_simulation(simulate(exchanges.build(strategy, n, params), clusters.ideal(n + 1)))


def changed(one: RunRecord, **fields: Any) -> RunRecord:
    """Return a record with some fields replaced, checked as if it came from a file."""
    return RunRecord.model_validate({**one.model_dump(), **fields})


@pytest.mark.parametrize("strategy", exchanges.STRATEGIES)
@pytest.mark.parametrize("n", [1, 4])
def test_round_trip(strategy: str, n: int, tmp_path: Path) -> None:
    one = simulated(strategy, n, 2 * n + 1)
    write(one, tmp_path / "new" / "folder" / "run.json")
    assert read(tmp_path / "new" / "folder" / "run.json") == one
    assert os.listdir(tmp_path / "new" / "folder") == ["run.json"]


def test_a_record_says_what_was_simulated() -> None:
    exchange = exchanges.build("parameter-server", 2, 5)
    result = simulate(exchange, clusters.ideal(3), "float64")
    one = from_simulation(result)
    assert (one.origin, one.strategy, one.workers, one.ranks) == ("simulated", "parameter-server", 2, 3)
    assert (one.params, one.dtype, one.exchanges, one.time_s) == (5, "float64", 1, result.time_s)
    assert one.schedule_digest == exchange.digest()
    assert isinstance(one.totals, Totals)
    assert (one.totals.messages, one.totals.bytes, one.totals.message_sizes) == (4, 160, {40: 4})
    assert one.totals.links == [(0, 2, 1, 40), (1, 2, 1, 40), (2, 0, 1, 40), (2, 1, 1, 40)]
    assert one.spans is not None
    assert one.spans.schedule == [0, 0, 1, 1]
    assert list(zip(one.spans.src, one.spans.dst, strict=True)) == [(0, 2), (1, 2), (2, 0), (2, 1)]
    assert one.spans.bytes == [40] * 4
    assert one.spans.finish_s == [
        second for part in result.lowered.parts for second in result.timeline.finish_s[part.sends].tolist()
    ]
    assert max(one.spans.finish_s) == one.time_s


def test_losses_of_a_diverged_training_survive(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    write(changed(simulated(), losses=[1.5, math.inf, math.nan]), path)
    json.loads(path.read_text(), parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))
    losses = read(path).losses
    assert losses[:2] == [1.5, math.inf]
    assert math.isnan(losses[2])


def test_a_title_in_any_language_survives(tmp_path: Path) -> None:
    one = changed(simulated(), configuration={"cluster_title": "Größe 2 µs 集群"})
    write(one, tmp_path / "run.json")
    assert read(tmp_path / "run.json") == one


@given(st.integers(1, 5), st.lists(st.tuples(*[st.integers(0, 9)] * 4), max_size=4), st.integers(0, 50))
def test_totals_of_equal_exchanges_divide(count: int, links: list[tuple[int, int, int, int]], messages: int) -> None:
    one = Totals(messages=messages, bytes=8 * messages, message_sizes={8: messages}, links=links)
    many = Totals(
        messages=messages * count,
        bytes=8 * messages * count,
        message_sizes={8: messages * count},
        links=[(src, dst, number * count, size * count) for src, dst, number, size in links],
    )
    assert many.per_exchange(count) == one
    uneven = many.model_copy(update={"messages": many.messages + 1})
    assert (uneven.per_exchange(count) is None) == (count > 1)


def text_of(one: RunRecord) -> str:
    return one.model_dump_json(indent=1)


def test_a_torn_file_names_file_and_line(tmp_path: Path) -> None:
    path = tmp_path / "torn.json"
    text = text_of(simulated())
    for size in (0, 1, 40, len(text) // 2, len(text) - 2):
        path.write_text(text[:size], encoding="utf-8")
        with pytest.raises(ConfigError) as caught:
            read(path)
        line = text[:size].count("\n") + 1
        assert str(caught.value).startswith((f"{path}:{line}: not a run record: ", f"{path}:{line - 1}: "))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{\n "a": 1,\n oops}', r"bad\.json:3: not a run record: Expecting property name"),
        (b"", r"bad\.json:1: not a run record: Expecting value"),
        (b"[1, 2]", r"bad\.json: not a run record: the file: Input should be"),
        (b"null", r"bad\.json: not a run record: the file: "),
        (b'{"format": "another"}', r"bad\.json: not a run record: format: Input should be 'distsim run record 1'"),
        (b"{}", r"bad\.json: not a run record: origin: Field required"),
        (b"\xff\xfe{}", r"bad\.json: not a run record: it is not UTF-8 text"),
        (b"\xef\xbb\xbf{}", r"bad\.json:1: not a run record: Unexpected UTF-8 BOM"),
        (b"[" * 100_000, r"bad\.json:1: not a run record: nested too deeply"),
        (b'{"workers": ' + b"9" * 5000 + b"}", r"bad\.json: not a run record: Exceeds the limit"),
        (b"NaN", r"bad\.json: not a run record"),
    ],
)
def test_other_files_are_refused(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.json"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        read(path)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"origin": "guessed"}, "origin: Input should be 'simulated' or 'measured'"),
        ({"workers": 0}, "workers: Input should be greater than or equal to 1"),
        ({"exchanges": 0}, "exchanges: Input should be greater than"),
        ({"exchange_time_s": []}, "exchange_time_s: List should have at least 1 item"),
        ({"exchange_time_s": [-1.0]}, "exchange_time_s.0: Input should be greater than or equal to 0"),
        ({"totals": "hidden"}, "totals"),
        ({"surprise": 1}, "surprise: Extra inputs are not permitted"),
        ({"params": "many"}, "params: Input should be a valid integer"),
        ({"parts": [{"name": "bucket 0"}]}, "parts.0.params: Field required"),
        ({"parts": 2 * simulated().model_dump()["parts"]}, "the file: .*two parts have the same name"),
    ],
)
def test_wrong_fields_are_named(fields: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.json"
    path.write_text(json.dumps({**simulated().model_dump(mode="json"), **fields}))
    with pytest.raises(ConfigError, match=message) as caught:
        read(path)
    assert str(caught.value).startswith(f"{path}: not a run record: ")
    assert "\n" not in str(caught.value)


def test_columns_of_messages_must_be_equally_long(tmp_path: Path) -> None:
    path = tmp_path / "bad.json"
    content = simulated().model_dump(mode="json")
    content["spans"]["row"].pop()
    path.write_text(json.dumps(content))
    with pytest.raises(ConfigError, match=r"spans: .*the columns are not equally long"):
        read(path)


def test_files_that_cannot_be_opened(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.json: cannot read it: No such file"):
        read(tmp_path / "none.json")
    with pytest.raises(ConfigError, match=r"cannot read it: Is a directory"):
        read(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"file/run\.json: cannot write it: (Not a directory|File exists)"):
        write(simulated(), tmp_path / "file" / "run.json")
    (tmp_path / "folder").mkdir()
    with pytest.raises(ConfigError, match=r"folder: cannot write it: Is a directory"):
        write(simulated(), tmp_path / "folder")
    assert sorted(os.listdir(tmp_path)) == ["file", "folder"]


@pytest.mark.parametrize("moment", ["fsync", "replace"])
@pytest.mark.parametrize("failure", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_failed_write_leaves_the_old_file(
    moment: str, failure: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise failure

    path = tmp_path / "run.json"
    old = simulated(params=5)
    write(old, path)
    with monkeypatch.context() as context:
        context.setattr(os, "fsync", fail) if moment == "fsync" else context.setattr(Path, "replace", fail)
        with pytest.raises((ConfigError, KeyboardInterrupt)):
            write(simulated(), path)
    assert os.listdir(tmp_path) == ["run.json"]
    assert read(path) == old


def verdicts(lines: list[Line]) -> dict[str, str]:
    return {line.name: line.verdict for line in lines}


def measured(times: int = 1, **fields: Any) -> RunRecord:
    """A record such as a run of several equal steps leaves."""
    one = simulated()
    assert isinstance(one.totals, Totals)
    totals = Totals(
        messages=one.totals.messages * times,
        bytes=one.totals.bytes * times,
        message_sizes={size: count * times for size, count in one.totals.message_sizes.items()},
        links=[(src, dst, count * times, size * times) for src, dst, count, size in one.totals.links],
    )
    given = {"origin": "measured", "exchanges": times, "totals": totals.model_dump(), **fields}
    return changed(one, **given)


def test_equal_counts_agree_whatever_the_times() -> None:
    one = simulated()
    lines = diff(one, measured(10, exchange_time_s=[1.0, 1.5 * one.time_s, 0.0]))
    assert agree(lines)
    assert verdicts(lines) == {
        "schedule digest": "equal",
        "messages": "equal",
        "bytes": "equal",
        "message sizes": "equal",
        "links": "equal",
        "bucket 0": "equal",
        "message by message": "equal",
        "exchange time": "-33.3%",
    }
    assert next(line for line in lines if line.name == "messages") == Line(
        name="messages", first="12", second="12", verdict="equal"
    )


@pytest.mark.parametrize(
    ("field", "value", "names"),
    [
        ("messages", 13, ["messages"]),
        ("bytes", 1, ["bytes"]),
        ("message_sizes", {"12": 12}, ["message sizes"]),
        ("links", [], ["links"]),
    ],
)
def test_each_different_count_is_found(field: str, value: object, names: list[str]) -> None:
    one = measured()
    assert isinstance(one.totals, Totals)
    lines = diff(simulated(), changed(one, totals={**one.totals.model_dump(), field: value}))
    assert [name for name, verdict in verdicts(lines).items() if verdict == "DIFFERENT"] == names
    assert not agree(lines)


def test_a_different_message_or_digest_is_found() -> None:
    one = measured()
    assert one.spans is not None
    spans = {**one.spans.model_dump(), "dst": [*one.spans.dst[:-1], 1]}
    assert verdicts(diff(simulated(), changed(one, spans=spans)))["message by message"] == "DIFFERENT"
    short = {name: column[:-1] for name, column in one.spans.model_dump().items()}
    lines = diff(simulated(), changed(one, spans=short))
    assert next(line for line in lines if line.name == "message by message") == Line(
        name="message by message", first="11 of 12", second="11 of 11", verdict="DIFFERENT"
    )
    assert verdicts(diff(simulated(), measured(schedule_digest="0" * 64)))["schedule digest"] == "DIFFERENT"


def test_uneven_exchanges_are_different_from_any() -> None:
    uneven = measured(2, exchanges=5)
    for lines in (diff(simulated(), uneven), diff(uneven, simulated())):
        assert not agree(lines)
        assert verdicts(lines)["messages"] == "DIFFERENT"


def test_what_a_library_hides_is_not_observable() -> None:
    hidden = measured(totals=NOT_OBSERVABLE, spans=None)
    for lines in (diff(simulated(), hidden), diff(hidden, simulated())):
        assert agree(lines)
        assert {verdicts(lines)[name] for name in ("messages", "bytes", "message sizes", "links")} == {NOT_OBSERVABLE}
        assert "message by message" not in verdicts(lines)
    assert next(line for line in diff(simulated(), hidden) if line.name == "bytes").second == NOT_OBSERVABLE


@pytest.mark.parametrize(
    ("field", "value"), [("strategy", "all-to-all"), ("workers", 4), ("params", 8), ("dtype", "float64")]
)
def test_records_of_different_exchanges_cannot_be_compared(field: str, value: object) -> None:
    with pytest.raises(
        ConfigError, match=f"records of different exchanges: {field} is .* in one, {value} in the other"
    ):
        diff(simulated(), changed(simulated(), **{field: value}))
