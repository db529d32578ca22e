"""Links that failed or are slower than their kind, and devices that are stragglers: `overrides` of a cluster file."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import translate

import numpy as np
from numpy.typing import NDArray

from distsim.clusterfile import Override
from distsim.errors import ConfigError
from distsim.topologies.graph import Cables
from distsim.units import shown
from distsim.yamlfile import near

Mask = NDArray[np.bool_]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Changed:
    """Links and devices after all overrides."""

    cables: Cables
    slowdown: NDArray[np.float64]
    """Per device, how many times longer its additions and its host's work take."""


class Unmatched(ConfigError):
    """The override whose index is the second argument matches nothing; the first is the message."""


def apply(overrides: Sequence[Override], cables: Cables, devices: Sequence[str], switches: Sequence[str]) -> Changed:
    """Return the links without the failed ones, all else changed, and the devices' slowdown. Raises Unmatched."""
    slowdown, slower = np.ones(len(devices)), np.ones(len(cables.tail))
    failed = np.zeros(len(cables.tail), np.bool_)
    columns = {key: getattr(cables, key).copy() for key in ("latency_s", "bandwidth_Bps", "overhead_s")}
    names = (*devices, *switches) if overrides else ()
    for number, entry in enumerate(overrides):
        try:
            if entry.device is not None:
                assert entry.slowdown is not None
                found = _named(entry.device, names[: len(devices)])
                slowdown[found] *= entry.slowdown
                _bounded(float(slowdown[found].max()))
                continue
            links = _links(entry, cables, names)
            slower[links] *= entry.slowdown or 1.0
            _bounded(float(slower[links].max()))
        except ConfigError as error:
            raise Unmatched(str(error), number) from None
        failed |= links & entry.failed
        columns["bandwidth_Bps"][links] /= entry.slowdown or 1.0
        for key, given in (
            ("latency_s", entry.latency),
            ("bandwidth_Bps", entry.bandwidth),
            ("overhead_s", entry.overhead),
        ):
            if given is not None:
                columns[key][links] = given.value
    left = {key: column[~failed] for key, column in columns.items()}
    return Changed(cables=Cables(tail=cables.tail[~failed], head=cables.head[~failed], **left), slowdown=slowdown)


def _bounded(slowdown: float) -> None:
    """Refuse what several overrides make of one link or device if no number could hold it in the end."""
    if slowdown > 1e9:
        raise ConfigError(f"{slowdown:g} times slower in all; expected at most 1e+09, or `failed: true`")


def _links(entry: Override, cables: Cables, names: Sequence[str]) -> Mask:
    """Return which links an entry means."""
    assert entry.src is not None and entry.dst is not None
    src, dst = _named(entry.src, names), _named(entry.dst, names)
    found = src[cables.tail] & dst[cables.head]
    if entry.both:
        found |= dst[cables.tail] & src[cables.head]
    if not found.any():
        there = np.flatnonzero(src[cables.tail])[:1] if src[cables.tail].any() else np.flatnonzero(dst[cables.head])[:1]
        example = "".join(f" such as {names[cables.tail[i]]} -> {names[cables.head[i]]}" for i in there)
        raise ConfigError(f"no link leads from {shown(entry.src)} to {shown(entry.dst)}; expected a link{example}")
    return found


def _named(pattern: str, names: Sequence[str]) -> Mask:
    """Return which names a shell-style pattern matches, or is."""
    matches = re.compile(translate(pattern)).match
    found = np.fromiter((name == pattern or matches(name) is not None for name in names), np.bool_, len(names))
    if not found.any():
        raise ConfigError(f"no node is called {shown(pattern)}; expected a name or a pattern{near(pattern, names)}")
    return found
