"""Read a small YAML file into dicts, lists and strings, and say the line of everything that is wrong.

Scalars stay strings: YAML's typing reads `1e9` as text, `no` as False and 12:30:45 as a number. The tree is
built from parse events with an explicit stack, so nothing recurses, whatever the nesting.
"""

from __future__ import annotations

import itertools
import os
import stat
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import yaml
from yaml.events import (
    AliasEvent,
    DocumentStartEvent,
    Event,
    MappingEndEvent,
    MappingStartEvent,
    NodeEvent,
    ScalarEvent,
    SequenceEndEvent,
    SequenceStartEvent,
)

from distsim.errors import ConfigError, nearest
from distsim.units import shown

MAX_BYTES = 256 * 1024
MAX_DEPTH = 20
_SYNTAX = "expected `key: value` lines, indented with spaces, every bracket and quote closed"

Path = tuple[str | int, ...]

# libyaml's parser is 20 times faster; the pure one gives the same events where a wheel lacks it.
_Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


@dataclass(frozen=True, kw_only=True, slots=True)
class Document:
    """A parsed file: `data`, and the line of every key and list item in it."""

    file: str
    """How messages name the file."""
    data: Any
    """dict, list or str; all scalars are str."""
    lines: Mapping[Path, int]
    """`("links", "nvlink", "bandwidth")` -> line number, from 1."""

    def error(self, path: Path, message: str) -> ConfigError:
        """Return the error `file:LINE: a.b.c: message` for the nearest ancestor of `path` that has a line."""
        known = path
        while known not in self.lines:
            known = known[:-1]
        where = ".".join(_plain(str(part)) for part in path)
        return ConfigError(f"{self.file}:{self.lines[known]}: {where + ': ' if where else ''}{message}")


def _plain(key: str) -> str:
    """Return a key for a message of one line: short, control characters escaped."""
    key = key if len(key) <= 40 else f"{key[:40]}..."
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in key)


def near(name: str, valid: Iterable[str]) -> str:
    """Return `errors.nearest` where name and valid names come from a file and may be long and many."""
    names = list(itertools.islice(valid, 200))
    hint = nearest(name[:40], names)
    return hint if len(hint) < 300 else f"; valid: {', '.join(shown(each, 30) for each in names[:5])}, ..."


def did_you_mean(name: str, valid: list[str]) -> str:
    """Return the nearest of names that the message lists anyway, or nothing."""
    hint = nearest(name[:40], valid)
    return hint if "did you mean" in hint else ""


def read(path: str) -> Document:
    """Parse the YAML file at `path`; ConfigError if it is missing, no regular file, too large or invalid."""
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):
            raise ConfigError(f"{path}: not a regular file; expected a YAML file")
        if status.st_size > MAX_BYTES:
            raise _too_large(path, status.st_size)
        with open(path, "rb") as handle:
            return parse(handle.read(MAX_BYTES + 1), path)
    except OSError as error:
        raise ConfigError(f"{path}: cannot read: {error.strerror or error}; expected a YAML file") from None
    except ValueError as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{shown(path)}: not a path ({error}); expected a YAML file") from None


def parse(content: bytes | str, file: str) -> Document:
    """Parse YAML text, UTF-8 where it is bytes; ConfigError, naming `file`, if it is invalid."""
    if isinstance(content, str):
        content = content.encode("utf-8", "surrogatepass")
    if len(content) > MAX_BYTES:
        raise _too_large(file, len(content))
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        byte = content[error.start]
        raise ConfigError(f"{file}:{line}: byte 0x{byte:02x} is not UTF-8; expected UTF-8 text") from None
    builder = _Builder(file=file)
    try:
        for event in _events(text):
            builder.take(event)
    except yaml.YAMLError as error:
        raise ConfigError(f"{file}:{_line_of(error, text)}: not YAML: {_problem(error)}; {_SYNTAX}") from None
    except ConfigError:
        raise
    except (ValueError, OverflowError) as error:  # the pure parser on \U00110000 or %YAML 1.<5,000 digits>
        raise ConfigError(f"{file}:1: not YAML: {error}; {_SYNTAX}") from None
    if builder.documents == 0:
        raise ConfigError(f"{file}:1: the file is empty; expected YAML such as `title: ...`")
    return Document(file=file, data=builder.root, lines=builder.lines)


def _events(text: str) -> Iterator[Event]:
    yield from yaml.parse(text, Loader=_Loader)


def _too_large(file: str, size_bytes: int) -> ConfigError:
    return ConfigError(f"{file}:1: {size_bytes:,} bytes; expected a YAML file of at most {MAX_BYTES:,} bytes")


