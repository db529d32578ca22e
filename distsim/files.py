"""Files that are written whole or not at all."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from distsim.errors import ConfigError


def write_whole(path: Path, text: str) -> None:
    """Write a text file by way of a temporary one beside it; make its folder if need be.

    Raises: ConfigError naming the file if it cannot be written.
    """
    partial = path.parent / f".{path.name}.{os.getpid()}"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with partial.open("w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
    except OSError as error:
        raise ConfigError(f"{path}: cannot write it: {error.strerror}") from error


def make_writable(folder: Path) -> None:
    """Make a folder in which a long run will leave its results, and find out now whether it can be written.

    Raises: ConfigError naming the folder.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise ConfigError(f"{folder}: cannot write there: {error.strerror}") from error
