"""Plans that look at no size and no time: what people use today, for comparison."""

from __future__ import annotations

import math

from distsim.errors import ConfigError
from distsim.memory.chain import Chain
from distsim.memory.plan import MemoryPlan, Op, Row, with_drops


def store_all(chain: Chain) -> MemoryPlan:
    """Keep everything: no forward is run twice."""
    return periodic(chain, chain.layers)


def periodic(chain: Chain, every: int) -> MemoryPlan:
    """Keep every `every`-th activation; a segment between two is recomputed once, when backward comes to it.

    The last segment is kept as it is, as torch.utils.checkpoint's `checkpoint_sequential` does.

    Raises: ConfigError if `every` is less than 1.
    """
    if every < 1:
        raise ConfigError(f"a segment has at least 1 layer, not {every}")
    record = Op.FORWARD if chain.saved is None else Op.RECORD
    first = list(range(0, chain.layers, every))  # of each segment: the layer before it, whose activation is kept
    rows: list[Row] = [(Op.FORWARD, layer) for layer in range(1, first[-1] + 1)]
    rows += [(record, layer) for layer in range(first[-1] + 1, chain.layers + 1)]
    rows.append((Op.LOSS, chain.layers))
    for start, end in reversed(list(zip(first, [*first[1:], chain.layers], strict=True))):
        if end < chain.layers:
            rows += [(record, layer) for layer in range(start + 1, end + 1) if _made_again(chain, layer, end)]
        rows += [(Op.BACKWARD, layer) for layer in range(end, start, -1)]
    return with_drops(chain, rows)


def _made_again(chain: Chain, layer: int, end: int) -> bool:
    """Whether recomputing a segment runs this layer: the activation at its end is kept, but nothing saved for it."""
    return layer < end or chain.saved is not None


def square_root(chain: Chain) -> MemoryPlan:
    """Keep every √L-th activation: memory of about 2√L layers for one more forward.

    Chen, Xu, Zhang and Guestrin, "Training deep nets with sublinear memory cost" (2016).
    """
    return periodic(chain, math.isqrt(chain.layers - 1) + 1)
