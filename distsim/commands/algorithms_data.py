"""What `distsim algorithms` says: how each algorithm goes, what it is best at, its source, options and formulas."""

from __future__ import annotations

from typing import Any, get_args, get_origin

from distsim import exchanges, formulas
from distsim.collectives import PERSONALISED
from distsim.exchanges.spec import options_of

SOURCES = {
    "all-to-all": "no paper: it is what the collective says",
    "bruck": 'Bruck et al., "Efficient algorithms for all-to-all communications in multiport message-passing '
    'systems", IEEE Trans. Parallel Distrib. Syst. 8, 1997',
    "chain": 'Pjesivac-Grbovic et al., "Performance analysis of MPI collective operations", Cluster Computing 10, 2007',
    "direct": 'Thakur, Rabenseifner and Gropp, "Optimization of collective communication operations in MPICH", '
    "Int. J. High Perform. Comput. Appl. 19, 2005 (the exchange of long messages, without its rounds)",
    "double-tree": 'Sanders, Speck and Träff, "Two-tree algorithms for full bandwidth broadcast, reduction and scan", '
    "Parallel Computing 35, 2009",
    "halving-doubling": 'Rabenseifner, "Optimization of collective reduction operations", ICCS 2004; Thakur, '
    "Rabenseifner and Gropp 2005",
    "hierarchical": 'Jia et al., "Highly scalable deep learning training system with mixed-precision", '
    "arXiv:1807.11205, 2018",
    "pairwise": "Thakur, Rabenseifner and Gropp 2005",
    "parameter-server": 'Li et al., "Scaling distributed machine learning with the parameter server", OSDI 2014',
    "recursive-doubling": "Thakur, Rabenseifner and Gropp 2005",
    "ring": 'Patarasuk and Yuan, "Bandwidth optimal all-reduce algorithms for clusters of workstations", '
    "J. Parallel Distrib. Comput. 69, 2009",
    "torus": 'Mikami et al., "Massively distributed SGD: ImageNet/ResNet-50 training in a flash", '
    "arXiv:1811.05233, 2018",
    "tree": "Thakur, Rabenseifner and Gropp 2005 (binomial tree)",
}
"""By strategy."""

OPTIONS = {
    "across": "what goes between nodes",
    "bidirectional": "each channel is two rings, one each way",
    "channels": "rings side by side, each with a block of the array of its own",
    "inside": "what goes inside a node",
    "node": "ranks of a node, which are consecutive",
    "placement": "servers are ranks of their own, or among the workers",
    "radix": "a rank of a full tree has radix - 1 children on each level below it",
    "rows": "rows of the torus",
    "segments": "pieces of each chunk, which follow each other: a rank passes one on while the next comes in",
    "servers": "each keeps an equal share of the parameters",
}
"""What options mean, each the same wherever it occurs."""

CHOSEN = {"node": "largest divisor of n up to 8", "rows": "largest divisor of n up to its root"}
"""Defaults that depend on n."""

_SERVES_ALL = (
    "A rank sends to all of its children at once over its one link, so that times add up down the tree: textbooks, "
    "where a rank serves one child after another, have log2(n) (a + S/B), and so has `--posting rounds`."
)


def _meet(longer: str) -> str:
    """Return how much longer a large array takes where messages of the two levels are not kept apart."""
    return f"Eager messages of both levels meet on the ideal switch, and large arrays take {longer} in rounds."


