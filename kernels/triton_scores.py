"""Best positives, and how many negatives are as similar: Triton kernels and their launches."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .float_keys import exact_keys, exact_values
from .interface import Pairs, RowValues, ceil_div
from .triton_arguments import ids_args
from .triton_configs import PanelConfig
from .triton_math import column_subtiles
from .triton_tiles import grouped_tile, pair_masks, similarity

# Of int32 keys that sort as float32 values do (float_keys.exact_keys): no value's, and that of the
# lowest finite value.
_NO_KEY = tl.constexpr(-(2**31))
_LOWEST_KEY = tl.constexpr(-0x7F800000)
_LAST_KEY = tl.constexpr(2**31 - 1)  # of NaN


@triton.jit
def _exact_key(s):
    bits = s.to(tl.int32, bitcast=True)
    return tl.where(s == s, bits ^ ((bits >> 31) & _LAST_KEY), _LAST_KEY)


@triton.jit(do_not_specialize=["M", "N", "diagonal", "first_tile"])
def best_kernel(  # noqa: PLR0913, a kernel's pointers, sizes and strides
    x_ptr,  # (M, D)
    y_ptr,  # (N, D)
    image_ids_ptr,  # (M,) int64 or None
    text_ids_ptr,  # (N,) int64 or None
    image_keys_ptr,  # (M,) int32, raised; or None
    text_keys_ptr,  # (N,) int32, likewise
    M,
    N,
    diagonal,
    first_tile,  # column of the first tile that the diagonal meets in tile row 0
    stride_xm,
    stride_xd,
    stride_yn,
    stride_yd,
    D: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    GROUP_M: tl.constexpr,
    SUBTILES: tl.constexpr,
):
    """The best positives of one tile's rows and columns: see Panel.best_positives.

    Without ids two programs a tile row are launched: for the tiles that the diagonal may meet.
    """
    pid = tl.program_id(0)
    if image_ids_ptr is None:
        tl.static_assert(BLOCK_M == BLOCK_N, "the diagonal meets two tiles of a row")
        tile_m = pid // 2
        tile_n = tile_m + first_tile + pid % 2
    else:
        tile_m, tile_n = grouped_tile(pid, M, N, BLOCK_M, BLOCK_N, GROUP_M)
    if (tile_n >= 0) & (tile_n * BLOCK_N < N):
        row0 = tile_m * BLOCK_M
        tile = similarity(
            x_ptr, y_ptr, row0, tile_n * BLOCK_N, M, N, stride_xm, stride_xd, stride_yn, stride_yd,
            D, INPUT_PRECISION, BLOCK_M, BLOCK_N, BLOCK_D,
        )  # fmt: skip
        WIDTH: tl.constexpr = BLOCK_N // SUBTILES
        subtiles = column_subtiles(tile, SUBTILES)
        # in every place of a subtile the best so far: rows are reduced once, at the end
        best = tl.full((BLOCK_M, WIDTH), _NO_KEY, tl.int32)
        for subtile in tl.static_range(SUBTILES):
            col0 = tile_n * BLOCK_N + subtile * WIDTH
            positive, valid = pair_masks(
                row0, col0, M, N, diagonal, image_ids_ptr, text_ids_ptr, BLOCK_M, WIDTH
            )
            positive &= valid
            if tl.max(positive.to(tl.int32)) > 0:  # which most blocks hold none of
                key = tl.maximum(_exact_key(subtiles[subtile]), _LOWEST_KEY)
                key = tl.where(positive, key, _NO_KEY)
                if image_keys_ptr is not None:
                    best = tl.maximum(best, key)
                if text_keys_ptr is not None:
                    cols = col0 + tl.arange(0, WIDTH)
                    # a maximum of whole numbers: the order changes nothing
                    of_cols = tl.max(key, 0)
                    tl.atomic_max(text_keys_ptr + cols, of_cols, mask=cols < N, sem="relaxed")
            tl.debug_barrier()  # one subtile after the other, as in the panel kernel
        if image_keys_ptr is not None:
            rows = row0 + tl.arange(0, BLOCK_M)
            of_rows = tl.max(best, 1)
            tl.atomic_max(image_keys_ptr + rows, of_rows, mask=rows < M, sem="relaxed")


@triton.jit(do_not_specialize=["M", "N", "diagonal"])
def not_below_kernel(  # noqa: PLR0913, a kernel's pointers, sizes and strides
    x_ptr,  # (M, D)
    y_ptr,  # (N, D)
    image_ids_ptr,  # (M,) int64 or None
    text_ids_ptr,  # (N,) int64 or None
    image_best_ptr,  # (M,) fp32, or None
    text_best_ptr,  # (N,) fp32, or None
    image_counts_ptr,  # (M,) int32, added to; None where image_best_ptr is
    text_counts_ptr,  # (N,) int32, likewise
    M,
    N,
    diagonal,
    stride_xm,
    stride_xd,
    stride_yn,
    stride_yd,
    D: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    GROUP_M: tl.constexpr,
    SUBTILES: tl.constexpr,
):
    """One tile's negatives that are not below the best positives: see Panel.count_not_below."""
    tile_m, tile_n = grouped_tile(tl.program_id(0), M, N, BLOCK_M, BLOCK_N, GROUP_M)
    row0 = tile_m * BLOCK_M
    tile = similarity(
        x_ptr, y_ptr, row0, tile_n * BLOCK_N, M, N, stride_xm, stride_xd, stride_yn, stride_yd,
        D, INPUT_PRECISION, BLOCK_M, BLOCK_N, BLOCK_D,
    )  # fmt: skip
    rows = row0 + tl.arange(0, BLOCK_M)
    if image_best_ptr is not None:
        image_best = tl.load(image_best_ptr + rows, mask=rows < M, other=0.0)
    WIDTH: tl.constexpr = BLOCK_N // SUBTILES
    subtiles = column_subtiles(tile, SUBTILES)
    of_rows = tl.zeros((BLOCK_M, WIDTH), tl.int32)
    for subtile in tl.static_range(SUBTILES):
        col0 = tile_n * BLOCK_N + subtile * WIDTH
        if col0 < N:  # a branch keeps the compiler from mixing the subtiles
            s = subtiles[subtile]
            positive, valid = pair_masks(
                row0, col0, M, N, diagonal, image_ids_ptr, text_ids_ptr, BLOCK_M, WIDTH
            )
            counted = valid & ~positive
            if image_best_ptr is not None:
                of_rows += (counted & ~(s < image_best[:, None])).to(tl.int32)
            if text_best_ptr is not None:
                cols = col0 + tl.arange(0, WIDTH)
                text_best = tl.load(text_best_ptr + cols, mask=cols < N, other=0.0)
                of_cols = tl.sum((counted & ~(s < text_best[None, :])).to(tl.int32), 0)
                # sums of whole numbers: the order changes nothing
                tl.atomic_add(text_counts_ptr + cols, of_cols, mask=cols < N, sem="relaxed")
        tl.debug_barrier()  # one subtile after the other, as in the panel kernel
    if image_best_ptr is not None:
        counts = tl.sum(of_rows, 1)
        tl.atomic_add(image_counts_ptr + rows, counts, mask=rows < M, sem="relaxed")


