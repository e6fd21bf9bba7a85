"""The shipped panel kernel with blocks of x and y from the copy engine (tensor descriptors)."""

import triton
import triton.language as tl

from fused_siglip.kernels.math import EASY_LOGIT, column_parts
from fused_siglip.kernels.panel_triton import (
    _grouped_tile,
    epilogue,
    meets_diagonal_or_edge,
    pair_masks,
)


@triton.jit(do_not_specialize=["M", "N", "diagonal"])
def panel_tma_kernel(
    x_desc,  # (M, D), blocks of BLOCK_M x BLOCK_D
    y_desc,  # (N, D), blocks of BLOCK_N x BLOCK_D
    g_ptr,  # (M, N) rounded up to whole tiles
    partials_ptr,  # (3, tiles) fp32
    logit_scale_ptr,  # () fp32
    logit_bias_ptr,  # () fp32
    M,
    N,
    diagonal,
    stride_gm,
    D: tl.constexpr,
    GRAD_SCALE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    GROUP_M: tl.constexpr,
    PARTS: tl.constexpr,
    OCTETS: tl.constexpr,
    PAIRED: tl.constexpr,
    COLS: tl.constexpr,
    PERSISTENT: tl.constexpr,
):
    """Tiles of a panel: g, and the three sums over a tile's pairs."""
    tiles = tl.cdiv(M, BLOCK_M) * tl.cdiv(N, BLOCK_N)
    scale = tl.load(logit_scale_ptr)
    bias = tl.load(logit_bias_ptr)
    WIDTH: tl.constexpr = BLOCK_N // PARTS
    step = tl.num_programs(0) if PERSISTENT else tiles
    for pid in tl.range(tl.program_id(0), tiles, step, flatten=PERSISTENT):
        tile_m, tile_n = _grouped_tile(pid, M, N, BLOCK_M, BLOCK_N, GROUP_M)
        row0 = tile_m * BLOCK_M
        s = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for start in range(0, D, BLOCK_D):
            x = x_desc.load([row0, start])
            y = y_desc.load([tile_n * BLOCK_N, start])
            s = tl.dot(x, y.T, s)
        parts = column_parts(s, PARTS)
        zero = tl.zeros((OCTETS, 8, COLS), tl.float32)
        sums = (zero, zero, zero)
        easy = (scale >= 0) & (tl.max(s) * scale + bias <= EASY_LOGIT)
        easy &= ~meets_diagonal_or_edge(row0, tile_n * BLOCK_N, M, N, diagonal, BLOCK_M, BLOCK_N)
        for part in tl.static_range(PARTS):
            col0 = tile_n * BLOCK_N + part * WIDTH
            rows = (row0 + tl.arange(0, BLOCK_M)).to(tl.int64)
            g_ptrs = g_ptr + rows[:, None] * stride_gm + (col0 + tl.arange(0, WIDTH))[None, :]
            if easy:
                sums = epilogue(
                    parts[part], None, None, scale, bias, sums, g_ptrs, True,
                    True, GRAD_SCALE, PAIRED,
                )  # fmt: skip
            elif meets_diagonal_or_edge(row0, col0, M, N, diagonal, BLOCK_M, WIDTH):
                positive, valid = pair_masks(row0, col0, M, N, diagonal, None, None, BLOCK_M, WIDTH)
                sums = epilogue(
                    parts[part], positive, valid, scale, bias, sums, g_ptrs, False,
                    True, GRAD_SCALE, PAIRED,
                )  # fmt: skip
            else:
                sums = epilogue(
                    parts[part], None, None, scale, bias, sums, g_ptrs, False,
                    True, GRAD_SCALE, PAIRED,
                )  # fmt: skip
        loss, gs_sum, g_sum = sums
        tl.store(partials_ptr + pid, tl.sum(loss))
        tl.store(partials_ptr + tiles + pid, tl.sum(gs_sum))
        tl.store(partials_ptr + 2 * tiles + pid, tl.sum(g_sum))
