"""Exact symmetry: simulate one representative of each class of transfers that provably behave alike.

A strategy proposes a group of maps that turn its rows into themselves (a ring rotates, halving-doubling is
invariant under xor). Of that group, the largest part is taken under which the cluster looks the same too; it
moves every rank, so that its orbits of ranks, of transfers and of waits all have as many members as it has maps.
What is proven before anything is simulated, or else the exchange is run in full:

- links: each map, extended from devices to switches, takes links to links with the same numbers, and devices to
  devices with the same; links have orbits too, and a link that `copies / orbit` members of a class cross has its
  capacity divided by as many;
- routes: the representatives' routes are the only ones with the fewest hops, and so go where the links go;
- rows: the representatives' rows, moved by each generator, are the rows of the ranks that they move to, chunk
  sizes and pre- and postconditions too. For all other elements the builder's equivariance stands, which the
  tests check in full at small sizes;
- order: where links are taken in order and not shared, each is crossed by one member of a class, and no transfer
  ever has to wait; ties between waiting transfers could otherwise be broken differently for members of one class.

Max-min fair rates are unique, so equal for all members of a class; one stands for all, exactly.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from distsim import exchanges
from distsim.bounds import link_load_s
from distsim.cluster import Cluster
from distsim.dependencies import Landings
from distsim.errors import ConfigError
from distsim.exchanges import Symmetry
from distsim.network import Network
from distsim.schedule import COLUMNS, Schedule
from distsim.traffic import Traffic

Index = npt.NDArray[np.int64]

MAX_PAIRS = 2**24
"""Most pairs of ranks for which traffic is counted one by one."""

TURNS = "transfers have to wait for each other's turn, and turns may differ from rank to rank"


class Asymmetric(Exception):
    """Why symmetry is not proven, in words that follow "because"."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Group:
    """The maps of a proposed symmetry that a cluster shares: multiples of `shift`, or the bits of `mask`."""

    symmetry: Symmetry
    shift: int = 1
    """Rotation: elements are its multiples."""
    mask: int = 0
    """Xor: elements have only these bits."""

    @property
    def copies(self) -> int:
        """How many maps there are: so many ranks, transfers and waits look alike."""
        if self.symmetry.kind == "rotation":
            return self.symmetry.elements // self.shift
        return 1 << self.mask.bit_count()

    def generators(self) -> list[int]:
        """Elements of which all others are products."""
        if self.symmetry.kind == "rotation":
            return [self.shift]
        return [1 << bit for bit in range(self.mask.bit_length()) if self.mask >> bit & 1]

    def element_to(self, rank: npt.NDArray[np.integer]) -> Index:
        """Return the element that takes a representative to each rank."""
        unit = rank.astype(np.int64) // self.symmetry.unit
        return unit - unit % self.shift if self.symmetry.kind == "rotation" else unit & self.mask

    def inverse(self, element: Index) -> Index:
        """Return the element that undoes each element."""
        if self.symmetry.kind == "xor":
            return element
        return np.where(element == 0, 0, self.symmetry.elements - element)

    def representatives(self) -> npt.NDArray[np.int32]:
        """Return the ranks that stand for all others, ascending."""
        ranks = np.arange(self.symmetry.workers)
        return np.flatnonzero(self.element_to(ranks) == 0).astype(np.int32)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Proven:
    """A group and all that the simulation of its representatives needs."""

    group: Group
    schedule: Schedule
    """The rows that representatives send."""
    landings: Landings
    """Per row: where its copy that lands at a representative does so."""
    link_orbit: Index
    """Per link of the cluster: the least link of its orbit."""
    link_copies: Index
    """Per link: how many members of each class that crosses its orbit once cross this very link."""

    def everywhere(self, some: Traffic) -> Traffic:
        """Return the traffic of all ranks, given that of the representatives.

        Raises: ConfigError if so many pairs of ranks talk that their counts do not fit in memory.
        """
        symmetry, copies = self.group.symmetry, self.group.copies
        if len(some.link_src) * copies > MAX_PAIRS:
            raise ConfigError(
                f"{len(some.link_src) * copies:,} pairs of ranks talk; counts of {MAX_PAIRS:,} fit in memory"
            )
        element = np.unique(self.group.element_to(np.arange(symmetry.workers)))[:, None]
        src, dst = symmetry.rank(element, some.link_src).ravel(), symmetry.rank(element, some.link_dst).ravel()
        order = np.lexsort((dst, src))
        return Traffic(
            ranks=symmetry.workers,
            messages=some.messages * copies,
            bytes=some.bytes * copies,
            message_sizes={size: count * copies for size, count in some.message_sizes.items()},
            link_src=src[order],
            link_dst=dst[order],
            link_messages=np.tile(some.link_messages, copies)[order],
            link_bytes=np.tile(some.link_bytes, copies)[order],
        )

    def load_s(self, some: Traffic, cluster: Cluster) -> npt.NDArray[np.float64]:
        """Return how long each link is busy at least with the traffic of all, given the representatives'."""
        own = link_load_s(some, cluster)
        return np.asarray(np.bincount(self.link_orbit, own, len(own))[self.link_orbit] * self.link_copies)

    def chunk_like(self) -> Index:
        """Return for each chunk the one that a map takes it to and that stands for it."""
        symmetry = self.group.symmetry
        chunks = np.arange(self.schedule.chunks)
        if not symmetry.parts:
            return chunks
        return symmetry.chunk(self.group.inverse(self.group.element_to(chunks % symmetry.workers)), chunks)


