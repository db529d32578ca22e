"""The Python interface: it says what the command line says, its columns fit each other, and its documents are true."""

from __future__ import annotations

import ast
import contextlib
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

import distsim
from distsim import api, critical, exchanges
from distsim.cli import main
from distsim.cluster import load
from distsim.errors import ConfigError

ROOT = Path(__file__).resolve().parent.parent
PYTHON = (ROOT / "docs" / "python.md").read_text("utf-8")
Capture = pytest.CaptureFixture[str]


def command(capsys: Capture, text: str) -> Any:
    """Run a command with --json that must succeed; return the value."""
    assert main([*text.split(), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def as_json(value: Any) -> Any:
    """Return what is left of a value when it goes through JSON."""
    return json.loads(json.dumps(value))


@pytest.mark.parametrize("strategy", ["ring", "tree:radix=4", "auto", "parameter-server"])
@pytest.mark.parametrize("cluster", [None, "h100_2x8_ndr"])
def test_simulate_is_the_command(strategy: str, cluster: str | None, capsys: Capture) -> None:
    where = f"--cluster {cluster}" if cluster else ""
    values = command(capsys, f"exchange {strategy} --ranks 6 --params 262144 {where} --dtype float16")
    for array in ({"params": 2**18}, {"size": "512 KiB"}, {"size": 2**19}, {"size": 2**19 + 1}):
        result = distsim.simulate(strategy, ranks=6, cluster=cluster, dtype="float16", **array)
        assert as_json({**result.values(), **critical.as_values(result.simulation)}) == values
    given = api.find_cluster(cluster, 7)
    assert distsim.simulate(strategy, ranks=6, cluster=given, params=2**18, dtype="float16").time_s == values["time_s"]


def test_a_result_shows_itself_as_the_command_does(capsys: Capture) -> None:
    result = distsim.simulate("ring", ranks=8, size="1 GiB", cluster="dgx_h100")
    flags = "--ranks 8 --cluster dgx_h100 --params 268435456"
    assert main(["exchange", "ring", *flags.split()]) == 0
    assert f"{result!r}\n" == capsys.readouterr().out

    class Cells(HTMLParser):
        def __init__(self) -> None:
            super().__init__()
            self.tags: list[str] = []
            self.text = ""

        def handle_starttag(self, tag: str, attrs: Any) -> None:
            self.tags.append(tag)

        def handle_data(self, data: str) -> None:
            self.text += f" {data}"

    cells = Cells()
    cells.feed(result._repr_html_())
    assert cells.tags.count("tr") == 1 + len(result.summary())
    assert " ".join(cells.text.split()) == " ".join(re.sub("-{4,}", "", repr(result)).split())


@pytest.mark.parametrize("strategy", ["ring", "parameter-server", "double-tree"])
def test_transfers_are_all_messages(strategy: str) -> None:
    result = distsim.simulate(strategy, ranks=5, params=1003)
    transfers = result.transfers()
    assert {len(column) for column in transfers.values()} == {result.simulation.traffic.messages}
    assert {"step", "src", "dst", "chunk", "bytes", "start_s", "finish_s"} <= transfers.keys()
    assert sum(transfers["bytes"]) == result.simulation.traffic.bytes
    assert 0 < max(transfers["finish_s"]) <= result.time_s
    assert all(start < end for start, end in zip(transfers["start_s"], transfers["finish_s"], strict=True))


def test_links_of_a_ring_carry_its_closed_form() -> None:
    """On one switch each of 8 ranks sends and receives 2 * 7/8 of the array, in 14 messages."""
    result = distsim.simulate("ring", ranks=8, params=8000, cluster="dgx_h100")
    links = result.links()
    assert links["bytes"] == [2 * 7 * 4000] * 16
    assert links["messages"] == [14] * 16
    assert len(set(links["link"])) == 16
    assert max(links["busy_s"]) == pytest.approx(result.simulation.bandwidth_bound_s, rel=1e-12)
    for busy_s, Bps, share in zip(links["busy_s"], links["bandwidth_Bps"], links["utilization"], strict=True):
        assert busy_s >= 2 * 7 * 4000 / Bps * (1 - 1e-12)
        assert share == pytest.approx(busy_s / result.time_s, rel=1e-12)


def test_links_are_those_of_the_routes() -> None:
    result = distsim.simulate("all-to-all", ranks=16, params=10, cluster="h100_2x8_ndr")
    cluster, counts = load("h100_2x8_ndr"), dict[str, int]()
    for src in range(16):
        for dst in range(16):
            if src != dst:
                for link in cluster.routes([src], [dst])[1].tolist():
                    counts[cluster.link_name(link)] = counts.get(cluster.link_name(link), 0) + 1
    links = result.links()
    assert dict(zip(links["link"], links["messages"], strict=True)) == counts
    assert links["bytes"] == [40 * count for count in links["messages"]]
    nothing = distsim.simulate("ring", ranks=1, params=10)
    assert {len(column) for column in (*nothing.links().values(), *nothing.transfers().values())} == {0}


def test_compare_is_the_command(capsys: Capture) -> None:
    columns = distsim.compare(ranks=8, size="4 kB", cluster="dgx_h100")
    values = command(capsys, "compare --ranks 8 --params 1000 --cluster dgx_h100")
    assert columns["strategy"] == [value["strategy"] for value in values]
    assert set(columns["strategy"]) == exchanges.STRATEGIES.keys()
    for name, column in columns.items():
        assert column == [value.get(name) for value in values]
    assert sum(error is not None for error in columns["error"]) == 1
    two = distsim.compare(["ring", "ring:channels=2"], ranks=4, params=8)
    assert two["strategy"] == ["ring", "ring:channels=2"]


def test_sweep_is_the_command(tmp_path: Path) -> None:
    out = tmp_path / "table.csv"
    flags = "--clusters dgx_h100 --strategies ring,auto --ranks 2,9 --sizes 8B,1kB --sharing fair"
    assert main([*f"sweep {flags} --jobs 1 --out".split(), str(out)]) == 0
    written = out.read_text()
    columns = distsim.sweep(
        clusters="dgx_h100", strategies=["ring", "auto"], ranks=[2, 9], sizes="8B,1kB", sharing="fair", jobs=1
    )
    assert list(columns) == written.splitlines()[0].split(",")
    assert {len(column) for column in columns.values()} == {8}
    again = tmp_path / "again.csv"
    distsim.sweep(
        clusters="dgx_h100", strategies="ring,auto", ranks=[2, 9], sizes=[8, 1000], sharing="fair", out=again, jobs=2
    )
    assert again.read_text() == written
    assert distsim.sweep(strategies="ring", ranks=3, sizes="8B", jobs=1)["time_s"] == [
        distsim.simulate("ring", ranks=3, size=8).time_s
    ]


def test_sharing_takes_the_place_of_the_clusters() -> None:
    """Two messages at once into one link: both end late, or one after the other."""
    ends = {}
    for sharing in ("fair", "fifo"):
        result = distsim.simulate("parameter-server", ranks=2, params=10**6, sharing=sharing)
        assert result.values()["sharing"] == sharing
        transfers = result.transfers()
        ends[sharing] = [
            end for end, part in zip(transfers["finish_s"], transfers["schedule"], strict=True) if part == 0
        ]
    assert ends["fair"][0] == pytest.approx(ends["fair"][1], rel=1e-9)
    assert sorted(ends["fifo"])[1] - sorted(ends["fifo"])[0] == pytest.approx(4e6 / 12.5e9, rel=1e-6)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"strategy": "rign", "params": 1}, "unknown strategy 'rign'; did you mean 'ring'?"),
        ({}, 'expected either size, such as "1 GiB", or params'),
        ({"params": 1, "size": "4 B"}, 'expected either size, such as "1 GiB", or params'),
        ({"size": "1 GB/s"}, "'1 GB/s' has the unknown unit"),
        ({"params": 1, "dtype": "float31"}, "unknown dtype 'float31'"),
        ({"params": 1, "cluster": "dgx_h10"}, "unknown cluster 'dgx_h10'"),
        ({"params": 1, "collective": "gather"}, "unknown collective 'gather'"),
        ({"params": 1, "sharing": "fare"}, "unknown sharing 'fare'; did you mean 'fair'?"),
        ({"params": 1, "strategy": "auto", "ranks": 9, "cluster": "dgx_h100"}, "dgx_h100 has 8 devices, but"),
        ({"params": 1, "ranks": 0}, "workers must be at least 1, not 0"),
    ],
)
def test_mistakes_are_config_errors(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        distsim.simulate(**{"strategy": "ring", "ranks": 2, **settings})
    assert message in str(caught.value)


def test_the_package_offers_what_it_says() -> None:
    assert {"simulate", "compare", "sweep", "Result"} <= set(distsim.__all__) <= set(dir(distsim))
    for name in distsim.__all__:
        assert getattr(distsim, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'simulates'"):
        _ = distsim.simulates


def blocks(text: str) -> list[tuple[str, str]]:
    """Every ```python block of a document, and the ```text block that follows it or nothing."""
    return re.findall(r"^```python\n(.*?)^```\n(?:\n```text\n(.*?)^```\n)?", text, re.MULTILINE | re.DOTALL)


def cell(code: str, names: dict[str, Any]) -> str:
    """Run code as a notebook does: return what it prints, and the value of its last line if that is an expression."""
    tree = ast.parse(code)
    last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(compile(tree, "cell", "exec"), names)
        value = None if last is None else eval(compile(ast.unparse(last), "cell", "eval"), names)
        if value is not None:
            print(repr(value))
    return printed.getvalue()


def test_the_python_document_shows_what_comes_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    found = blocks(PYTHON)
    assert sum(bool(output) for _, output in found) >= 4
    for code, output in found:
        assert cell(code, names) == output, code
