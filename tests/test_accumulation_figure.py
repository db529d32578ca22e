"""The figure of accumulation: what is read, what is drawn where, what is marked, and what is refused."""

from __future__ import annotations

import json
import math
import tomllib
from collections.abc import Callable
from functools import partial
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import accumulation_reports as made
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import StepPatch

from analysis import accumulation
from analysis.layer_axis import LABELS, common, labels, position
from trainers.accumulation import report as written

ROOT = Path(__file__).resolve().parent.parent
Drawn = Callable[..., Figure]


@pytest.fixture
def drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Drawn:
    """Draws reports by the command, from files, and returns the figure."""
    monkeypatch.chdir(tmp_path)
    figures: list[Figure] = []
    save = Figure.savefig

    def keep(figure: Figure, *where: Any, **how: Any) -> None:
        figures.append(figure)
        save(figure, *where, **how)

    monkeypatch.setattr(Figure, "savefig", keep)

    def draw(*reports: dict[str, Any]) -> Figure:
        names = [f"{place}.json" for place in range(len(reports))]
        for name, report in zip(names, reports, strict=True):
            Path(name).write_text(json.dumps(report))
        assert accumulation.main([*names, "--out", "figure.png"]) == 0
        assert Path("figure.png").read_bytes().startswith(b"\x89PNG")
        return figures[-1]

    return draw


def lines(axes: Axes) -> dict[str, Line2D]:
    """Return the pairs' lines by their labels."""
    return {str(line.get_label()): line for line in axes.get_lines() if "×" in str(line.get_label())}


def heights(line: Line2D) -> list[float]:
    """Return where a line's points are."""
    return [float(value) for value in np.asarray(line.get_ydata())]


def ticks(axes: Axes) -> dict[str, float]:
    """Return the places of the labels along the vertical axis."""
    return {
        label.get_text(): float(place) for label, place in zip(axes.get_yticklabels(), axes.get_yticks(), strict=True)
    }


def tolerances(axes: Axes) -> list[float]:
    """Return the upper edge of the grey area at each layer."""
    (area,) = [patch for patch in axes.patches if isinstance(patch, StepPatch)]
    return [float(value) for value in area.get_data()[0]]


def marks(axes: Axes) -> list[float]:
    """Return where modules are marked as to blame."""
    (line,) = [line for line in axes.get_lines() if line.get_marker() == "|"]
    return [float(place) for place in np.asarray(line.get_xdata())]


def test_a_layer_is_drawn_at_its_parameters_common_relative_difference(drawn: Drawn) -> None:
    report = made.report(["0.weight", "0.bias", "2.weight"], formats=["float64"])
    rows = report["pairs"][0]["gradients"]
    for row, numbers in zip(rows, [(3.0, 1e-7, 1e-12), (4.0, 0.0, 0.0), (2.0, 1e-3, 4e-5)], strict=True):
        row |= dict(zip(("norm", "difference", "tolerance"), numbers, strict=True))
    (axes,) = drawn(report).axes
    found = lines(axes)
    assert list(found) == ["1 × 32", "2 × 16", "4 × 8", "5 × 7, last 2", "8 × 4", "16 × 2", "32 × 1"]
    assert heights(found["1 × 32"]) == pytest.approx([1e-7 / 5, 5e-4])
    assert heights(found["32 × 1"]) == [ticks(axes)["exactly 0"]] * 2
    assert axes.get_yscale() == "log"
    assert tolerances(axes) == pytest.approx([1e-12 / 5, 2e-5])
    assert axes.get_xlabel() == "2 layers (3 tensors) in model order"


def test_zero_and_infinity_have_places_of_their_own(drawn: Drawn) -> None:
    report = made.report(["0.weight", "2.weight"], formats=["float64"])
    for pair in report["pairs"]:
        pair["gradients"][1]["norm"] = 0.0
        if pair["micro_batch"] == 2:
            pair["gradients"][1]["difference"] = 0.0
    (axes,) = drawn(report).axes
    places, found, (bottom, top) = ticks(axes), lines(axes), axes.get_ylim()
    assert heights(found["1 × 32"])[1] == places["∞"] < top
    assert heights(found["2 × 16"])[1] == places["exactly 0"] > bottom
    finite = [value for line in found.values() for value in heights(line)[:1] if value != places["exactly 0"]]
    assert places["exactly 0"] < min(finite) and max(finite) < places["∞"]
    assert "∞" not in ticks(drawn(made.tiny()).axes[0])


