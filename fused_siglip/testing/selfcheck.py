"""``python -m fused_siglip``: what runs here, and whether it is right.

Prints versions, the device, the backend and panels of each dtype, and compares the loss and its
gradients with float64. Ends with PASS, or with FAIL, what to report and status 1. With ``--report``
all of it is also written to files, with ``--bench`` the loss is timed.
"""

from __future__ import annotations

import argparse
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..kernels import (
    BACKENDS,
    PanelSpec,
    accumulate_dtype,
    default_backend,
    multiplies_half_into_fp32,
    panel_class,
    why_triton_unavailable,
)
from ..loss import siglip_loss
from ..planner import PlanRequest, plan_panels
from ..validation import FEATURE_DTYPES
from . import report, timing
from .environment import PLANNED, dtype_name, environment, panels
from .reference import eager_siglip_loss
from .rounding import excess, rounding_errors

OUTPUTS = ("loss", "image", "text", "scale", "bias")
# What is computed: images, texts, D, t, b, ids. More than one panel with the workspace below.
CALLS = {
    "pairs": (300, 300, 96, 10.0, -10.0, False),
    "pairs, t = 100": (300, 300, 96, 100.0, -10.0, False),
    "ids and padding": (290, 170, 40, 10.0, -10.0, True),
}


class Comparison(NamedTuple):
    """One call in one dtype on one backend, beside float64."""

    backend: str
    dtype: str
    call: str
    errors: list[float]  # of OUTPUTS, over the largest that rounding can cause; empty: it raised
    failure: str | None = None  # the traceback

    def wrong(self) -> list[str]:
        name = f"{self.backend:<7}{self.dtype:<9} {self.call}"
        if self.failure is not None:
            return [f"{name}: {self.failure}"]
        return [
            f"{name}: {output} errs {share:.3g} times as much as rounding can"
            for output, share in zip(OUTPUTS, self.errors, strict=True)
            if share > 1
        ]


def describe(found: dict[str, Any], planned: list[dict[str, Any]]) -> str:
    """The environment, and for each dtype the backend that is chosen and its panels."""
    rows, d = PLANNED
    device = found["device"]
    driver = "" if found["driver"] is None else f", driver {found['driver']}"
    lines = [
        f"fused_siglip {found['fused_siglip']}, torch {found['torch']}, triton {found['triton']}, "
        f"Python {found['python']}, {found['system']}",
        f"device: {device} ({found['device_name']}{driver})",
        f"float32 products: {found['float32_products']} (fp32_precision of torch.backends)",
        f"\npanels of {rows} x {rows} pairs, D = {d}:",
    ]
    lines += [
        f"  {plan['dtype']:<9} {plan['backend']:<7} {plan['rows']} x {plan['cols']}, workspace "
        f"{plan['workspace_bytes'] / 2**20:.0f} MiB, at most {plan['peak_bytes'] / 2**20:.0f} MiB "
        "with both gradients"
        for plan in planned
    ]
    obstacles: dict[str, list[str]] = {}
    for plan in planned:
        if plan["why_not_triton"] is not None:
            obstacles.setdefault(plan["why_not_triton"], []).append(plan["dtype"])
    for reason, dtypes in obstacles.items():
        which = "" if len(dtypes) == len(planned) else f" for {', '.join(dtypes)}"
        lines.append(f"falls back to torch instead of triton{which}: {reason}")
    half_backend = default_backend(device, torch.bfloat16)
    if half_backend == "torch" and not multiplies_half_into_fp32(device):
        lines.append(
            f"half features are converted to float32 in panels: {device} has no product of half "
            "operands with a float32 sum"
        )
    return "\n".join(lines)


