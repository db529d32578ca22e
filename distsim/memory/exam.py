"""The exam's case: keep every k-th activation, recompute the others from the nearest below, or load them from disk.

L layers. Only the input and the activation of every k-th layer stay in memory after the first forward. In backward,
from the last layer down, each layer's activation comes from the nearest stored one at or below it: one `loadmem`, then
`fwd` of the layers between. Nothing overlaps, so that times are sums. The alternative is a disk that holds every
activation: one `loaddisk` for each layer; at break-even both take the same time.

Closed forms. Of the L layers S are stored; f layers lie below the first stored one, e above the last; T(n) = n(n+1)/2.

    by default             S = floor(L/k)          f = min(L, k - 1)    e = L mod k
    from-zero              S = ceil(L/k)           f = 0                e = (L - 1) mod k
    last-not-stored, where that gives e = 0: S is one less and e = k; if no layer is stored any more, f = L

From zero, a_0 is the first layer's activation, and stored; the input is what that layer reads.

    forwards               T(f) + (S - 1) T(k - 1) + T(e)  (T(f) alone if S = 0); cached: L - S
    loads                  L; of all layers even if cached, for whatever is used is loaded
      free-input           L - f; cached: L - 1 if f > 0, for the input is then loaded once
      cached,stored-loads  S, and 1 more if f > 0, unless free-input too
    time                   forwards × fwd + loads × loadmem
    break-even             time / L

By default, with q, r = divmod(L, k), that is q k(k-1)/2 + r(r+1)/2 forwards and L loads.

Mixing lets each layer take the cheaper way. Without a cache that is layer by layer: n layers above a stored one cost
min(loadmem + t × fwd, loaddisk) for t = 0..n. With a cache the lowest m of a segment's n layers are recomputed and the
others loaded from disk; its time is linear in m from 1 on, so that m is 0, 1 or n. At break-even mixing is never slower
than either pure scheme, and faster as soon as two layers of the default convention differ in cost, which is for
1 < k, 1 < L and fwd > 0: some layer is above the mean that the disk costs, and some below.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal, NamedTuple

from distsim.errors import ConfigError, nearest
from distsim.memory.lower import Timed
from distsim.units import shown

WORDS = ("cached", "stored-loads", "free-input", "last-not-stored", "from-zero")
"""What `Convention.parse` reads: each switches one field from the exam's convention to the other."""
MOST = 10**12
"""Layers; of more, times need not fit into a float."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Convention:
    """What is counted, and what is stored; the defaults are the exam's."""

    cached: bool = False
    """Whether what is recomputed stays in memory until it has been used, so that each layer is run at most once."""
    loads: Literal["all", "stored"] = "all"
    """With a cache: whether each use is a load, or only those of stored activations, once each."""
    input_loads: bool = True
    """Whether loads of the input are counted."""
    last_stored: bool = True
    """Whether the last layer's activation is stored where its number is a multiple of k."""
    first_layer: Literal[0, 1] = 1
    """The first layer's number: from 0, it is itself stored."""

    @staticmethod
    def parse(text: str) -> Convention:
        """Read words with commas between them, such as `"cached,free-input"`; `""` and `"exam"` are the exam's.

        Raises: ConfigError naming the word that is none, with the nearest that is one.
        """
        words = {word.strip() for word in text.split(",")} - {"", "exam"}
        for word in sorted(words):
            if word not in WORDS:
                raise ConfigError(f"unknown convention {shown(word)}{nearest(word, ('exam', *WORDS))}")
        return Convention(
            cached="cached" in words,
            loads="stored" if "stored-loads" in words else "all",
            input_loads="free-input" not in words,
            last_stored="last-not-stored" not in words,
            first_layer=0 if "from-zero" in words else 1,
        )

    def text(self) -> str:
        """Return what `parse` reads: `"exam"` if nothing differs from it."""
        switched = (
            self.cached,
            self.loads == "stored",
            not self.input_loads,
            not self.last_stored,
            self.first_layer == 0,
        )
        return ",".join(word for word, on in zip(WORDS, switched, strict=True) if on) or "exam"


