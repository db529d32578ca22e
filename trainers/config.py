"""What describes a training run: one frozen set of values, the same on every rank."""

from __future__ import annotations

from dataclasses import dataclass

from distsim.errors import ConfigError
from distsim.exchanges import parse

DTYPES = ("float32", "float64")


@dataclass(frozen=True, kw_only=True, slots=True)
class RunConfig:
    """A training run. Everything here is part of the fingerprint that ranks compare."""

    strategy: str
    """A strategy with its options, as `distsim.exchanges.build` takes it."""
    workers: int
    """Ranks that compute gradients."""
    steps: int = 50
    """Optimizer steps, one exchange each."""
    batch_size: int = 4
    """Sequences for each worker and step."""
    learning_rate: float = 0.1
    momentum: float = 0.9
    """Of stochastic gradient descent."""
    dtype: str = "float32"
    """Of parameters and gradients: float32 or float64."""
    layers: int = 4
    width: int = 128
    context: int = 128
    """Of the transformer: blocks, features (a multiple of 32), bytes in a sequence."""
    seed: int = 0
    text: str | None = None
    """A file to train on; the Python standard library's sources if None."""
    transport: str = "schedule"
    """schedule: run the schedule's own messages; library: the library's all-reduce (ring only)."""

    def __post_init__(self) -> None:
        """Raises: ConfigError naming the flag that cannot be used."""
        for name in ("workers", "steps", "batch_size", "layers", "context"):
            if getattr(self, name) < 1:
                raise ConfigError(f"--{name.replace('_', '-')} must be at least 1, not {getattr(self, name)}")
        if self.width < 32 or self.width % 32:
            raise ConfigError(f"--width must be a multiple of 32 (the width of a head), not {self.width}")
        if not 0 <= self.seed < 2**63:
            raise ConfigError(f"--seed must be a whole number from 0 to 2^63 - 1, not {self.seed}")
        if not 0 < self.learning_rate < float("inf"):
            raise ConfigError(f"--learning-rate must be a positive number, not {self.learning_rate}")
        if self.transport == "library" and parse(self.strategy).name != "ring":
            raise ConfigError(
                f"--transport library is the library's ring all-reduce; with --strategy {self.strategy} "
                "use --transport schedule"
            )
