"""A cluster: devices, directed links and the routes between devices, read from YAML (see `clusterfile`)."""

from __future__ import annotations

import importlib.resources
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from distsim import overrides, topologies, validation, yamlfile
from distsim.clusterfile import ClusterFile
from distsim.errors import ConfigError, nearest
from distsim.routing import NoRoute, Routes, fewest_hops
from distsim.topologies import builders
from distsim.units import exact_bandwidth, exact_time, parse_bandwidth_Bps, parse_time_s, shown

if TYPE_CHECKING:
    import networkx

PACKAGE = "cluster_configs"
IDEAL_BANDWIDTH = "100 Gbit/s"
IDEAL_LATENCY = "5 us"


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Cluster:
    """Devices joined by directed links. Rank r runs on `devices[r]`. The arrays are read-only."""

    name: str
    """Shipped name, or the file's name without its ending."""
    title: str
    """One line for humans."""
    devices: Sequence[str]
    """Names of the nodes that compute; a long list makes its names only when they are asked for."""
    switches: Sequence[str]
    """Names of all other nodes."""
    tail: NDArray[np.int64]
    """Per link, the node that it leaves; devices count from 0, switches from `len(devices)`."""
    head: NDArray[np.int64]
    """Per link, the node that it enters."""
    latency_s: NDArray[np.float64]
    """Per link, seconds."""
    bandwidth_Bps: NDArray[np.float64]
    """Per link, bytes per second."""
    overhead_s: NDArray[np.float64]
    """Per link, how much longer than its bytes take each message holds the link, seconds."""
    reduce_bandwidth_Bps: NDArray[np.float64]
    """Per device, bytes of one operand added per second; inf where addition is free."""
    host_overhead_s: NDArray[np.float64]
    """Per device, seconds that its host spends on each operation that it sends."""
    sharing: Literal["fair", "fifo"] = "fair"
    """How messages on one link at the same time share it: max-min fairly, or one after the other."""
    routing: Literal["first", "ecmp"] = "first"
    """Which of several equally short routes is taken."""

    def __post_init__(self) -> None:
        for key in (
            "tail",
            "head",
            "latency_s",
            "bandwidth_Bps",
            "overhead_s",
            "reduce_bandwidth_Bps",
            "host_overhead_s",
        ):
            array = np.array(getattr(self, key), dtype=np.int64 if key in ("tail", "head") else np.float64)
            array.setflags(write=False)
            object.__setattr__(self, key, array)
        links = len(self.tail)
        assert len(self.head) == len(self.latency_s) == len(self.bandwidth_Bps) == len(self.overhead_s) == links
        assert len(self.reduce_bandwidth_Bps) == len(self.host_overhead_s) == len(self.devices) > 0
        assert max(self.tail.max(initial=0), self.head.max(initial=0)) < self.nodes
        assert (self.latency_s >= 0).all() and (self.overhead_s >= 0).all() and (self.bandwidth_Bps > 0).all()
        assert (self.reduce_bandwidth_Bps > 0).all() and (self.host_overhead_s >= 0).all()

    @property
    def nodes(self) -> int:
        """Devices and switches."""
        return len(self.devices) + len(self.switches)

    def node_name(self, node: int) -> str:
        """Return `"gpu0"`."""
        return self.devices[node] if node < len(self.devices) else self.switches[node - len(self.devices)]

    def link_name(self, link: int) -> str:
        """Return `"gpu0 -> switch"`."""
        return f"{self.node_name(int(self.tail[link]))} -> {self.node_name(int(self.head[link]))}"

    def graph(self) -> networkx.DiGraph[str]:
        """Return the graph. Nodes carry `device` (bool), edges `link`, `latency_s` and `bandwidth_Bps`."""
        import networkx

        graph: networkx.DiGraph[str] = networkx.DiGraph(name=self.name, title=self.title)
        graph.add_nodes_from(self.devices, device=True)
        graph.add_nodes_from(self.switches, device=False)
        names = (*self.devices, *self.switches)
        columns = ("latency_s", "bandwidth_Bps", "overhead_s")
        for link, (src, dst) in enumerate(zip(self.tail.tolist(), self.head.tolist(), strict=True)):
            data = {name: float(getattr(self, name)[link]) for name in columns}
            graph.add_edge(names[src], names[dst], link=link, **data)
        return graph

    def egress_Bps(self, devices: ArrayLike) -> NDArray[np.float64]:
        """Return, for each device index, the sum of the bandwidths of the links that leave it."""
        return _sum_by(self.tail, self.bandwidth_Bps, self.nodes)[np.asarray(devices, np.int64)]

    def ingress_Bps(self, devices: ArrayLike) -> NDArray[np.float64]:
        """Return, for each device index, the sum of the bandwidths of the links that enter it."""
        return _sum_by(self.head, self.bandwidth_Bps, self.nodes)[np.asarray(devices, np.int64)]

    def routes(self, src: ArrayLike, dst: ArrayLike) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        """Return the links from device index `src[i]` to `dst[i]`: `links[ptr[i]:ptr[i + 1]]`, in order.

        Fewest hops; among equals, with `routing` "first" the route of a breadth-first search that tries links in
        file order (what networkx's `single_source_shortest_path` finds on `graph()`), with "ecmp" one that a
        hash of (src, dst) picks. A device reaches itself over no link.
        ConfigError names both devices where there is no route, and for an index beyond the devices.
        """
        found = self._fewest_hops(src, dst, spread=self.routing == "ecmp")
        return found.ptr, found.links

    def route_is_unique(self, src: ArrayLike, dst: ArrayLike) -> NDArray[np.bool_]:
        """Return, per pair of device indices, whether exactly one route has the fewest hops; raises as `routes`."""
        return self._fewest_hops(src, dst, ties=True).unique

    def _fewest_hops(self, src: ArrayLike, dst: ArrayLike, ties: bool = False, spread: bool = False) -> Routes:
        sources, targets = np.asarray(src, np.int64).ravel(), np.asarray(dst, np.int64).ravel()
        assert sources.shape == targets.shape, "one destination per source"
        for index in (sources, targets):
            assert index.size == 0 or index.min() >= 0, "indices count from 0"
            if index.size and index.max() >= len(self.devices):
                raise ConfigError(
                    f"cluster {self.name} has {len(self.devices)} devices, too few for device {index.max()} "
                    "(counted from 0); expected fewer ranks or a larger cluster"
                )
        try:
            return fewest_hops(*self.ends(), sources, targets, ties=ties, spread=spread)
        except NoRoute as missing:
            raise self._no_route(int(sources[missing.args[0]]), int(targets[missing.args[0]])) from None

    def _no_route(self, src: int, dst: int) -> ConfigError:
        return ConfigError(
            f"{self.name}: no route from {self.devices[src]} to {self.devices[dst]}; "
            "expected links from every device to every other"
        )

    def check_connected(self) -> None:
        """Raise ConfigError for two devices of which one cannot reach the other."""
        rest = np.arange(1, len(self.devices))
        tail, head, nodes = self.ends()
        # Back to device 0 is away from it over links turned round: one search each way.
        for away, ends in ((True, (tail, head)), (False, (head, tail))):
            try:
                fewest_hops(*ends, nodes, np.zeros_like(rest), rest)
            except NoRoute as missing:
                other = int(rest[missing.args[0]])
                raise (self._no_route(0, other) if away else self._no_route(other, 0)) from None

    def ends(self) -> tuple[NDArray[np.int64], NDArray[np.int64], int]:
        """Return per link the indices of its two nodes (devices come first), and the number of nodes."""
        return self.tail, self.head, self.nodes


