"""Training on Ray actors: one for each worker and each parameter server, all running the same loop."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import ray
import torch

from distsim.errors import DistsimError
from distsim.schedule import ITEMSIZE
from trainers import budget, norms, profiling, report, workload
from trainers.config import RunConfig
from trainers.exchanger import Exchanger
from trainers.fingerprint import Fingerprint, agree, fingerprint
from trainers.loop import RankResult, check, train
from trainers.metrics import Metrics
from trainers.neighbours import Sample, sample
from trainers.plan import plan, trainable
from trainers.ray_session import session
from trainers.ray_transport import Mailbox, RayTransport

CPU = torch.device("cpu")


def run(
    config: RunConfig, cluster: str | None, out: Path, address: str | None, *, tensorboard: bool = False
) -> report.Summary:
    """Train with all workers and servers; start a local Ray unless `address` names one to join.

    Raises: ConfigError if the cluster cannot be joined or the ranks disagree; DistsimError if an actor dies.
    """
    work = workload.load(config.workload, config.options, config.seed, config.dtype)
    check(config, work)
    norms.apply(config, work)
    budget.check(config, work)
    exchanges = plan(trainable(work.model), config.strategy, config.workers, config.bucket_mb, config.overlap)
    predicted = report.prepare(exchanges, config, cluster, out)
    sizes = [ITEMSIZE[dtype] for dtype in exchanges.dtypes]
    total = sum(each.traffic(size).bytes for each, size in zip(exchanges.exchanges, sizes, strict=True))
    name = report.file_name(config)
    metrics = Metrics(folder=out, name=name, steps=config.steps, tensorboard=tensorboard, show=True)
    try:
        with session(address, total):
            actors = start_ranks(exchanges.ranks)
            agree(collect([actor.prepare.remote(config) for actor in actors]))
            if config.memory_budget is not None:
                (planned,) = collect([actors[0].plan_memory.remote()])
                collect([actor.apply_memory.remote(planned) for actor in actors[: config.workers]])
            on_step = report.follow(metrics, report.utilisation(work, config, CPU), config)
            running = [actor.train.remote(str(out / f"{name}.trace.json")) for actor in actors]

            def follow() -> None:
                for kind, step, seen in ray.get(actors[0].progress.remote()):
                    {"step": on_step, "evaluation": metrics.evaluation}[kind](step, **seen)

            results: list[RankResult] = collect(running, follow)
            follow()
            seen = ray.get(actors[0].memory.remote())
    finally:
        metrics.close()
    return report.finish(report.measured(config, exchanges, work, results, CPU.type, seen), predicted, out)


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
    """One rank, a Ray actor: the training loop in one thread, exchanges, deliveries and questions in others."""

    def __init__(self, rank: int) -> None:
        torch.set_num_threads(1)
        self._rank = rank
        self._mailbox = Mailbox()
        self._told: deque[tuple[str, int, dict[str, Any]]] = deque()
        self._memory: budget.Memory | None = None

    def connect(self, peers: list[Any]) -> None:
        """Learn the handles of all ranks."""
        self._transport = RayTransport(self._rank, peers, self._mailbox)

    def deliver(self, src: int, serial: int, letter: list[Any]) -> None:
        """Take in a message of another rank."""
        self._mailbox.put(src, serial, letter)

    def prepare(self, config: RunConfig) -> Fingerprint:
        """Build model and exchanges; return what must be the same on all ranks."""
        self._config = config
        self._workload = workload.load(config.workload, config.options, config.seed, config.dtype)
        norms.apply(config, self._workload)
        self._plan = plan(
            trainable(self._workload.model), config.strategy, config.workers, config.bucket_mb, config.overlap
        )
        return fingerprint(config, self._workload, self._plan, CPU.type)

    def plan_memory(self) -> budget.Planned:
        """Measure and plan the layers, for all workers."""
        return budget.plan(self._config, self._workload, CPU)

    def apply_memory(self, planned: budget.Planned) -> None:
        """Run the layers by a plan from now on."""
        self._memory = budget.Memory(self._config, self._workload, planned, self._rank)

    def memory(self) -> dict[str, Any] | None:
        """Return what the record says of the plan, if there is one."""
        return None if self._memory is None else self._memory.seen()

    def train(self, trace_file: str) -> RankResult:
        """Run the training loop to its end; a trace, if one is asked for, is written where rank 0 is."""
        config, exchanger = self._config, Exchanger(self._plan, self._rank, [self._transport], CPU)
        traces = self._rank == 0 and config.profile > 0
        with profiling.traced(config.profile, Path(trace_file), enabled=traces) as trace, ExitStack() as ends:
            if self._memory is not None:
                ends.callback(self._memory.close)

            def on_step(step: int, **seen: Any) -> None:
                self._note("step", step, seen)
                trace.step()

            def on_evaluation(step: int, **seen: Any) -> None:
                self._note("evaluation", step, seen)

            return train(config, self._workload, self._plan, self._rank, exchanger, on_step, on_evaluation)

    def calibrate(self, sizes: Sequence[int], rounds: int) -> list[Sample]:
        """Time neighbour exchanges with the other ranks."""
        transport = self._transport
        return sample(self._rank, transport.ranks, transport, sizes, rounds, CPU)

    def progress(self) -> list[tuple[str, int, dict[str, Any]]]:
        """Return the steps and evaluations since the last time."""
        return [self._told.popleft() for _ in range(len(self._told))]

    def _note(self, kind: str, step: int, seen: dict[str, Any]) -> None:
        self._told.append((kind, step, seen))
