"""Shapes of clusters: for each `topology.kind` its keys, and a pure function to devices and directed edges.

Latency convention: a kind of link costs its `latency` once per message, paid on the way up (to the switch);
the way down, from a switch to a device, costs nothing. So a message device -> switch -> device takes exactly
the `latency` of the file, and one over a direct edge between two devices too. The same holds for `overhead`.
An edge that is given one way only has what it says.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Literal, NamedTuple

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationInfo,
    field_validator,
)

from distsim.errors import ConfigError
from distsim.units import shown
from distsim.yamlfile import near

MAX_COUNT = 65_536
"""Largest count in a file: beyond it a typo is likelier than a cluster."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Link:
    """One direction of a cable, bus or loopback."""

    latency_s: float
    bandwidth_Bps: float
    overhead_s: float = 0.0

    def without_delay(self) -> Link:
        """Return the way back: the same bandwidth, at no latency and no overhead."""
        return Link(latency_s=0.0, bandwidth_Bps=self.bandwidth_Bps)


class Edge(NamedTuple):
    """A directed link between two nodes of the graph."""

    src: str
    dst: str
    link: Link


class Shape(NamedTuple):
    """What a builder returns. Where two routes have equally many hops, the one over earlier edges wins."""

    devices: list[str]
    edges: list[Edge]


def parse_count(text: object) -> int:
    """Return a whole number from 1 to MAX_COUNT; ConfigError otherwise."""
    digits = str(text) if isinstance(text, str | int) and not isinstance(text, bool) else ""
    if digits.isascii() and digits.isdecimal() and len(digits) <= 9 and 1 <= int(digits) <= MAX_COUNT:
        return int(digits)
    raise ConfigError(f"{shown(text)} is not a count; expected a whole number from 1 to {MAX_COUNT}")


def parse_flag(text: object) -> bool:
    """Return True or False from `true` or `false`; ConfigError otherwise."""
    if isinstance(text, bool) or text in ("true", "false"):
        return text in (True, "true")
    raise ConfigError(f"{shown(text)} is neither true nor false; expected `true` or `false`")


def _ends(device: str, switch: str, link: Link) -> Iterator[Edge]:
    """A device's cable to a switch: latency on the way up, none on the way down."""
    yield Edge(device, switch, link)
    yield Edge(switch, device, link.without_delay())


def switch(devices: int, link: Link, *, prefix: str = "gpu", hub: str = "switch") -> Shape:
    """Every device has its own link, each way, to one switch that never limits."""
    names = [f"{prefix}{i}" for i in range(devices)]
    return Shape(names, [edge for name in names for edge in _ends(name, hub, link)])


def bus(devices: int, link: Link, *, prefix: str = "process") -> Shape:
    """All messages share one link, as in the kernel's loopback: device -> bus.in -> bus.out -> device."""
    names = [f"{prefix}{i}" for i in range(devices)]
    edges = [Edge("bus.in", "bus.out", link)]
    for name in names:
        edges.append(Edge(name, "bus.in", link.without_delay()))
        edges.append(Edge("bus.out", name, link.without_delay()))
    return Shape(names, edges)


def nodes(
    nodes: int,
    devices_per_node: int,
    inside: Link | None,
    nics_per_node: int,
    nic: Link,
    pcie: Link | None = None,
) -> Shape:
    """Nodes of devices behind an inner switch; NICs join the nodes through a network that never limits.

    Device i of a node uses NIC `i * nics_per_node // devices_per_node`. A message between nodes costs the
    NIC's latency, plus that of PCIe where given, once end to end. `inside` is None for nodes of one device.
    """
    pcie = pcie or nic.without_delay()
    names: list[str] = []
    edges: list[Edge] = []
    for node in range(nodes):
        local = [f"node{node}.gpu{i}" for i in range(devices_per_node)]
        # Inner links come first: two devices that share a NIC are two hops apart over it as well.
        if inside is not None:
            edges += [edge for name in local for edge in _ends(name, f"node{node}.switch", inside)]
        for i, name in enumerate(local):
            edges += _ends(name, f"node{node}.nic{i * nics_per_node // devices_per_node}", pcie)
        for i in range(nics_per_node):
            edges += _ends(f"node{node}.nic{i}", "network", nic)
        names += local
    return Shape(names, edges)


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


Count = Annotated[int, BeforeValidator(parse_count)]
Name = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1, max_length=100)]


class SwitchTopology(_Model):
    """`{kind: switch, devices: 8, link: nvlink}`"""

    kind: Literal["switch"]
    devices: Count = Field(examples=["8"])
    link: Name = Field(examples=["nvlink"])

    def link_names(self) -> dict[tuple[str | int, ...], str]:
        return {("link",): self.link}

    def shape(self, links: Mapping[str, Link]) -> Shape:
        return switch(self.devices, links[self.link], hub=f"{self.link}.switch")


class BusTopology(_Model):
    """`{kind: bus, devices: 4, link: loopback}`"""

    kind: Literal["bus"]
    devices: Count = Field(examples=["4"])
    link: Name = Field(examples=["loopback"])

    def link_names(self) -> dict[tuple[str | int, ...], str]:
        return {("link",): self.link}

    def shape(self, links: Mapping[str, Link]) -> Shape:
        return bus(self.devices, links[self.link])


