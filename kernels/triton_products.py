"""The two products of the gradients in Triton.

Of only those tiles of g that are not 0; and, where the library cannot multiply half operands into
fp32 (ROCm), of all of g.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .triton_configs import PanelConfig
from .triton_math import column_parts

BLOCK_D = 128  # features a program of the product computes
LISTED = 128  # tiles that a program of the list looks at together


@triton.jit
def _bound(number):
    """The end of a loop, as the interpreter takes it too."""
    return number


if not isinstance(_bound, triton.JITFunction):
    # The interpreter holds numbers as arrays of one, which NumPy 2.4 does not take for an index.
    def _bound(number):
        return number.handle.data.item()


@triton.jit(do_not_specialize=["tiles", "stride_line", "stride_tile", "stride_list"])
def list_tiles_kernel(
    flags_ptr,  # 0 for a tile without gradient
    lists_ptr,  # (lines, 1 + tiles) int32: a line's number of other tiles, then which they are
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
def product_kernel(
    out_ptr,  # (M, D) fp32
    g_ptr,  # (M, K) rounded up to whole tiles
    y_ptr,  # (K, D)
    lists_ptr,  # of the K tiles of every tile row of g, as list_tiles_kernel writes them; or None
    alpha,
    M,
    K,
    D,
    stride_om,
    stride_od,
    stride_gm,
    stride_gk,
    stride_yk,
    stride_yd,
    stride_list,
    FRESH: tl.constexpr,  # out is overwritten, else added to
    INPUT_PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,  # a tile of g
    TILE_K: tl.constexpr,
    BLOCK_K: tl.constexpr,  # a step of the product, divides TILE_K
    BLOCK_D: tl.constexpr,
    PARTS: tl.constexpr,
):
    """BLOCK_M rows and BLOCK_D columns of out: the sum over the tiles that a line's list names.

    Those are 0 past M and K. Without a list the sum is over all of K, and g need be 0 only up to
    the next multiple of 16: what the panel kernel writes.
    """
    line = tl.program_id(1)
    rows = line * BLOCK_M + tl.arange(0, BLOCK_M)
    d = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    k = tl.arange(0, BLOCK_K)
    g_ptrs = g_ptr + rows.to(tl.int64)[:, None] * stride_gm + k.to(tl.int64)[None, :] * stride_gk
    y_ptrs = y_ptr + k.to(tl.int64)[:, None] * stride_yk + d.to(tl.int64)[None, :] * stride_yd
    product = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    if lists_ptr is None:
        steps = tl.cdiv(K, BLOCK_K)
        written = tl.cdiv(K, 16) * 16  # a multiple of 16: the loads stay wide
        for step in range(0, _bound(steps)):
            start = step * BLOCK_K
            # nor need there be a number past M
            g = tl.load(
                g_ptrs, mask=(rows < M)[:, None] & (k < written - start)[None, :], other=0.0
            )
            inside = (k < K - start)[:, None] & (d < D)[None, :]
            y = tl.load(y_ptrs, mask=inside, other=0.0)
            product = tl.dot(g, y, product, input_precision=INPUT_PRECISION)
            g_ptrs += BLOCK_K * stride_gk
            y_ptrs += BLOCK_K * stride_yk
    else:
        list_ptr = lists_ptr + line * stride_list
        STEPS: tl.constexpr = TILE_K // BLOCK_K
        steps = tl.load(list_ptr) * STEPS
        tile = tl.load(list_ptr + 1)
        for step in range(0, _bound(steps)):
            start = tile * TILE_K + step % STEPS * BLOCK_K
            g = tl.load(g_ptrs + start.to(tl.int64) * stride_gk)
            inside = (k < K - start)[:, None] & (d < D)[None, :]
            y = tl.load(y_ptrs + start.to(tl.int64) * stride_yk, mask=inside, other=0.0)
            product = tl.dot(g, y, product, input_precision=INPUT_PRECISION)
            tile = tl.load(list_ptr + 1 + (step + 1) // STEPS)  # past the last one: not used

    # A few columns at a time: addresses of all of them do not fit the registers.
    if FRESH | (steps > 0):
        WIDTH: tl.constexpr = BLOCK_D // PARTS
        parts = column_parts(product, PARTS)
        for part in tl.static_range(PARTS):
            cols = tl.program_id(0) * BLOCK_D + part * WIDTH + tl.arange(0, WIDTH)
            out_ptrs = out_ptr + rows.to(tl.int64)[:, None] * stride_om
            out_ptrs += cols.to(tl.int64)[None, :] * stride_od
            inside = (rows < M)[:, None] & (cols < D)[None, :]
            total = parts[part] * alpha
            if not FRESH:
                total += tl.load(out_ptrs, mask=inside)
            tl.store(out_ptrs, total, mask=inside)
            tl.debug_barrier()  # else the compiler mixes the parts again


def product_constants(config: PanelConfig, tile: tuple[int, int]) -> dict[str, int]:
    """The product kernel's compile-time constants, for tiles of g (or of g^T) of this size."""
    return {
        "BLOCK_M": tile[0],
        "TILE_K": tile[1],
        "BLOCK_K": config.block_d,
        "BLOCK_D": BLOCK_D,
        "PARTS": config.parts,
    }


def list_elements(tiles_m: int, tiles_n: int) -> int:
    """int32 numbers in which the lists of either product find room, for g of so many tiles."""
    # one more than a list holds: the product reads ahead
    return tiles_m * tiles_n + 2 * max(tiles_m, tiles_n)


def add_tiled_product(
    out: Tensor,  # (M, D) fp32
    g: Tensor,  # (M, K) rounded up to whole tiles, as the panel kernel writes it
    other: Tensor,  # (K, D) in the dtype of g
    flags: Tensor | None,  # (tile rows, tile columns) of g, int32: 0 where a tile is 0 throughout
    lists: Tensor | None,  # at least list_elements int32, overwritten; None without flags
    alpha: float,
    fresh: bool,
    config: PanelConfig,
    tile: tuple[int, int],  # of g
    precision: str,
) -> None:
    """out = alpha * g @ other, added to what is there unless ``fresh``; tiles of 0 are not read.

    fp32 out of tensor cores, added to ``out`` once; the same bits every time.
    """
    (m, d), lines = out.shape, triton.cdiv(out.shape[0], tile[0])
    stride_list = 0
    with torch.cuda.device_of(out):  # Triton launches on the current device
        if flags is not None:
            # Lists spare the product a branch in its loop: with one, nothing would be loaded ahead.
            tiles, stride_list = flags.shape[1], flags.shape[1] + 2
            list_tiles_kernel[(lines,)](
                flags, lists, tiles, *flags.stride(), stride_list, BLOCK=LISTED
            )
        product_kernel[(triton.cdiv(d, BLOCK_D), lines)](
            out,
            g,
            other,
            None if flags is None else lists,
            alpha,
            m,
            other.shape[0],
            d,
            *out.stride(),
            *g.stride(),
            *other.stride(),
            stride_list,
            FRESH=fresh,
            INPUT_PRECISION=precision,
            **product_constants(config, tile),
            **config.options(),
        )
