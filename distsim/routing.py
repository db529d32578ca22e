"""Routes with the fewest hops between many pairs of nodes at once, by array operations."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

_SEARCH_STATES = 4_000_000
"""Pairs of (start, node) that one search holds at once, about 60 MB."""

Indices = NDArray[np.int64]


class NoRoute(Exception):
    """There is no route for the pair whose index is the argument."""


def fewest_hops(
    tail: Indices, head: Indices, nodes: int, src: Indices, dst: Indices
) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Return routes in CSR form: from node `src[i]` to `dst[i]` over `links[ptr[i]:ptr[i + 1]]`, in order.

    Link k leads from `tail[k]` to `head[k]`. Ties go to what a breadth-first search finds that tries links in
    ascending order. Raises NoRoute.
    """
    by_tail, by_head = np.argsort(tail, kind="stable"), np.argsort(head, kind="stable")
    out_ptr = np.searchsorted(tail[by_tail], np.arange(nodes + 1))
    in_ptr = np.searchsorted(head[by_head], np.arange(nodes + 1))
    # A node with one link out, or with one link in, leaves no choice: search only between their other ends.
    # Behind a single switch that leaves nothing to search, however many devices there are.
    start, end = src.copy(), dst.copy()
    first, last = np.full(len(src), -1), np.full(len(src), -1)
    forced = (np.diff(out_ptr)[start] == 1) & (start != end)
    first[forced] = by_tail[out_ptr[start[forced]]]
    start[forced] = head[first[forced]]
    forced = (np.diff(in_ptr)[end] == 1) & (start != end)
    last[forced] = by_head[in_ptr[end[forced]]]
    end[forced] = tail[last[forced]]

    columns = [last]  # links of every route from its end backwards; -1 where a route has none
    todo = np.flatnonzero(start != end)
    starts, block_of = np.unique(start[todo], return_inverse=True)
    block = max(1, _SEARCH_STATES // max(nodes, 1))
    for low in range(0, len(starts), block):
        parent = _search(starts[low : low + block], head, nodes, by_tail, out_ptr)
        mine = (low <= block_of) & (block_of < low + block)
        rows, root, here = todo[mine], block_of[mine] - low, end[todo[mine]]
        hop = 0
        while rows.size:
            hop += 1
            if hop == len(columns):
                columns.append(np.full(len(src), -1))
            link = parent[root, here]
            if (link < 0).any():
                raise NoRoute(int(rows[link < 0][0]))
            columns[hop][rows] = link
            here = tail[link]
            going = here != start[rows]
            rows, root, here = rows[going], root[going], here[going]
    table = np.stack([*columns, first])[::-1].T
    used = table >= 0
    ptr = np.concatenate(([0], np.cumsum(used.sum(axis=1))))
    return ptr.astype(np.int32), table[used].astype(np.int32)


def _search(starts: Indices, head: Indices, nodes: int, by_tail: Indices, out_ptr: Indices) -> NDArray[np.int32]:
    """Search breadth-first from all `starts`: per (start, node) the link that first reached it, or -1."""
    parent = np.full(len(starts) * nodes, -1, np.int32)
    seen = np.zeros(len(starts) * nodes, np.bool_)
    frontier = np.arange(len(starts)) * nodes + starts  # states: start number * nodes + node
    seen[frontier] = True
    first = np.empty(len(seen), np.int64)
    degree = np.diff(out_ptr)
    while frontier.size:
        node = frontier % nodes
        count = degree[node]
        within = np.arange(count.sum()) - np.repeat(np.cumsum(count) - count, count)
        links = by_tail[np.repeat(out_ptr[node], count) + within]
        state = np.repeat(frontier - node, count) + head[links]
        fresh = ~seen[state]
        links, state = links[fresh], state[fresh]
        numbers = np.arange(len(state))
        first[state[::-1]] = numbers[::-1]  # the last write wins: the earliest link to each state
        chosen = first[state] == numbers
        frontier = state[chosen]
        parent[frontier] = links[chosen]
        seen[frontier] = True
    return parent.reshape(len(starts), nodes)
