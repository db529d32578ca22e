"""A cluster: devices, directed links and the routes between devices, read from YAML.

title: "DGX H100: 8 GPUs behind NVSwitch"
source: "where the shape and the counts come from"
topology: {kind: switch, devices: 8, link: nvlink}
links:
  nvlink:
    bandwidth: {value: "450 GB/s", source: "..."}   # per direction
    latency: {value: "2 us", source: "..."}         # end to end, see topologies.py
reduce:                                             # optional; without it additions are free
  bandwidth: {value: "1 TB/s", source: "..."}       # bytes of one operand that a device adds per second
"""

from __future__ import annotations

import importlib.resources
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, StringConstraints

from distsim import routing, topologies, validation, yamlfile
from distsim.errors import ConfigError, nearest
from distsim.units import exact_bandwidth, exact_time, parse_bandwidth_Bps, parse_time_s, shown

if TYPE_CHECKING:
    import networkx

PACKAGE = "cluster_configs"
IDEAL_BANDWIDTH = "100 Gbit/s"
IDEAL_LATENCY = "5 us"


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


Text = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1)]


def _sane(unit: str, least: float, most: float) -> AfterValidator:
    """Refuse numbers that no cluster has and that would overflow sums and quotients of a simulation."""

    def within(value: float) -> float:
        if value != 0 and not least <= value <= most:
            raise ConfigError(f"{value:g} {unit} is out of range; expected {least:g} to {most:g} {unit}")
        return value

    return AfterValidator(within)


class TimeQuantity(_Model):
    """`{value: "2 us", source: "..."}`"""

    value: Annotated[float, BeforeValidator(parse_time_s), _sane("s", 0, 1e6)] = Field(examples=['"2 us"'])
    source: Text = Field(examples=['"where the number comes from"'])


class BandwidthQuantity(_Model):
    """`{value: "450 GB/s", source: "..."}`"""

    value: Annotated[float, BeforeValidator(parse_bandwidth_Bps), _sane("B/s", 1e-3, 1e18)] = Field(
        examples=['"450 GB/s"']
    )
    source: Text = Field(examples=['"where the number comes from"'])


class LinkEntry(_Model):
    """One kind of link; the bandwidth is that of one direction."""

    bandwidth: BandwidthQuantity = Field(examples=['{value: "450 GB/s", source: "..."}'])
    latency: TimeQuantity = Field(examples=['{value: "2 us", source: "..."}'])
    overhead: TimeQuantity | None = Field(default=None, examples=['{value: "2 us", source: "..."}'])


class ReduceEntry(_Model):
    """How fast one device adds an array to another, in bytes of one operand per second."""

    bandwidth: BandwidthQuantity = Field(examples=['{value: "1 TB/s", source: "..."}'])


