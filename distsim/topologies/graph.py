"""Directed links between numbered nodes, as columns: what every builder of a topology is made of.

Latency convention: a cable between a device (or a lower switch) and the switch above it costs its latency once
per message, on the way up; the way down costs nothing, or `down_s` where the file gives a latency per hop. So a
message device -> switch -> device takes exactly the `latency` of the file. A direct cable between two devices
costs its latency each time a message crosses it. The same holds for the overhead.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal, overload

import numpy as np
from numpy.typing import ArrayLike, NDArray

from distsim.errors import ConfigError

Indices = NDArray[np.int64]
Floats = NDArray[np.float64]

MAX_LINKS = 20_000_000
"""Most links of one cluster, about 1 GB."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Link:
    """A kind of link: one direction of a cable, bus or loopback."""

    latency_s: float
    bandwidth_Bps: float
    overhead_s: float = 0.0
    down_s: float = 0.0
    """Latency of the way down, from a switch; 0 where the latency is given end to end."""

    def down(self) -> Link:
        """Return the way down: the same bandwidth, no overhead."""
        return Link(latency_s=self.down_s, bandwidth_Bps=self.bandwidth_Bps, down_s=self.down_s)


class Names(Sequence[str]):
    """Names of nodes, made when they are asked for: a cluster may have a million."""

    __slots__ = ("_count", "_name")

    def __init__(self, count: int, name: Callable[[int], str]) -> None:
        self._count, self._name = count, name

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[str, ...]: ...
    def __getitem__(self, index: int | slice) -> str | tuple[str, ...]:
        if isinstance(index, slice):
            return tuple(self._name(i) for i in range(self._count)[index])
        return self._name(range(self._count)[index])

    def __reduce__(self) -> tuple[type[tuple[str, ...]], tuple[tuple[str, ...]]]:
        return tuple, (tuple(self),)  # functions cannot be pickled


def numbered(prefix: str, count: int) -> Names:
    """Return the names `gpu0`, `gpu1`, ..."""
    return Names(count, lambda i: f"{prefix}{i}")


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Cables:
    """Directed links as columns of equal length."""

    tail: Indices
    """The node that the link leaves: devices count from 0, switches from the number of devices."""
    head: Indices
    """The node that it enters."""
    latency_s: Floats
    bandwidth_Bps: Floats
    overhead_s: Floats


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Shape:
    """What a builder returns. Where two routes have equally many hops, links that come first are preferred."""

    devices: Sequence[str]
    switches: Sequence[str]
    cables: Cables
    nic_at: Indices | None = None
    """Per device, the node that its NIC hangs on if this is a node of a larger cluster; None: the device itself."""


def one_way(tail: ArrayLike, head: ArrayLike, link: Link, width: ArrayLike = 1.0) -> Cables:
    """Return links from each `tail` to its `head`; `width` is how many of them run side by side, as one link."""
    ends = np.broadcast_arrays(np.asarray(tail, np.int64), np.asarray(head, np.int64), np.asarray(width, np.float64))
    tails, heads, widths = (each.ravel() for each in ends)
    return Cables(
        tail=tails,
        head=heads,
        latency_s=np.full(len(tails), link.latency_s),
        bandwidth_Bps=link.bandwidth_Bps * widths,
        overhead_s=np.full(len(tails), link.overhead_s),
    )


def direct(a: ArrayLike, b: ArrayLike, link: Link, width: ArrayLike = 1.0) -> Cables:
    """Return cables between equals: each way costs the latency."""
    return join(one_way(a, b, link, width), one_way(b, a, link, width))


def upward(below: ArrayLike, above: ArrayLike, link: Link, width: ArrayLike = 1.0) -> Cables:
    """Return cables to switches: the way up costs the latency, the way down what the link says of it."""
    return join(one_way(below, above, link, width), one_way(above, below, link.down(), width))


def join(*parts: Cables) -> Cables:
    """Return the links of all parts, in order."""
    return Cables(
        tail=np.concatenate([each.tail for each in parts]),
        head=np.concatenate([each.head for each in parts]),
        latency_s=np.concatenate([each.latency_s for each in parts]),
        bandwidth_Bps=np.concatenate([each.bandwidth_Bps for each in parts]),
        overhead_s=np.concatenate([each.overhead_s for each in parts]),
    )


def limited(links: int) -> None:
    """Refuse, before any memory is taken, what would have too many links."""
    if links > MAX_LINKS:
        raise ConfigError(f"{links:,} links; expected a cluster of at most {MAX_LINKS:,}")