def launch_best(
    x: Tensor,  # (m, D)
    y: Tensor,  # (n, D)
    pairs: Pairs,
    best: RowValues,  # raised
    precision: str,
    config: PanelConfig,
) -> None:
    """Launch ``best_kernel``; the best positives are keys on their way."""
    (m, d), n = x.shape, y.shape[0]
    if pairs.ids is None and pairs.diagonal is None:
        return
    tiles_m, tiles_n = ceil_div(m, config.tile[0]), ceil_div(n, config.tile[1])
    programs = 2 * tiles_m if pairs.ids is None else tiles_m * tiles_n
    diagonal = pairs.diagonal or 0  # ids win where both are given
    keys = RowValues(*(None if values is None else exact_keys(values) for values in best))
    with torch.cuda.device_of(x):  # Triton launches on the current device
        best_kernel[(programs,)](
            x,
            y,
            *ids_args(pairs),
            *keys,
            m,
            n,
            diagonal,
            diagonal // config.tile[1],
            *x.stride(),
            *y.stride(),
            D=d,
            INPUT_PRECISION=precision,
            **config.tile_constants(),
            **config.options(),
        )
    for values, raised in zip(best, keys, strict=True):
        if values is not None and raised is not None:
            values.copy_(exact_values(raised, values.dtype))


def launch_count(
    x: Tensor,  # (m, D)
    y: Tensor,  # (n, D)
    pairs: Pairs,
    best: RowValues,
    counts: RowValues,  # added to
    precision: str,
    config: PanelConfig,
) -> None:
    """Launch ``not_below_kernel``."""
    (m, d), n = x.shape, y.shape[0]
    tiles_m, tiles_n = ceil_div(m, config.tile[0]), ceil_div(n, config.tile[1])
    sides = zip(best, counts, strict=True)
    wanted = [(b, c) if b is not None and c is not None else (None, None) for b, c in sides]
    with torch.cuda.device_of(x):  # Triton launches on the current device
        not_below_kernel[(tiles_m * tiles_n,)](
            x,
            y,
            *ids_args(pairs),
            *(of_side for of_side, _ in wanted),
            *(of_side for _, of_side in wanted),
            m,
            n,
            # no pair is (i, i + n): without a diagonal, the same kernel never meets it
            n if pairs.diagonal is None else pairs.diagonal,
            *x.stride(),
            *y.stride(),
            D=d,
            INPUT_PRECISION=precision,
            **config.tile_constants(),
            **config.options(),
        )
