"""`distsim algorithms` and docs/algorithms.md: the page is what is printed, and what it says holds."""

from __future__ import annotations

import json
import re
from math import ceil, log2
from pathlib import Path
from typing import Any

import pytest

from distsim import exchanges, formulas
from distsim.cli import main
from distsim.cluster import ideal
from distsim.commands import algorithms_data, algorithms_page
from distsim.commands.algorithms_data import CHOSEN, OPTIONS, PARAGRAPHS, SOURCES
from distsim.commands.algorithms_page import RANKS, Agreement, agreements
from distsim.exchanges import ALGORITHMS
from distsim.exchanges.spec import options_of
from distsim.formulas import FORMULAS, NAMES, Formula
from distsim.step import simulate

PAGE = (Path(__file__).resolve().parent.parent / "docs" / "algorithms.md").read_text("utf-8")
PAIRS = [(collective, strategy) for collective, known in ALGORITHMS.items() for strategy in known]
Capture = pytest.CaptureFixture[str]


def printed(capsys: Capture, *flags: str) -> str:
    """Run the command, which must succeed and say nothing on stderr; return its stdout."""
    assert main(["algorithms", *flags]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    return out


@pytest.fixture(scope="module")
def table() -> list[Agreement]:
    return list(agreements())


def test_the_page_is_what_the_command_prints(capsys: Capture) -> None:
    assert printed(capsys, "--markdown") == PAGE, "run `distsim algorithms --markdown > docs/algorithms.md`"


def test_formulas_and_simulations_agree(table: list[Agreement]) -> None:
    assert [(one.collective, one.strategy, one.n) for one in table] == [(*pair, n) for pair in PAIRS for n in RANKS]
    for one in table:
        assert one.messages[0] == one.messages[1] and one.largest[0] == one.largest[1], one
        assert one.differs is None or one.differs < 1e-9, one
        assert 0 < one.small_s[1] < one.large_s[1]


def test_closed_forms_are_missing_only_where_rounds_meet(table: list[Agreement]) -> None:
    folded = {"double-tree", "halving-doubling", "recursive-doubling"}
    sums_up = {("all-reduce", "tree"), ("reduce", "tree")}
    missing = {(one.collective, one.strategy, one.n) for one in table if one.differs is None}
    assert missing == {
        (*pair, n) for pair in PAIRS for n in (3, 5, 33) if pair[1] in folded or pair in sums_up
    }  # fmt: skip


def test_disagreement_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    """A ring whose formulas say one message and one latency too many, and a message of everything."""
    wrong = Formula("2*n*(n-1) + 1", "p", "2*(n-1) + 1", "2*(n-1)/n")
    monkeypatch.setitem(FORMULAS["all-reduce"], "ring", wrong)
    (one,) = (one for one in agreements([4]) if (one.collective, one.strategy) == ("all-reduce", "ring"))
    small_s = 6 * 5e-6 + 1.5 * 42_240 / 12.5e9
    assert one.differs == pytest.approx(5e-6 / small_s)  # 14 %
    row = algorithms_page._agreement_row(one)
    assert row[3:5] == ("24 (formula: 25)", "26,400,000 (formula: 105,600,000)")
    assert row[-1] == "< 1e0"


@pytest.mark.parametrize(("collective", "strategy"), PAIRS)
def test_every_strategy_is_everywhere(collective: str, strategy: str, capsys: Capture) -> None:
    (section,) = re.findall(rf"^### {collective}: {strategy}\n(.*?)^##", PAGE, re.MULTILINE | re.DOTALL)
    formula = FORMULAS[collective][strategy]
    posting = {"eager": "", "rounds": ", with rounds"}[formula.posting]
    assert f"- time: {formula.time_text()}, for {formula.holds_for()}{posting}\n" in section
    assert f"- source: {SOURCES[strategy]}\n" in section
    for name in (*options_of(ALGORITHMS[collective][strategy]), "segments"):
        assert f"`{name}` (" in section
    (agreement,) = re.findall(rf"^### {collective}: agreement\n(.*?)(?:^##|\Z)", PAGE, re.MULTILINE | re.DOTALL)
    rows = [line.split(" | ") for line in agreement.splitlines() if line.startswith(f"| {strategy} | ")]
    assert [(int(row[1]), row[2]) for row in rows] == [(n, formula.posting) for n in RANKS]
    (block,) = (part for part in printed(capsys).split("\n\n") if part.startswith(f"{collective} "))
    (line,) = (line for line in block.splitlines() if line.startswith(f"{strategy} "))
    assert formula.time_text() in line
    assert re.split(" {2,}", line)[-2:] == [formula.holds_for(), formula.posting]


def test_texts_are_of_what_there_is() -> None:
    assert {collective: set(texts) for collective, texts in PARAGRAPHS.items()} == {
        collective: set(known) for collective, known in ALGORITHMS.items()
    }
    assert set(SOURCES) == {strategy for _, strategy in PAIRS}
    options = [options_of(ALGORITHMS[collective][strategy]) for collective, strategy in PAIRS]
    assert set(OPTIONS) == {name for known in options for name in known} | {"segments"}
    assert set(CHOSEN) == {name for known in options for name, (_, default) in known.items() if default is None}
    mentioned = re.findall(
        r"`([a-z-]+:[^`]+)`", " ".join(text for texts in PARAGRAPHS.values() for text in texts.values())
    )
    assert mentioned
    for spec in mentioned:
        assert str(exchanges.parse(spec)) == spec


def test_json_is_only_json(capsys: Capture) -> None:
    found: list[dict[str, Any]] = json.loads(printed(capsys, "--json"))
    assert [(one["collective"], one["strategy"]) for one in found] == PAIRS
    (ring,) = (one for one in found if (one["collective"], one["strategy"]) == ("all-reduce", "ring"))
    assert (ring["messages"], ring["largest_message"]) == ("2n(n-1)", "p/n")
    assert (ring["latencies"], ring["arrays"], ring["time"]) == ("2(n-1)", "2(n-1)/n", "2(n-1) a + 2(n-1)/n S/B")
    options = [(each["name"], each["type"], each["default"]) for each in ring["options"]]
    assert options == [
        ("channels", "whole number", 1),
        ("bidirectional", "true or false", False),
        ("node", "whole number", 1),
        ("segments", "whole number", 1),
    ]
    assert all(one["description"] and one["source"] for one in found)


def test_one_output_at_a_time(capsys: Capture) -> None:
    assert main(["algorithms", "--json", "--markdown"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and "--json and --markdown both go to stdout" in err


EXPRESSIONS = sorted(
    {
        expression
        for known in FORMULAS.values()
        for formula in known.values()
        for expression in (formula.messages_are, formula.largest_is, formula.latencies, formula.arrays)
    }
)


def read(text: str, n: int, p: int) -> float:
    """The value of a formula as a reader takes it: what stands side by side is multiplied, = compares."""
    tokens = re.findall(r"log2|if|else|\d+|[a-zA-Z]|\S", text)
    joined = ""
    for before, token in zip(["", *tokens], tokens, strict=False):
        factor = re.fullmatch(r"\d+|[a-zA-Z]|\)", before) and re.fullmatch(r"log2|\d+|[a-zA-Z]|\(", token)
        joined += ("*" if factor else "") + {"=": "==", "if": " if ", "else": " else "}.get(token, token)
    values = {name: function(n) for name, (function, _) in NAMES.items()}
    value: float = eval(joined, {"log2": log2, "n": n, "p": p, **values})
    return value


@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_what_is_shown_is_what_is_computed(expression: str) -> None:
    for n in (2, 4, 8, 64):
        assert read(formulas.shown(expression), n, 960) == pytest.approx(formulas._value(expression, n, 960))


@pytest.mark.parametrize(("collective", "strategy"), PAIRS)
def test_the_time_that_is_shown_is_what_is_computed(collective: str, strategy: str) -> None:
    formula = FORMULAS[collective][strategy]
    text = formula.time_text().replace("S/B", "(1/7)")  # S = 1, B = 7
    for n in (2, 4, 8, 64):
        for a in (0, 3):
            shown = read(re.sub(r"\ba\b|(?<=\d)a\b", f"({a})", text), n, 1)
            assert shown == pytest.approx(formula.time_s(n, 1, a, 7)), (text, n)


def test_names_mean_what_the_page_says() -> None:
    for n in range(1, 130):
        divisors = [d for d in range(1, n + 1) if n % d == 0]
        assert NAMES["q"][0](n) == max(2**k for k in range(8) if 2**k <= n)
        assert NAMES["g"][0](n) == max(d for d in divisors if d <= 8)
        assert NAMES["C"][0](n) == n // max(d for d in divisors if d * d <= n)
        assert NAMES["d"][0](n) == next(k for k in range(9) if 2**k >= n)
        assert NAMES["w"][0](n) == sum(format(number, "b").count("1") for number in range(n))
        # The binomial tree, from the root: a rank's children are it plus each power of two below its lowest one.
        served = {0: (0, 0)}
        for rank in range(n):
            lowest = next((2**k for k in range(8) if rank >> k & 1), 256)
            children = [rank + 2**k for k in range(8) if 2**k < lowest and rank + 2**k < n]
            for child in children:
                served[child] = (served[rank][0] + 1, served[rank][1] + len(children))
        assert len(served) == n
        last = (max(hops for hops, _ in served.values()), max(copies for _, copies in served.values()))
        assert (NAMES["h"][0](n), NAMES["c"][0](n)) == last


def time_s(spec: str, collective: str, n: int, size: int, **settings: Any) -> float:
    """Simulated seconds of float32 on the ideal switch of 5 us and 12.5 GB/s."""
    return simulate(exchanges.build(spec, n, size // 4, collective), ideal(n), **settings).time_s


def test_segments_follow_each_other() -> None:
    """What the page says of segments, and of the double tree and the chain with them."""
    array_s = 2**30 / 12.5e9
    for collective, spec in (("all-reduce", "double-tree"), ("broadcast", "chain"), ("reduce", "chain")):
        whole_s = time_s(spec, collective, 16, 2**30)
        for posting in ("eager", "rounds"):
            assert time_s(f"{spec}:segments=64", collective, 16, 2**30, posting=posting) < whole_s / 3
        assert time_s(f"{spec}:segments=64", collective, 16, 2**30, sharing="fifo") < whole_s * 0.6
    ring_s = time_s("ring", "all-reduce", 16, 2**30)
    assert time_s("double-tree:segments=64", "all-reduce", 16, 2**30) == pytest.approx(1.2 * ring_s, rel=0.02)
    assert time_s("double-tree:segments=8", "all-reduce", 64, 2**20) < time_s("ring", "all-reduce", 64, 2**20) / 2
    for collective in ("broadcast", "reduce"):
        for n, k in ((3, 2), (5, 16), (16, 64), (16, 256)):
            wanted_s = (n - 1) * 5e-6 + (n - 2 + k) / k * array_s
            assert time_s(f"chain:segments={k}", collective, n, 2**30) == pytest.approx(wanted_s, rel=1e-9)
    assert array_s < time_s("chain:segments=256", "broadcast", 16, 2**30) < 1.1 * array_s


def test_rounds_are_those_of_textbooks() -> None:
    """A binomial broadcast in rounds, and what the page says of eager messages that meet."""
    size = 64 * 2**20
    for n in (2, 3, 4, 8, 13, 16):
        wanted_s = ceil(log2(n)) * (5e-6 + size / 12.5e9)
        assert time_s("tree", "broadcast", n, size, posting="rounds") == pytest.approx(wanted_s, rel=1e-9)
    longest = {
        ("reduce-scatter", "hierarchical", 9): 9 / 8,
        ("reduce-scatter", "torus", 4): 4 / 3,
        ("all-gather", "hierarchical", 128): 1.84,
        ("all-gather", "torus", 4): 4 / 3,
    }
    for (collective, strategy, n), most in longest.items():
        in_rounds_s = time_s(strategy, collective, n, 2**28 * 9, posting="rounds")
        longer = time_s(strategy, collective, n, 2**28 * 9) / in_rounds_s
        assert 0.98 * most < longer < most


def test_the_figures_beside_store_and_forward() -> None:
    size_s = 1 / 50  # 1 GiB at 50 GiB/s
    for strategy, rounds, quoted in (("halving-doubling", 2 * 6, 78.762e-3), ("ring", 2 * 63, 78.876e-3)):
        time_s = rounds * 1e-6 + 126 / 64 * size_s
        assert f"| {strategy} | {time_s * 1e3:.3f} ms | {time_s * 1e3:.3f} ms | {quoted * 1e3:.3f} ms |" in PAGE
        assert rounds * 1e-6 + 2 * 126 / 64 * size_s == pytest.approx(quoted, abs=1e-6)


def test_the_fastest_is_in_bold() -> None:
    """For 8 ranks, where simulating is quick; the table has the formulas' times."""
    from distsim import api

    (rows,) = re.findall(r"^\| 8 ranks \|.*\n\| ---.*\n((?:\|.*\n)+)", PAGE, re.MULTILINE)
    cells = {row[1]: row[2:-1] for row in ([cell.strip() for cell in line.split("|")] for line in rows.splitlines())}
    for column, size in enumerate(("1 KiB", "64 KiB", "1 MiB", "16 MiB", "1 GiB")):
        results, _ = api.simulate_all(ranks=8, size=size)
        least = min(result.time_s for result in results.values())
        fastest = {name for name, result in results.items() if result.time_s <= least * (1 + 1e-9)}
        assert {name for name, row in cells.items() if row[column].startswith("**")} == fastest


def test_pairs_are_those_of_the_registry() -> None:
    assert algorithms_data.pairs() == PAIRS
