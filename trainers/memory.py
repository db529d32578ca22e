"""A MemoryPlan, executed: a sequence of layers that keeps, recomputes and offloads as the plan says, row by row.

    applied = apply(model.blocks, plan, waits=replay(chain, plan, budget, "full").waits, store=store)
    model(inputs).sum().backward()     # same loss and same gradients, to the bit
    applied.last.forwards              # how often each layer has really run

It works inside any model and any loop: parameters, their hooks and the model's state are as they were.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from typing import Any, Self

import torch
from torch import Tensor, nn

from distsim.errors import ConfigError
from distsim.memory.plan import MemoryPlan, Op
from distsim.memory.replay import READS, WRITES
from trainers.memory_pass import Pass
from trainers.memory_program import Counts, compiled
from trainers.offload import Store


def apply(
    layers: nn.Sequential,
    plan: MemoryPlan,
    *,
    waits: Iterable[tuple[int, int]] | None = None,
    store: Store | None = None,
) -> Applied:
    """Make a sequence of layers run by a plan from now on, whenever it is called with gradients enabled.

    `waits` are pairs of rows (before, after) as in `Replay.waits`: but for these, copies go on beside everything
    else. Without them nothing overlaps. `store` is where W and R rows copy to and from.

    Raises: ConfigError if the plan is for another number of layers, has no recording forwards (it is then of a chain
    without `saved`, which modules are not), copies without a store, or the layers are no plain sequence.
    """
    if not isinstance(layers, nn.Sequential) or type(layers).forward is not nn.Sequential.forward:
        raise ConfigError(f"a memory plan applies to a torch.nn.Sequential, not to {type(layers).__name__}")
    if "forward" in vars(layers):
        raise ConfigError("these layers already run by a memory plan, or have another forward of their own")
    _check(plan, len(layers), store)
    return Applied(layers, plan, waits, store)


class Applied:
    """A plan in force, made by `apply`."""

    def __init__(
        self, layers: nn.Sequential, plan: MemoryPlan, waits: Iterable[tuple[int, int]] | None, store: Store | None
    ) -> None:
        self.layers, self.plan, self.store = layers, plan, store
        self.last = Counts.zero(len(layers), len(plan))
        """Of the last call of the layers, and of its backward."""
        self.total = Counts.zero(len(layers), len(plan))
        """Of all of them; `resident_bytes` is the most that a row of any has seen."""
        self._program = compiled(plan, waits)
        self._stale: list[Hashable] = []  # keys of passes that were given up, in the store still
        layers.forward = self.forward  # type: ignore[method-assign]

    def forward(self, inputs: Tensor) -> Tensor:
        """Run the layers: by the plan if there can be a backward pass, else as they are.

        Raises: ConfigError for a layer that returns anything but one tensor, or that changes its input in place.
        """
        if not isinstance(inputs, Tensor):
            raise ConfigError(f"layers under a memory plan take one tensor, not {type(inputs).__name__}")
        learns = inputs.requires_grad or any(each.requires_grad for each in self.layers.parameters())
        if not (torch.is_grad_enabled() and learns):
            plain: Tensor = nn.Sequential.forward(self.layers, inputs)  # type: ignore[no-untyped-call]
            return plain
        self.last = Counts.zero(len(self.layers), len(self.plan))
        return Pass(self._program, list(self.layers), self.store, self._stale, (self.last, self.total)).forward(inputs)

    def remove(self) -> None:
        """Let the layers run plainly again; a backward pass that is still to come is not affected."""
        vars(self.layers).pop("forward", None)

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """A copy of a model runs its own layers by the plan, with the same store."""
        copied = object.__new__(type(self))
        vars(copied).update(vars(self))
        copied.layers = memo[id(self.layers)]
        copied.last, copied.total = (Counts.zero(len(self.last.forwards), len(self.plan)) for _ in range(2))
        return copied


def _check(plan: MemoryPlan, count: int, store: Store | None) -> None:
    rows = plan.rows()
    planned = max((layer for _, layer in rows), default=0)
    if planned != count:
        raise ConfigError(f"the memory plan is for {planned} layers; the sequence has {count}")
    backwards = [layer for op, layer in rows if op == Op.BACKWARD]
    if backwards != list(range(count, 0, -1)) or plan.count(Op.LOSS) != 1:
        raise ConfigError("a memory plan has LOSS once, and B_i of every layer once, from the last to the first")
    if not plan.count(Op.RECORD):
        raise ConfigError(
            "the memory plan has no recording forwards (Fall_i): it is of a chain without size_saved, but the backward "
            "of a module needs all that autograd saves; plan a chain that `python -m trainers.profile` has written"
        )
    if store is None and plan.count(*READS, *WRITES):
        raise ConfigError("the memory plan offloads; give it a store, such as trainers.offload.host_store()")
