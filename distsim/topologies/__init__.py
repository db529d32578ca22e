"""Shapes of clusters: how `topology` in a cluster file is written. Builders are in `builders.py`.

    {kind: switch, devices: 8, link: nvlink}                one switch that never limits
    {kind: bus, devices: 4, link: loopback}                 one link that all messages share
    {kind: full, devices: 4, link: nvlink}                  a link between every two devices
    {kind: ring, devices: 8, link: nvlink}
    {kind: mesh, size: [4, 4], link: ici}                   1 to 3 axes; `torus` closes them
    {kind: hypercube, dimensions: 3, link: nvlink}
    {kind: cube-mesh, link: nvlink2}                        DGX-1 with V100; `link` is one NVLink
    {kind: pcie, devices: 8, sockets: 2, switches: 4, link: pcie4, socket_link: upi}
    {kind: fat-tree, devices: 64, devices_per_leaf: 16, spines: 4, oversubscription: 2, link: ndr}
    {kind: edges, devices: [a, b], edges: [{from: a, to: b, link: nvlink, both: true}]}
    {kind: nodes, nodes: 16, node: TOPOLOGY, nics: 8, fabric: TOPOLOGY}

`kind: nodes` composes: `node` is the inside of each node and `fabric` joins the NICs, both any of the other
kinds. The devices of the fabric are the NICs, so its `devices` are not given. Optional: `pcie`, the link between a
device and its NIC (as fast as the NIC if not given), and `rails`, the order of NICs in the fabric: node by node if
not given, `joined` rail by rail (leaves of a fat tree then serve one NIC index), `separate` a fabric for each NIC
index. Routes have the fewest hops whatever they lead through: from a device to a NIC index that is not its own,
the way may change rails inside a node, before it leaves or after it arrives.

Latency: see `graph.py`. A message that passes the spines of a fat tree pays the `level_latency` once more than one
that stays below a leaf, and one that passes its cores twice; for the same cost at each hop, up and down, give the
link's `hop_latency` in place of `latency`.
"""

from __future__ import annotations

from distsim.topologies.graph import Link, Names, Shape
from distsim.topologies.models import Topology, given

__all__ = ["Link", "Names", "Shape", "Topology", "given"]