PARAGRAPHS: dict[str, dict[str, str]] = {
    "all-reduce": {
        "all-to-all": "Every rank sends its whole array to every other one, and each sums for itself. One latency, the "
        "least there is, and the most bytes: best for arrays of a few kilobytes, and only on a network that "
        "carries all pairs of ranks at once.",
        "direct": "Every rank sends part c of its array to rank c, which sums what it gets and sends the sum to "
        "everybody. Two latencies and as few bytes as the ring: on the ideal switch only all-to-all can beat it, for "
        "small arrays. Best inside a node with a switch; every pair of ranks talks at once, which networks between "
        "nodes rarely carry.",
        "double-tree": "Two binary trees carry half of the array each, up to the root and down again; no rank has "
        "children in both. Made for segments, which follow each other: then all links are busy. "
        "With `double-tree:segments=64`, 1 GiB takes 16 ranks a fifth longer than a ring; with "
        "`double-tree:segments=8`, 1 MiB takes 64 ranks less than half as long. Without them a rank waits for whole "
        "halves.",
        "halving-doubling": "In round k, ranks r and r xor 2^k exchange half of what they still sum; then all gather "
        "by the same way back. The ring's bytes in log2(n) rounds each way: the first choice for middle and large "
        "arrays where n is a power of two. Otherwise the ranks beyond it hand their whole array to a neighbour "
        "first, and large arrays take longer than in a ring.",
        "hierarchical": "Reduce-scatter inside each node, all-reduce across nodes among ranks of equal place, each "
        "with its share, all-gather inside each node. Only the g-th part of a node's bytes crosses each of its network "
        "links, and ranks of one node do not compete. For clusters of nodes with fast links inside.",
        "parameter-server": "Workers push gradients to a server, it updates, and workers pull the parameters. Two "
        "latencies, but all bytes go through the server's link; `servers=n` spreads them. For few workers, and "
        "where optimizer state is to be kept in one place.",
        "recursive-doubling": "In round k, ranks r and r xor 2^k exchange their running sums, whole. The fewest rounds "
        "in which every rank has one partner at a time: best for small arrays where a network does not carry all "
        "pairs of ranks at once. If n is no power of two, the ranks beyond it hand their array over first and get "
        "the sum last.",
        "ring": "Parts of the array go around a ring twice, to be summed and to be shared. Every rank sends the least "
        "that any all-reduce can and talks to one neighbour only: best for large arrays, on any network. Its "
        "2(n-1) latencies make it slow for small arrays among many ranks. `channels` uses several network "
        "adapters of a node; one ring sends while messages of others are under way.",
        "torus": "Reduce-scatter along rows, all-reduce along columns, all-gather along rows, all around rings. The "
        "ring's bytes with about 4 sqrt(n) latencies in place of 2n; every rank talks to its neighbours in row and "
        "column alone. For grids and tori, and for large arrays among many ranks.",
        "tree": "A binomial tree sums towards rank 0, and the sum comes back down. Fewest messages; log2(n) latencies "
        "each way. For small arrays, and where messages are costly. " + _SERVES_ALL,
    },
    "reduce-scatter": {
        "direct": "Every rank sends part c of its array to rank c. One latency and the least bytes: best where the "
        "network carries all pairs of ranks at once.",
        "halving-doubling": "Ranks exchange half of what they still sum, farthest first. The least bytes in log2(n) "
        "rounds where n is a power of two.",
        "hierarchical": "Inside nodes everybody sends the parts of each place to the rank at that place; then rings "
        "across nodes. For clusters of nodes with fast links inside. " + _meet("up to an eighth longer than"),
        "ring": "Part c starts behind rank c and is summed on its way around the ring. The least bytes, and one "
        "neighbour only: for large arrays, on any network.",
        "torus": "Rings along rows, then along columns: the least bytes, with fewer latencies than one ring. "
        + _meet("up to a third longer than"),
    },
    "all-gather": {
        "direct": "Every rank sends its part to everybody. One latency and the least bytes: best where the network "
        "carries all pairs of ranks at once.",
        "halving-doubling": "Ranks exchange all that they have, nearest first, so that it doubles each time. The "
        "least bytes in log2(n) rounds where n is a power of two.",
        "hierarchical": "Rings across nodes; whatever arrives goes to all ranks of the node at once, while the rings "
        "go on. For clusters of nodes with fast links inside. " + _meet("up to nearly twice as long as"),
        "ring": "Every rank's part goes around the ring. The least bytes, and one neighbour only: for large arrays, on "
        "any network.",
        "torus": "Rings along columns, and what arrives goes on along the row at once: the least bytes, with fewer "
        "latencies than one ring. " + _meet("up to a third longer than"),
    },
    "broadcast": {
        "chain": "Rank 0 sends to rank 1, it to rank 2, and so on. With k segments, which follow each "
        "other, it takes (n-1) a + (n-2+k)/k S/B: with hundreds, large arrays need little more than S/B, however many "
        "ranks there are. Without them it is the slowest for more than a few ranks.",
        "direct": "Rank 0 sends part c to rank c, and every rank sends its part to all. Two latencies and less than "
        "twice S/B: best for large arrays where the network carries all pairs of ranks at once.",
        "tree": "Ranks that have the array pass it on to their subtrees, a binomial tree. For small arrays among many "
        "ranks. " + _SERVES_ALL,
    },
    "reduce": {
        "chain": "The last rank sends to the one before, which adds and sends on, down to rank 0. For large "
        "arrays with many segments, as the broadcast.",
        "direct": "Every rank sends part c of its array to rank c, which sums and sends the sum to rank 0. Two "
        "latencies and less than twice S/B: best for large arrays where the network carries all pairs at once.",
        "tree": "Ranks add what their children in a binomial tree send, and pass the sum on to their parent. For small "
        "arrays; children of one rank are done one after another if n is a power of two, so nothing waits.",
    },
    PERSONALISED: {
        "bruck": "A part that has to go d ranks on travels by the binary digits of d. Every rank talks to log2(n) "
        "others only, but a part is sent on up to log2(n) times. For small arrays where a message costs its sender "
        "time; on the ideal switch, where it does not, sending everything straight is never slower.",
        "direct": "Every rank sends its part for each other rank straight there, beginning with the next rank. The "
        "least bytes and one latency: best for large arrays.",
        "pairwise": "The same messages, in an order in which ranks r and r xor k exchange in round k. For networks and "
        "libraries where a pair of ranks sends both ways at once (`--posting rounds` simulates the rounds).",
    },
}
"""By collective and strategy: how it goes, and when to choose it."""

