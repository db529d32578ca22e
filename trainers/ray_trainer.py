"""Training on Ray actors: one for each worker and each parameter server, all running the same loop."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import ray
import torch

from distsim import exchanges
from distsim.check import check
from distsim.errors import DistsimError
from distsim.schedule import ITEMSIZE
from trainers import data, report
from trainers.config import RunConfig
from trainers.fingerprint import Fingerprint, agree, fingerprint
from trainers.loop import RankResult, train
from trainers.neighbours import Sample, sample
from trainers.ray_session import session
from trainers.ray_transport import Mailbox, RayTransport
from trainers.workloads import language_model


def run(config: RunConfig, cluster: str | None, out: Path, address: str | None) -> report.Summary:
    """Train with all workers and servers; start a local Ray unless `address` names one to join.

    Raises: ConfigError if the cluster cannot be joined or the ranks disagree; DistsimError if an actor dies.
    """
    text = data.load_text(config.text, config.context + 1)
    model = language_model.build(config)
    exchange = exchanges.build(config.strategy, config.workers, sum(p.numel() for p in model.parameters()))
    check(exchange)
    predicted = report.prepare(exchange, config, cluster, out)
    with session(address, exchange.traffic(ITEMSIZE[config.dtype]).bytes):
        actors = start_ranks(exchange.ranks)
        agree(collect([actor.prepare.remote(config) for actor in actors]))
        progress = report.Progress(config, enabled=True)
        running = [actor.train.remote() for actor in actors]
        results: list[RankResult] = collect(running, lambda: progress.show(*ray.get(actors[0].progress.remote())))
        progress.close()
    return report.finish(report.measured(config, exchange, text, results, "cpu"), predicted, out)


def calibrate(ranks: int, sizes: Sequence[int], rounds: int) -> list[list[Sample]]:
    """Time neighbour exchanges of `ranks` actors on a local Ray; return everybody's samples."""
    with session(None, 4 * sum(sizes) * ranks):
        return collect([actor.calibrate.remote(sizes, rounds) for actor in start_ranks(ranks)])


def start_ranks(ranks: int, options: Sequence[dict[str, Any]] = ()) -> list[Any]:
    """Start an actor for each rank, with Ray's `options` of its own if given, and tell all of them of each other.

    An actor is never restarted: it would go on from fresh state.
    """
    make_actor: Any = ray.remote  # Ray's own types do not know all of its options
    actor_class = make_actor(num_cpus=0, max_concurrency=4, max_restarts=0)(Rank)
    actors = [actor_class.options(**own).remote(rank) for rank, own in enumerate(options or [{}] * ranks)]
    collect([actor.connect.remote(actors) for actor in actors])
    return actors


def collect(running: list[Any], meanwhile: Any = None) -> list[Any]:
    """Wait for all results, in order; call `meanwhile` about twice a second.

    Raises: DistsimError as soon as one fails, naming its rank.
    """
    waiting = list(running)
    while waiting:
        done, waiting = ray.wait(waiting, num_returns=1, timeout=0.5)
        for reference in done:
            rank = running.index(reference)
            try:
                ray.get(reference)
            except ray.exceptions.RayTaskError as error:
                if isinstance(error.cause, DistsimError):
                    raise error.cause from error
                raise
            except ray.exceptions.RayActorError as error:
                raise DistsimError(f"the actor of rank {rank} has died: {error}") from error
        if meanwhile is not None:
            with suppress(ray.exceptions.RayActorError):  # a rank that has just died is named in the next turn
                meanwhile()
    return list(ray.get(running))


class Rank:
    """One rank, a Ray actor: the training loop in one thread, deliveries and questions in others."""

    def __init__(self, rank: int) -> None:
        torch.set_num_threads(1)
        self._rank = rank
        self._mailbox = Mailbox()
        self._progress: tuple[int, float | None] = (0, None)

    def connect(self, peers: list[Any]) -> None:
        """Learn the handles of all ranks."""
        self._transport = RayTransport(self._rank, peers, self._mailbox)

    def deliver(self, src: int, serial: int, letter: list[Any]) -> None:
        """Take in a message of another rank."""
        self._mailbox.put(src, serial, letter)

    def prepare(self, config: RunConfig) -> Fingerprint:
        """Build model and exchange; return what must be the same on all ranks."""
        self._config = config
        self._text = data.load_text(config.text, config.context + 1)
        self._model = language_model.build(config)
        params = sum(parameter.numel() for parameter in self._model.parameters())
        self._exchange = exchanges.build(config.strategy, config.workers, params)
        return fingerprint(config, self._text, self._model, self._exchange, "cpu")

    def train(self) -> RankResult:
        """Run the training loop to its end."""
        return train(
            self._config,
            self._text,
            self._model,
            self._exchange,
            self._rank,
            self._transport,
            report=self._report,
        )

    def calibrate(self, sizes: Sequence[int], rounds: int) -> list[Sample]:
        """Time neighbour exchanges with the other ranks."""
        transport = self._transport
        return sample(self._rank, transport.ranks, transport, sizes, rounds, torch.device("cpu"))

    def progress(self) -> tuple[int, float | None]:
        """Steps done so far, and the last loss."""
        return self._progress

    def _report(self, steps: int, loss: float | None) -> None:
        self._progress = (steps, loss)
