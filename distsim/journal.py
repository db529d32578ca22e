"""A journal of finished work: what a long run appends to as it goes, and reads when it is started again."""

from __future__ import annotations

import fcntl
import json
import os
import time
from pathlib import Path
from typing import Any

from distsim.errors import ConfigError

FORMAT = b'{"format": "distsim sweep journal 1"}\n'
SYNC_EVERY_S = 1.0
"""What was written survives the end of the program at once, and a loss of power after this time."""


class Journal:
    """An append-only file of `{"key": ..., "row": ...}`, one JSON value a line, open in one process at a time.

    A last line that was cut off is dropped when the file is opened: its writer was killed.
    """

    def __init__(self, path: Path) -> None:
        """Open a journal, a new one if there is none; `rows` has what it holds.

        Raises: ConfigError if it cannot be written, is in use, or is no journal.
        """
        self.path = path
        self.rows: dict[str, dict[str, Any]] = {}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("a+b")
        except OSError as error:
            raise ConfigError(f"{path}: cannot write it: {error.strerror}") from error
        try:
            self._read()
        except BaseException:
            self._file.close()
            raise
        self._synced_s = time.monotonic()

    def _read(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(f"{self.path}: another sweep is writing it; expected one sweep for each file") from None
        self._file.seek(0)
        content = self._file.read()
        whole = content.rfind(b"\n") + 1
        if not content.startswith(FORMAT[: len(content)]):
            raise self._foreign(1)
        for number, line in enumerate(content[len(FORMAT) : whole].splitlines(), start=2):
            try:
                entry = json.loads(line)
                self.rows[entry["key"]] = entry["row"]
            except (ValueError, KeyError, TypeError):
                raise self._foreign(number) from None
        self._file.truncate(whole)
        if whole == 0:
            self._append(FORMAT)

    def _foreign(self, line: int) -> ConfigError:
        return ConfigError(f"{self.path}:{line}: not a line of a sweep's journal; delete the file to start afresh")

    def add(self, key: str, row: dict[str, Any]) -> None:
        """Keep a finished row.

        Raises: ConfigError if it cannot be written.
        """
        self.rows[key] = row
        self._append(json.dumps({"key": key, "row": row}).encode() + b"\n")
        if time.monotonic() - self._synced_s >= SYNC_EVERY_S:
            os.fsync(self._file.fileno())
            self._synced_s = time.monotonic()

    def _append(self, line: bytes) -> None:
        try:
            self._file.write(line)
            self._file.flush()
        except OSError as error:
            raise ConfigError(f"{self.path}: cannot write it: {error.strerror}") from error

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        """Close the file, with all of it on the disk; another sweep may then open it."""
        try:
            os.fsync(self._file.fileno())
        finally:
            self._file.close()
