"""What a meter counts, against tensors whose sizes are known."""

from __future__ import annotations

import pytest
import torch

from trainers.meter import Meter

CPU = torch.device("cpu")


def test_a_meter_counts_what_is_there_at_once() -> None:
    kept = []
    with Meter(CPU) as meter:
        with meter.span("one after the other"):
            for _ in range(3):
                torch.empty(1000)
        with meter.span("both"):
            kept.append(torch.empty(10))
            torch.cat([torch.empty(1000), torch.empty(500)])  # 1,500 and their 1,500 together
        kept.append(torch.empty(7))  # of no span
        with meter.span("freed"):
            kept.clear()
        with meter.span("nothing"):
            pass
    assert meter.used == {
        "one after the other": (0, 4000),
        "both": (40, 4 * 3010),
        "freed": (-68, 0),
        "nothing": (0, 0),
    }


def test_a_meter_lets_errors_through() -> None:
    with pytest.raises(KeyError), Meter(CPU) as meter, meter.span("failed"):
        raise KeyError
    with Meter(CPU) as meter, meter.span("works"):
        torch.empty(10)
    assert meter.used["works"].most == 40
