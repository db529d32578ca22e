"""The exchanges of a training step: one for each bucket of gradients, and one for the numbers that all ranks need.

They are described here once; the trainers run them, the simulator predicts them, and counts are compared by name.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor, nn

from distsim import exchanges
from distsim.errors import ConfigError
from distsim.schedule import Exchange, Schedule

NUMBERS, NORM, EVALUATION = "numbers", "norm", "evaluation"
SUMS = 2
"""The first of the numbers: how much was counted, and the sum of its losses. A flag for each parameter follows."""
SMALL = "recursive-doubling"
"""How numbers are summed: in the fewest steps."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """What ranks exchange in a step, in this order, and which parameters each bucket has."""

    strategy: str
    workers: int
    names: tuple[str, ...]
    exchanges: tuple[Exchange, ...]
    """The buckets' in the order in which backward fills them; the numbers'; and the norm's, where servers update."""
    dtypes: tuple[str, ...]
    """Of each exchange's elements."""
    buckets: tuple[tuple[int, ...], ...]
    """Per bucket: its parameters, by their place in the model, in the order in which they lie in it."""

    @property
    def ranks(self) -> int:
        """Workers and servers."""
        return self.exchanges[0].ranks

    @property
    def has_servers(self) -> bool:
        """Whether some ranks update and the others get their parameters from them."""
        return self.exchanges[0].parameters is not None

    def schedules(self) -> list[Schedule]:
        """All schedules: of each exchange its gradients', then its parameters' if it has any."""
        return [schedule for exchange in self.exchanges for schedule in exchange.schedules()]

    def first_schedule(self) -> list[int]:
        """Per exchange: the place of its first schedule among all."""
        return [0, *accumulate(len(exchange.schedules()) for exchange in self.exchanges)][:-1]


def trainable(model: nn.Module) -> list[nn.Parameter]:
    """Return the parameters that are trained; those that need no gradient have no part in any exchange."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


ALWAYS_BYTES = 1_000_000
"""With overlap, how large a bucket may be wherever it comes, if `bucket_mb` allows it."""


def plan(parameters: Sequence[Tensor], strategy: str, workers: int, bucket_mb: float, overlap: bool = False) -> Plan:
    """Share parameters out among buckets of at most `bucket_mb` (1e6 bytes), the last ones first, as backward comes.

    A parameter that is larger has a bucket of its own, and none has two types. With overlap the first buckets and
    the last ones are smaller, so that the exchange starts early and little is left when backward is over: none is
    larger than all before it together, nor than half of what is left, but 1 MB is always allowed.

    Raises: ConfigError for what is wrong with the strategy, or if there is nothing to train.
    """
    if not parameters:
        raise ConfigError("this model has no parameter that requires a gradient")
    groups = _groups(parameters, bucket_mb * 1e6, overlap)
    sizes = [sum(parameters[place].numel() for place in group) for group in groups]
    found = [exchanges.build(strategy, workers, size) for size in sizes]
    names = [f"bucket {number}" for number in range(len(found))]
    dtypes = [str(parameters[group[0]].dtype).removeprefix("torch.") for group in groups]
    ranks = found[0].ranks
    small = [(NUMBERS, SUMS + len(parameters)), *([(NORM, 1)] if found[0].parameters is not None else [])]
    return Plan(
        strategy=found[0].strategy,
        workers=workers,
        names=(*names, *(name for name, _ in small)),
        exchanges=(*found, *(exchanges.build(SMALL, ranks, size) for _, size in small)),
        dtypes=(*dtypes, *("float64" for _ in small)),
        buckets=tuple(groups),
    )


def _groups(parameters: Sequence[Tensor], most_bytes: float, overlap: bool) -> list[tuple[int, ...]]:
    groups: list[list[int]] = []
    open_of: dict[tuple[torch.dtype, torch.device], tuple[list[int], float]] = {}  # a group, and what it may still get
    handed, left = 0.0, float(sum(each.numel() * each.element_size() for each in parameters))
    for place in reversed(range(len(parameters))):
        parameter = parameters[place]
        kind, size_bytes = (parameter.dtype, parameter.device), parameter.numel() * parameter.element_size()
        group, room = open_of.get(kind, ([], 0.0))
        if not group or size_bytes > room:
            group, room = [], most_bytes
            if overlap:
                room = min(most_bytes, max(ALWAYS_BYTES, min(handed, left / 2)))
            groups.append(group)
        group.append(place)
        open_of[kind] = group, room - size_bytes
        handed, left = handed + size_bytes, left - size_bytes
    return sorted((tuple(group) for group in groups), key=lambda group: -group[-1])  # as they are completed
