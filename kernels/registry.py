"""Which backends there are, which of them can run where, and what torch's products can do there."""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Callable
from typing import NamedTuple

import torch

from .interface import Panel

OLDEST_CAPABILITY = (8, 0)  # of CUDA devices that the Triton kernel is compiled for

_TRITON_INSTALLED = importlib.util.find_spec("triton") is not None


def multiplies_half_into_fp32(device_type: str) -> bool:
    """Whether torch's products take half operands and accumulate into an fp32 output.

    CUDA does (out_dtype, with an fp32 addend since torch 2.10); ROCm builds refuse it.
    """
    return device_type == "cuda" and torch.version.hip is None


def float32_products(device_type: str = "cuda") -> str:
    """How torch multiplies float32 matrices there: "ieee", or rounded first, such as "tf32".

    ``torch.set_float32_matmul_precision`` sets what is read here too;
    ``torch.get_float32_matmul_precision`` raises once a user has set this attribute.
    """
    of_device = torch.backends.cuda if device_type == "cuda" else torch.backends.mkldnn
    precision = of_device.matmul.fp32_precision
    return "ieee" if precision == "none" else precision


def why_triton_unavailable(device: torch.device | str, dtype: torch.dtype) -> str | None:
    """Why the Triton backend cannot run on this device and dtype, or None where it can."""
    device = torch.device(device)
    if not _TRITON_INSTALLED:
        return "triton is not installed (pip install triton)"
    if dtype == torch.float64:
        return "it has no float64 (use backend='torch')"
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return f"it needs a CUDA or ROCm device, not {device.type} (or TRITON_INTERPRET=1 to debug)"
    if device.type == "cuda" and torch.version.hip is None and torch.cuda.is_available():
        found = torch.cuda.get_device_properties(device)  # which torch.compile knows for a constant
        if (found.major, found.minor) < OLDEST_CAPABILITY:
            return (
                "it needs CUDA compute capability 8.0 or newer, this device has "
                f"{found.major}.{found.minor}"
            )
    return None


def check_backend(name: str | None, device: torch.device, dtype: torch.dtype) -> None:
    """Raise ValueError where Triton was asked for by name and cannot run."""
    obstacle = why_triton_unavailable(device, dtype) if name == "triton" else None
    if obstacle is not None:
        raise ValueError(f"backend='triton' cannot run here: {obstacle}")


def why_not_default(device: torch.device | str, dtype: torch.dtype) -> str | None:
    """Why Triton is not what a caller gets who names no backend, or None where it is."""
    obstacle = why_triton_unavailable(device, dtype)
    if obstacle is None and torch.device(device).type != "cuda":
        return f"it is only chosen on a CUDA or ROCm device, not on {torch.device(device).type}"
    return obstacle


def default_backend(device: torch.device | str, dtype: torch.dtype) -> str:
    """The backend for a caller who names none: Triton on a GPU where it can, else torch."""
    if torch.device(device).type != "cuda":  # asked at every call: no more than this on a CPU
        return "torch"
    return "triton" if why_not_default(device, dtype) is None else "torch"


class Gpu(NamedTuple):
    """What a call asks about its GPU."""

    capability: tuple[int, int]  # of CUDA
    multiprocessors: int


def gpu(device: torch.device) -> Gpu:
    """The facts of a GPU; without an index, of the current one."""
    return _gpu(torch.cuda.current_device() if device.index is None else device.index)


@functools.cache  # asked several times a call, and torch takes microseconds to answer
def _gpu(index: int) -> Gpu:
    found = torch.cuda.get_device_properties(index)
    return Gpu((found.major, found.minor), found.multi_processor_count)


@functools.cache
def _torch_panel() -> type[Panel]:
    from .torch_panel import TorchPanel

    return TorchPanel


@functools.cache
def _triton_panel() -> type[Panel]:
    from .triton_panel import TritonPanel

    return TritonPanel


# What ``backend=`` takes, and how to get the class behind it: triton is imported only when asked
# for.
BACKENDS: dict[str, Callable[[], type[Panel]]] = {"torch": _torch_panel, "triton": _triton_panel}


def panel_class(name: str) -> type[Panel]:
    """The class behind a backend's name."""
    return BACKENDS[name]()
