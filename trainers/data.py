"""Which samples are used when, and by whom: the order depends on the seed alone, never on the number of workers."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from distsim.errors import ConfigError

Indexes = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True, slots=True)
class Order:
    """Samples of each step and worker.

    An epoch's order is a permutation drawn from seed and epoch. A step takes the next `samples_per_step` of it:
    first everybody's micro-batch 0, worker after worker, then everybody's micro-batch 1, and so on. So 4 workers
    use in each step what 2 workers with twice the batch size, or twice the micro-batches, use.
    """

    samples: int
    """How many there are."""
    workers: int
    batch_size: int
    """Samples of a micro-batch, each worker."""
    accumulate: int
    """Micro-batches of a worker in a step."""
    uneven: str
    """join: the last step of an epoch has the samples that are left, which some workers see fewer or none of;
    drop: they are not used in this epoch."""
    seed: int

    def __post_init__(self) -> None:
        """Raises: ConfigError if an epoch has no step."""
        if self.steps_per_epoch < 1:
            raise ConfigError(
                f"--uneven {self.uneven}: a step takes {self.samples_per_step} samples (workers x accumulate x "
                f"batch size), but there are only {self.samples}; use join, or a smaller --batch-size"
            )

    @property
    def samples_per_step(self) -> int:
        """Samples of a full step, of all workers together."""
        return self.workers * self.accumulate * self.batch_size

    @property
    def steps_per_epoch(self) -> int:
        """Steps in which every sample is used once ("drop": all but fewer than a step takes)."""
        full, left = divmod(self.samples, self.samples_per_step)
        return full + (left > 0 and self.uneven == "join")

    def micro_batches(self, step: int, worker: int) -> list[Indexes]:
        """Return the indexes of a worker's samples in a step: `accumulate` arrays of at most `batch_size` each.

        Steps count on from epoch to epoch. Arrays are shorter or empty only in an epoch's last step.
        """
        epoch, turn = divmod(step, self.steps_per_epoch)
        order = _permutation(self.samples, self.seed, epoch)
        taken = order[turn * self.samples_per_step : (turn + 1) * self.samples_per_step]
        firsts = ((batch * self.workers + worker) * self.batch_size for batch in range(self.accumulate))
        return [taken[first : first + self.batch_size] for first in firsts]


@lru_cache(maxsize=2)
def _permutation(samples: int, seed: int, epoch: int) -> Indexes:
    order: Indexes = np.random.default_rng((seed, epoch)).permutation(samples)
    order.flags.writeable = False  # everybody gets the same one
    return order