def _sum_by(index: NDArray[np.int64], values: NDArray[np.float64], length: int) -> NDArray[np.float64]:
    """Return the sum of `values` per index; `bincount` alone gives integers where there are no values."""
    return np.bincount(index, values, length).astype(np.float64)


def build(spec: ClusterFile, name: str, document: yamlfile.Document | None = None) -> Cluster:
    """Return the cluster that `spec` describes; `document` lets errors say the line.

    ConfigError for a link that is named but not defined, one that is defined but never used, an override that
    changes nothing, and devices that cannot reach each other.
    """
    where = document or yamlfile.Document(file=name, data={}, lines={(): 1})
    _check_links(spec, where)
    links = {link: entry.link() for link, entry in spec.links.items()}
    try:
        shape = spec.topology.shape(links, topologies.given(spec.topology))
    except ConfigError as error:
        raise where.error(("topology",), str(error)) from None
    try:
        changed = overrides.apply(spec.overrides, shape.cables, shape.devices, shape.switches)
    except overrides.Unmatched as error:
        message, number = error.args
        raise where.error(("overrides", number), message) from None
    if spec.reduce is None and spec.host is None:
        for number, entry in enumerate(spec.overrides):
            if entry.device is not None:
                message = (
                    "additions and the host's work are free here, so nothing slows down; expected `reduce` or `host`"
                )
                raise where.error(("overrides", number, "device"), message)
    cluster = _of(
        shape,
        changed,
        name=name,
        title=spec.title,
        reduce_Bps=spec.reduce.bandwidth.value if spec.reduce is not None else math.inf,
        host_s=spec.host.overhead.value if spec.host is not None else 0.0,
        sharing=spec.sharing,
        routing=spec.routing or spec.topology.ties(),
    )
    failed = [number for number, entry in enumerate(spec.overrides) if entry.failed]
    if failed or not spec.topology.connected():
        try:
            cluster.check_connected()
        except ConfigError as error:
            at = ("overrides", failed[0], "failed") if failed else ("topology",)
            raise where.error(at, str(error).partition(": ")[2]) from None
    return cluster