def prove(strategy: str, workers: int, params: int, cluster: Cluster, collective: str = "all-reduce") -> Proven:
    """Find the largest group of symmetries that strategy and cluster share, and prove it.

    Raises: Asymmetric saying what stands against it; ConfigError as `exchanges.build` does.
    """
    symmetry = exchanges.symmetry_of(strategy, workers, collective)
    if symmetry is None or symmetry.elements < 2:
        raise Asymmetric(f"{strategy} among {workers} workers has no symmetry to offer")
    group, link_maps = _shared(symmetry, cluster)
    ranks = group.representatives()
    _refuse_soon(exchanges.rows_of(strategy, workers, params, ranks[:1], collective), len(ranks), cluster)
    schedule = exchanges.rows_of(strategy, workers, params, ranks, collective)
    for element in group.generators():
        _prove_rows(strategy, workers, params, collective, schedule, ranks, symmetry, element)
    _prove_routes(schedule, cluster)
    back = group.inverse(group.element_to(schedule.dst))
    landings = Landings(
        dst=symmetry.rank(back, schedule.dst).astype(np.int32),
        chunk=symmetry.chunk(back, schedule.chunk).astype(np.int32),
    )
    orbit = _orbits(link_maps, group.copies)
    members = np.bincount(orbit, minlength=len(orbit))[orbit]
    return Proven(
        group=group, schedule=schedule, landings=landings, link_orbit=orbit, link_copies=group.copies // members
    )


def quotient(net: Network, proven: Proven) -> Network:
    """Let one link of each orbit stand for all: it is held by representatives, each of which counts several times.

    Raises: Asymmetric where members of one class take a link in order, and so wait for each other.
    """
    links = len(proven.link_orbit)
    where = np.arange(len(net.resources))
    where[:links] = proven.link_orbit
    copies = np.ones(len(where))
    copies[:links] = proven.link_copies
    held = where[net.routes.resources]
    if (copies[held[~net.resources.fair[held]]] > 1).any() or _twice(held, net.routes.ptr, net.resources.fair):
        raise Asymmetric(TURNS)
    resources = replace(
        net.resources,
        capacity=net.resources.capacity / copies,
        overhead_s=net.resources.overhead_s * copies,
    )
    return replace(net, resources=resources, routes=replace(net.routes, resources=held.astype(np.int32)))


def _twice(held: Index, ptr: Index, fair: npt.NDArray[np.bool_]) -> bool:
    """Return whether some route crosses an orbit of links that are taken in order twice."""
    route = np.repeat(np.arange(len(ptr) - 1), np.diff(ptr))
    crossed = np.stack((route, held))[:, ~fair[held]]
    return bool(np.unique(crossed, axis=1).shape[1] < crossed.shape[1])


def _refuse_soon(first: Schedule, representatives: int, cluster: Cluster) -> None:
    """Look at the rows of one rank before those of all representatives are built."""
    if first.rows * representatives > exchanges.MAX_ROWS:
        raise Asymmetric(
            f"{cluster.name} looks the same from so few of its ranks that {representatives} have to be simulated, "
            f"with about {first.rows * representatives:,} transfers"
        )
    _prove_routes(first, cluster)


def _prove_routes(schedule: Schedule, cluster: Cluster) -> None:
    traffic = schedule.traffic(1)
    if not cluster.route_is_unique(traffic.link_src, traffic.link_dst).all():
        raise Asymmetric(f"some of its routes on {cluster.name} are not the only ones with the fewest hops")