def copies(shape: Shape, count: int, prefix: str) -> Shape:
    """Return `count` copies of a shape side by side, not joined; all devices come before all switches."""
    devices, switches = len(shape.devices), len(shape.switches)
    cables, number = shape.cables, np.arange(count)[:, None]
    limited(count * len(cables.tail))

    def placed(nodes: Indices) -> Indices:
        return np.where(nodes < devices, number * devices + nodes, (count - 1) * devices + number * switches + nodes)

    def named(names: Sequence[str]) -> Names:
        size = len(names)
        return Names(count * size, lambda i: f"{prefix}{i // size}.{names[i % size]}")

    return Shape(
        devices=named(shape.devices),
        switches=named(shape.switches),
        cables=Cables(
            tail=placed(cables.tail).ravel(),
            head=placed(cables.head).ravel(),
            latency_s=np.tile(cables.latency_s, count),
            bandwidth_Bps=np.tile(cables.bandwidth_Bps, count),
            overhead_s=np.tile(cables.overhead_s, count),
        ),
        nic_at=placed(np.arange(devices) if shape.nic_at is None else shape.nic_at).ravel(),
    )


def nodes(
    count: int,
    node: Shape,
    nics: int,
    fabric: Shape,
    *,
    pcie: Link | None = None,
    rails: Literal["joined", "separate"] | None = None,
) -> Shape:
    """Return `count` nodes, each a copy of `node`, whose NICs are the devices of `fabric`.

    Device i of a node uses NIC `i * nics // devices`, over a `pcie` cable of its own, or one as fast as the NIC.
    A NIC is two nodes, `nic0.out` and `nic0.in`, lest two devices that share it talk through it. Its place in the
    fabric: node by node; with `rails="joined"` NIC by NIC, first NIC 0 of every node; with `rails="separate"`
    every NIC index has a copy of the fabric to itself.
    """
    if rails == "separate":
        fabric = copies(fabric, nics, "rail")
    inside, net, ports = copies(node, count, "node"), fabric.cables, count * nics
    per_node = len(node.devices)
    assert len(fabric.devices) == ports and inside.nic_at is not None
    limited(len(inside.cables.tail) + len(net.tail) + 3 * count * per_node)

    def place(node: Indices, nic: Indices) -> Indices:
        return nic * count + node if rails else node * nics + nic

    def name(i: int) -> str:
        port, side = i % ports, ("out", "in")[i // ports]
        of, nic = (port % count, port // count) if rails else divmod(port, nics)
        return f"node{of}.nic{nic}.{side}"

    out = len(inside.devices) + len(inside.switches)  # first node of all NICs' ways out, then those in
    to_nic = place(np.arange(count)[:, None], np.arange(per_node) * nics // per_node).ravel()
    # Devices behind one PCIe switch share its cable to the NIC.
    at, nic = np.divmod(np.unique(inside.nic_at * ports + to_nic), ports)
    # A port that nothing leaves, or enters, carries nothing that way: any bandwidth will do.
    port_out_Bps, port_in_Bps = (
        np.maximum(np.bincount(end, net.bandwidth_Bps, ports)[:ports], 1e-3) for end in (net.tail, net.head)
    )
    as_fast, no_delay = Link(latency_s=0.0, bandwidth_Bps=1.0), pcie is None
    link = as_fast if pcie is None else pcie
    # Where NICs are joined directly, as in a torus, what comes in for another node goes out again.
    through = np.flatnonzero(np.bincount(net.tail, minlength=ports)[:ports] > 1)
    placed = Cables(
        tail=net.tail + np.where(net.tail < ports, out, out + ports),
        head=net.head + out + ports,
        latency_s=net.latency_s,
        bandwidth_Bps=net.bandwidth_Bps,
        overhead_s=net.overhead_s,
    )
    return Shape(
        devices=inside.devices,
        switches=_chain(inside.switches, Names(2 * ports, name), fabric.switches),
        cables=join(
            inside.cables,
            one_way(at, out + nic, link, port_out_Bps[nic] if no_delay else 1.0),
            one_way(out + ports + nic, at, link.down(), port_in_Bps[nic] if no_delay else 1.0),
            one_way(out + ports + through, out + through, as_fast, port_in_Bps[through]),
            placed,
        ),
    )


def _chain(*parts: Sequence[str]) -> Names:
    """Return the names of all parts, in order."""
    starts = [0, *accumulate(len(part) for part in parts)]

    def name(i: int) -> str:
        which = next(k for k in range(len(parts)) if i < starts[k + 1])
        return parts[which][i - starts[which]]

    return Names(starts[-1], name)