@dataclass(frozen=True, kw_only=True, slots=True)
class Periodic:
    """Counts and times, in seconds, of the periodic scheme, of the disk alone, and of the mix of both."""

    forwards: int
    loads: int
    time_s: float
    breakeven_loaddisk_s: float
    """The time of a `loaddisk` with which the disk alone takes as long."""
    loaddisk_s: float
    """The one that the following are for: as given, or the break-even."""
    disk_time_s: float
    mixed_time_s: float
    mixed_loaddisks: int
    """How many layers the mix loads from disk."""


class _Segment(NamedTuple):
    """A stored activation, or the input, and the layers above it that are recomputed from it."""

    base: int
    """Layer, counted from 1; 0 is the input."""
    above: int
    """How many these are."""
    times: int
    """How many segments like this there are, each k layers above the one before."""


class _Costs(NamedTuple):
    forward: Fraction
    load: Fraction
    base_load: Fraction
    """Of the segment's base, when layers are recomputed from it."""
    disk: Fraction


class _Mix(NamedTuple):
    time: Fraction
    recomputed: int
    """Layers of the segment, the lowest, that are not loaded from disk."""
    base_from_disk: bool


def periodic(
    layers: int,
    every: int,
    forward_s: float,
    load_s: float,
    convention: Convention | None = None,
    disk_s: float | None = None,
) -> Periodic:
    """Return counts and times in closed form, each rounded once from the exact value of the decimal numbers given.

    Without `disk_s`, a `loaddisk` takes what it does at break-even.

    Raises: ConfigError if `layers` or `every` is less than 1, or a time is negative or not finite.
    """
    convention = convention or Convention()
    forward, load = _time("forward", forward_s), _time("load", load_s)
    segments = _segments(layers, every, convention)
    forwards = sum(each.times * (each.above if convention.cached else _triangle(each.above)) for each in segments)
    from_input = segments[0].above
    loads = layers
    if convention.cached and convention.loads == "stored":
        loads = sum(each.times for each in segments if each.base or each.above)
    if not convention.input_loads:
        loads -= min(1, from_input) if convention.cached else from_input
    time = forwards * forward + loads * load
    disk = time / layers if disk_s is None else _time("loaddisk", disk_s)
    mixes = [_mix(each, _costs(each, forward, load, disk, convention), convention) for each in segments]
    pairs = list(zip(segments, mixes, strict=True))
    return Periodic(
        forwards=forwards,
        loads=loads,
        time_s=float(time),
        breakeven_loaddisk_s=float(time / layers),
        loaddisk_s=float(disk),
        disk_time_s=float(layers * disk),
        mixed_time_s=float(sum(each.times * mix.time for each, mix in pairs)),
        mixed_loaddisks=sum(each.times * (each.above - mix.recomputed + mix.base_from_disk) for each, mix in pairs),
    )


def mixed_layers(
    layers: int,
    every: int,
    forward_s: float,
    load_s: float,
    convention: Convention | None = None,
    disk_s: float | None = None,
) -> frozenset[int]:
    """Return the layers, counted from 1, that the mix of `periodic` loads from disk; the same arguments and errors."""
    convention = convention or Convention()
    forward, load = _time("forward", forward_s), _time("load", load_s)
    if disk_s is None:
        pure = periodic(layers, every, forward_s, load_s, convention)
        disk = (pure.forwards * forward + pure.loads * load) / layers
    else:
        disk = _time("loaddisk", disk_s)
    found: set[int] = set()
    for each in _segments(layers, every, convention):
        mix = _mix(each, _costs(each, forward, load, disk, convention), convention)
        for base in range(each.base, each.base + each.times * every, every):
            found.update(range(base + mix.recomputed + 1, base + each.above + 1))
            if mix.base_from_disk:
                found.add(base)
    return frozenset(found)


