"""Tables and figures from records alone: everything here is made up, nothing is trained."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from matplotlib import image

from analysis.__main__ import main
from analysis.comparison import Pair, comparison_table, read_pairs
from analysis.figure import message_colours
from distsim import record
from distsim.record import Part, RunRecord, Spans, Totals

PARAMS, STEPS = 1000, 20


def made_up(strategy: str, origin: str, time_s: float, observable: bool = True) -> RunRecord:
    """Two ranks send each other the whole array once an exchange; a second phase of messages for the server's."""
    phases = (0, 1) if strategy == "parameter-server" else (0,)
    rows = [(phase, row) for phase in phases for row in (0, 1)]
    exchanges = 1 if origin == "simulated" else STEPS
    messages = len(rows) * exchanges
    spans = Spans(
        schedule=[phase for phase, _ in rows],
        row=[row for _, row in rows],
        step=[0] * len(rows),
        src=[row for _, row in rows],
        dst=[1 - row for _, row in rows],
        chunk=[0] * len(rows),
        bytes=[4 * PARAMS] * len(rows),
        start_s=[phase * time_s / 2 for phase, _ in rows],
        finish_s=[(phase + 1) * time_s / 2 for phase, _ in rows],
    )
    per_link = messages // 2
    totals = Totals(
        messages=messages,
        bytes=messages * 4 * PARAMS,
        message_sizes={4 * PARAMS: messages},
        links=[(0, 1, per_link, per_link * 4 * PARAMS), (1, 0, per_link, per_link * 4 * PARAMS)],
    )
    return RunRecord(
        origin="simulated" if origin == "simulated" else "measured",
        strategy=strategy,
        workers=2,
        ranks=2,
        params=PARAMS,
        dtype="float32",
        schedule_digest="0" * 64,
        exchanges=exchanges,
        totals=totals if observable else record.NOT_OBSERVABLE,
        exchange_time_s=[time_s] if origin == "simulated" else [time_s * 0.5] + [time_s] * (STEPS - 2) + [time_s * 9],
        losses=[] if origin == "simulated" else np.linspace(5.5, 2.25, STEPS).tolist(),
        spans=spans if observable else None,
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two pairs, one of them with a library that hides its messages, and a simulated record alone."""
    for strategy, simulated_s, measured_s, observable in (
        ("parameter-server", 9e-3, 10e-3, True),
        ("ring", 3e-3, 2e-3, False),
    ):
        record.write(made_up(strategy, "simulated", simulated_s), tmp_path / f"{strategy}.simulated.json")
        measured = made_up(strategy, "measured", measured_s, observable)
        record.write(measured, tmp_path / f"{strategy}.measured.json")
    record.write(made_up("all-to-all", "simulated", 1e-3), tmp_path / "all-to-all.simulated.json")
    return tmp_path


def cells(line: str) -> list[str]:
    """The cells of a line of a table; two blanks or more lie between them."""
    return [cell.strip() for cell in line.split("  ") if cell.strip()]


def test_pairs_are_read_by_name_and_single_records_left_out(folder: Path) -> None:
    pairs = read_pairs(folder)
    assert [pair.measured.strategy for pair in pairs] == ["parameter-server", "ring"]
    assert all(pair.simulated.origin == "simulated" and pair.measured.origin == "measured" for pair in pairs)


def test_the_table_multiplies_the_simulated_exchange_and_says_what_cannot_be_seen(folder: Path) -> None:
    head, *lines = comparison_table(read_pairs(folder)).splitlines()
    assert head == "2 workers, 1,000 parameters (float32), 20 steps"
    server, ring = (
        next(cells(line) for line in lines if line.startswith(name)) for name in ("parameter-server", "ring")
    )
    assert server == ["parameter-server", "80", "80", "320,000", "320,000", "9 ms", "10 ms", "-10%", "5.5000", "2.2500"]
    assert ring == [
        *("ring", "40", "not observable", "160,000", "not observable"),
        *("3 ms", "2 ms", "+50%", "5.5000", "2.2500"),
    ]


def test_the_error_is_that_of_the_simulated_time_against_the_measured_median() -> None:
    """The mean of the measured times is 1.375 times their median: it does not count."""
    pair = Pair(made_up("ring", "simulated", 4e-3), made_up("ring", "measured", 2e-3))
    assert pair.error == pytest.approx(1.0)


def test_the_figure_is_a_png_with_something_on_it(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(folder)]) == 0
    shown = capsys.readouterr()
    assert (shown.err, matplotlib.get_backend().lower()) == ("", "agg")
    assert "not observable" in shown.out
    assert shown.out.splitlines()[-1] == f"figure and records: {folder}"
    path = folder / "comparison.png"
    raw = path.read_bytes()
    assert raw[:8] == b"\x89PNG\r\n\x1a\n"
    assert struct.unpack(">II", raw[16:24]) == (12 * 120, int((3.2 + 2.6 * 2) * 120))
    pixels = image.imread(path)[:, :, :3]
    assert pixels.shape[2] == 3
    height = pixels.shape[0]
    for colour in ("#4c78a8", "#f58518", "#54a24b"):  # simulated and gradients, measured, parameters
        wanted = np.array([int(colour[place : place + 2], 16) for place in (1, 3, 5)]) / 255
        assert (np.abs(pixels - wanted).max(axis=2) < 0.02).sum() > 500, colour
    for part in np.array_split(np.arange(height), 3):  # every row of charts has ink
        assert 0.01 < (pixels[part].min(axis=2) < 0.5).mean() < 0.9


def step_of(buckets: int, phases: int) -> RunRecord:
    """A step of rank 0 sending to rank 1 a message for each phase of each bucket, and then the numbers."""
    names = [*(f"bucket {bucket}" for bucket in range(buckets)), "numbers"]
    counts = [*[phases] * buckets, 1]
    messages = sum(counts)
    one = made_up("ring", "simulated", 1.0)
    return one.model_copy(
        update={
            "parts": [
                Part(name=name, params=1, dtype="float32", schedule_digest="0", messages=count, bytes=count, time_s=1.0)
                for name, count in zip(names, counts, strict=True)
            ],
            "spans": Spans(
                schedule=list(range(messages)),
                **{name: [0] * messages for name in ("row", "step", "src", "chunk", "bytes")},
                dst=[1] * messages,
                start_s=[float(at) for at in range(messages)],
                finish_s=[at + 0.9 for at in range(messages)],
            ),
        }
    )


@pytest.mark.parametrize(
    ("buckets", "phases", "legend"),
    [
        (1, 1, ["gradients", "numbers"]),
        (1, 2, ["gradients", "parameters", "numbers"]),
        (3, 1, ["bucket 0", "bucket 1", "bucket 2", "numbers"]),
        (2, 2, ["bucket 0", "bucket 1", "lighter: parameters", "numbers"]),
        (40, 2, ["bucket 0", "bucket 39", "lighter: parameters", "numbers"]),
    ],
)
def test_every_schedule_of_every_bucket_has_a_colour_of_its_own(buckets: int, phases: int, legend: list[str]) -> None:
    one = step_of(buckets, phases)
    assert one.spans is not None
    colours, shown = message_colours(one, one.spans)
    assert list(shown) == legend
    assert len(set(colours)) == len(colours) == buckets * phases + 1
    assert colours[-1] == shown["numbers"]
    if buckets > 1:
        assert colours[0] == shown["bucket 0"]
        assert colours[phases * (buckets - 1)] == shown[f"bucket {buckets - 1}"]
    if buckets > 1 and phases > 1:
        assert all(
            sum(second) > sum(first) for first, second in zip(colours[:-1:2], colours[1:-1:2], strict=True)
        )  # lighter


def test_messages_are_coloured_whatever_their_order() -> None:
    one = step_of(2, 1)
    assert one.spans is not None
    shuffled = one.spans.model_copy(update={"schedule": [2, 0, 1]})
    colours, shown = message_colours(one, shuffled)
    assert colours == [shown["numbers"], shown["bucket 0"], shown["bucket 1"]]


def test_records_from_before_there_were_parts_have_two_colours() -> None:
    one = made_up("parameter-server", "simulated", 1.0)
    assert one.spans is not None and not one.parts
    colours, shown = message_colours(one, one.spans)
    assert list(shown) == ["gradients", "parameters"]
    assert colours == [shown["gradients"]] * 2 + [shown["parameters"]] * 2


def test_a_step_of_many_buckets_is_drawn(tmp_path: Path) -> None:
    """40 buckets, each with parameters, of which no message may be lost: 81 bars on rank 0's line, each seen."""
    one = step_of(40, 2)
    record.write(one, tmp_path / "ring.simulated.json")
    measured = {**made_up("ring", "measured", 1.0).model_dump(), "spans": one.spans, "parts": one.parts}
    record.write(RunRecord.model_validate(measured), tmp_path / "ring.measured.json")
    assert main([str(tmp_path)]) == 0
    pixels = image.imread(tmp_path / "comparison.png")[:, :, :3]
    seen = np.unique(np.rint(255 * pixels[pixels.shape[0] // 2 :]).astype(np.int64).reshape(-1, 3), axis=0)
    assert one.spans is not None
    colours, _ = message_colours(one, one.spans)
    far = [colour for colour in colours if np.abs(seen - 255 * np.array(colour)).max(axis=1).min() > 1]
    assert far == []


def damage(folder: Path, what: str) -> str:
    """Spoil the folder; return what the message must hold."""
    path = folder / "ring.measured.json"
    text = path.read_text()
    if what == "torn":
        path.write_text(text[: len(text) // 2])
        return "ring.measured.json:"
    if what == "empty":
        path.write_text("")
        return "ring.measured.json:1: not a run record"
    if what == "not text":
        path.write_bytes(b"\xff\xfe\x00")
        return "ring.measured.json: not a run record: it is not UTF-8 text"
    if what == "another format":
        path.write_text(json.dumps({**json.loads(text), "format": "distsim run record 99"}))
        return "ring.measured.json: not a run record: format"
    if what == "unknown key":
        path.write_text(json.dumps({**json.loads(text), "surprise": 1}))
        return "ring.measured.json: not a run record: surprise"
    if what == "a folder":
        path.unlink()
        path.mkdir()
        return "ring.measured.json: cannot read it: Is a directory"
    for file in folder.glob("*.measured.json"):
        file.unlink()
    return f"{folder}: no NAME.simulated.json with a NAME.measured.json beside it"


@pytest.mark.parametrize(
    "what", ("torn", "empty", "not text", "another format", "unknown key", "a folder", "nothing measured")
)
def test_bad_records_are_one_message_and_exit_code_2(
    folder: Path, what: str, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = damage(folder, what)
    assert main([str(folder)]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith("analysis: error: ")
    assert expected in shown.err
    assert shown.err.count("\n") == 1
    assert not (folder / "comparison.png").exists()


def test_a_folder_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path / "none")]) == 2
    assert capsys.readouterr().err.startswith(f"analysis: error: {tmp_path / 'none'}: no NAME.simulated.json")


def test_a_figure_that_cannot_be_written(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "comparison.png").mkdir()
    assert main([str(folder)]) == 2
    assert "comparison.png: cannot write it" in capsys.readouterr().err


def test_a_measured_record_without_losses_is_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    values = json.loads((folder / "ring.measured.json").read_text())
    (folder / "ring.measured.json").write_text(json.dumps({**values, "losses": []}))
    assert main([str(folder)]) == 2
    assert "ring.measured.json" in capsys.readouterr().err
