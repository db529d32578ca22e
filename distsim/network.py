"""A cluster as the engine sees it: resources (links, processors, hosts) and the routes that transfers take."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from distsim.cluster import Cluster
from distsim.places import named, numbers, places
from distsim.schedule import Ints, Schedule
from distsim.taskgraph import Floats, Resources, Routes

Sharing = Literal["fair", "fifo"]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Network:
    """Links come first among the resources, then each rank's processor, then each rank's host."""

    cluster: Cluster
    resources: Resources
    routes: Routes
    """One for each ordered pair of ranks that talks, then one for each processor and each host."""
    route_of_rows: tuple[Ints, ...]
    """Per schedule: the route of each row."""
    processor_route: int
    host_route: int
    """Those of rank 0; rank r's are r further on."""


def network(schedules: tuple[Schedule, ...], cluster: Cluster, sharing: Sharing | None = None) -> Network:
    """Find what transfers between ranks hold; rank r runs on device r of the cluster.

    Links are shared fairly or taken in order (`sharing`, by default the cluster's). A processor's capacity is
    in bytes of one operand added per second, a host's in seconds per second.
    """
    ranks = schedules[0].ranks
    talking = [(schedule.src, schedule.dst) for schedule in schedules]
    columns, count = places(ranks, *talking)
    talks, src, dst = named(count, columns, *talking)
    number = np.zeros(count, np.int32)
    number[talks] = numbers(len(talks))
    ptr, links = cluster.routes(src, dst)
    pairs, every, count = len(src), np.arange(ranks), len(cluster.bandwidth_Bps)
    fair = (sharing or cluster.sharing) == "fair"
    return Network(
        cluster=cluster,
        resources=Resources(
            capacity=np.concatenate((cluster.bandwidth_Bps, cluster.reduce_bandwidth_Bps[:ranks], np.ones(ranks))),
            overhead_s=np.concatenate((cluster.overhead_s, np.zeros(2 * ranks))),
            fair=np.arange(count + 2 * ranks) < (count if fair else 0),
            describe=lambda resource: _name(cluster, resource, ranks),
        ),
        routes=Routes(
            ptr=np.concatenate((ptr, ptr[-1] + 1 + np.arange(2 * ranks))).astype(np.int64),
            resources=np.concatenate((links, count + every, count + ranks + every)).astype(np.int32),
            latency_s=np.concatenate((along(np.add, cluster.latency_s, ptr, links), np.zeros(2 * ranks))),
        ),
        route_of_rows=tuple(number[pair] for pair in columns),
        processor_route=pairs,
        host_route=pairs + ranks,
    )


def along(combine: np.ufunc, values: Floats, ptr: npt.NDArray[np.integer], links: npt.NDArray[np.integer]) -> Floats:
    """Combine a column of the links along each route; every route has links."""
    return np.asarray(combine.reduceat(values[links], ptr[:-1])) if len(links) else np.zeros(0)


def _name(cluster: Cluster, resource: int, ranks: int) -> str:
    links = len(cluster.bandwidth_Bps)
    if resource < links:
        return f"link {cluster.link_name(resource)}"
    which, rank = divmod(resource - links, ranks)
    return f"{('processor', 'host')[which]} of rank {rank}"
