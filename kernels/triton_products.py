"""The two products of the gradients in Triton.

They multiply only those tiles of dlogits that are not 0 or, where the library cannot multiply half
operands into fp32 (ROCm), all of dlogits.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .interface import ceil_div
from .triton_configs import PanelConfig
from .triton_math import column_subtiles

BLOCK_D = 128  # features a program of the product computes
LISTED = 128  # tiles that a program of the list looks at together


def _same(number):
    return number


def _index(number):
    # The interpreter holds numbers as arrays of one, which NumPy 2.4 does not take for an index.
    return number.handle.data.item()


# The end of a loop, as the interpreter takes it too.
_bound = triton.jit(_same)
if not isinstance(_bound, triton.JITFunction):
    _bound = _index


@triton.jit(do_not_specialize=["tiles", "stride_line", "stride_tile", "stride_list"])
def list_tiles_kernel(
    flags_ptr,  # 0 for a tile without gradient
    lists_ptr,  # (lines, 1 + tiles) int32: how many tiles a line lists, then which they are
    tiles,  # of a line
    stride_line,
    stride_tile,
    stride_list,
    BLOCK: tl.constexpr,
):
    """One line's tiles that are not 0, in their order."""
    line = tl.program_id(0)
    list_ptr = lists_ptr + line * stride_list
    listed = tl.zeros((), tl.int32)
    for start in range(0, _bound(tiles), BLOCK):
        tile = start + tl.arange(0, BLOCK)
        flags = tl.load(flags_ptr + line * stride_line + tile * stride_tile, tile < tiles, other=0)
        found = (flags != 0).to(tl.int32)
        tl.store(list_ptr + listed + tl.cumsum(found), tile, mask=flags != 0)
        listed += tl.sum(found)
    tl.store(list_ptr, listed)