def operations(
    layers: int,
    every: int,
    forward_s: float,
    load_s: float,
    convention: Convention | None = None,
    disk_s: float = 0.0,
    from_disk: frozenset[int] = frozenset(),
) -> tuple[list[Timed], list[tuple[int, int]]]:
    """Return all that backward does, one after another, as `lower.simulate` takes it: operations, and who waits.

    Resources are `compute`, `memory bus` and `disk`; times are seconds. Layers in `from_disk`, counted from 1, are
    loaded from there in `disk_s`; the others are recomputed. Loads that the convention does not count are left out.

    Raises: ConfigError as `periodic`.
    """
    convention = convention or Convention()
    for what, value in (("forward", forward_s), ("load", load_s), ("loaddisk", disk_s)):
        _time(what, value)
    # The layers that are there without recomputing, in ascending order: the nearest one is always the last.
    held = [
        base
        for each in _segments(layers, every, convention)
        for base in range(each.base, each.base + each.times * every, every)
    ]
    stored, loaded = set(held), set[int]()
    timed: list[Timed] = []

    def name(layer: int) -> str:
        return str(layer - 1 + convention.first_layer) if layer else "input"

    for layer in range(layers, 0, -1):
        if layer not in from_disk:
            nearest_held = held[-1]
            free = nearest_held == 0 and not convention.input_loads
            if convention.cached and convention.loads == "stored":
                free = free or nearest_held not in stored or nearest_held in loaded
            if not free:
                timed.append(Timed(f"loadmem {name(nearest_held)}", "memory bus", load_s))
            loaded.add(nearest_held)
            made = range(nearest_held + 1, layer + 1)
            timed += [Timed(f"fwd {name(each)}", "compute", forward_s) for each in made]
            if convention.cached:
                held += made
        else:
            timed.append(Timed(f"loaddisk {name(layer)}", "disk", disk_s))
        if held[-1] == layer:
            held.pop()
    return timed, [(row - 1, row) for row in range(1, len(timed))]


def _segments(layers: int, every: int, convention: Convention) -> list[_Segment]:
    """Return the input's segment first, then those of the stored activations: all but the last have k - 1 layers."""
    for what, value in (("layers", layers), ("the period of stored layers", every)):
        if not 1 <= value <= MOST:
            raise ConfigError(f"{what}: expected a whole number from 1 to {MOST}, not {shown(value)}")
    first = every if convention.first_layer == 1 else 1
    stored = (layers - first) // every + 1 if first <= layers else 0
    if stored and not convention.last_stored and first + (stored - 1) * every == layers:
        stored -= 1
    if not stored:
        return [_Segment(0, layers, 1)]
    last = first + (stored - 1) * every
    return [_Segment(0, first - 1, 1), _Segment(first, every - 1, stored - 1), _Segment(last, layers - last, 1)]


def _costs(each: _Segment, forward: Fraction, load: Fraction, disk: Fraction, convention: Convention) -> _Costs:
    return _Costs(forward, load, load if each.base or convention.input_loads else Fraction(0), disk)


def _mix(each: _Segment, costs: _Costs, convention: Convention) -> _Mix:
    """Return the cheapest way through one segment; recomputing is preferred where the disk is no faster."""
    forward, load, base_load, disk = costs
    from_disk = each.base > 0 and disk < load
    own = min(load, disk) if each.base else Fraction(0)

    def through(recomputed: int) -> _Mix:
        rest = (each.above - recomputed) * disk
        if not recomputed:
            return _Mix(own + rest, 0, from_disk)
        if not convention.cached:
            return _Mix(own + recomputed * base_load + _triangle(recomputed) * forward + rest, recomputed, from_disk)
        if convention.loads == "all":
            above = (recomputed - 1) * load
            return _Mix(own + base_load + above + recomputed * forward + rest, recomputed, from_disk)
        # The base has been loaded for the layers above it, and is still there for its own.
        return _Mix(base_load + recomputed * forward + rest, recomputed, False)

    if not convention.cached and forward:
        cheaper = math.floor((disk - base_load) / forward)  # the t with base_load + t × fwd <= loaddisk
        return through(max(0, min(each.above, cheaper)))
    return min((through(count) for count in (each.above, min(1, each.above), 0)), key=lambda mix: mix.time)


def _triangle(count: int) -> int:
    return count * (count + 1) // 2


def _time(what: str, seconds: float) -> Fraction:
    """Return the decimal number that a float is written as: 20 ns are 2e-08 s, which no float is exactly."""
    if not 0 <= seconds <= 1e200:
        raise ConfigError(f"the time of a {what}: expected seconds, from 0 to 1e200, not {seconds!r}")
    return Fraction(repr(float(seconds)))
