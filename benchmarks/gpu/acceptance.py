"""The targets of the GPU run, each beside what the rows say."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import NamedTuple

import torch

from ..common.results import GIB, MIB, fused_name, select

REFERENCE = {"batch_size": 32768, "dim": 768, "dtype": "bfloat16", "logit_scale": 10.0}


class Target(NamedTuple):
    what: str
    measured: str  # "-": not measured
    target: str
    met: bool | None

    @property
    def verdict(self) -> str:
        return "-" if self.met is None else "yes" if self.met else "NO"


def targets(rows: list[dict]) -> list[Target]:
    return [
        *_checks(rows),
        *_speed(rows),
        *_peers(rows),
        *_accuracy(rows),
        *_memory(rows),
        *_small_batches(rows),
    ]


def _at_most(
    what: str, value: float | None, limit: float, spec: str = ".2f", unit: str = ""
) -> Target:
    measured = "-" if value is None else format(value, spec) + unit
    met = None if value is None else value <= limit
    return Target(what, measured, f"<= {limit:g}{unit}", met)


def _at_least(what: str, value: float | None, limit: float) -> Target:
    measured = "-" if value is None else f"{value:.2f}x"
    return Target(what, measured, f">= {limit:g}x", None if value is None else value >= limit)


def _checks(rows: list[dict]) -> Iterator[Target]:
    tests = select(rows, kind="tests")
    said, met = "-", None
    if tests:
        said = ", ".join(f"{tests[-1][word]} {word}" for word in ("passed", "failed", "error"))
        met = tests[-1]["exit_code"] == 0
    yield Target("tests on the device", said, "all green", met)
    repeated = select(rows, kind="determinism")
    said = f"{sum(row['different'] for row in repeated)} differ" if repeated else "-"
    met = all(row["different"] == 0 for row in repeated) if repeated else None
    runs = repeated[0]["runs"] if repeated else 100
    yield Target(f"{runs} runs, same bits", said, "0 differ", met)
    for tool in ("memcheck", "racecheck"):
        found = [row["findings"] for row in select(rows, kind="sanitizer", tool=tool)]
        said = "-" if not found else "did not end" if found[0] is None else f"{found[0]} found"
        yield Target(f"compute-sanitizer {tool}", said, "0 found", found[0] == 0 if found else None)


def _cost(rows: list[dict], loss: str, column: str, **fields: object) -> float | None:
    fields = {"kind": "cost", "mode": "full", **fields}
    found = [row[column] for row in select(rows, loss=loss, **fields)]
    return found[0] if found else None


def _over(value: float | None, base: float | None) -> float | None:
    return None if value is None or not base else value / base


def _speed(rows: list[dict]) -> Iterator[Target]:
    fused = fused_name(rows)
    for dim, size, t in product((768, 1152), (32768, 65536), (10.0, 100.0)):
        at = REFERENCE | {"batch_size": size, "dim": dim, "logit_scale": t}
        floor_ratio = _cost(rows, fused, "ratio_to_floor", **at)
        yield _at_most(f"x floor, B = {size}, D = {dim}, t = {t:g}", floor_ratio, 1.10)
    full = _cost(rows, fused, "seconds", **REFERENCE)
    frozen = _cost(rows, fused, "seconds", mode="frozen", **REFERENCE)
    yield _at_most("frozen tower / full, B = 32768", _over(frozen, full), 0.72)
    forward = _cost(rows, fused, "ratio_to_floor", mode="no_grad", **REFERENCE)
    yield _at_most("forward only / one product, B = 32768", forward, 1.2)


def _peers(rows: list[dict]) -> Iterator[Target]:
    fused = fused_name(rows)
    for name, limit in (
        ("siglip_kernel", 1.4),
        ("open_clip", 3.0),
        ("eager", 3.0),
        ("compiled", 1.5),
    ):
        times = [_cost(rows, loss, "seconds", **REFERENCE) for loss in (name, fused)]
        yield _at_least(f"faster than {name}, B = 32768", _over(*times), limit)
    ours, theirs = (
        _cost(rows, loss, "peak_extra_bytes", **REFERENCE) for loss in (fused, "siglip_kernel")
    )
    ratio = _over(ours, theirs)
    what = "memory / siglip_kernel's, B = 32768"
    yield _at_most(what, ratio, 1.0)


def _accuracy(rows: list[dict]) -> Iterator[Target]:
    """Root mean square errors of dX and dY, the worst of all shapes that were compared."""
    fused = fused_name(rows)
    compared = select(rows, kind="accuracy")
    worst = _worst_ratio(compared, fused, "eager")
    yield _at_most("gradient error / eager's, all dtypes and sizes", worst, 2.0)
    hard = select(compared, dtype="bfloat16", logit_scale=100.0)
    for name, limit in (("siglip_kernel", 0.45), ("eager", 1 / 3), ("one_rounding", 1.4)):
        what = f"gradient error / {name}'s, t = 100, bf16"
        yield _at_most(what, _worst_ratio(hard, fused, name), round(limit, 3))


def _worst_ratio(rows: list[dict], ours: str, theirs: str) -> float | None:
    keys = ("batch_size", "dim", "dtype", "matmul_precision", "compared_rows", "logit_scale")
    ratios = []
    for row in select(rows, loss=ours):
        for other in select(rows, loss=theirs, **{key: row[key] for key in keys}):
            for name in ("image_grad", "text_grad"):
                ratios.append(row["errors"][name]["rms"] / other["errors"][name]["rms"])
    return max(ratios, default=None)


def _memory(rows: list[dict]) -> Iterator[Target]:
    cost = select(rows, kind="cost", loss=fused_name(rows), mode="full")
    extra = [beyond_accumulators(row) / MIB for row in cost if row["peak_extra_bytes"] is not None]
    yield _at_most("extra memory, any B", max(extra, default=None), 512, ".0f", " MiB")
    (large,) = select(rows, kind="million", batch_size=1 << 20) or [None]
    yield _at_most("B = 1,048,576: seconds", large and large["seconds"], 8, ".2f", " s")
    peak = large and large["peak_bytes"] and large["peak_bytes"] / GIB
    yield _at_most("B = 1,048,576: memory in all", peak, 16, ".1f", " GiB")


def beyond_accumulators(row: dict) -> int:
    """Peak memory beyond inputs and the fp32 accumulators, which become the gradients.

    The row has taken the gradients off already: of half gradients, half of the accumulators.
    """
    gradients = {"full": 2, "frozen": 1, "no_grad": 0}[row["mode"]]
    rest = max(4 - getattr(torch, row["dtype"]).itemsize, 0)
    return row["peak_extra_bytes"] - rest * gradients * row["batch_size"] * row["dim"]


def _small_batches(rows: list[dict]) -> Iterator[Target]:
    fused = fused_name(rows)
    at = {"batch_size": 1024, "dim": 768, "dtype": "bfloat16"}
    times = [_cost(rows, loss, "seconds", **at) for loss in (fused, "eager")]
    yield _at_most("B = 1024: time / eager's", _over(*times), 0.5)
    replayed = select(rows, kind="latency", loss=fused, graph=True, **at)
    micros = replayed[0]["seconds"] * 1e6 if replayed else None
    yield _at_most("B = 1024, CUDA graph", micros, 40, ".1f", " us")
