"""``python -m fused_siglip``: what runs here, and whether it is right.

Prints versions, the device, the backend and panels of each dtype, and compares the loss and its
gradients with float64. Ends with PASS, or with FAIL, what to report and status 1.
"""

from __future__ import annotations

import platform
import time
import traceback
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor

from .. import __version__
from ..kernels import (
    BACKENDS,
    PanelSpec,
    accumulate_dtype,
    default_backend,
    float32_products,
    multiplies_half_into_fp32,
    panel_class,
    why_not_default,
    why_triton_unavailable,
)
from ..loss import siglip_loss
from ..planner import PlanRequest, plan_panels
from ..validation import FEATURE_DTYPES
from .reference import eager_siglip_loss
from .rounding import excess, rounding_errors

PLANNED = (32768, 768)  # the batch and D whose panels are printed
OUTPUTS = ("loss", "image", "text", "scale", "bias")
# What is computed: images, texts, D, t, b, ids. More than one panel with the workspace below.
CALLS = {
    "pairs": (300, 300, 96, 10.0, -10.0, False),
    "pairs, t = 100": (300, 300, 96, 100.0, -10.0, False),
    "ids and padding": (290, 170, 40, 10.0, -10.0, True),
}


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _device(device: str) -> str:
    if device == "cuda":
        major, minor = torch.cuda.get_device_capability()
        built = f"ROCm {torch.version.hip}" if torch.version.hip else f"CUDA {torch.version.cuda}"
        return f"{torch.cuda.get_device_name()}, capability {major}.{minor}, {built}"
    return (
        f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}, "
        f"{torch.get_num_threads()} threads"
    )


def describe(device: str) -> str:
    """Versions, device, and for each dtype the backend that is chosen and its panels."""
    rows, d = PLANNED
    lines = [
        f"fused_siglip {__version__}, torch {torch.__version__}, triton {_version('triton')}, "
        f"Python {platform.python_version()}, {platform.system()}",
        f"device: {device} ({_device(device)})",
        f"float32 products: {float32_products(device)} (fp32_precision of torch.backends)",
        f"\npanels of {rows} x {rows} pairs, D = {d}:",
    ]
    multiprocessors = None
    if device == "cuda":
        multiprocessors = torch.cuda.get_device_properties(0).multi_processor_count
    for dtype in FEATURE_DTYPES:
        backend = default_backend(device, dtype)
        request = PlanRequest(rows, rows, d, dtype, device, backend)
        plan = plan_panels(request._replace(multiprocessors=multiprocessors))
        lines.append(
            f"  {_name(dtype):<9} {backend:<7} {plan.rows} x {plan.cols}, workspace "
            f"{plan.workspace_bytes / 2**20:.0f} MiB, at most {plan.peak_bytes / 2**20:.0f} MiB "
            "with both gradients"
        )
    obstacles: dict[str, list[str]] = {}
    for dtype in FEATURE_DTYPES:
        reason = why_not_default(device, dtype)
        if reason is not None:
            obstacles.setdefault(reason, []).append(_name(dtype))
    for reason, dtypes in obstacles.items():
        which = "" if len(dtypes) == len(FEATURE_DTYPES) else f" for {', '.join(dtypes)}"
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


def check(device: str) -> list[str]:
    """Compare every backend that runs here with float64; print errors, return what is wrong."""
    print("\nerror against float64, over the largest that rounding can cause (1 or less is right):")
    print(" " * 36 + "".join(f"{name:>8}" for name in OUTPUTS))
    wrong = []
    for backend in BACKENDS:
        for dtype in FEATURE_DTYPES:
            if backend == "triton" and not _triton_runs(device, dtype):
                continue
            for call in CALLS:
                name = f"{backend:<7}{_name(dtype):<9} {call}"
                try:
                    shares = measure(call, backend, dtype, device)
                except Exception:
                    wrong.append(f"{name}: {traceback.format_exc()}")
                    continue
                print(f"  {name:<34}" + "".join(f"{share:8.3f}" for share in shares))
                wrong += [
                    f"{name}: {output} errs {share:.3g} times as much as rounding can"
                    for output, share in zip(OUTPUTS, shares, strict=True)
                    if share > 1
                ]
    return wrong


def main() -> int:
    start = time.perf_counter()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    print(describe(device))
    wrong = check(device)
    seconds = time.perf_counter() - start
    if not wrong:
        print(f"\nPASS ({seconds:.1f} s)")
        return 0
    print("\nFAIL: please report everything above and this:\n")
    print("\n".join(wrong))
    return 1