def measure(call: str, backend: str, dtype: torch.dtype, device: str) -> list[float]:
    """Errors of [loss, dX, dY, dt, db] over the largest that rounding can cause: at most 1."""
    m, n, d, t, b, with_ids = CALLS[call]
    generator = torch.Generator().manual_seed(0)
    shared = torch.randn(max(m, n), d, generator=generator)
    towers = [
        torch.nn.functional.normalize(shared[:rows] + torch.randn(rows, d, generator=generator))
        for rows in (m, n)
    ]
    features = [tower.to(device, dtype) for tower in towers]
    image_ids = text_ids = None
    if with_ids:
        image_ids, text_ids = (
            torch.randint(-10, 50, (rows,), generator=generator).to(device) for rows in (m, n)
        )
    accumulate = accumulate_dtype(dtype)
    inputs = [*features, *(torch.tensor(v, dtype=accumulate, device=device) for v in (t, b))]
    operand = plan_panels(PlanRequest(1, 1, 1, dtype, device, backend)).operand_dtype
    workspace = panel_class(backend).workspace_bytes(PanelSpec(256, 256, operand, True, True))

    def run(
        loss_function: Callable[..., Tensor], values: Sequence[Tensor], **options: Any
    ) -> list[Tensor]:
        leaves = [v.detach().clone().requires_grad_() for v in values]
        loss = loss_function(*leaves, image_ids=image_ids, text_ids=text_ids, **options)
        return [loss.detach(), *torch.autograd.grad(loss, leaves)]

    actual = run(siglip_loss, inputs, backend=backend, workspace_bytes=workspace)
    again = run(siglip_loss, inputs, backend=backend, workspace_bytes=workspace)
    if not all(torch.equal(v, w) for v, w in zip(actual, again, strict=True)):
        raise RuntimeError("the same inputs gave other bits the second time")
    exact = run(eager_siglip_loss, [v.double() for v in inputs])
    errors = rounding_errors(*inputs, image_ids=image_ids, text_ids=text_ids, g_dtype=operand)
    return [excess(a, x, e) for a, x, e in zip(actual, exact, errors, strict=True)]


def _triton_runs(device: str, dtype: torch.dtype) -> bool:
    """Whether Triton runs there: on a GPU, or in its interpreter."""
    return why_triton_unavailable(device, dtype) is None


def _compare(backend: str, dtype: torch.dtype, call: str, device: str) -> Comparison:
    try:
        errors = measure(call, backend, dtype, device)
    except Exception:
        return Comparison(backend, dtype_name(dtype), call, [], traceback.format_exc())
    return Comparison(backend, dtype_name(dtype), call, errors)


def check(device: str, say: Callable[[str], None] = print) -> list[Comparison]:
    """Compare every backend that runs here with float64; ``say`` each comparison as it is made."""
    say("\nerror against float64, over the largest that rounding can cause (1 or less is right):")
    say(" " * 36 + "".join(f"{name:>8}" for name in OUTPUTS))
    found = []
    for backend in BACKENDS:
        for dtype in FEATURE_DTYPES:
            if backend == "triton" and not _triton_runs(device, dtype):
                continue
            for call in CALLS:
                comparison = _compare(backend, dtype, call, device)
                found.append(comparison)
                if comparison.failure is None:
                    name = f"{backend:<7}{comparison.dtype:<9} {call}"
                    errors = "".join(f"{share:8.3f}" for share in comparison.errors)
                    say(f"  {name:<34}{errors}")
    return found


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m fused_siglip", description=__doc__)
    parser.add_argument(
        "--report", nargs="?", const=".", type=Path, metavar="FOLDER",
        help=f"write {report.JSON_FILE} and {report.TEXT_FILE} there (by default here)",
    )  # fmt: skip
    parser.add_argument(
        "--bench", action="store_true",
        help="time the loss beside eager and three plain products, in under a minute",
    )  # fmt: skip
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] = ()) -> int:
    options = _parse(arguments)
    start = time.perf_counter()
    said: list[str] = []

    def say(text: str) -> None:
        print(text, flush=True)
        said.append(text)

    device = "cuda" if torch.cuda.is_available() else "cpu"
    found, planned = environment(device), panels(device)
    say(describe(found, planned))
    comparisons = check(device, say)
    times = None
    if options.bench:
        times = timing.bench(device)
        say(f"\n{timing.summary(times)}")
    seconds = time.perf_counter() - start
    wrong = [line for comparison in comparisons for line in comparison.wrong()]
    if wrong:
        say("\nFAIL: please report everything above and this:\n")
        say("\n".join(wrong))
    else:
        say(f"\nPASS ({seconds:.1f} s)")
    if options.report is not None:
        content = {
            "environment": found,
            "panels": planned,
            "comparisons": [
                comparison._asdict()
                | {"errors": dict(zip(OUTPUTS, comparison.errors, strict=bool(comparison.errors)))}
                for comparison in comparisons
            ],
            "times": times,
            "passed": not wrong,
            "seconds": seconds,
        }
        for file in report.write(options.report, content, said):
            print(f"written to {file}")
    return int(bool(wrong))
