"""Routes with the fewest hops between many pairs of nodes at once."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from distsim import compiled

Indices = NDArray[np.int64]

_NEVER = 1 << 62


class NoRoute(Exception):
    """There is no route for the pair whose index is the argument."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Routes:
    """The route of pair i is `links[ptr[i]:ptr[i + 1]]`, in order."""

    ptr: NDArray[np.int32]
    links: NDArray[np.int32]
    unique: NDArray[np.bool_]
    """Per pair, whether no other route is as short; only where ties were asked for."""


def fewest_hops(
    tail: Indices, head: Indices, nodes: int, src: Indices, dst: Indices, *, ties: bool = False, spread: bool = False
) -> Routes:
    """Return a route from node `src[i]` to `dst[i]`; link k leads from `tail[k]` to `head[k]`. Raises NoRoute.

    Among equally short routes: the one that takes the earliest link at each node, from the source on, which is
    what a breadth-first search finds. With `spread`, going back from the destination, at each node a hash of
    (src, dst) picks one of the links by which an equally short route may arrive. `ties` counts the routes.
    """
    out_ptr, by_tail = np.zeros(nodes + 1, np.int64), np.argsort(tail, kind="stable")
    np.cumsum(np.bincount(tail, minlength=nodes), out=out_ptr[1:])
    into = np.bincount(head, minlength=nodes)
    only_in = np.full(nodes, -1)
    only_in[head] = np.arange(len(head))
    # A node with one link out, or with one link in, leaves no choice: search only between their other ends.
    # Behind a single switch that leaves nothing to search, however many devices there are.
    start, end = src.copy(), dst.copy()
    first, last = np.full(len(src), -1), np.full(len(src), -1)
    forced = (np.diff(out_ptr)[start] == 1) & (start != end)
    first[forced] = by_tail[out_ptr[start[forced]]]
    start[forced] = head[first[forced]]
    forced = (into[end] == 1) & (start != end)
    last[forced] = only_in[end[forced]]
    end[forced] = tail[last[forced]]

    order = np.argsort(start, kind="stable")
    starts, begin = np.unique(start[order], return_index=True)
    arguments = (
        *(starts, np.append(begin, len(src)), end[order], first[order], last[order], _flow(src, dst)[order]),
        *(out_ptr, by_tail, head, tail),
        *(np.full(nodes, value) for value in (-1, -1, -1, 0, 0, 0)),  # what the search knows of each node
        *(np.full(len(tail), -1), ties or spread, spread),
    )
    links, hops, unique, missing = compiled.call(_search, len(starts) * (nodes + len(tail)), *arguments)
    if missing >= 0:
        raise NoRoute(int(order[missing]))
    lengths = np.zeros(len(src), np.int64)
    lengths[order] = hops
    ptr = np.concatenate(([0], np.cumsum(lengths)))
    if (np.diff(order) < 0).any():  # from the order of the search to that of the pairs
        begins = np.zeros(len(src), np.int64)
        begins[order] = np.cumsum(hops) - hops
        links = links[np.arange(ptr[-1]) + np.repeat(begins - ptr[:-1], lengths)]
    alone = np.zeros(len(src), np.bool_)
    alone[order] = unique
    return Routes(ptr=ptr.astype(np.int32), links=links, unique=alone)


def _flow(src: Indices, dst: Indices) -> Indices:
    """Return a hash of each pair below 2**62: the finaliser of splitmix64 (Steele, Lea and Flood 2014)."""
    mixed = (src.astype(np.uint64) << np.uint64(32)) + dst.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(factor)
    return ((mixed ^ (mixed >> np.uint64(31))) >> np.uint64(2)).astype(np.int64)


def _search(  # type: ignore[no-untyped-def]  # of lists where it is interpreted, of arrays where it is compiled
    starts, pair_ptr, end, first, last, flow, out_ptr, out_link, head, tail,
    distance, wanted, arrived, queue, ways, choices, earlier, ties, spread,
):  # fmt: skip
    """Search breadth-first from each of `starts`, until all ends of its pairs are reached.

    Per node reached: `distance`; `arrived`, the link that first (with ties: last) led to it, from which `earlier`
    leads to the other ones; `choices`, how many these are; `ways`, how many routes there are (2: two or more).
    """
    links, hops, unique = [], [], []  # type: ignore[var-annotated]
    for s in range(len(starts)):
        missing = 0
        for i in range(pair_ptr[s], pair_ptr[s + 1]):
            if wanted[end[i]] != s:
                wanted[end[i]] = s
                missing += 1
        start = starts[s]
        distance[start], ways[start], queue[0] = 0, 1, start
        filled, taken = 1, 0
        limit = _NEVER  # nodes from this distance on need no look any more
        if wanted[start] == s:
            missing -= 1
            if missing == 0:
                limit = 0
        while taken < filled and distance[queue[taken]] < limit:
            node = queue[taken]
            taken += 1
            for k in range(out_ptr[node], out_ptr[node + 1]):
                link = out_link[k]
                there = head[link]
                if distance[there] < 0:
                    distance[there], ways[there] = distance[node] + 1, ways[node]
                    arrived[there], earlier[link], choices[there] = link, -1, 1
                    queue[filled] = there
                    filled += 1
                    if wanted[there] == s:
                        missing -= 1
                        if missing == 0:
                            # Ties are complete when all nodes that are one hop nearer have been looked at.
                            limit = distance[there] if ties else 0
                            if not ties:
                                break
                elif ties and distance[there] == distance[node] + 1:
                    ways[there] = 2
                    earlier[link] = arrived[there]
                    arrived[there] = link
                    choices[there] += 1
        for i in range(pair_ptr[s], pair_ptr[s + 1]):
            node = end[i]
            if distance[node] < 0:
                return np.array(links, np.int32), np.array(hops, np.int64), np.array(unique, np.bool_), i
            before = len(links)
            if first[i] >= 0:
                links.append(first[i])
            for _ in range(distance[node]):
                links.append(-1)
            unique.append(ways[node] < 2)
            at, draw = len(links), flow[i]
            while node != start:
                link = arrived[node]
                if ties and choices[node] > 1:
                    skip = choices[node] - 1  # the first that was found
                    if spread:
                        draw = (draw * 2862933555777941757 + 3037000493) & (_NEVER - 1)
                        skip = (draw >> 24) % choices[node]
                    for _ in range(skip):
                        link = earlier[link]
                at -= 1
                links[at] = link
                node = tail[link]
            if last[i] >= 0:
                links.append(last[i])
            hops.append(len(links) - before)
        for k in range(filled):
            distance[queue[k]] = -1
    return np.array(links, np.int32), np.array(hops, np.int64), np.array(unique, np.bool_), -1