def _line_of(error: yaml.YAMLError, text: str) -> int:
    mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
    if mark is not None:
        return int(mark.line) + 1
    position = getattr(error, "position", None)  # ReaderError: a character that YAML forbids
    return text.count("\n", 0, position) + 1 if isinstance(position, int) else 1


def _problem(error: yaml.YAMLError) -> str:
    problem = getattr(error, "problem", None) or getattr(error, "reason", None) or str(error)
    context = getattr(error, "context", None)
    text = f"{problem} {context}" if context else str(problem)
    return " ".join(text.split())


@dataclass(kw_only=True, slots=True)
class _Builder:
    """Turns events into the tree. `stack` holds the open containers, `path` leads to the next value."""

    file: str
    root: Any = None
    documents: int = 0
    lines: dict[Path, int] = field(default_factory=lambda: {(): 1})
    stack: list[dict[str, Any] | list[Any]] = field(default_factory=list)
    path: list[str | int] = field(default_factory=list)
    wants_value: list[bool] = field(default_factory=list)
    """For each open mapping, whether a key has been read whose value is still to come."""

    def take(self, event: Event) -> None:
        line = event.start_mark.line + 1 if event.start_mark is not None else 1
        if isinstance(event, DocumentStartEvent):
            self.documents += 1
            if self.documents > 1:
                raise ConfigError(f"{self.file}:{line}: a second document; expected one, no further `---`")
        elif isinstance(event, AliasEvent) or (isinstance(event, NodeEvent) and event.anchor is not None):
            sign = "*" if isinstance(event, AliasEvent) else "&"
            name = f"{sign}{event.anchor}"
            raise ConfigError(
                f"{self.file}:{line}: anchors and aliases ({shown(name)}) are not supported; "
                "expected every value written out (quote a text that begins with & or *)"
            )
        elif isinstance(event, NodeEvent) and getattr(event, "tag", None) not in (None, "!"):
            raise ConfigError(
                f"{self.file}:{line}: the tag {shown(getattr(event, 'tag', ''))} is not supported; "
                "expected plain text, lists and mappings"
            )
        elif isinstance(event, ScalarEvent):
            if self.stack and isinstance(self.stack[-1], dict) and not self.wants_value[-1]:
                self._key(event.value, line)
            else:
                self._value(event.value, line)
        elif isinstance(event, MappingStartEvent):
            self._open({}, line)
        elif isinstance(event, SequenceStartEvent):
            self._open([], line)
        elif isinstance(event, MappingEndEvent | SequenceEndEvent):
            self.stack.pop()
            self.wants_value.pop()
            self._close()

    def _key(self, key: str, line: int) -> None:
        path = (*self.path, key)
        if path in self.lines:
            raise ConfigError(
                f"{self.file}:{line}: duplicate key {shown(key)}, first given on line {self.lines[path]}; "
                "expected each key once"
            )
        self.lines[path] = line
        self.path.append(key)
        self.wants_value[-1] = True

    def _value(self, value: Any, line: int) -> None:
        self._attach(value, line)
        self._close()

    def _attach(self, value: Any, line: int) -> None:
        if not self.stack:
            self.root = value
            self.lines[()] = line
            return
        top = self.stack[-1]
        if isinstance(top, list):
            self.path.append(len(top))
            self.lines[tuple(self.path)] = line
            top.append(value)
        else:
            top[str(self.path[-1])] = value

    def _close(self) -> None:
        """The value at `path` is complete: step back to its container."""
        if self.stack:
            self.path.pop()
            self.wants_value[-1] = False

    def _open(self, container: dict[str, Any] | list[Any], line: int) -> None:
        if self.stack and isinstance(self.stack[-1], dict) and not self.wants_value[-1]:
            raise ConfigError(f"{self.file}:{line}: a key is a list or mapping; expected text as key")
        if len(self.stack) >= MAX_DEPTH:
            raise ConfigError(
                f"{self.file}:{line}: nested more than {MAX_DEPTH} levels deep; expected a flat configuration"
            )
        self._attach(container, line)
        self.stack.append(container)
        self.wants_value.append(False)


class _Dumper(yaml.SafeDumper):
    """Writes what `parse` reads: no aliases, also where one object appears twice."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def dump(data: Mapping[str, Any], comment: str = "") -> str:
    """Return YAML text of dicts, lists, str, int and bool, in their order; ConfigError for anything else."""
    # Non-ASCII letters are escaped: PyYAML's emitter folds some of them into spaces when it may write them.
    head = "".join(f"# {line}".rstrip() + "\n" for line in comment.splitlines())
    try:
        return head + str(yaml.dump(data, Dumper=_Dumper, sort_keys=False, width=110))
    except yaml.YAMLError as error:
        raise ConfigError(f"cannot write as YAML: {_problem(error)}; expected dicts, lists, text") from None
