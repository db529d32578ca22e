"""The catalogue of topologies: pure functions from counts and links to a `Shape`."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from distsim.topologies.graph import Link, Names, Shape, direct, join, limited, numbered, one_way, upward

DGX1_NVLINKS = {
    **{(0, 1): 1, (0, 2): 1, (0, 3): 2, (1, 2): 2, (1, 3): 1, (2, 3): 2},
    **{(4, 5): 1, (4, 6): 1, (4, 7): 2, (5, 6): 2, (5, 7): 1, (6, 7): 2},
    **{(0, 4): 2, (1, 5): 2, (2, 6): 1, (3, 7): 1},
}
"""NVLinks between the GPUs of a DGX-1 with V100 (6 a GPU), as `nvidia-smi topo -m` prints them (NV1, NV2);
such a print is in microsoft/msccl, tests/test_topologies.py."""


def switch(devices: int, link: Link, *, prefix: str = "gpu") -> Shape:
    """Every device has its own link, each way, to one switch that never limits."""
    return Shape(
        devices=numbered(prefix, devices), switches=("switch",), cables=upward(np.arange(devices), devices, link)
    )


def bus(devices: int, link: Link) -> Shape:
    """All messages share one link, as in the kernel's loopback: device -> bus.in -> bus.out -> device."""
    all_devices, enter, leave = np.arange(devices), devices, devices + 1
    free = Link(latency_s=0.0, bandwidth_Bps=link.bandwidth_Bps)
    cables = join(one_way(enter, leave, link), one_way(all_devices, enter, free), one_way(leave, all_devices, free))
    return Shape(devices=numbered("process", devices), switches=("bus.in", "bus.out"), cables=cables)


def full(devices: int, link: Link) -> Shape:
    """A direct link between every two devices."""
    limited(devices * (devices - 1))
    return Shape(devices=numbered("gpu", devices), switches=(), cables=direct(*np.triu_indices(devices, 1), link))


def ring(devices: int, link: Link) -> Shape:
    """Every device has a direct link to the next one, and the last to the first."""
    return torus((devices,), link)


def mesh(size: Sequence[int], link: Link) -> Shape:
    """A grid of `size` devices along each axis, each with direct links to its neighbours."""
    return _grid(size, link, wraps=False)


def torus(size: Sequence[int], link: Link) -> Shape:
    """A grid whose axes close to rings; along an axis of two devices the one link is not doubled."""
    return _grid(size, link, wraps=True)


def _grid(size: Sequence[int], link: Link, wraps: bool) -> Shape:
    # Links of the first axis come first, so that routes go along the axes in order.
    index = np.arange(math.prod(size)).reshape(size)
    limited(2 * len(size) * index.size)
    cables = []
    for axis, length in enumerate(size):
        near = index if wraps and length > 2 else index.take(np.arange(length - 1), axis)
        cables.append(direct(near, np.roll(index, -1, axis).take(np.arange(near.shape[axis]), axis), link))

    def name(i: int) -> str:
        return "gpu" + ".".join(str(int(at)) for at in np.unravel_index(i, tuple(size)))

    return Shape(devices=Names(index.size, name), switches=(), cables=join(*cables))


def hypercube(dimensions: int, link: Link) -> Shape:
    """2 ** `dimensions` devices; those whose numbers differ in one bit have a direct link."""
    limited(dimensions << dimensions)
    number = np.arange(1 << dimensions)
    lower = [number[number >> bit & 1 == 0] for bit in range(dimensions)]
    cables = [direct(ends, ends | 1 << bit, link) for bit, ends in enumerate(lower)]
    return Shape(devices=numbered("gpu", len(number)), switches=(), cables=join(*cables))


def cube_mesh(link: Link) -> Shape:
    """The 8 GPUs of a DGX-1 with V100: two quads, joined corner to corner; some cables are double."""
    a, b = np.array(list(DGX1_NVLINKS)).T
    return Shape(devices=numbered("gpu", 8), switches=(), cables=direct(a, b, link, width=list(DGX1_NVLINKS.values())))


def pcie(devices: int, sockets: int, switches: int, link: Link, socket_link: Link | None) -> Shape:
    """Devices below PCIe switches (none: directly) below the root complex of a socket; sockets are joined directly.

    Devices, and switches, are divided evenly. NICs hang where devices do, on a PCIe switch or a root complex.
    """
    all_devices, all_switches, roots = np.arange(devices), np.arange(switches), np.arange(sockets)
    first_root = devices + switches
    if switches:
        above = devices + all_devices * switches // devices
        cables = [upward(all_devices, above, link)]
        cables.append(upward(devices + all_switches, first_root + all_switches * sockets // switches, link))
    else:
        above = first_root + all_devices * sockets // devices
        cables = [upward(all_devices, above, link)]
    if socket_link is not None:
        a, b = np.triu_indices(sockets, 1)
        cables.append(direct(first_root + roots[a], first_root + roots[b], socket_link))
    names = (*numbered("pcie", switches), *numbered("root", sockets))
    return Shape(devices=numbered("gpu", devices), switches=names, cables=join(*cables), nic_at=above)


def fat_tree(
    devices: int,
    devices_per_leaf: int,
    spines: int,
    link: Link,
    *,
    oversubscription: float = 1.0,
    level_latency_s: float = 0.0,
    leaves_per_pod: int | None = None,
    cores: int = 0,
    core_oversubscription: float = 1.0,
) -> Shape:
    """Leaves of devices; every leaf is joined to every spine of its pod, and the pods by cores.

    The cables from a leaf up carry together what its devices can send, divided by `oversubscription`; likewise
    from the spines of a pod to the cores. A message that goes up to a spine (a core) takes `level_latency_s`
    (twice that) longer. Without `leaves_per_pod` there is one pod and no core. Spine k of every pod is joined to
    the k-th group of `cores // spines` cores (Al-Fares, Loukissas and Vahdat 2008).
    """
    leaves = -(-devices // devices_per_leaf)
    per_pod = leaves_per_pod or leaves
    pods, group = -(-leaves // per_pod), cores // spines
    limited(2 * (devices + leaves * spines + pods * cores))
    leaf, first_spine = np.arange(leaves)[:, None], devices + leaves
    up_Bps = devices_per_leaf * link.bandwidth_Bps / oversubscription / spines
    up = Link(latency_s=level_latency_s, bandwidth_Bps=up_Bps)
    cables = [
        upward(np.arange(devices), devices + np.arange(devices) // devices_per_leaf, link),
        upward(devices + leaf, first_spine + leaf // per_pod * spines + np.arange(spines), up),
    ]
    if cores:
        top = Link(latency_s=level_latency_s, bandwidth_Bps=per_pod * up_Bps / core_oversubscription / group)
        spine = first_spine + np.arange(pods * spines)[:, None]
        core = first_spine + pods * spines + np.arange(spines * group).reshape(spines, group)
        cables.append(upward(spine, np.tile(core, (pods, 1)), top))

    def name(i: int) -> str:
        if i < leaves:
            return f"leaf{i}"
        i -= leaves
        return f"spine{i}" if i < pods * spines else f"core{i - pods * spines}"

    switches = Names(leaves + pods * spines + cores, name)
    return Shape(devices=numbered("gpu", devices), switches=switches, cables=join(*cables))
