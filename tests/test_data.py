"""The order of samples, against its definition: whoever takes part, a step uses the same samples."""

from __future__ import annotations

from itertools import chain

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from distsim.errors import ConfigError
from trainers.data import Order

sizes = st.integers(1, 5)


def order(samples: int, workers: int, batch: int, accumulate: int, uneven: str = "join", seed: int = 0) -> Order:
    return Order(samples=samples, workers=workers, batch_size=batch, accumulate=accumulate, uneven=uneven, seed=seed)


def of_step(each: Order, step: int) -> list[int]:
    """All samples of a step: micro-batch after micro-batch, worker after worker."""
    by_worker = [each.micro_batches(step, worker) for worker in range(each.workers)]
    return [int(index) for batches in zip(*by_worker, strict=True) for batch in batches for index in batch]


def of_epoch(each: Order, epoch: int) -> list[int]:
    steps = range(epoch * each.steps_per_epoch, (epoch + 1) * each.steps_per_epoch)
    return list(chain.from_iterable(of_step(each, step) for step in steps))


@given(st.integers(1, 200), sizes, sizes, sizes, st.integers(0, 3), st.integers(0, 2**63 - 1))
def test_join_uses_every_sample_once_an_epoch_in_the_order_of_the_permutation(
    samples: int, workers: int, batch: int, accumulate: int, epoch: int, seed: int
) -> None:
    used = of_epoch(order(samples, workers, batch, accumulate, seed=seed), epoch)
    assert sorted(used) == list(range(samples))
    assert used == np.random.default_rng((seed, epoch)).permutation(samples).tolist()


@given(st.integers(1, 200), sizes, sizes, sizes, st.integers(0, 3))
def test_drop_leaves_out_fewer_than_a_step_takes(
    samples: int, workers: int, batch: int, accumulate: int, epoch: int
) -> None:
    together = workers * batch * accumulate
    if samples < together:
        with pytest.raises(ConfigError, match=f"a step takes {together} samples .* only {samples}; use join"):
            order(samples, workers, batch, accumulate, "drop")
        return
    each = order(samples, workers, batch, accumulate, "drop")
    used = of_epoch(each, epoch)
    assert len(set(used)) == len(used) <= samples
    assert samples - len(used) < together
    for step in range(each.steps_per_epoch):
        for worker in range(workers):
            assert [len(part) for part in each.micro_batches(step, worker)] == [batch] * accumulate


@given(st.integers(1, 300), st.sampled_from(("join", "drop")), st.integers(0, 40), st.integers(0, 9))
def test_a_step_uses_the_same_samples_whatever_the_number_of_workers(
    samples: int, uneven: str, step: int, seed: int
) -> None:
    """Twelve samples a step, shared out among workers, micro-batches and batch sizes in all ways there are."""
    if uneven == "drop" and samples < 12:
        return
    shares = [(n, a, 12 // (n * a)) for n in range(1, 13) for a in range(1, 13) if 12 % (n * a) == 0]
    assert len(shares) == 18
    used = [of_step(order(samples, n, batch, a, uneven, seed), step) for n, a, batch in shares]
    assert all(each == used[0] for each in used)


@given(st.integers(1, 60), sizes, sizes, sizes, st.integers(0, 50))
def test_every_worker_always_gets_as_many_micro_batches_and_none_is_too_large(
    samples: int, workers: int, batch: int, accumulate: int, step: int
) -> None:
    each = order(samples, workers, batch, accumulate)
    parts = [each.micro_batches(step, worker) for worker in range(workers)]
    assert {len(part) for part in parts} == {accumulate}
    lengths = [len(part[j]) for j in range(accumulate) for part in parts]
    assert max(lengths) <= batch
    assert lengths == sorted(lengths, reverse=True)  # the first ones get what is left
    last = step % each.steps_per_epoch == each.steps_per_epoch - 1
    assert last or set(lengths) == {batch}


def test_epochs_and_seeds_differ_and_nothing_else_does() -> None:
    first, again, other = order(100, 2, 5, 2), order(100, 2, 5, 2), order(100, 2, 5, 2, seed=1)
    assert of_epoch(first, 0) == of_epoch(again, 0)
    assert of_epoch(first, 0) != of_epoch(first, 1)
    assert of_epoch(first, 0) != of_epoch(other, 0)
    assert of_epoch(first, 1) != of_epoch(other, 0)  # seed and epoch are not added up


def test_what_one_has_in_hand_cannot_be_changed_for_others() -> None:
    with pytest.raises(ValueError, match="read-only"):
        order(10, 1, 5, 1).micro_batches(0, 0)[0][0] = 3