@triton.jit(do_not_specialize=["M", "K", "stride_list"])
def product_kernel(  # noqa: PLR0913, a kernel's pointers, sizes and strides
    out_ptr,  # (M, D) fp32
    dlogits_ptr,  # (M, K) rounded up to whole tiles
    y_ptr,  # (K, D)
    lists_ptr,  # the K tiles of every tile row of dlogits, by list_tiles_kernel; or None
    alpha,
    M,
    K,
    D,
    stride_om,
    stride_od,
    stride_zm,
    stride_zk,
    stride_yk,
    stride_yd,
    stride_list,
    ACCUMULATE: tl.constexpr,  # out is added to, else overwritten
    INPUT_PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,  # a tile of dlogits
    TILE_K: tl.constexpr,
    BLOCK_K: tl.constexpr,  # a step of the product, divides TILE_K
    BLOCK_D: tl.constexpr,
    SUBTILES: tl.constexpr,
):
    """BLOCK_M rows and BLOCK_D columns of out: the sum over the tiles that a line's list names.

    Those are 0 past M and K. Without a list the sum is over all of K, and dlogits need be 0 only up
    to the next multiple of 16: what the panel kernel writes.
    """
    line = tl.program_id(1)
    rows = line * BLOCK_M + tl.arange(0, BLOCK_M)
    d = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    k = tl.arange(0, BLOCK_K)
    dlogits_ptrs = dlogits_ptr + rows.to(tl.int64)[:, None] * stride_zm
    dlogits_ptrs += k.to(tl.int64)[None, :] * stride_zk
    y_ptrs = y_ptr + k.to(tl.int64)[:, None] * stride_yk + d.to(tl.int64)[None, :] * stride_yd
    product = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    if lists_ptr is None:
        steps = tl.cdiv(K, BLOCK_K)
        written = tl.cdiv(K, 16) * 16  # a multiple of 16: the loads stay wide
        for step in range(0, _bound(steps)):
            start = step * BLOCK_K
            # nor need there be a number past M
            dlogits = tl.load(
                dlogits_ptrs, mask=(rows < M)[:, None] & (k < written - start)[None, :], other=0.0
            )
            inside = (k < K - start)[:, None] & (d < D)[None, :]
            y = tl.load(y_ptrs, mask=inside, other=0.0)
            product = tl.dot(dlogits, y, product, input_precision=INPUT_PRECISION)
            dlogits_ptrs += BLOCK_K * stride_zk
            y_ptrs += BLOCK_K * stride_yk
    else:
        list_ptr = lists_ptr + line * stride_list
        STEPS: tl.constexpr = TILE_K // BLOCK_K
        steps = tl.load(list_ptr) * STEPS
        tile = tl.load(list_ptr + 1)
        for step in range(0, _bound(steps)):
            start = tile * TILE_K + step % STEPS * BLOCK_K
            dlogits = tl.load(dlogits_ptrs + start.to(tl.int64) * stride_zk)
            inside = (k < K - start)[:, None] & (d < D)[None, :]
            y = tl.load(y_ptrs + start.to(tl.int64) * stride_yk, mask=inside, other=0.0)
            product = tl.dot(dlogits, y, product, input_precision=INPUT_PRECISION)
            tile = tl.load(list_ptr + 1 + (step + 1) // STEPS)  # past the last one: not used

    # A few columns at a time: addresses of all of them do not fit the registers.
    if (not ACCUMULATE) | (steps > 0):
        WIDTH: tl.constexpr = BLOCK_D // SUBTILES
        subtiles = column_subtiles(product, SUBTILES)
        for subtile in tl.static_range(SUBTILES):
            cols = tl.program_id(0) * BLOCK_D + subtile * WIDTH + tl.arange(0, WIDTH)
            out_ptrs = out_ptr + rows.to(tl.int64)[:, None] * stride_om
            out_ptrs += cols.to(tl.int64)[None, :] * stride_od
            inside = (rows < M)[:, None] & (cols < D)[None, :]
            total = subtiles[subtile] * alpha
            if ACCUMULATE:
                total += tl.load(out_ptrs, mask=inside)
            tl.store(out_ptrs, total, mask=inside)
            tl.debug_barrier()  # else the compiler mixes the subtiles again


class TileLists(NamedTuple):
    """Which tiles of dlogits are multiplied: all others are 0."""

    flags: Tensor  # (tile rows, tile columns) int32, 0 where a tile is 0
    lists: Tensor  # at least list_elements int32, overwritten


class ProductConfig(NamedTuple):
    """How the product kernel is compiled and launched."""

    panel: PanelConfig
    tile: tuple[int, int]  # of dlogits (or its transpose)
    precision: str  # "ieee" or "tf32", how fp32 operands are multiplied

    def constants(self) -> dict[str, int]:
        """The product kernel's compile-time constants."""
        return {
            "BLOCK_M": self.tile[0],
            "TILE_K": self.tile[1],
            "BLOCK_K": self.panel.block_d,
            "BLOCK_D": BLOCK_D,
            "SUBTILES": self.panel.epilogue_subtiles,
        }


def list_elements(tiles_m: int, tiles_n: int) -> int:
    """int32 numbers in which the lists of either product find room, for so many tiles."""
    # one more than a list holds: the product reads ahead
    return tiles_m * tiles_n + 2 * max(tiles_m, tiles_n)


def add_tiled_product(
    out: Tensor,  # (M, D) fp32
    dlogits: Tensor,  # (M, K) rounded up to whole tiles, as the panel kernel writes it
    rhs: Tensor,  # (K, D) in the dtype of dlogits
    lists: TileLists | None,  # None: every tile is multiplied
    alpha: float,
    accumulate: bool,
    config: ProductConfig,
) -> None:
    """out = alpha * dlogits @ rhs, plus what is there if ``accumulate``; tiles of 0 are not read.

    fp32 out of tensor cores, added to ``out`` once; the same bits every time.
    """
    (m, d), lines = out.shape, ceil_div(out.shape[0], config.tile[0])
    stride_list = 0
    with torch.cuda.device_of(out):  # Triton launches on the current device
        if lists is not None:
            # Lists spare the product a branch in its loop: with one, nothing would be loaded ahead.
            tiles = lists.flags.shape[1]
            stride_list = tiles + 2
            list_tiles_kernel[(lines,)](
                lists.flags, lists.lists, tiles, *lists.flags.stride(), stride_list, BLOCK=LISTED
            )
        product_kernel[(ceil_div(d, BLOCK_D), lines)](
            out,
            dlogits,
            rhs,
            None if lists is None else lists.lists,
            alpha,
            m,
            rhs.shape[0],
            d,
            *out.stride(),
            *dlogits.stride(),
            *rhs.stride(),
            stride_list,
            ACCUMULATE=accumulate,
            INPUT_PRECISION=config.precision,
            **config.constants(),
            **config.panel.options(),
        )
