"""Runs the commands of the README and of the documents: their console blocks show what they really print.

A block ```console is compared to the letter. In a block ```console measured, what follows depends on the
machine: there every number is taken for any number. `make demo` runs as what it calls, and like other commands of
minutes only with `-m slow`; `make test` would run this test again and is left to CI. A block whose first line is a
comment with a file's name is that file.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from analysis.comparison import read_pairs
from distsim.diff import agree, diff

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text("utf-8")
PAGES = (
    "README.md",
    "docs/accumulation.md",
    "docs/memory.md",
    "docs/reading-results.md",
    "docs/sweeps.md",
    "docs/trainers.md",
)
BIN = Path(sys.executable).parent


class Shown(NamedTuple):
    """One command of a page and what it is shown to print."""

    page: str
    command: str
    output: str
    measured: bool


def shown_commands(page: str) -> list[Shown]:
    """Every `$ command` of a page's console blocks, in order."""
    found = []
    text = (ROOT / page).read_text("utf-8")
    for kind, block in re.findall(r"^```console( measured)?\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        for part in re.split(r"(?:\A|\n\n)\$ ", block)[1:]:  # a command opens its block or follows a blank line
            command, _, output = part.partition("\n")
            found.append(Shown(page, command, output.rstrip("\n"), bool(kind)))
    return found


def shape(text: str) -> list[str]:
    """The lines of a text without what differs from run to run: numbers, their units, rules and spacing."""
    text = re.sub(r"[-+]?\d[\d.,]*( ?(ns|us|ms|s|[kMGT]?B(/s)?|%))?", "#", text)
    lines = [re.sub(r"[-\s]+", " ", line).strip() for line in text.splitlines()]
    return [line for line in lines if line]


LONG = re.compile("make demo|depth=152|batch.json|--compile|'.tree|parameter-server(:servers=2)? --workers")
COMMANDS = [
    pytest.param(shown, marks=(pytest.mark.slow, pytest.mark.timeout(900)) if LONG.search(shown.command) else ())
    for page in PAGES
    for shown in shown_commands(page)
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """For each page the folder of a reader who makes its files and types one command after the other."""
    made = {}
    for page in PAGES:
        made[page] = tmp_path_factory.mktemp("reader")
        text = (ROOT / page).read_text("utf-8")
        for name, content in re.findall(r"^```(?:python|yaml)\n# (\S+\.(?:py|yaml))\n(.*?)^```", text, re.M | re.S):
            (made[page] / name).parent.mkdir(exist_ok=True)
            (made[page] / name).write_text(content)
    return made


def run(command: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Type a command in a folder, with this environment's programs."""
    return subprocess.run(
        ["bash", "-c", command],
        cwd=folder,
        env={**os.environ, "PATH": f"{BIN}:{os.environ['PATH']}", "TMPDIR": str(folder), "OMP_NUM_THREADS": "1"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=800,
        check=False,
    )


@pytest.mark.timeout(400)
@pytest.mark.parametrize("shown", COMMANDS, ids=lambda shown: str(shown.command[:60]))
def test_command_prints_what_its_page_shows(shown: Shown, folders: dict[str, Path]) -> None:
    if shown.command == "make test":
        pytest.skip("this is part of it")
    ran = run(shown.command.replace("make demo", f"python {ROOT / 'tools' / 'demo.py'}"), folders[shown.page])
    fails = "error: " in shown.output
    assert ran.returncode == (2 if fails else int("NOT equivalent" in shown.output)), ran.stderr
    printed = (ran.stderr if fails else ran.stdout).rstrip("\n")
    if shown.measured:
        head, dots, tail = f"\n{shown.output}".partition("\n...\n")  # a line of dots: lines are left out
        lines, first, last = shape(printed), shape(head), shape(tail)
        assert lines[: len(first)] == first and lines[len(lines) - len(last) :] == last
        assert dots or len(lines) == len(first)
    else:
        assert printed == shown.output
    if shown.command == "make demo":
        pairs = read_pairs(ROOT / "runs" / "demo")
        assert {pair.measured.strategy for pair in pairs} == {"ring", "all-to-all", "parameter-server"}
        for pair in pairs:
            assert agree(diff(pair.simulated, pair.measured))
            assert pair.measured.losses[-1] < pair.measured.losses[0]


def test_the_readme_shows_both_commands_on_its_first_screen() -> None:
    first_screen = "\n".join(README.splitlines()[:40])
    assert "make demo" in first_screen and "make test" in first_screen


def test_the_files_to_read_first_exist() -> None:
    (listed,) = re.findall(r"^## Six files to read first\n(.*?)^## ", README, re.MULTILINE | re.DOTALL)
    files = re.findall(r"^\d\. \[`([^`]+)`\]\(([^)]+)\)", listed, re.MULTILINE)
    assert len(files) == 6
    for name, target in files:
        assert name == target and (ROOT / target).is_file()


def test_the_map_of_the_house_names_every_module() -> None:
    (map_,) = re.findall(r"^## The house\n(.*?)^## ", README, re.MULTILINE | re.DOTALL)
    for folder in ("distsim", "trainers", "analysis"):
        for file in (ROOT / folder).glob("*.py"):
            assert file.name.startswith("__init__") or file.name in map_, f"{folder}/{file.name} is not on the map"


def test_every_feature_of_ours_is_linked_to_its_test() -> None:
    page = (ROOT / "docs" / "trainers.md").read_text("utf-8")
    used = set(re.findall(r"\]\[(t-[a-z]+)\]", page))
    linked = dict(re.findall(r'^\[(t-[a-z]+)\]: (\.\./tests/\S+ "\w+")$', page, re.MULTILINE))
    assert used == linked.keys() and len(used) > 15
    for target in linked.values():
        file, name = re.fullmatch(r'\.\./(\S+) "(\w+)"', target).groups()  # type: ignore[union-attr]
        assert re.search(rf"^def {name}\(", (ROOT / file).read_text("utf-8"), re.MULTILINE), target


def test_no_cell_of_the_feature_table_is_without_a_source() -> None:
    """But for what we have not, which needs none."""
    page = (ROOT / "docs" / "trainers.md").read_text("utf-8")
    defined = set(re.findall(r"^\[([a-z0-9-]+)\]: ", page, re.MULTILINE))
    rows = [line.strip("|").split("|") for line in page.splitlines() if line.startswith("|") and line.count("|") == 9]
    assert len(rows) > 25
    for name, ours, *theirs in rows:
        if name.strip() in ("", "---"):
            continue
        assert "][t-" in ours or ours.strip() in ("no", "not yet", "not yet run"), name
        for cell in theirs:
            sources = re.findall(r"\]\[([a-z0-9-]+)\]", cell)
            assert sources and defined >= set(sources), (name, cell)