def _shared(symmetry: Symmetry, cluster: Cluster) -> tuple[Group, list[Index]]:
    """Return the largest group of a symmetry's maps that are a cluster's too, and the link map of each generator."""
    if symmetry.kind == "rotation":
        for shift in range(1, symmetry.elements // 2 + 1):
            if symmetry.elements % shift == 0:
                links = _link_map(symmetry, shift, cluster)
                if links is not None:
                    return Group(symmetry=symmetry, shift=shift), [links]
    else:
        found = {1 << bit: _link_map(symmetry, 1 << bit, cluster) for bit in range(symmetry.elements.bit_length() - 1)}
        mask = sum(element for element, links in found.items() if links is not None)
        if mask:
            return Group(symmetry=symmetry, mask=mask), [links for links in found.values() if links is not None]
    raise Asymmetric(f"{cluster.name} does not look the same from any two of its ranks")


def _link_map(symmetry: Symmetry, element: int, cluster: Cluster) -> Index | None:
    """Return where an element takes each link, or None if it does not take the cluster to itself."""
    devices = np.arange(len(cluster.devices))
    image = devices.copy()
    image[: symmetry.workers] = symmetry.rank(element, devices[: symmetry.workers])
    for column in (cluster.reduce_bandwidth_Bps, cluster.host_overhead_s):
        if (column[image] != column).any():
            return None
    node_map = _node_map(image, cluster)
    if node_map is None:
        return None
    tail, head, nodes = cluster.ends()
    key = tail * nodes + head
    order = np.argsort(key, kind="stable")
    wanted = node_map[tail] * nodes + node_map[head]
    place = np.minimum(np.searchsorted(key[order], wanted), len(key) - 1)
    links = order[place]
    if (key[links] != wanted).any() or (np.bincount(links, minlength=len(links)) != 1).any():
        return None
    for column in (cluster.latency_s, cluster.bandwidth_Bps, cluster.overhead_s):
        if (column[links] != column).any():
            return None
    return links


def _node_map(image: Index, cluster: Cluster) -> Index | None:
    """Extend a map of devices to switches: the j-th new neighbour of a node goes where that of its image is.

    A guess, which the links then prove or not; None where neighbours contradict each other.
    """
    tail, head, nodes = cluster.ends()
    known = np.full(nodes, -1)
    known[: len(image)] = image
    sides = [(near, far, np.argsort(near, kind="stable")) for near, far in ((tail, head), (head, tail))]
    while (known < 0).any():
        settled = known >= 0
        for near, far, order in sides:
            new = order[settled[near[order]] & (known[far[order]] < 0)]
            count = np.bincount(near[new], minlength=nodes)
            start = np.cumsum(count) - count
            target = known[near[new]]
            if (count[target] != count[near[new]]).any():
                return None
            goes_to = far[new[start[target] + np.arange(len(new)) - start[near[new]]]]
            known[far[new]] = goes_to
            if (known[far[new]] != goes_to).any():
                return None
        if settled.sum() == (known >= 0).sum():
            return None
    return known


def _orbits(maps: list[Index], copies: int) -> Index:
    """Return the least member of each link's orbit under commuting maps whose products number `copies`."""
    least = np.arange(len(maps[0]))
    for links in maps:
        reach, steps = links, 1
        while steps < copies:  # doubling: after k turns, the least of 2^k powers of the map
            least = np.minimum(least, least[reach])
            reach, steps = reach[reach], 2 * steps
    return least


def _prove_rows(
    strategy: str,
    workers: int,
    params: int,
    collective: str,
    schedule: Schedule,
    ranks: npt.NDArray[np.int32],
    symmetry: Symmetry,
    element: int,
) -> None:
    """Compare the rows that representatives' images send with the representatives' rows moved there."""
    moved = np.sort(symmetry.rank(element, ranks))
    other = exchanges.rows_of(strategy, workers, params, moved, collective)
    chunks = np.arange(schedule.chunks)
    if (schedule.chunk_elements[symmetry.chunk(element, chunks)] != schedule.chunk_elements).any():
        raise Asymmetric(_uneven(workers, params, schedule))
    for flags in (schedule.contributes, schedule.must_hold):
        there = flags[np.ix_(symmetry.rank(element, ranks), symmetry.chunk(element, chunks))]
        if (there != flags[ranks]).any():
            raise Asymmetric(f"ranks of {strategy} begin or end with different things")
    mine: list[npt.NDArray[np.signedinteger]] = [
        schedule.step,
        symmetry.rank(element, schedule.src),
        symmetry.rank(element, schedule.dst),
        symmetry.chunk(element, schedule.chunk),
        schedule.op,
        schedule.source,
    ]
    theirs = [getattr(other, name) for name in COLUMNS]
    if len(mine[0]) == len(theirs[0]):
        if all(np.array_equal(a, b) for a, b in zip(mine, theirs, strict=True)):
            return
        first, second = (np.lexsort(columns[3::-1]) for columns in (mine, theirs))
        if all(np.array_equal(a[first], b[second]) for a, b in zip(mine, theirs, strict=True)):
            return
    raise Asymmetric(f"the rows of {strategy} are not what it proposes")


def _uneven(workers: int, params: int, schedule: Schedule) -> str:
    parts = schedule.chunks
    above = -(-params // parts) * parts
    return f"{params:,} parameters make chunks of unequal size among {workers:,} ranks ({above:,} would not)"
