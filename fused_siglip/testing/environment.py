"""What this machine is, and what the package chooses on it."""

from __future__ import annotations

import platform
import re
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from .. import __version__
from ..kernels import default_backend, float32_products, why_not_default
from ..planner import PlanRequest, plan_panels
from ..validation import FEATURE_DTYPES

PLANNED = (32768, 768)  # the batch and D whose panels are reported
# Where Linux says which driver is loaded and which processor it runs on.
_NVIDIA, _AMD, _CPU = (
    Path("/proc/driver/nvidia/version"),
    Path("/sys/module/amdgpu/version"),
    Path("/proc/cpuinfo"),
)


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _found(file: Path, pattern: str) -> str | None:
    """The first match of a pattern's group in a file that need not be there."""
    try:
        match = re.search(pattern, file.read_text())
    except OSError:
        return None
    return match[1] if match else None


def _device(device: str) -> str:
    if device == "cuda":
        major, minor = torch.cuda.get_device_capability()
        built = f"ROCm {torch.version.hip}" if torch.version.hip else f"CUDA {torch.version.cuda}"
        return f"{torch.cuda.get_device_name()}, capability {major}.{minor}, {built}"
    model = _found(_CPU, r"model name\s*: (.+)") or platform.machine()
    return f"{model}, {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"


def _driver(device: str) -> str | None:
    """The GPU driver's version, where Linux tells it."""
    if device != "cuda":
        return None
    if torch.version.hip:
        return _found(_AMD, r"(\S+)")
    return _found(_NVIDIA, r"Module\s+(?:for \S+\s+)?([\d.]+)")


def environment(device: str) -> dict[str, Any]:
    """Versions and device; no name of a user, a machine or a folder."""
    return {
        "fused_siglip": __version__,
        "torch": torch.__version__,
        "triton": _version("triton"),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "device": device,
        "device_name": _device(device),
        "driver": _driver(device),
        "float32_products": float32_products(device),
    }


def panels(device: str) -> list[dict[str, Any]]:
    """For each dtype the backend that is chosen, and its panels of :data:`PLANNED`."""
    rows, d = PLANNED
    multiprocessors = None
    if device == "cuda":
        multiprocessors = torch.cuda.get_device_properties(0).multi_processor_count
    found = []
    for dtype in FEATURE_DTYPES:
        backend = default_backend(device, dtype)
        request = PlanRequest(rows, rows, d, dtype, device, backend)
        plan = plan_panels(request._replace(multiprocessors=multiprocessors))
        found.append(
            {
                "dtype": dtype_name(dtype),
                "backend": backend,
                "rows": plan.rows,
                "cols": plan.cols,
                "workspace_bytes": plan.workspace_bytes,
                "peak_bytes": plan.peak_bytes,
                "why_not_triton": why_not_default(device, dtype),
            }
        )
    return found
