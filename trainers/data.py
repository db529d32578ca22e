"""Text to train on that is real and on every machine: the Python standard library's own sources, as bytes."""

from __future__ import annotations

import hashlib
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from distsim.errors import ConfigError


@dataclass(frozen=True, slots=True, eq=False)
class Text:
    """A text as bytes, and where it comes from."""

    name: str
    data: npt.NDArray[np.uint8]

    def digest(self) -> str:
        """SHA-256 of the bytes, in hexadecimal."""
        return hashlib.sha256(self.data.tobytes()).hexdigest()

    def windows(self, seed: int, step: int, count: int, length: int) -> npt.NDArray[np.int64]:
        """Draw `count` random windows of `length` bytes, shape (count, length).

        The draw depends on seed and step alone, never on who asks, so that workers who share a batch out
        among themselves see the same data at any worker count.
        """
        random = np.random.default_rng((seed, step))
        first = random.integers(0, len(self.data) - length + 1, size=count)
        windows: npt.NDArray[np.int64] = self.data[first[:, None] + np.arange(length)].astype(np.int64)
        return windows


def load_text(path: str | None, least_bytes: int) -> Text:
    """Read a file as bytes or, without one, the top-level modules of Python's standard library.

    Raises: ConfigError if the file cannot be read or is shorter than `least_bytes`.
    """
    if path is None:
        folder = Path(sysconfig.get_path("stdlib"))
        name = f"Python {sysconfig.get_python_version()} standard library"
        raw = b"".join(file.read_bytes() for file in sorted(folder.glob("*.py")))
    else:
        name = path
        try:
            raw = Path(path).read_bytes()
        except OSError as error:
            raise ConfigError(f"--text {path}: cannot read it: {error.strerror}") from error
    if len(raw) < least_bytes:
        raise ConfigError(f"--text {name}: {len(raw)} bytes, but one sequence alone takes {least_bytes}")
    return Text(name, np.frombuffer(raw, dtype=np.uint8))
