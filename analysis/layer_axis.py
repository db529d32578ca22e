"""An axis along a model's layers, which are given by their dotted names in model order."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby, takewhile

LABELS = 18
"""Layers that have their names on the axis; of more, the first layers of stages have those of the stages."""
LONGEST = 28
"""Characters of a label."""


def common(layers: Sequence[str]) -> str:
    """Return the name of the smallest part of the model that holds all layers; "" if that is the model."""
    shared = zip(*(layer.split(".")[:-1] for layer in layers), strict=False)
    return ".".join(parts[0] for parts in takewhile(lambda parts: len(set(parts)) == 1, shared))


def labels(layers: Sequence[str]) -> dict[int, str]:
    """Return names for places on the axis: all, or of more than LABELS layers the stages as far as there is room.

    Larger stages come first. Names are without what all layers have in `common`.
    """
    start = f"{whole}." if (whole := common(layers)) else ""
    names = [layer.removeprefix(start) for layer in layers]
    if len(names) <= LABELS:
        return {place: _short(name) for place, name in enumerate(names)}
    found: dict[int, str] = {}
    stages = _stages([name.split(".") for name in names], 1, 0, len(names) / 4)
    for place, _, name in sorted(stages, key=lambda stage: -stage[1]):
        if all(abs(place - other) >= len(names) / LABELS for other in found):
            found[place] = _short(name)
    return dict(sorted(found.items()))


def _stages(names: Sequence[Sequence[str]], depth: int, first: int, most: float) -> Iterator[tuple[int, int, str]]:
    """Yield first layer, number of layers and name of parts of the model that have no more than `most` layers each."""
    for start, group in groupby(names, key=lambda name: name[:depth]):
        stage = list(group)
        if len(stage) > most and max(map(len, stage)) > depth:
            yield from _stages(stage, depth + 1, first, most)
        else:
            yield first, len(stage), ".".join(start)
        first += len(stage)


def _short(name: str) -> str:
    if len(name) > LONGEST:
        return f"{name[: LONGEST // 2 - 1]}...{name[2 - LONGEST // 2 :]}"
    return name or "(model)"


def position(module: str, layers: Sequence[str]) -> float:
    """Return where a module stands: at its first layer, or, without parameters, between two layers.

    Names do not say the order of modules without parameters: numbered ones (nn.Sequential's) are placed by their
    numbers, others after all layers of the module that they are in; for "", the model itself, that is the end.
    """
    own = [place for place, layer in enumerate(layers) if f"{layer}.".startswith(f"{module}.")]
    if own:
        return own[0]
    parent, _, name = module.rpartition(".")
    start = f"{parent}." if parent else ""
    within = [place for place, layer in enumerate(layers) if f"{layer}.".startswith(start)]
    if not within:
        return position(parent, layers) if parent else 0.5
    beside = [(place, f"{layers[place]}.".removeprefix(start).split(".")[0]) for place in within]
    numbered = [(place, int(sibling)) for place, sibling in beside if sibling.isdecimal()]
    if name.isdecimal() and numbered:
        before = [place for place, number in numbered if number < int(name)]
        return before[-1] + 0.5 if before else numbered[0][0] - 0.5
    return within[-1] + 0.5