def test_reports_are_columns_formats_rows_and_a_row_has_one_scale(drawn: Drawn) -> None:
    figure = drawn(made.batch_norm(), made.batch_norm("group"), made.tiny(formats=["float64"]))
    grid = np.array(figure.axes).reshape(2, 3)
    for row in grid:
        assert len({axes.get_ylim() for axes in row}) == 1
    assert grid[0, 0].get_ylim() != grid[1, 0].get_ylim()
    titles = [[str(axes.get_title(loc="left")) for axes in row] for row in grid]
    assert titles[0][0].startswith("not equivalent: resnet152\nclasses=1000, size=64, batch of 32")
    assert "to blame: 155 BatchNorm2d" in titles[0][0]
    assert titles[0][1].startswith("equivalent: resnet152") and "batch norm: group" in titles[0][1]
    assert [title.splitlines()[-1] for title in titles[1][1:]] == [
        "float32: 7 of 7 pairs equivalent",
        "float32: not run",
    ]
    assert "float64: 1 of 7 pairs equivalent" in titles[0][0] and "float64: 1 of 1 pairs equivalent" in titles[0][2]
    other = np.array(drawn(made.batch_norm("group"), made.batch_norm()).axes).reshape(2, 2)
    for axes, swapped in zip(grid[:, :2].flat, other[:, ::-1].flat, strict=True):
        assert heights(lines(swapped)["2 × 16"]) == heights(lines(axes)["2 × 16"])
    assert {line.get_linestyle() for line in lines(grid[1, 1]).values()} == {"-", ":"}
    assert lines(grid[1, 1])["1 × 32"].get_linestyle() == ":"


def test_a_pair_with_an_error_has_no_line_but_its_words(drawn: Drawn) -> None:
    axes = drawn(made.batch_norm(failing=(1, "ValueError: costs $\\bad$\n or 6")), made.batch_norm("group")).axes[0]
    assert np.isnan(heights(lines(axes)["1 × 32"])).all()
    assert np.isfinite(tolerances(axes)).all() and len(tolerances(axes)) == 311
    assert "1 × 32: ValueError: costs $\\bad$ or 6" in axes.get_title(loc="left")
    nothing = made.batch_norm()
    for pair in nothing["pairs"]:
        pair |= {"gradients": [], "error": "RuntimeError: boom", "equivalent": False}
    axes = drawn(nothing).axes[1]
    assert axes.get_xlabel() == "no gradients" and marks(axes) == []
    assert "float32: 0 of 7 pairs equivalent\n1 × 32: RuntimeError: boom\nand 6 more" in axes.get_title(loc="left")


def test_numbers_that_are_none_leave_a_gap(drawn: Drawn) -> None:
    report = made.report(["0.weight", "1.weight", "2.weight"], formats=["float64"])
    report["pairs"][0]["gradients"][1]["difference"] = None
    (axes,) = drawn(report).axes
    assert [math.isnan(value) for value in heights(lines(axes)["1 × 32"])] == [False, True, False]


def test_modules_to_blame_are_marked_where_they_stand(drawn: Drawn) -> None:
    report = made.batch_norm()
    layers = list(dict.fromkeys(name.rpartition(".")[0] for name in made.resnet()))
    assert marks(drawn(report).axes[0]) == [layers.index(each["module"]) for each in report["culprits"]]
    figure = drawn(made.dropout())
    assert "to blame: 10 Dropout, the loss" in figure.axes[0].get_title(loc="left")
    assert figure.axes[1].get_xlabel() == "57 layers (112 tensors) of module transformer, in model order"
    assert marks(figure.axes[0]) == [56.5, *(7.5 + 6 * block for block in range(9))]
    (loop,) = drawn(made.tiny(formats=["float64"], culprits=[made.culprit("", "step", "loop")])).axes
    assert "to blame: the loop" in loop.get_title(loc="left") and marks(loop) == []