def _check_links(spec: ClusterFile, where: yamlfile.Document) -> None:
    """Refuse links that are named but not defined, and those that are defined but never used."""
    used = spec.topology.link_names()
    for path, link in used.items():
        if link not in spec.links:
            hint = yamlfile.near(link, spec.links)
            raise where.error(("topology", *path), f"unknown link {shown(link)}; expected one of `links`{hint}")
    for link in spec.links:
        if link not in used.values():
            hint = yamlfile.near(link, sorted(set(used.values())))
            raise where.error(("links", link), f"unused link; expected `topology` to name it{hint}")


def _of(
    shape: topologies.Shape, changed: overrides.Changed, *, reduce_Bps: float, host_s: float, **fields: Any
) -> Cluster:
    cables = changed.cables
    columns = {key: getattr(cables, key) for key in ("tail", "head", "latency_s", "bandwidth_Bps", "overhead_s")}
    return Cluster(
        devices=shape.devices,
        switches=shape.switches,
        reduce_bandwidth_Bps=reduce_Bps / changed.slowdown,
        host_overhead_s=host_s * changed.slowdown,
        **columns,
        **fields,
    )


def ideal(ranks: int) -> Cluster:
    """Return `ranks` devices behind one ideal switch: the default where no cluster is named."""
    if ranks < 1:
        raise ConfigError(f"{ranks} ranks; expected a whole number from 1, such as 8")
    link = topologies.Link(latency_s=parse_time_s(IDEAL_LATENCY), bandwidth_Bps=parse_bandwidth_Bps(IDEAL_BANDWIDTH))
    title = f"ideal switch: {IDEAL_BANDWIDTH} per device each way, {IDEAL_LATENCY} per message, free addition"
    shape = builders.switch(ranks, link, prefix="device")
    unchanged = overrides.apply((), shape.cables, shape.devices, shape.switches)
    return _of(shape, unchanged, name="ideal", title=title, reduce_Bps=math.inf, host_s=0.0)


class Summary(NamedTuple):
    """What a list of clusters shows of one."""

    name: str
    devices: int
    title: str


def parse(content: bytes | str, name: str, file: str) -> Cluster:
    """Return the cluster that YAML text describes; `file` is how errors name it."""
    return _from_document(yamlfile.parse(content, file), name)


def _from_document(document: yamlfile.Document, name: str) -> Cluster:
    return build(validation.validate(document, ClusterFile), name, document)


def load(name_or_path: str) -> Cluster:
    """Return a shipped cluster by name (`"dgx_h100"`), or the one in a file (a path, or ending in .yaml).

    ConfigError, one line `file:LINE: what; expected form; nearest`, for all that can be wrong with it.
    """
    return _from_document(*_document(name_or_path))


def summary(name_or_path: str) -> Summary:
    """Return a cluster's name, number of devices and title without building it; raises as `load`, for its keys."""
    document, name = _document(name_or_path)
    spec = validation.validate(document, ClusterFile)
    try:
        return Summary(name, topologies.given(spec.topology), spec.title)
    except ConfigError as error:
        raise document.error(("topology",), str(error)) from None


def _document(name_or_path: str) -> tuple[yamlfile.Document, str]:
    """Return the parsed file of a shipped name or a path, and the name of its cluster."""
    stem, ending = os.path.splitext(os.path.basename(name_or_path))
    if "/" in name_or_path or os.sep in name_or_path or ending in (".yaml", ".yml"):
        return yamlfile.read(name_or_path), stem
    if name_or_path not in shipped():
        hint = nearest(name_or_path[:60], shipped())
        raise ConfigError(
            f"unknown cluster {shown(name_or_path)}{hint}; expected a shipped name "
            "(`distsim clusters` lists them) or the path of a .yaml file"
        )
    file = importlib.resources.files(PACKAGE) / f"{name_or_path}.yaml"
    return yamlfile.parse(file.read_bytes(), f"{PACKAGE}/{name_or_path}.yaml"), name_or_path


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
