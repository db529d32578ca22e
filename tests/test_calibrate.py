"""Calibration: the fit finds what was planted, its file loads, and a real run writes one."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
from processes import run, torchrun

from distsim import exchanges
from distsim.cluster import Cluster, load
from distsim.errors import DistsimError
from distsim.step import simulate
from trainers import calibrate, neighbours
from trainers.calibrate import Fit, cluster_file, fit
from trainers.neighbours import STEPS, Sample

SIZES = (40_000, 400_000)


def planted(
    ranks: int, seconds: Callable[[int, int], float], addition_s: float = 1e-4, noise: float = 0.0
) -> list[list[Sample]]:
    """Samples of all ranks; `seconds(messages, bytes)` is how long a chain takes from the last begin to the last end.

    Ranks begin one after another, and only the last one ends when the chain does. Of five rounds two are slower, one
    of them much, and two faster by `noise`.
    """
    results = []
    for rank in range(ranks):
        samples = []
        for size in SIZES:
            for steps in STEPS:
                took = seconds(steps * ranks, size)
                exchanges_s = []
                for turn, factor in enumerate((1, 1 - noise, 1 - 2 * noise, 1 + noise, 1 + 20 * noise)):
                    begin = 10.0 * turn + 0.01 * rank
                    end = 10.0 * turn + 0.01 * (ranks - 1) + took * factor - (0.001 if rank else 0.0) * took
                    exchanges_s.append((begin, end))
                additions = [addition_s * size / max(SIZES)] * 3
                samples.append(Sample(steps, size, exchanges_s, additions, "this machine"))
        results.append(samples)
    return results


@pytest.mark.parametrize("ranks", (2, 4, 7))
def test_the_fit_finds_the_planted_bus(ranks: int) -> None:
    overhead_s, bandwidth_Bps = 37e-6, 2.5e9
    samples = planted(ranks, lambda messages, size: messages * (overhead_s + size / bandwidth_Bps), noise=0.2)
    found = fit(ranks, samples)
    assert found.overhead_s == pytest.approx(overhead_s, rel=1e-9)
    assert found.bandwidth_Bps == pytest.approx(bandwidth_Bps, rel=1e-9)
    assert found.reduce_bandwidth_Bps == pytest.approx(400_000 / 1e-4, rel=1e-12)
    assert found.worst_error < 1e-9


def test_a_negative_overhead_is_clipped() -> None:
    """Times that grow faster than the bytes: the best line has a negative overhead, which no bus has."""
    samples = planted(3, lambda messages, size: messages * (size / 1e9 - 20e-6))
    found = fit(3, samples)
    assert found.overhead_s == 0.0
    # The best bandwidth without overhead, in the least squares of the relative errors, by a fine search.
    times = [(size, steps * 3 * (size / 1e9 - 20e-6), steps * 3) for size in SIZES for steps in STEPS]

    def badness(bandwidth_Bps: float) -> float:
        return sum((messages * size / bandwidth_Bps / took - 1) ** 2 for size, took, messages in times)

    assert all(badness(found.bandwidth_Bps) <= badness(found.bandwidth_Bps * factor) for factor in (0.999, 1.001))
    assert found.worst_error == pytest.approx(
        max(abs(messages * size / found.bandwidth_Bps / took - 1) for size, took, messages in times)
    )


def test_no_bandwidth_is_told_where_larger_messages_are_as_fast() -> None:
    with pytest.raises(DistsimError, match="messages of 400000 bytes took no longer than those of 40000, so no bandw"):
        fit(2, planted(2, lambda messages, size: messages * (1e-5 if size > 100_000 else 2e-5)))


def loaded(folder: Path, found: Fit, ranks: int) -> Cluster:
    path = folder / "found.yaml"
    path.write_text(cluster_file(ranks, "TCP", found))
    return load(str(path))


def test_the_file_loads_back_to_the_same_numbers_and_predicts_the_planted_times(tmp_path: Path) -> None:
    """A ring of n ranks on the bus: 2(n - 1) steps of n messages, each for its overhead and its bytes."""
    found = Fit(overhead_s=37e-6, bandwidth_Bps=2.5e9, reduce_bandwidth_Bps=4e15, worst_error=0.1)
    cluster = loaded(tmp_path, found, 4)
    assert len(cluster.devices) == 4
    simulation = simulate(exchanges.build("ring", 4, 400_000), cluster)
    assert simulation.time_s == pytest.approx(6 * 4 * (37e-6 + 400_000 / 2.5e9), rel=1e-6)
    links = zip(cluster.bandwidth_Bps.tolist(), cluster.latency_s.tolist(), cluster.overhead_s.tolist(), strict=True)
    assert (2.5e9, 0.0, 37e-6) in set(links)
    assert set(cluster.reduce_bandwidth_Bps.tolist()) == {4e15}


def test_odd_numbers_survive_the_file(tmp_path: Path) -> None:
    found = Fit(
        overhead_s=1.2345678901234e-5, bandwidth_Bps=1234567890.1234, reduce_bandwidth_Bps=7e9 / 3, worst_error=0
    )
    cluster = loaded(tmp_path, found, 2)
    assert found.bandwidth_Bps in cluster.bandwidth_Bps.tolist()
    assert found.overhead_s in cluster.overhead_s.tolist()
    assert set(cluster.reduce_bandwidth_Bps.tolist()) == {found.reduce_bandwidth_Bps}


def test_neighbours_pass_on_around_the_ring() -> None:
    schedule = neighbours.neighbours(3, 5, 4)
    assert schedule.rows == 12
    assert set(zip(schedule.src.tolist(), schedule.dst.tolist(), strict=True)) == {(0, 1), (1, 2), (2, 0)}
    assert schedule.traffic(4).message_sizes == {20: 12}


@pytest.mark.timeout(120)
def test_a_real_run_writes_a_file_that_loads(tmp_path: Path) -> None:
    out = tmp_path / "new" / "loopback.yaml"
    ended = run(torchrun(2, "-m", "trainers.calibrate", "--out", out, "--params", "1000000"), tmp_path)
    assert ended.left == []
    if "no bandwidth can be told" in ended.err:
        pytest.skip("this machine is too busy to be measured")
    assert ended.code == 0, ended.err
    assert re.search(r"^TCP, 2 ranks: .* shared, .* a message, .*; wrote .*loopback.yaml$", ended.out, re.MULTILINE)
    cluster = load(str(out))
    assert len(cluster.devices) == 2
    assert simulate(exchanges.build("ring", 2, 1_000_000), cluster).time_s > 0
    assert "measured 2" in out.read_text()


@pytest.mark.parametrize(
    ("flags", "under_torchrun", "complaint"),
    (
        ((), False, "torchrun --nproc-per-node 4 -m trainers.calibrate"),
        (("--workers", "2"), True, "run it under torchrun, or with --workers for Ray"),
        (("--params", "1"), True, "at least 2 ranks and a parameter for each, not 2 and 1"),
        (("--workers", "0"), False, "at least 2 ranks and a parameter for each, not 1 and"),
    ),
)
def test_wrong_use(
    flags: tuple[str, ...],
    under_torchrun: bool,
    complaint: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    if under_torchrun:
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
        monkeypatch.setenv("WORLD_SIZE", "2")
    assert calibrate.main(["--out", str(tmp_path / "out.yaml"), *flags]) == 2
    error = capsys.readouterr().err
    assert error.startswith("trainers.calibrate: error: ")
    assert complaint in error
    assert not (tmp_path / "out.yaml").exists()
