"""Panels that are not shipped, for the shipped sweep: what the fused kernel has to beat.

A library product into the panel and one elementwise kernel over it (the plain alternative), and the
fused kernel with wider tiles.
"""

from __future__ import annotations

import functools
import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from fused_siglip import siglip_loss
from fused_siglip.kernels import (
    BACKENDS,
    GRAD_SCALE,
    Affine,
    Pairs,
    Panel,
    PanelSpec,
    multiplies_half_into_fp32,
)
from fused_siglip.kernels.interface import ceil_div
from fused_siglip.kernels.torch_products import add_product
from fused_siglip.kernels.triton_configs import TILE
from fused_siglip.kernels.triton_kernels import epilogue
from fused_siglip.kernels.triton_math import SATURATED_LOGIT
from fused_siglip.kernels.triton_panel import TritonPanel, stored_dtype
from fused_siglip.kernels.triton_tiles import meets_diagonal_or_edge, pair_masks
from fused_siglip.kernels.triton_totals import TritonTotals

BLOCK = (32, 256)  # pairs a program of the elementwise kernel takes


@triton.jit(do_not_specialize=["M", "N", "diagonal"])
def elementwise_kernel(  # noqa: PLR0913, a kernel's pointers, sizes and strides
    s_ptr,  # (M, N) similarities, fp32 or the operands' dtype
    dlogits_ptr,  # (M, N) rounded up to whole blocks, may be s_ptr; or None
    partials_ptr,  # (3, blocks) fp32: a block's sums of softplus(u), dlogits * s, dlogits
    logit_scale_ptr,  # () fp32
    logit_bias_ptr,  # () fp32
    image_ids_ptr,  # (M,) int64 or None
    text_ids_ptr,  # (N,) int64 or None
    M,
    N,
    diagonal,
    stride,  # of s and dlogits
    GRAD_SCALE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    row0, col0 = tl.program_id(1) * BLOCK_M, tl.program_id(0) * BLOCK_N
    rows = (row0 + tl.arange(0, BLOCK_M)).to(tl.int64)
    offsets = rows[:, None] * stride + (col0 + tl.arange(0, BLOCK_N))[None, :]
    s = tl.load(s_ptr + offsets).to(tl.float32)
    scale = tl.load(logit_scale_ptr)
    bias = tl.load(logit_bias_ptr)
    dlogits_ptrs = None
    if dlogits_ptr is not None:
        dlogits_ptrs = dlogits_ptr + offsets
    # sums of (., 8, .), as the epilogue folds them
    zero = tl.zeros((BLOCK_M // 8, 8, BLOCK_N), tl.float32)
    sums = (zero, zero, zero)
    saturated = False
    mixed = col0 < N
    if image_ids_ptr is None:
        mixed = meets_diagonal_or_edge(row0, col0, M, N, diagonal, BLOCK_M, BLOCK_N)
        saturated = (scale >= 0) & (tl.max(s) * scale + bias <= SATURATED_LOGIT) & ~mixed
    if saturated:
        sums = epilogue(s, None, None, scale, bias, sums, dlogits_ptrs, True, True, GRAD_SCALE, 1)
    elif mixed:
        positive, valid = pair_masks(
            row0, col0, M, N, diagonal, image_ids_ptr, text_ids_ptr, BLOCK_M, BLOCK_N
        )
        sums = epilogue(
            s, positive, valid, scale, bias, sums, dlogits_ptrs, False, True, GRAD_SCALE, 1
        )
    elif image_ids_ptr is None:
        sums = epilogue(s, None, None, scale, bias, sums, dlogits_ptrs, False, True, GRAD_SCALE, 1)
    loss, dscale_sum, dbias_sum = sums
    blocks = tl.num_programs(0) * tl.num_programs(1)
    block = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
    tl.store(partials_ptr + block, tl.sum(loss))
    tl.store(partials_ptr + blocks + block, tl.sum(dscale_sum))
    tl.store(partials_ptr + 2 * blocks + block, tl.sum(dbias_sum))


class LibraryPanel(TritonTotals):
    """A :class:`fused_siglip.kernels.Panel`: library product, then one elementwise kernel.

    Similarities stay fp32, in a buffer of their own beside dlogits.
    """

    tile = TILE
    align = 1
    dscale_from_products = False
    in_place = False

    @classmethod
    def _similarity(cls, dtype: torch.dtype) -> torch.dtype:
        return stored_dtype(dtype) if cls.in_place else torch.float32

    @staticmethod
    def _shape(rows: int, cols: int) -> tuple[int, int]:
        return tuple(ceil_div(k, side) * side for k, side in zip((rows, cols), BLOCK))  # noqa: B905

    @classmethod
    def workspace_bytes(cls, spec: PanelSpec) -> int:
        elements = math.prod(cls._shape(spec.rows, spec.cols))
        stored = spec.store_dlogits and not cls.in_place
        dlogits = stored_dtype(spec.dtype).itemsize if stored else 0
        sums = 3 * torch.float32.itemsize * elements // math.prod(BLOCK)
        return elements * (cls._similarity(spec.dtype).itemsize + dlogits) + sums

    def __init__(self, spec: PanelSpec, device: torch.device):
        if spec.filters_negatives or spec.weighted:
            raise ValueError("benchmarks' panels take all negatives, and all pairs alike")
        shape, dtype = self._shape(spec.rows, spec.cols), spec.dtype
        empty = functools.partial(torch.empty, device=device)
        # zeros: what a smaller panel leaves beside it is read, though it takes no part
        self.s = torch.zeros(shape, dtype=self._similarity(dtype), device=device)
        self.dlogits = None
        if spec.store_dlogits:
            self.dlogits = self.s if self.in_place else empty(shape, dtype=stored_dtype(dtype))
        self.all_partials = empty(3 * math.prod(shape) // math.prod(BLOCK), dtype=torch.float32)
        self.sums = 3 if spec.scalar_grads else 1
        self.dtype, self.totals = dtype, []

    def __call__(
        self,
        x: Tensor,  # (m, D)
        y: Tensor,  # (n, D)
        affine: Affine,
        pairs: Pairs,
        sums: Tensor | None,  # (3,)
        selection: None = None,
        image_losses: None = None,
    ) -> Tensor | None:  # (m, n)
        m, n = x.shape[0], y.shape[0]
        s = self.s[:m, :n]
        if x.dtype == s.dtype:
            torch.mm(x, y.T, out=s)
        elif multiplies_half_into_fp32(x.device.type):
            torch.mm(x, y.T, out_dtype=s.dtype, out=s)
        else:
            torch.mm(x.to(s.dtype), y.T.to(s.dtype), out=s)
        blocks_m, blocks_n = (ceil_div(k, side) for k, side in zip((m, n), BLOCK, strict=True))
        partials = self.all_partials[: 3 * blocks_m * blocks_n].view(3, -1)
        self.partials = partials[: self.sums]
        with torch.cuda.device_of(x):
            elementwise_kernel[(blocks_n, blocks_m)](
                self.s,
                self.dlogits,
                partials,
                *affine,
                *(pairs.ids or (None, None)),
                m,
                n,
                n if pairs.diagonal is None else pairs.diagonal,
                self.s.stride(0),
                GRAD_SCALE=GRAD_SCALE.get(self.dtype, 1.0),
                BLOCK_M=BLOCK[0],
                BLOCK_N=BLOCK[1],
                num_warps=8,
            )
            if sums is not None:
                torch.sum(self.partials, 1, out=sums[: self.sums])
        return None if self.dlogits is None else self.dlogits[:m, :n].to(self.dtype)

    def add_product(
        self,
        out: Tensor,  # (m, D) or, transposed, (n, D)
        dlogits: Tensor,  # (m, n)
        rhs: Tensor,  # (n, D) or, transposed, (m, D)
        alpha: float,
        accumulate: bool,
        transposed: bool,
    ) -> None:
        add_product(out, dlogits.T if transposed else dlogits, rhs, alpha, accumulate)


class InPlaceLibraryPanel(LibraryPanel):
    """The same in one buffer of the operands' dtype, so similarities are rounded to that.

    Half the bytes, and not as exact (siglip-kernel computes so): it shows what exactness costs.
    """

    in_place = True


class PortableTritonPanel(TritonPanel):
    """The portable kernel where one of its own is shipped for the device."""

    def _on_hopper(self, x: Tensor, y: Tensor) -> bool:
        return False


VARIANTS: dict[str, type[Panel]] = {
    "library_fp32": LibraryPanel,
    "library_in_place": InPlaceLibraryPanel,
    "portable": PortableTritonPanel,
}


def variant_loss(x: Tensor, y: Tensor, t: Tensor, b: Tensor, *, backend: str, **options) -> Tensor:
    """siglip_loss with a panel of VARIANTS, which is a backend for the time of the call."""
    BACKENDS[backend] = lambda: VARIANTS[backend]
    try:
        return siglip_loss(x, y, t, b, backend=backend, **options)
    finally:
        del BACKENDS[backend]
