"""Whatever is wrong with a cluster file: one ConfigError of one line, with file, line, expected form."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from bad_files import BAD_TOPOLOGIES, EDGES, GOOD, NODES, PCIE, SWITCH, TREE, changed, override
from hypothesis import given, settings
from hypothesis import strategies as st

from distsim import cluster as clusters
from distsim import yamlfile
from distsim.errors import ConfigError

pytestmark = pytest.mark.timeout(60)

BOMB = "a: &a [x, x, x]\nb: &b [*a, *a, *a]\nc: &c [*b, *b, *b]\nd: [*c, *c, *c]\n"

BAD: dict[str, tuple[str, int, list[str]]] = {
    # name: text, line, what the message says
    **BAD_TOPOLOGIES,
    "unknown key": (
        changed("    latency:", "    latencyy:"),
        7,
        ["unknown key", "did you mean 'latency'?", "expected"],
    ),
    "unknown key at the top": (
        GOOD + "titel: x\n",
        12,
        ["titel", "did you mean 'title'?", "expected one of: title"],
    ),
    "unknown key, nothing near": (
        GOOD + "zzz: x\n",
        12,
        ["expected one of: title, source, topology, links, reduce, host, sharing, routing, overrides"],
    ),
    "unknown key of a kind": (changed("devices: 2", "device: 2"), 3, ["did you mean 'devices'?"]),
    "unit of another quantity": (changed("2 us", "2 GB/s"), 8, ["unknown unit 'GB/s'", "expected a time"]),
    "unknown unit": (
        changed("450 GB/s", "450 Gbitt/s"),
        6,
        ["did you mean 'Gbit/s'?", "expected a bandwidth"],
    ),
    "wrong case": (changed("450 GB/s", "450 gb/s"), 6, ["'GB/s' or 'Gb/s'"]),
    "negative": (changed("2 us", "-2 us"), 8, ["negative", "expected a time"]),
    "NaN": (changed("2 us", "nan us"), 8, ["not a finite number", "expected"]),
    "YAML's NaN": (changed('"2 us"', ".nan"), 8, ["is not a time", "expected"]),
    "infinite": (changed("450 GB/s", "inf GB/s"), 6, ["not a finite number", "expected"]),
    "zero bandwidth": (changed("450 GB/s", "0 GB/s"), 6, ["is zero", "expected a bandwidth above zero"]),
    "no unit": (changed('"450 GB/s"', "1e9"), 6, ["'1e9' has no unit", "expected a bandwidth", "GiB/s"]),
    "YAML's number": (changed('"2 us"', "12:30:45"), 8, ["unknown unit", "expected a time"]),
    "duplicate key": (
        GOOD + "title: again\n",
        12,
        ["duplicate key 'title'", "line 1", "expected each key once"],
    ),
    "duplicate, inner": (changed('value: "450', 'source: x, value: "450'), 6, ["duplicate key 'source'"]),
    "missing source": (
        changed('      source: "s"\n', ""),
        7,
        ["links.nvlink.latency", "'source' is missing", "expected"],
    ),
    "empty source": (changed('      source: "s"\n', "      source:\n"), 9, ["is empty", "expected source:"]),
    "missing title": (
        changed('title: "two devices"\n', ""),
        1,
        ["the key 'title' is missing", "expected title:"],
    ),
    "missing latency": (GOOD[: GOOD.index("    latency")], 5, ['expected latency: {value: "2 us", source']),
    "bare quantity": (
        changed('{value: "450 GB/s", source: "s"}', "450 GB/s"),
        6,
        ["not a mapping", "expected bandwidth:"],
    ),
    "list for mapping": (changed(SWITCH, "[switch]"), 3, ["topology", "expected topology: {kind: switch"]),
    "text for mapping": (changed(SWITCH, "switch"), 3, ["topology", "expected topology: {kind: switch"]),
    "mapping for text": (
        changed('"two devices"', "{a: b}"),
        1,
        ["title", "is not a text", "expected title:"],
    ),
    "top is a list": (
        "- a\n- b\n",
        1,
        ["is not a mapping", "expected the keys title, source, topology, links"],
    ),
    "top is a text": ("hello\n", 1, ["'hello' is not a mapping", "expected the keys title"]),
    "links is a text": (
        GOOD[: GOOD.index("links:")] + "links: x\n",
        4,
        ["is not a mapping", "expected links:"],
    ),
    "wrong kind": (
        changed("kind: switch", "kind: swich"),
        3,
        ["topology.kind", "did you mean 'switch'?", "expected"],
    ),
    "kind is a list": (changed("kind: switch", "kind: [a]"), 3, ["topology", "expected"]),
    "no kind": (changed("kind: switch, ", ""), 3, ["the key 'kind' is missing", "expected topology:"]),
    "unknown link": (
        changed("link: nvlink", "link: nvlnk"),
        3,
        ["topology.link", "unknown link", "did you mean 'nvlink'?"],
    ),
    "unused link": (
        changed(
            "reduce:",
            "  pcie: {bandwidth: {value: 1 B/s, source: s}, latency: {value: 0 s, source: s}}\nreduce:",
        ),
        10,
        ["links.pcie", "unused link", "expected"],
    ),
    "alias bomb": (BOMB, 1, ["anchors and aliases", "expected every value written out"]),
    "alias": (GOOD + "x: *a\n", 12, ["anchors and aliases"]),
    "merge key": (changed("    latency:", "    <<: {a: b}\n    latency:"), 7, ["unknown key"]),
    "tag": (
        changed("title: ", "title: !!python/name:os.system "),
        1,
        ["tag", "not supported", "expected plain text"],
    ),
    "brackets": ("[" * 3000, 1, ["nested more than 20 levels", "expected"]),
    "closed brackets": ("a: " + "[" * 3000 + "]" * 3000, 1, ["nested more than 20 levels", "expected"]),
    "nested mappings": ("{a: " * 3000, 1, ["nested more than 20 levels"]),
    "nested blocks": ("\n".join("  " * i + "a:" for i in range(300)), 21, ["nested more than 20 levels"]),
    "list as key": ("[a, b]: c\n", 1, ["a key is a list or mapping", "expected text"]),
    "mapping as key": (changed("topology: {", "topology: {{"), 3, ["a key is a list or mapping"]),
    "syntax": (changed("devices: 2, ", "devices: 2, }, "), 3, ["not YAML"]),
    "unclosed": ("title: t\nsource: [a\n", 3, ["not YAML"]),
    "tab": ("title: t\nlinks:\n\ta: b\n", 3, ["not YAML"]),
    "control character": ("title: t\nsource: \x07\n", 2, ["not YAML"]),
    "two documents": (GOOD + "---\na: b\n", 12, ["a second document", "expected one"]),
    "empty": ("", 1, ["empty", "expected"]),
    "only a comment": ("# nothing\n", 1, ["empty", "expected"]),
    "bad escape": ('title: "\\U00110000"\n', 1, ["not YAML"]),
}


def message_of(path: Path | str) -> str:
    with pytest.raises(ConfigError) as caught:
        clusters.load(str(path))
    message = str(caught.value)
    assert "\n" not in message and len(message) < 600
    assert caught.value.__suppress_context__ or caught.value.__context__ is None
    return message


@pytest.mark.parametrize("pure", [False, True], ids=["libyaml", "pure"])
@pytest.mark.parametrize("name", sorted(BAD))
def test_bad_file(name: str, pure: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if pure:  # the parser of a machine whose PyYAML came without libyaml
        monkeypatch.setattr(yamlfile, "_Loader", yaml.SafeLoader)
    text, line, says = BAD[name]
    file = tmp_path / "bad.yaml"
    file.write_text(text, encoding="utf-8")
    message = message_of(file)
    found = re.match(re.escape(f"{file}:") + r"(\d+): ", message)
    assert found, message
    if "not YAML" not in says:  # the two parsers point at different ends of a syntax error
        assert int(found[1]) == line, message
    for part in says:
        assert part in message


def test_the_good_file_loads(tmp_path: Path) -> None:
    file = tmp_path / "good.yaml"
    for topology in (SWITCH, NODES, TREE, PCIE, EDGES % "{from: gpu0, to: gpu1, link: nvlink, both: true}"):
        file.write_text("\ufeff" + changed(SWITCH, topology))
        assert clusters.load(str(file)).title == "two devices"


def test_ten_megabytes_fail_before_they_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "large.yaml"
    file.write_bytes(b"a: b\n" * 2_000_000)
    monkeypatch.setattr("builtins.open", lambda *_: pytest.fail("the file was opened"))
    assert f"{file}:1: 10,000,000 bytes; expected a YAML file of at most 262,144 bytes" in message_of(file)


LARGE = {
    "unknown keys": GOOD + "".join(f"k{i}: x\n" for i in range(20_000)),
    "unused links": changed(
        "reduce:",
        "".join(
            f"  l{i}: {{bandwidth: {{value: 1 B/s, source: s}}, latency: {{value: 0 s, source: s}}}}\n"
            for i in range(3000)
        )
        + "reduce:",
    ),
    "many nodes": changed(SWITCH, EDGES % ",\n".join(f"{{from: gpu0, to: n{i}, link: nvlink}}" for i in range(6000))),
    "one long key": "k" * 200_000 + ": x\n",
    "one long text": changed("two devices", "x" * 200_000),
    "one long unit": changed("2 us", "2 " + "u" * 200_000),
}


@pytest.mark.parametrize("name", sorted(LARGE))
def test_a_large_bad_file_gives_a_short_message(name: str, tmp_path: Path) -> None:
    file = tmp_path / "large.yaml"
    file.write_text(LARGE[name])
    assert file.stat().st_size <= yamlfile.MAX_BYTES
    assert "expected" in message_of(file)


def test_invalid_utf8(tmp_path: Path) -> None:
    file = tmp_path / "latin.yaml"
    file.write_bytes(b"title: t\nsource: caf\xe9\n")
    assert f"{file}:2: byte 0xe9 is not UTF-8; expected UTF-8" in message_of(file)


def test_not_a_file(tmp_path: Path) -> None:
    assert "No such file" in message_of(tmp_path / "none.yaml")
    assert "not a regular file" in message_of(f"{tmp_path}/")
    assert "not a regular file" in message_of("/dev/zero")
    os.mkfifo(tmp_path / "pipe.yaml")
    assert "not a regular file" in message_of(tmp_path / "pipe.yaml")
    assert "not a path" in message_of("a\0b.yaml")


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_unreadable(tmp_path: Path) -> None:
    file = tmp_path / "secret.yaml"
    file.write_text(GOOD)
    file.chmod(0)
    assert "Permission denied" in message_of(file)


def survives(text: str) -> None:
    try:
        clusters.parse(text, "fuzz", "fuzz.yaml")
    except ConfigError as error:
        assert str(error).startswith("fuzz.yaml:")
        assert "\n" not in str(error)


@given(st.text())
@settings(deadline=None)
def test_arbitrary_text_is_a_config_error(text: str) -> None:
    survives(text)


@given(st.binary())
@settings(deadline=None)
def test_arbitrary_bytes_are_a_config_error(content: bytes) -> None:
    with pytest.raises(ConfigError):
        clusters.parse(content, "fuzz", "fuzz.yaml")


WORDS = """title source topology links reduce kind switch bus nodes edges torus size fat-tree devices_per_leaf spines
devices node nics fabric rails joined pcie link nvlink from to both true bandwidth latency hop_latency value overrides
device slowdown failed 1 2 8 2us 1GB/s s"""
words = st.sampled_from(WORDS.split())
trees = st.recursive(
    words | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(words | st.text(max_size=5), inner, max_size=6),
    max_leaves=25,
)


@given(trees)
@settings(deadline=None, max_examples=300)
def test_arbitrary_trees_are_a_config_error(tree: object) -> None:
    survives(yaml.safe_dump(tree, allow_unicode=True))


@given(st.data())
@settings(deadline=None, max_examples=300)
def test_a_damaged_file_is_a_config_error(data: st.DataObject) -> None:
    good = [GOOD, changed(SWITCH, NODES), changed(SWITCH, TREE), override("{from: 'gpu*', to: switch, slowdown: 3}")]
    text = data.draw(st.sampled_from([*good, BOMB]))
    at = data.draw(st.integers(0, len(text)))
    end = data.draw(st.integers(at, min(len(text), at + 20)))
    new = data.draw(st.text(st.sampled_from("{}[]:,-&*!|>'\"%@`#? \n\ta0.9eGB/s"), max_size=6))
    survives(text[:at] + new + text[end:])


@given(trees)
@settings(deadline=None)
def test_reading_gives_back_every_text(tree: object) -> None:
    text = yaml.safe_dump(tree)
    document = yamlfile.parse(text, "fuzz.yaml")
    assert document.data == tree
    assert all(1 <= line <= text.count("\n") + 1 for line in document.lines.values())


def test_importing_does_not_import_networkx() -> None:
    code = "import sys, distsim.cluster; sys.exit('networkx' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
