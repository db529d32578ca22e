"""Clocks: what several ranks' timestamps say together, on one machine or on several."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt


def machine() -> str:
    """Name the machine that this process's monotonic clock belongs to (and its boot, which restarts the clock)."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    return f"{platform.node()} {boot.read_text().strip() if boot.exists() else ''}"


def together_s(spans: npt.NDArray[np.float64], machines: Sequence[str]) -> npt.NDArray[np.float64]:
    """Return how long each round took all ranks; `spans` has shape (ranks, rounds, [start, end]), in seconds.

    On one machine: from when the last rank began until the last one was done. Clocks of different machines
    cannot be compared: there it is the longest that a rank was busy by its own clock.
    """
    start, end = spans[:, :, 0], spans[:, :, 1]
    if len(set(machines)) == 1:
        return np.asarray(end.max(axis=0) - start.max(axis=0))
    return np.asarray((end - start).max(axis=0))
