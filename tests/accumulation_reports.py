"""Made-up reports of gradient accumulation, as `python -m trainers.accumulation --json` writes them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

UNIT_ROUNDOFF = {"float64": 2.0**-53, "float32": 2.0**-24}
PAIRS = ((1, 32, 1), (2, 16, 2), (4, 8, 4), (5, 7, 2), (8, 4, 8), (16, 2, 16), (32, 1, 32))


def resnet(blocks: Sequence[int] = (3, 8, 36, 3)) -> list[str]:
    """Names of the parameters of a bottleneck ResNet in model order; by default of the 152-layer one: 467."""

    def norm(name: str) -> list[str]:
        return [f"{name}.weight", f"{name}.bias"]

    names = ["conv1.weight", *norm("bn1")]
    for stage, depth in enumerate(blocks, start=1):
        for block in range(depth):
            for place in (1, 2, 3):
                names += [f"layer{stage}.{block}.conv{place}.weight", *norm(f"layer{stage}.{block}.bn{place}")]
            if block == 0:
                names += [f"layer{stage}.0.downsample.0.weight", *norm(f"layer{stage}.0.downsample.1")]
    return [*names, "fc.weight", "fc.bias"]


def transformer(blocks: int = 9) -> list[str]:
    """Names of the parameters of a GPT-2; by default of 57 layers."""
    names = ["transformer.wte.weight", "transformer.wpe.weight"]
    for block in range(blocks):
        for part in ("ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj"):
            names += [f"transformer.h.{block}.{part}.{each}" for each in ("weight", "bias")]
    return [*names, "transformer.ln_f.weight", "transformer.ln_f.bias"]


def report(
    names: Sequence[str],
    *,
    apart: Callable[[str, int], float] | None = None,
    pairs: Sequence[tuple[int, int, int]] = PAIRS,
    formats: Sequence[str] = ("float64", "float32"),
    culprits: Sequence[dict[str, Any]] = (),
    failing: tuple[int, str] | None = None,
    kinks: int | None = None,
    **fields: Any,
) -> dict[str, Any]:
    """Return a report of a model with these parameters.

    `apart(name, micro_batch)` is the relative difference of a gradient beside rounding; `failing` a micro-batch size
    whose pairs end with an error; `kinks` one whose float32 gradients are 1e-3 apart at kinks.
    """
    random = np.random.default_rng(0)
    norms = np.exp(random.normal(0, 1.5, len(names)))
    batch = pairs[-1][0] * pairs[-1][1]

    def rows(number_format: str, micro_batch: int) -> Iterator[dict[str, Any]]:
        unit = UNIT_ROUNDOFF[number_format]
        for place, (name, norm) in enumerate(zip(names, norms.tolist(), strict=True)):
            noise = (
                0.0 if micro_batch == batch else unit * 6 * math.exp(random.normal(0, 0.4)) * (2 - place / len(names))
            )
            kink = 1e-3 if kinks == micro_batch and number_format == "float32" else 0.0
            more = apart(name, micro_batch) * math.exp(random.normal(0, 0.2)) if apart and micro_batch != batch else 0.0
            tolerance = norm * unit * 300 * (3 - 2 * place / len(names))
            yield {"name": name, "norm": norm, "difference": norm * (noise + kink + more), "tolerance": tolerance}

    def pair(number_format: str, micro_batch: int, steps: int, last: int) -> dict[str, Any]:
        made = {"format": number_format, "micro_batch": micro_batch, "steps": steps, "last": last, "kinks": False}
        if failing is not None and failing[0] == micro_batch:
            nothing = dict.fromkeys(("logits", "loss", "gradient", "gradients"))
            return made | nothing | {"equivalent": False, "error": failing[1]}
        gradients = list(rows(number_format, micro_batch))
        within = all(each["difference"] <= each["tolerance"] for each in gradients)
        kinky = kinks == micro_batch and number_format == "float32"
        whole = {key: math.hypot(*(each[key] for each in gradients)) for key in ("norm", "difference", "tolerance")}
        return made | {
            **{"equivalent": within or kinky, "kinks": kinky, "error": None, "logits": whole, "loss": whole},
            **{"gradient": whole, "gradients": gradients},
        }

    made = [pair(number_format, *each) for number_format in formats for each in pairs]
    return {
        **{"equivalent": all(each["equivalent"] for each in made), "workload": "mypackage.model:build", "options": {}},
        **{"model": "ResNet", "parameters": 60_192_808, "data": "noise", "effective_batch": batch, "ranks": 1},
        **{"loop": "trainers", "normalise": "count", "batch_norm": "keep", "formats": list(formats), "pairs": made},
        **{"culprits": list(culprits), "weights": None},
        **fields,
    }


def culprit(module: str, kind: str, where: str = "forward") -> dict[str, Any]:
    """Return a finding about a module."""
    numbers = {"norm": 1.0, "difference": 0.5, "tolerance": 1e-14}
    return {"module": module, "type": kind, "where": where, "reason": "batch statistics", "remedy": None, **numbers}


def batch_norm(batch_norm: str = "keep", **fields: Any) -> dict[str, Any]:
    """Return the report of a ResNet-152 with batch normalisation, or after `--batch-norm group`."""
    names = resnet()
    options = {"workload": "resnet152", "options": {"classes": 1000, "size": 64}, "batch_norm": batch_norm}
    if batch_norm == "group":
        return report(names, **{"kinks": 1, **options, **fields})
    modules = dict.fromkeys(name.rpartition(".")[0] for name in names if "bn" in name or "downsample.1" in name)
    depth = {name: place / len(names) for place, name in enumerate(names)}
    return report(
        names,
        apart=lambda name, micro_batch: 0.6 * micro_batch**-0.7 * (1.2 - depth[name]),
        **{
            "culprits": [culprit(module, "BatchNorm2d") for module in modules],
            "failing": (
                1,
                "ValueError: Expected more than 1 value per channel when training, got input size [1, 2048, 1, 1]",
            ),
            **options,
            **fields,
        },
    )


def dropout(**fields: Any) -> dict[str, Any]:
    """Return the report of a transformer of 57 layers with dropout in its blocks."""
    culprits = [
        culprit("transformer.drop", "Dropout"),
        *(culprit(f"transformer.h.{block}.mlp.dropout", "Dropout") for block in range(9)),
        culprit("", "function", "loss"),
    ]
    return report(
        transformer(),
        apart=lambda name, micro_batch: 0.1 * (1 + 3 / micro_batch),
        **{"culprits": culprits, "workload": "language-model", "options": {"dropout": 0.1}, **fields},
    )


def tiny(**fields: Any) -> dict[str, Any]:
    """Return the report of a model of two layers, the second without a gradient, and one pair."""
    made = report(["0.weight", "0.bias", "2.weight"], pairs=[(32, 1, 32)], **{"parameters": 67, **fields})
    return made
