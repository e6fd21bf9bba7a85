"""What the Triton kernels multiply and write: features and dlogits in the dtypes for that."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from .triton_kernels import panel_kernel

INTERPRETED = not isinstance(panel_kernel, triton.JITFunction)  # decided when it was decorated


def stored_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which the kernel writes dlogits: the interpreter cuts bf16 off where devices
    round."""
    return torch.float32 if INTERPRETED and dtype == torch.bfloat16 else dtype


def multiplied(features: Tensor, precision: str) -> Tensor:
    """Features as tl.dot multiplies them.

    The interpreter's takes the bits of bf16 for a number. In tf32 the tensor cores cut the last 13
    bits off where the libraries round: every similarity would come out a little too small, and at
    t = 100 the loss 0.4% off (on an H100: benchmarks/results, device, matmul_precision "high").
    """
    if INTERPRETED and features.dtype == torch.bfloat16:
        return features.float()
    return round_to_tf32(features) if precision == "tf32" else features


def round_to_tf32(features: Tensor) -> Tensor:
    """float32 to the nearest number with 10 bits of mantissa, ties away from zero."""
    if features.dtype != torch.float32:
        return features
    rounded = (features.view(torch.int32) + (1 << 12)).bitwise_and_(-1 << 13).view(torch.float32)
    return torch.where(features.isfinite(), rounded, features)