SEGMENTS = {"segments": (int, 1)}
"""What every strategy takes besides its builder's options."""


def pairs() -> list[tuple[str, str]]:
    """Return every collective with each of its strategies."""
    return [(collective, strategy) for collective, known in exchanges.ALGORITHMS.items() for strategy in known]


def options_table(collective: str, strategy: str) -> list[dict[str, Any]]:
    """Return name, type, default and meaning of each option; a default that depends on n is a text."""
    known = options_of(exchanges.ALGORITHMS[collective][strategy]) | SEGMENTS
    return [
        {
            "name": name,
            "type": _type(kind),
            "default": CHOSEN[name] if default is None else default,
            "meaning": OPTIONS[name],
        }
        for name, (kind, default) in known.items()
    ]


def _type(kind: Any) -> str:
    """Return an option's type for a user."""
    if get_origin(kind) is not None and all(isinstance(word, str) for word in get_args(kind)):
        return " or ".join(get_args(kind))
    return "true or false" if kind is bool else "whole number"


def values(collective: str, strategy: str) -> dict[str, Any]:
    """Return all that is known of one strategy for one collective; the keys are those of `--json`."""
    formula = formulas.FORMULAS[collective][strategy]
    return {
        "collective": collective,
        "strategy": strategy,
        "messages": formulas.shown(formula.messages_are),
        "largest_message": formulas.shown(formula.largest_is),
        "latencies": formulas.shown(formula.latencies),
        "arrays": formulas.shown(formula.arrays),
        "time": formula.time_text(),
        "time_holds_for": formula.holds_for(),
        "posting": formula.posting,
        "options": options_table(collective, strategy),
        "description": PARAGRAPHS[collective][strategy],
        "source": SOURCES[strategy],
    }


def written(default: Any) -> str:
    """Return a default as it is written in a spec."""
    return str(default).lower() if isinstance(default, bool) else str(default)


def option_rows() -> list[tuple[str, str, str, str]]:
    """Return (strategies that take it, option, type, default) once for each option."""
    takers: dict[tuple[str, str, str], list[str]] = {}
    for collective, strategy in pairs():
        for each in options_table(collective, strategy):
            strategies = takers.setdefault((each["name"], each["type"], written(each["default"])), [])
            if strategy not in strategies:
                strategies.append(strategy)
    everybody = len(SOURCES)
    return [
        ("every strategy" if len(strategies) == everybody else ", ".join(strategies), *option)
        for option, strategies in sorted(takers.items(), key=lambda taken: taken[0][0])
    ]
