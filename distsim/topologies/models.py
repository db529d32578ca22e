"""The keys of each `topology.kind` in a cluster file, and the shape that they stand for."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections import Counter
from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import Field, ValidationInfo, field_validator

from distsim.errors import ConfigError
from distsim.topologies import builders
from distsim.topologies.graph import Cables, Link, Shape, join, one_way
from distsim.topologies.graph import nodes as join_nodes
from distsim.units import shown
from distsim.validation import MAX_COUNT, Count, Fields, Flag, Name, Ratio, TimeQuantity, one_of
from distsim.yamlfile import near

Links = Mapping[str, Link]
Key = tuple[str | int, ...]


class _Kind(Fields):
    """What every kind of topology answers. `count` is None where the number of devices has to be given."""

    def count(self) -> int | None:
        return getattr(self, "devices", None)

    def link_names(self) -> dict[Key, str]:
        """Return which kinds of link are used, by the path of the key that names them."""
        return {(key,): getattr(self, key) for key in ("link", "socket_link", "pcie") if getattr(self, key, None)}

    @abstractmethod
    def shape(self, links: Links, devices: int) -> Shape:
        """Build it with these links; `devices` is `count()` where that is not None."""

    def ties(self) -> Literal["first", "ecmp"]:
        """Return how routes are chosen among equally short ones where the file does not say."""
        return "first"

    def connected(self) -> bool:
        """Return whether the shape joins all devices whatever its numbers."""
        return True


_FLAT = {"switch": builders.switch, "bus": builders.bus, "full": builders.full, "ring": builders.ring}


class FlatTopology(_Kind):
    """`{kind: switch, devices: 8, link: nvlink}`; likewise bus, full and ring."""

    kind: Literal["switch", "bus", "full", "ring"]
    devices: Count | None = Field(default=None, examples=["8"])
    link: Name = Field(examples=["nvlink"])

    def shape(self, links: Links, devices: int) -> Shape:
        return _FLAT[self.kind](devices, links[self.link])


class GridTopology(_Kind):
    """`{kind: torus, size: [4, 4, 4], link: ici}`; a mesh has no links from its last devices to its first."""

    kind: Literal["mesh", "torus"]
    size: tuple[Count, ...] = Field(min_length=1, max_length=3, examples=["[4, 4]"])
    link: Name = Field(examples=["ici"])

    @field_validator("size")
    @classmethod
    def _few_enough(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        if math.prod(value) > MAX_COUNT:
            raise ConfigError(f"{math.prod(value)} devices in all; expected at most {MAX_COUNT}")
        return value

    def count(self) -> int:
        return math.prod(self.size)

    def shape(self, links: Links, devices: int) -> Shape:
        build = builders.torus if self.kind == "torus" else builders.mesh
        return build(self.size, links[self.link])


class HypercubeTopology(_Kind):
    """`{kind: hypercube, dimensions: 3, link: nvlink}`: 2 ** dimensions devices."""

    kind: Literal["hypercube"]
    dimensions: Count = Field(examples=["3"])
    link: Name = Field(examples=["nvlink"])

    @field_validator("dimensions")
    @classmethod
    def _few_enough(cls, value: int) -> int:
        if value > 20:
            raise ConfigError(f"{value} dimensions; expected at most 20, which is {MAX_COUNT} devices")
        return value

    def count(self) -> int:
        return 1 << self.dimensions

    def shape(self, links: Links, devices: int) -> Shape:
        return builders.hypercube(self.dimensions, links[self.link])


class CubeMeshTopology(_Kind):
    """`{kind: cube-mesh, link: nvlink2}`: the 8 GPUs of a DGX-1 with V100; `link` is one NVLink."""

    kind: Literal["cube-mesh"]
    link: Name = Field(examples=["nvlink2"])

    def count(self) -> int:
        return 8

    def shape(self, links: Links, devices: int) -> Shape:
        return builders.cube_mesh(links[self.link])


class PcieTopology(_Kind):
    """`{kind: pcie, devices: 8, sockets: 2, switches: 4, link: pcie4, socket_link: upi}`

    Without `switches` devices hang directly on the root complex of their socket.
    """

    kind: Literal["pcie"]
    devices: Count = Field(examples=["8"])
    sockets: Count = Field(default=1, examples=["2"])
    switches: Count | None = Field(default=None, examples=["4"])
    link: Name = Field(examples=["pcie4"])
    socket_link: Name | None = Field(default=None, examples=["upi"], validate_default=True)

    @field_validator("sockets", "switches")
    @classmethod
    def _even(cls, value: int | None, info: ValidationInfo) -> int | None:
        for below, above in ((info.data.get("devices"), value), (value, info.data.get("sockets"))):
            if below is not None and above is not None and below % above:
                raise ConfigError(f"{below} cannot be divided evenly among {above}; expected a multiple")
        return value

    @field_validator("socket_link")
    @classmethod
    def _when_needed(cls, value: str | None, info: ValidationInfo) -> str | None:
        sockets = info.data.get("sockets", 1)
        if value is None and sockets > 1:
            raise ConfigError(f"{sockets} sockets need a link between them; expected `socket_link: upi`")
        if value is not None and sockets == 1:
            raise ConfigError("one socket has no link to another; expected no key 'socket_link'")
        return value

    def shape(self, links: Links, devices: int) -> Shape:
        socket_link = links[self.socket_link] if self.socket_link is not None else None
        return builders.pcie(devices, self.sockets, self.switches or 0, links[self.link], socket_link)


class FatTreeTopology(_Kind):
    """`{kind: fat-tree, devices: 64, devices_per_leaf: 16, spines: 4, oversubscription: 2, link: ndr}`

    `leaves_per_pod: 4, cores: 8` add a third level; `spines` then counts those of one pod.
    """

    kind: Literal["fat-tree"]
    devices: Count | None = Field(default=None, examples=["64"])
    devices_per_leaf: Count = Field(examples=["16"])
    spines: Count = Field(examples=["4"])
    oversubscription: Ratio = Field(default=1.0, examples=["2"])
    leaves_per_pod: Count | None = Field(default=None, examples=["4"])
    cores: Count | None = Field(default=None, examples=["8"], validate_default=True)
    core_oversubscription: Ratio = Field(default=1.0, examples=["2"])
    level_latency: TimeQuantity | None = Field(default=None, examples=['{value: "1 us", source: "..."}'])
    link: Name = Field(examples=["ndr"])

    @field_validator("cores")
    @classmethod
    def _together(cls, value: int | None, info: ValidationInfo) -> int | None:
        if (value is None) != (info.data.get("leaves_per_pod") is None):
            raise ConfigError("a third level needs both; expected `leaves_per_pod: 4, cores: 8` or neither")
        spines = info.data.get("spines", 1)
        if value is not None and value % spines:
            raise ConfigError(
                f"{value} cores cannot be divided among the {spines} spines of a pod; expected a multiple"
            )
        return value

    @field_validator("core_oversubscription")
    @classmethod
    def _with_cores(cls, value: float, info: ValidationInfo) -> float:
        if info.data.get("cores") is None:
            raise ConfigError("there are no cores; expected `leaves_per_pod: 4, cores: 8` beside it")
        return value

    def ties(self) -> Literal["first", "ecmp"]:
        return "ecmp"

    def shape(self, links: Links, devices: int) -> Shape:
        return builders.fat_tree(
            devices,
            self.devices_per_leaf,
            self.spines,
            links[self.link],
            oversubscription=self.oversubscription,
            level_latency_s=self.level_latency.value if self.level_latency is not None else 0.0,
            leaves_per_pod=self.leaves_per_pod,
            cores=self.cores or 0,
            core_oversubscription=self.core_oversubscription,
        )


class EdgeEntry(Fields):
    """`{from: gpu0, to: sw, link: nvlink, both: true}`; `both` adds the way back."""

    src: Name = Field(alias="from", examples=["gpu0"])
    dst: Name = Field(alias="to", examples=["switch"])
    link: Name = Field(examples=["nvlink"])
    both: Flag = Field(default=False, examples=["true"])


class EdgesTopology(_Kind):
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

    def count(self) -> int:
        return len(self.devices)

    def link_names(self) -> dict[Key, str]:
        return {("edges", i, "link"): edge.link for i, edge in enumerate(self.edges)}

    def connected(self) -> bool:
        return False

    def shape(self, links: Links, devices: int) -> Shape:
        numbers = {name: i for i, name in enumerate(self.devices)}
        for entry in self.edges:
            for name in (entry.src, entry.dst):
                numbers.setdefault(name, len(numbers))
        cables: list[Cables] = []
        for entry in self.edges:
            src, dst, link = numbers[entry.src], numbers[entry.dst], links[entry.link]
            if not entry.both:  # one way, given for itself: at what it says
                cables.append(one_way(src, dst, link))
                continue
            for a, b in ((src, dst), (dst, src)):
                way_down = b < devices <= a
                cables.append(one_way(a, b, link.down() if way_down else link))
        return Shape(devices=self.devices, switches=tuple(numbers)[devices:], cables=join(*cables))


AnyPlain = (
    FlatTopology | GridTopology | HypercubeTopology | CubeMeshTopology | PcieTopology | FatTreeTopology | EdgesTopology
)
"""Every kind but `nodes`: a cluster, the inside of a node, or the fabric between nodes."""
Plain = Annotated[AnyPlain, Field(discriminator="kind")]


class NodesTopology(_Kind):
    """`{kind: nodes, nodes: 16, node: {kind: switch, devices: 8, link: nv}, nics: 8, fabric: {kind: switch, link: ib}}`

    `node` and `fabric` are topologies themselves: the devices of the fabric are the NICs of all nodes.
    """

    kind: Literal["nodes"]
    nodes: Count = Field(examples=["16"])
    node: Plain = Field(examples=["{kind: switch, devices: 8, link: nvlink}"])
    nics: Count = Field(examples=["8"])
    pcie: Name | None = Field(default=None, examples=["pcie5"])
    rails: Annotated[Literal["joined", "separate"] | None, one_of("joined", "separate")] = Field(
        default=None, examples=["joined"]
    )
    fabric: Plain = Field(examples=["{kind: switch, link: ndr}"])

    @field_validator("node")
    @classmethod
    def _counted(cls, value: _Kind, info: ValidationInfo) -> _Kind:
        total = given(value) * info.data.get("nodes", 1)
        if total > MAX_COUNT:
            raise ConfigError(f"{total} devices in all; expected nodes x devices of a node <= {MAX_COUNT}")
        return value

    @field_validator("nics")
    @classmethod
    def _no_idle_nic(cls, value: int, info: ValidationInfo) -> int:
        node = info.data.get("node")
        if node is not None and value > node.count():
            raise ConfigError(f"{value} NICs for {node.count()} devices; expected at most one NIC per device")
        return value

    @field_validator("fabric")
    @classmethod
    def _fits(cls, value: _Kind, info: ValidationInfo) -> _Kind:
        count, nodes, nics = value.count(), info.data.get("nodes"), info.data.get("nics")
        if count is None or nodes is None or nics is None:
            return value
        ports = _ports(nodes, nics, info.data.get("rails"))
        if isinstance(value, FlatTopology | FatTreeTopology):
            raise ConfigError(f"the fabric joins the {ports} NICs; expected no key 'devices'")
        if count != ports:
            raise ConfigError(f"the fabric joins {count} devices, but there are {ports} NICs; expected {ports}")
        return value

    def count(self) -> int:
        return self.nodes * given(self.node)

    def link_names(self) -> dict[Key, str]:
        inner = {
            (key, *path): name for key in ("node", "fabric") for path, name in getattr(self, key).link_names().items()
        }
        return {**super().link_names(), **inner}

    def ties(self) -> Literal["first", "ecmp"]:
        return self.fabric.ties()

    def connected(self) -> bool:
        return self.node.connected() and self.fabric.connected()

    def shape(self, links: Links, devices: int) -> Shape:
        return join_nodes(
            self.nodes,
            self.node.shape(links, given(self.node)),
            self.nics,
            self.fabric.shape(links, _ports(self.nodes, self.nics, self.rails)),
            pcie=links[self.pcie] if self.pcie is not None else None,
            rails=self.rails,
        )


def _ports(nodes: int, nics: int, rails: str | None) -> int:
    """Return how many NICs one fabric joins."""
    return nodes if rails == "separate" else nodes * nics


def given(topology: _Kind) -> int:
    """Return the number of devices; ConfigError where the file has to give it and does not."""
    count = topology.count()
    if count is None:
        raise ConfigError("the key 'devices' is missing; expected devices: 8")
    return count


Topology = Annotated[AnyPlain | NodesTopology, Field(discriminator="kind")]