class ClusterFile(_Model):
    """The file as a whole."""

    title: Text = Field(max_length=200, examples=['"what this cluster is"'])
    source: Text = Field(examples=['"where the shape and the counts come from"'])
    topology: topologies.Topology = Field(examples=["{kind: switch, devices: 8, link: nvlink}"])
    links: dict[topologies.Name, LinkEntry] = Field(examples=["a mapping of names to links"])
    reduce: ReduceEntry | None = Field(default=None, examples=['{bandwidth: {value: "1 TB/s", source: "..."}}'])


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Cluster:
    """Devices joined by directed links. Rank r runs on `devices[r]`. The arrays are read-only."""

    name: str
    """Shipped name, or the file's name without its ending."""
    title: str
    """One line for humans."""
    devices: tuple[str, ...]
    """Names of the nodes that compute; all other nodes are switches."""
    link_src: tuple[str, ...]
    """Per link, the node that it leaves."""
    link_dst: tuple[str, ...]
    """Per link, the node that it enters."""
    latency_s: NDArray[np.float64]
    """Per link, seconds."""
    bandwidth_Bps: NDArray[np.float64]
    """Per link, bytes per second."""
    overhead_s: NDArray[np.float64]
    """Per link, how much longer than its bytes take each message holds the link, seconds."""
    reduce_bandwidth_Bps: NDArray[np.float64]
    """Per device, bytes of one operand added per second; inf where addition is free."""

    def __post_init__(self) -> None:
        for key in ("latency_s", "bandwidth_Bps", "overhead_s", "reduce_bandwidth_Bps"):
            array = np.array(getattr(self, key), dtype=np.float64)
            array.setflags(write=False)
            object.__setattr__(self, key, array)
        links = len(self.link_src)
        assert len(self.link_dst) == len(self.latency_s) == len(self.bandwidth_Bps) == links
        assert len(self.overhead_s) == links
        assert len(self.reduce_bandwidth_Bps) == len(self.devices) > 0
        assert (self.latency_s >= 0).all() and (self.overhead_s >= 0).all() and (self.bandwidth_Bps > 0).all()

    def link_name(self, link: int) -> str:
        """Return `"gpu0 -> switch"`."""
        return f"{self.link_src[link]} -> {self.link_dst[link]}"

    def graph(self) -> networkx.DiGraph[str]:
        """Return the graph. Nodes carry `device` (bool), edges `link`, `latency_s` and `bandwidth_Bps`."""
        import networkx

        graph: networkx.DiGraph[str] = networkx.DiGraph(name=self.name, title=self.title)
        graph.add_nodes_from(self.devices, device=True)
        for link, (src, dst) in enumerate(zip(self.link_src, self.link_dst, strict=True)):
            for node in (src, dst):
                if node not in graph:
                    graph.add_node(node, device=False)
            columns = ("latency_s", "bandwidth_Bps", "overhead_s")
            graph.add_edge(src, dst, link=link, **{name: float(getattr(self, name)[link]) for name in columns})
        return graph

    def egress_Bps(self, devices: ArrayLike) -> NDArray[np.float64]:
        """Return, for each device index, the sum of the bandwidths of the links that leave it."""
        tail, _, nodes = self.ends()
        return _sum_by(tail, self.bandwidth_Bps, nodes)[np.asarray(devices, np.int64)]

    def ingress_Bps(self, devices: ArrayLike) -> NDArray[np.float64]:
        """Return, for each device index, the sum of the bandwidths of the links that enter it."""
        _, head, nodes = self.ends()
        return _sum_by(head, self.bandwidth_Bps, nodes)[np.asarray(devices, np.int64)]

    def routes(self, src: ArrayLike, dst: ArrayLike) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        """Return the links from device index `src[i]` to `dst[i]`: `links[ptr[i]:ptr[i + 1]]`, in order.

        Fewest hops; among equals, the route of a breadth-first search that tries links in file order (what
        networkx's `single_source_shortest_path` finds on `graph()`). A device reaches itself over no link.
        ConfigError names both devices where there is no route, and for an index beyond the devices.
        """
        sources, targets = np.asarray(src, np.int64).ravel(), np.asarray(dst, np.int64).ravel()
        assert sources.shape == targets.shape, "one destination per source"
        for index in (sources, targets):
            assert index.size == 0 or index.min() >= 0, "indices count from 0"
            if index.size and index.max() >= len(self.devices):
                raise ConfigError(
                    f"cluster {self.name} has {len(self.devices)} devices, too few for device {index.max()} "
                    "(counted from 0); expected fewer ranks or a larger cluster"
                )
        tail, head, nodes = self.ends()
        try:
            return routing.fewest_hops(tail, head, nodes, sources, targets)
        except routing.NoRoute as missing:
            pair = missing.args[0]
            a, b = self.devices[sources[pair]], self.devices[targets[pair]]
            raise ConfigError(
                f"{self.name}: no route from {a} to {b}; expected links from every device to every other"
            ) from None

    def ends(self) -> tuple[NDArray[np.int64], NDArray[np.int64], int]:
        """Return per link the indices of its two nodes (devices come first), and the number of nodes."""
        index = {name: i for i, name in enumerate(self.devices)}
        for name in (*self.link_src, *self.link_dst):
            index.setdefault(name, len(index))
        tail = np.fromiter((index[name] for name in self.link_src), np.int64, len(self.link_src))
        head = np.fromiter((index[name] for name in self.link_dst), np.int64, len(self.link_dst))
        return tail, head, len(index)


def _sum_by(index: NDArray[np.int64], values: NDArray[np.float64], length: int) -> NDArray[np.float64]:
    """Return the sum of `values` per index; `bincount` alone gives integers where there are no values."""
    return np.bincount(index, values, length).astype(np.float64)


