"""The panel kernel for Hopper, from the host: when it runs, how it is compiled and launched."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import triton
from torch import Tensor

from .interface import Affine, ceil_div
from .registry import gpu

if TYPE_CHECKING:
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

CAPABILITY = (9, 0)
# Gluon is experimental in Triton: what is written for one release need not compile with the next.
_GLUON = triton.__version__.startswith("3.6.")
_OPERANDS = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class HopperConfig:
    """How hopper_kernel.py is compiled; checked by tests/triton_backend/test_gluon_compiled.py."""

    tile: tuple[int, int]
    stages: int  # blocks of x and y in shared memory
    num_warps: int  # of a consumer
    registers: int = 112  # of a consumer's thread: what 65,536 allow beside the producer's
    group_m: int = 16  # tile rows that share a band of y in L2
    block_k: int = 64  # features a step of the product takes
    width: int = 32  # columns a round of the epilogue takes
    store_buffers: int = 4  # rounds of dlogits on their way to memory; divides the rounds of a tile

    def tiles(self, m: int, n: int) -> int:
        """The number of tiles of an (m, n) panel."""
        return ceil_div(m, self.tile[0]) * ceil_div(n, self.tile[1])


# The fastest of those that benchmarks/gpu/tune.py timed on an H100: docs/performance-log.md.
# Its tile is not smaller than the portable kernel's, whose number of tiles the partial sums are
# allocated for.
HOPPER = HopperConfig((128, 128), stages=5, num_warps=8)


def suits(capability: tuple[int, int] | str, dtype: torch.dtype) -> bool:
    """Whether the kernel runs there: elsewhere the portable one does the same."""
    return _GLUON and capability == CAPABILITY and dtype in _OPERANDS


def reads(features: Tensor) -> bool:
    """Whether the copy engine can read (rows, D) features."""
    row, adjacent = features.stride()
    aligned = row * features.itemsize % 16 == 0 and features.data_ptr() % 16 == 0
    return adjacent == 1 and row >= features.shape[1] and aligned


def descriptor(tensor: Tensor, rows: int, cols: int) -> TensorDescriptor:
    """A tensor for the copy engine, in blocks of rows x cols."""
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    layout = _layout(rows, cols, tensor.dtype)
    return TensorDescriptor(tensor, tensor.shape, tensor.stride(), [rows, cols], layout)


@functools.cache
def _layout(rows: int, cols: int, dtype: torch.dtype) -> Any:  # Gluon's, which has no types
    from triton.experimental.gluon import language as gl

    kind = gl.bfloat16 if dtype == torch.bfloat16 else gl.float16
    return gl.NVMMASharedLayout.get_default_for([rows, cols], kind)


def launch_panel(
    config: HopperConfig,
    x: Tensor,  # (m, D)
    y: Tensor,  # (n, D)
    dlogits: Tensor | None,  # at least (m, n), rows aligned
    partials: Tensor,  # (3 or 1, tiles) fp32
    affine: Affine,
    diagonal: int,
    grad_scale: float,
) -> None:
    """dlogits and the sums of a panel: see :class:`fused_siglip.kernels.Panel`."""
    from .hopper_kernel import hopper_panel_kernel

    (m, d), n = x.shape, y.shape[0]
    programs = min(gpu(x.device).multiprocessors, config.tiles(m, n))
    hopper_panel_kernel[(programs,)](
        descriptor(x, config.tile[0], config.block_k),
        descriptor(y, config.tile[1], config.block_k),
        None if dlogits is None else descriptor(dlogits, config.tile[0], config.width),
        partials,
        *affine,
        m,
        n,
        diagonal,
        D=d,
        GROUP_M=config.group_m,
        STAGES=config.stages,
        WIDTH=config.width,
        GRAD_SCALE=grad_scale,
        SCALAR_GRADS=len(partials) == 3,
        STORE_BUFFERS=config.store_buffers,
        REGISTERS=config.registers,
        num_warps=config.num_warps,
        enable_fp_fusion=True,
    )