def test_legend_names_sizes_in_order_of_lightness(drawn: Drawn) -> None:
    sizes = [size for size in range(1, 5041) if 5040 % size == 0]
    report = made.report(["weight"], pairs=[(size, 5040 // size, size) for size in sizes], formats=["float64"])
    figure = drawn(report)
    (legend,) = figure.legends
    named = [text.get_text() for text in legend.get_texts()]
    assert named[0] == "micro-batch × steps" and named[-1] == "within tolerance"
    assert len(named) == 14 and named[1] == "1 × 5040" and named[-2] == "5040 × 1"
    found = lines(figure.axes[0])
    assert len(found) == 60
    colours = [to_hex(found[f"{size} × {5040 // size}"].get_color()) for size in sizes]
    lightness = [
        0.2126 * int(each[1:3], 16) + 0.7152 * int(each[3:5], 16) + 0.0722 * int(each[5:], 16) for each in colours
    ]
    assert lightness == sorted(lightness) and len(set(colours)) == 60


def test_nothing_is_drawn_over_something_else(drawn: Drawn) -> None:
    for reports in ([made.batch_norm(), made.batch_norm("group")], [made.dropout()], [made.tiny()]):
        figure = drawn(*reports)
        boxes = [axes.get_tightbbox() for axes in figure.axes] + [figure.legends[0].get_tightbbox()]
        for place, one in enumerate(boxes):
            assert (
                one is not None
                and one.x0 >= 0
                and one.y0 >= 0
                and one.x1 <= figure.bbox.x1
                and one.y1 <= figure.bbox.y1
            )
            assert not any(other is not None and one.overlaps(other) for other in boxes[:place])
        for axes in figure.axes[-len(reports) :]:
            texts = [label.get_text() for label in axes.get_xticklabels()]
            assert 2 <= len(texts) <= LABELS and all(texts)


def test_stages_are_named_within_the_room_there_is() -> None:
    layers = list(dict.fromkeys(name.rpartition(".")[0] for name in made.resnet()))
    assert (len(layers), len(made.resnet())) == (311, 467)
    found = labels(layers)
    assert {"layer1", "layer2", "layer3.0", "layer4", "fc"} <= set(found.values())
    assert all(layers[place].startswith(name) for place, name in found.items())
    assert all(not layers[place - 1].startswith(f"{name}.") for place, name in found.items() if place)
    gpt = list(dict.fromkeys(name.rpartition(".")[0] for name in made.transformer()))
    assert common(gpt) == "transformer"
    assert list(labels(gpt).values()) == [*(f"h.{block}" for block in range(9)), "ln_f"]
    assert labels(["a.0", "a.2"]) == {0: "0", 1: "2"}
    assert labels([""]) == {0: "(model)"}
    assert labels(["0.self_attention.q_projection.lora_A.default"]) == {0: "default"}
    assert labels(["self_attention.q_projection_of_all_heads", "b"])[0] == "self_attentio...of_all_heads"


names = st.lists(st.sampled_from("ab012"), min_size=1, max_size=4).map(".".join)


@given(st.lists(names, min_size=1, max_size=60, unique=True), names)
def test_any_names_have_labels_and_positions(layers: list[str], module: str) -> None:
    layers.sort()
    found = labels(layers)
    places = list(found)
    assert places and places == sorted(places) and places[0] >= 0 and places[-1] < len(layers)
    assert len(found) <= LABELS or len(layers) <= LABELS
    place = position(module, layers)
    assert -0.5 <= place <= len(layers) - 0.5
    own = [layer for layer in layers if layer == module or layer.startswith(f"{module}.")]
    assert layers[int(place)] == own[0] if own else place % 1 == 0.5


@pytest.mark.parametrize(
    ("module", "expected"),
    [
        ("0", 0), ("1", 0.5), ("3", 2.5), ("4", 3), ("4.drop", 3.5), ("4.1", 3.5), ("4.deep.er", 3.5),
        ("9", 3.5), ("drop", 3.5), ("", 3.5), ("2.0", 1), ("2.1", 1.5), ("2", 1),
    ],
)  # fmt: skip
def test_modules_without_parameters_stand_between_layers(module: str, expected: float) -> None:
    assert position(module, ["0", "2.0", "2.2", "4.fc"]) == expected


def test_the_model_itself_stands_at_its_own_parameters() -> None:
    assert position("", ["", "a"]) == 0
    assert position("5.1", ["5", "6"]) == 0.5


def test_what_is_no_report_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    report = made.tiny()
    (first, *_) = report["pairs"]
    wrong: dict[str, Any] = {
        "text.json": "report\n",
        "deep.json": "[" * 100_000,
        "list.json": "[1]",
        "none.json": "null",
        "empty.json": json.dumps({**report, "pairs": []}),
        "formats.json": json.dumps({**report, "formats": []}),
        "lacking.json": json.dumps({key: value for key, value in report.items() if key != "effective_batch"}),
        "words.json": json.dumps({**report, "pairs": [{**first, "gradients": [{"name": "a", "norm": "one"}]}]}),
        "large.json": json.dumps({**report, "parameters": 1e400}),
        "option.json": json.dumps({**report, "options": 3}),
    }
    for name, text in wrong.items():
        Path(name).write_text(text)
        assert accumulation.main([name, "--out", "figure.png"]) == 2
        said = capsys.readouterr().err
        assert said.startswith(f"analysis.accumulation: error: {name}:") and "\n" not in said.rstrip()
        assert ("not JSON" if name in ("text.json", "deep.json") else "not a report") in said
    assert accumulation.main(["away.json", "--out", "figure.png"]) == 2
    assert "away.json: cannot read it: No such file" in capsys.readouterr().err
    Path("good.json").write_text(json.dumps(report))
    for out in ("good.json/figure.png", "away/figure.png", "figure.word"):
        assert accumulation.main(["good.json", "--out", out]) == 2
        assert f"{out}: cannot write it" in capsys.readouterr().err
    assert not [each for each in Path().iterdir() if each.name.startswith("figure")]
    assert accumulation.main(["good.json", "--out", "figure"]) == 0
    assert Path("figure").read_bytes().startswith(b"\x89PNG")


def test_it_reads_what_the_trainers_write(drawn: Drawn) -> None:
    one, endless = written.Difference(2.0, 1e-3, 1e-6), written.Difference(2.0, math.inf, 1.0)
    pair = partial(written.Tested, format="float32")
    report = written.Report(
        workload="mlp", options={"width": 8}, model="MLP", parameters=9, data="noise", effective_batch=3, ranks=2,
        loop="own", normalise="micro-batch", batch_norm="sync", formats=("float32",), coarsest="float64", weights=None,
        pairs=(
            pair(micro_batch=1, steps=3, last=1, gradients={}, error="ValueError: no"),
            pair(micro_batch=2, steps=2, last=1, gradients={"a.weight": one, "b": written.Difference(1.0, 0.0, 1.0)}),
            pair(micro_batch=3, steps=1, last=3, gradients={"a.weight": endless}),
        ),
        culprits=(
            written.Cause(module="a", type="Linear", where="backward", reason="", remedy=None, found=one),
            written.Cause(module="", type="step", where="loop", reason="", remedy=None),
        ),
    )  # fmt: skip
    (axes,) = drawn(report.to_json()).axes
    found = lines(axes)
    assert heights(found["2 × 2, last 1"]) == [pytest.approx(5e-4), ticks(axes)["exactly 0"]]
    assert np.isnan(heights(found["1 × 3"])).all() and np.isnan(heights(found["3 × 1"])).all()
    assert marks(axes) == [0]
    assert str(axes.get_title(loc="left")).splitlines() == [
        "not equivalent: mlp",
        "width=8, batch norm: sync, batch of 3, 2 ranks, own loop, normalised by",
        "micro-batch, 9 parameters",
        "to blame: 1 Linear, the loop",
        "",
        "float32: 0 of 3 pairs equivalent",
        "1 × 3: ValueError: no",
    ]


def test_the_trainers_find_it_by_its_entry_point(tmp_path: Path) -> None:
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["entry-points"]["distsim.figures"]
    draw = EntryPoint("accumulation", declared["accumulation"], "distsim.figures").load()
    assert draw is accumulation.draw
    draw([made.tiny()], tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 10_000