def build(spec: ClusterFile, name: str, document: yamlfile.Document | None = None) -> Cluster:
    """Return the cluster that `spec` describes; `document` lets errors say the line.

    ConfigError for a link that is named but not defined, one that is defined but never used, and devices that
    cannot reach each other.
    """
    where = document or yamlfile.Document(file=name, data={}, lines={(): 1})
    used = spec.topology.link_names()
    for path, link in used.items():
        if link not in spec.links:
            hint = yamlfile.near(link, spec.links)
            raise where.error(("topology", *path), f"unknown link {shown(link)}; expected one of `links`{hint}")
    for link in spec.links:
        if link not in used.values():
            hint = yamlfile.near(link, sorted(set(used.values())))
            raise where.error(("links", link), f"unused link; expected `topology` to name it{hint}")
    links = {
        link: topologies.Link(
            latency_s=entry.latency.value,
            bandwidth_Bps=entry.bandwidth.value,
            overhead_s=entry.overhead.value if entry.overhead is not None else 0.0,
        )
        for link, entry in spec.links.items()
    }
    reduce_Bps = spec.reduce.bandwidth.value if spec.reduce is not None else math.inf
    cluster = _from_shape(spec.topology.shape(links), name, spec.title, reduce_Bps)
    if isinstance(spec.topology, topologies.EdgesTopology):  # the other kinds connect all by construction
        rest = np.arange(1, len(cluster.devices))
        try:
            for src, dst in ((np.zeros_like(rest), rest), (rest, np.zeros_like(rest))):
                cluster.routes(src, dst)
        except ConfigError as error:
            raise where.error(("topology", "edges"), str(error).partition(": ")[2]) from None
    return cluster


def _from_shape(shape: topologies.Shape, name: str, title: str, reduce_Bps: float) -> Cluster:
    return Cluster(
        name=name,
        title=title,
        devices=tuple(shape.devices),
        link_src=tuple(edge.src for edge in shape.edges),
        link_dst=tuple(edge.dst for edge in shape.edges),
        latency_s=np.array([edge.link.latency_s for edge in shape.edges]),
        bandwidth_Bps=np.array([edge.link.bandwidth_Bps for edge in shape.edges]),
        overhead_s=np.array([edge.link.overhead_s for edge in shape.edges]),
        reduce_bandwidth_Bps=np.full(len(shape.devices), reduce_Bps),
    )


def ideal(ranks: int) -> Cluster:
    """Return `ranks` devices behind one ideal switch: the default where no cluster is named."""
    if ranks < 1:
        raise ConfigError(f"{ranks} ranks; expected a whole number from 1, such as 8")
    link = topologies.Link(latency_s=parse_time_s(IDEAL_LATENCY), bandwidth_Bps=parse_bandwidth_Bps(IDEAL_BANDWIDTH))
    title = f"ideal switch: {IDEAL_BANDWIDTH} per device each way, {IDEAL_LATENCY} per message, free addition"
    return _from_shape(topologies.switch(ranks, link, prefix="device"), "ideal", title, math.inf)


def parse(content: bytes | str, name: str, file: str) -> Cluster:
    """Return the cluster that YAML text describes; `file` is how errors name it."""
    return _from_document(yamlfile.parse(content, file), name)


def _from_document(document: yamlfile.Document, name: str) -> Cluster:
    return build(validation.validate(document, ClusterFile), name, document)


def load(name_or_path: str) -> Cluster:
    """Return a shipped cluster by name (`"dgx_h100"`), or the one in a file (a path, or ending in .yaml).

    ConfigError, one line `file:LINE: what; expected form; nearest`, for all that can be wrong with it.
    """
    stem, ending = os.path.splitext(os.path.basename(name_or_path))
    if "/" in name_or_path or os.sep in name_or_path or ending in (".yaml", ".yml"):
        return _from_document(yamlfile.read(name_or_path), stem)
    if name_or_path not in shipped():
        hint = nearest(name_or_path[:60], shipped())
        raise ConfigError(
            f"unknown cluster {shown(name_or_path)}{hint}; expected a shipped name "
            "(`distsim clusters` lists them) or the path of a .yaml file"
        )
    file = importlib.resources.files(PACKAGE) / f"{name_or_path}.yaml"
    return parse(file.read_bytes(), name_or_path, f"{PACKAGE}/{name_or_path}.yaml")


def shipped() -> list[str]:
    """Return the names of the configurations that travel with the package, sorted."""
    files = (entry.name for entry in importlib.resources.files(PACKAGE).iterdir())
    return sorted(name.removesuffix(".yaml") for name in files if name.endswith(".yaml"))


def time_quantity(seconds: float, source: str) -> dict[str, str]:
    """Return `{value, source}` for `to_yaml`; loading it gives back the same float."""
    return {"value": exact_time(seconds), "source": source}


def bandwidth_quantity(Bps: float, source: str) -> dict[str, str]:
    """Return `{value, source}` for `to_yaml`; loading it gives back the same float."""
    return {"value": exact_bandwidth(Bps), "source": source}


def to_yaml(data: Mapping[str, Any], comment: str = "") -> str:
    """Return the text of a cluster file, with `comment` as its first lines; ConfigError if it would not load.

    `data` has the keys of the file: dicts, lists, str, int and bool; numbers through `time_quantity` and
    `bandwidth_quantity`.
    """
    text = yamlfile.dump(data, comment)
    parse(text, "cluster", "to_yaml")
    return text