class NodesTopology(_Model):
    """`{kind: nodes, nodes: 2, devices_per_node: 8, inside: nvlink, nics_per_node: 8, nic: ndr}`"""

    kind: Literal["nodes"]
    nodes: Count = Field(examples=["2"])
    devices_per_node: Count = Field(examples=["8"])
    inside: Name | None = Field(default=None, examples=["nvlink"], validate_default=True)
    nics_per_node: Count = Field(examples=["8"])
    nic: Name = Field(examples=["ndr"])
    pcie: Name | None = Field(default=None, examples=["pcie"])

    @field_validator("devices_per_node")
    @classmethod
    def _few_enough(cls, value: int, info: ValidationInfo) -> int:
        total = value * info.data.get("nodes", 1)
        if total > MAX_COUNT:
            raise ConfigError(f"{total} devices in all; expected nodes x devices_per_node <= {MAX_COUNT}")
        return value

    @field_validator("inside")
    @classmethod
    def _when_needed(cls, value: str | None, info: ValidationInfo) -> str | None:
        per_node = info.data.get("devices_per_node")
        if value is None and per_node is not None and per_node > 1:
            raise ConfigError(f"{per_node} devices per node need a link between them; expected `inside: nvlink`")
        if value is not None and per_node == 1:
            raise ConfigError("a node of 1 device has no link inside; expected no key 'inside'")
        return value

    @field_validator("nics_per_node")
    @classmethod
    def _no_idle_nic(cls, value: int, info: ValidationInfo) -> int:
        per_node = info.data.get("devices_per_node")
        if per_node is not None and value > per_node:
            raise ConfigError(f"{value} NICs for {per_node} devices; expected at most one NIC per device")
        return value

    def link_names(self) -> dict[tuple[str | int, ...], str]:
        given = {"inside": self.inside, "nic": self.nic, "pcie": self.pcie}
        return {(key,): name for key, name in given.items() if name is not None}

    def shape(self, links: Mapping[str, Link]) -> Shape:
        inside = links[self.inside] if self.inside is not None else None
        pcie = links[self.pcie] if self.pcie is not None else None
        return nodes(self.nodes, self.devices_per_node, inside, self.nics_per_node, links[self.nic], pcie)


class EdgeEntry(_Model):
    """`{from: gpu0, to: sw, link: nvlink, both: true}`; `both` adds the way back."""

    src: Name = Field(alias="from", examples=["gpu0"])
    dst: Name = Field(alias="to", examples=["switch"])
    link: Name = Field(examples=["nvlink"])
    both: Annotated[bool, BeforeValidator(parse_flag)] = Field(default=False, examples=["true"])


class EdgesTopology(_Model):
    """`{kind: edges, devices: [gpu0, gpu1], edges: [{from: gpu0, to: gpu1, link: nvlink, both: true}]}`"""

    kind: Literal["edges"]
    devices: tuple[Name, ...] = Field(min_length=1, max_length=MAX_COUNT, examples=["[gpu0, gpu1]"])
    edges: tuple[EdgeEntry, ...] = Field(min_length=1, examples=["[{from: gpu0, to: gpu1, link: nvlink, both: true}]"])

    @field_validator("devices")
    @classmethod
    def _no_twins(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        name, count = Counter(value).most_common(1)[0]
        if count > 1:
            raise ConfigError(f"the device {shown(name)} is listed {count} times; expected each name once")
        return value

    @field_validator("edges")
    @classmethod
    def _sound(cls, value: tuple[EdgeEntry, ...], info: ValidationInfo) -> tuple[EdgeEntry, ...]:
        pairs = [pair for e in value for pair in ([(e.src, e.dst)] + [(e.dst, e.src)] * e.both)]
        for (src, dst), count in Counter(pairs).items():
            if src == dst:
                raise ConfigError(f"the edge {src} -> {dst} leads nowhere; expected two different nodes")
            if count > 1:
                raise ConfigError(f"the edge {src} -> {dst} is given {count} times; expected once")
        neighbours: dict[str, set[str]] = {}
        for src, dst in pairs:
            neighbours.setdefault(src, set()).add(dst)
            neighbours.setdefault(dst, set()).add(src)
        devices = info.data.get("devices", tuple(neighbours))
        for node, others in neighbours.items():
            if node not in devices and len(others) < 2:  # a switch nobody passes through: most likely a typo
                others = {*others, node}
                candidates = [name for name in dict.fromkeys((*devices, *neighbours)) if name not in others]
                raise ConfigError(
                    f"{shown(node)} is neither a device nor a switch between two nodes; expected a name from "
                    f"`devices` or a switch with two links or more{near(node, candidates)}"
                )
        return value

    def link_names(self) -> dict[tuple[str | int, ...], str]:
        return {("edges", i, "link"): edge.link for i, edge in enumerate(self.edges)}

    def shape(self, links: Mapping[str, Link]) -> Shape:
        devices = set(self.devices)
        edges: list[Edge] = []
        for entry in self.edges:
            link = links[entry.link]
            if not entry.both:  # one way, given for itself: at what it says
                edges.append(Edge(entry.src, entry.dst, link))
                continue
            for src, dst in ((entry.src, entry.dst), (entry.dst, entry.src)):
                way_down = src not in devices and dst in devices
                edges.append(Edge(src, dst, link.without_delay() if way_down else link))
        return Shape(list(self.devices), edges)


Topology = Annotated[SwitchTopology | BusTopology | NodesTopology | EdgesTopology, Field(discriminator="kind")]
