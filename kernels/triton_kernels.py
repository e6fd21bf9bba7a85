"""The Triton kernels of a panel: its loss, dL/dlogits and sums; and the counts of its negatives."""

import triton
import triton.language as tl

from .triton_math import (
    SATURATED_LOGIT,
    added,
    byte_counts,
    column_parts,
    pair_hash,
    place,
    placed,
    saturated_softplus_sigmoid,
    softplus_sigmoid,
)


@triton.jit
def _grouped_tile(pid, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr):
    """Row and column of tile ``pid``: down the columns of bands GROUP_M tiles high, so that the
    programs running at one time share few blocks of x and y, and these stay in L2."""
    band = GROUP_M * tl.cdiv(N, BLOCK_N)
    first = pid // band * GROUP_M
    height = tl.minimum(tl.cdiv(M, BLOCK_M) - first, GROUP_M)
    return first + pid % band % height, pid % band // height


@triton.jit
def _similarity(
    x_ptr,  # (M, D)
    y_ptr,  # (N, D)
    row0,
    col0,
    M,
    N,
    stride_xm,
    stride_xd,
    stride_yn,
    stride_yd,
    D: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # (BLOCK_M, BLOCK_N) fp32
    """x y^T of a tile's rows and columns."""
    # Past the end the last row is read again: no mask on the loads, the epilogue drops the pairs.
    rows = tl.minimum(row0 + tl.arange(0, BLOCK_M), M - 1).to(tl.int64)
    cols = tl.minimum(col0 + tl.arange(0, BLOCK_N), N - 1).to(tl.int64)
    d = tl.arange(0, BLOCK_D).to(tl.int64)
    x_ptrs = x_ptr + rows[:, None] * stride_xm + d[None, :] * stride_xd
    y_ptrs = y_ptr + cols[None, :] * stride_yn + d[:, None] * stride_yd
    s = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, D, BLOCK_D):
        if D % BLOCK_D == 0:
            x = tl.load(x_ptrs)
            y = tl.load(y_ptrs)
        else:
            x = tl.load(x_ptrs, mask=d[None, :] < D - start, other=0.0)
            y = tl.load(y_ptrs, mask=d[:, None] < D - start, other=0.0)
        s = tl.dot(x, y, s, input_precision=INPUT_PRECISION)
        x_ptrs += BLOCK_D * stride_xd
        y_ptrs += BLOCK_D * stride_yd
    return s


@triton.jit
def pair_masks(
    row0,
    col0,
    M,
    N,
    diagonal,
    image_ids_ptr,  # (M,) or None
    text_ids_ptr,  # (N,) or None
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Which pairs of a block are positive and which take part at all; (BLOCK_M, BLOCK_N) each."""
    rows = row0 + tl.arange(0, BLOCK_M)
    cols = col0 + tl.arange(0, BLOCK_N)
    if image_ids_ptr is None:
        positive = (rows + diagonal)[:, None] == cols[None, :]
        valid = (rows < M)[:, None] & (cols < N)[None, :]
    else:
        image_ids = tl.load(image_ids_ptr + rows, mask=rows < M, other=-1)
        text_ids = tl.load(text_ids_ptr + cols, mask=cols < N, other=-1)
        positive = image_ids[:, None] == text_ids[None, :]
        valid = (image_ids >= 0)[:, None] & (text_ids >= 0)[None, :]
    return positive, valid


@triton.jit
def kept_pairs(
    s,  # (m, n) similarities
    choice,  # image_keys_ptr to least_ptr of the panel kernel
    block,  # row0, col0, M, N
):
    """Which pairs of a block are kept if they are negatives, (m, n)."""
    row0, col0, M, N = block
    image_keys_ptr, text_keys_ptr, below, centres_ptr, factors_ptr, least_ptr = choice
    rows = row0 + tl.arange(0, s.shape[0])
    cols = col0 + tl.arange(0, s.shape[1])
    if centres_ptr is not None:
        centres = tl.load(centres_ptr + rows, mask=rows < M, other=0.0)
        factors = tl.load(factors_ptr + rows, mask=rows < M, other=0.0)
        least = tl.load(least_ptr + rows, mask=rows < M, other=0.0)
        return ~(placed(s, centres, factors) < least[:, None])
    else:
        image_keys = tl.load(image_keys_ptr + rows, mask=rows < M, other=0)
        text_keys = tl.load(text_keys_ptr + cols, mask=cols < N, other=0)
        return pair_hash(image_keys[:, None], text_keys[None, :]) < below


@triton.jit
def meets_diagonal_or_edge(
    row0, col0, M, N, diagonal, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):
    """Whether a block holds a pair on the diagonal, or one past the last row or column."""
    meets = (row0 + diagonal < col0 + BLOCK_N) & (col0 < row0 + diagonal + BLOCK_M)
    return meets | (row0 + BLOCK_M > M) | (col0 + BLOCK_N > N)


@triton.jit
def _fold(t, ROW_GROUPS: tl.constexpr, PAIR_ROWS: tl.constexpr, COLS: tl.constexpr):
    """(m, n) to (ROW_GROUPS, 8, COLS): with the fold of the config no other thread's values are added.

    Row 8 i + j goes to (i, j), the columns to column modulo COLS; with PAIR_ROWS = 2 rows that are 8
    apart are added first.
    """
    rows: tl.constexpr = t.shape[0] // (8 * ROW_GROUPS * PAIR_ROWS)
    t = tl.reshape(t, (rows, ROW_GROUPS, PAIR_ROWS, 8, t.shape[1] // COLS, COLS))
    return tl.sum(tl.sum(tl.sum(t, 4), 2), 0)


@triton.jit
def epilogue(
    s,  # (m, n) similarities of one column part
    positive,  # (m, n) or None: no pair is positive
    valid,  # (m, n) or None: every pair takes part
    scale,
    bias,
    sums,  # 3 running sums of softplus(u), g*s, g, each folded
    g_ptrs,  # (m, n) or None
    EASY: tl.constexpr,  # every u is at most SATURATED_LOGIT
    SCALAR_GRADS: tl.constexpr,
    GRAD_SCALE: tl.constexpr,
    PAIR_ROWS: tl.constexpr,
    CHOSEN: tl.constexpr = False,  # not all negatives take part, but kept_pairs(s, choice, block)
    choice=None,
    block=None,
):
    loss, gs_sum, g_sum = sums
    if CHOSEN:
        kept = kept_pairs(s, choice, block)
        valid = kept if valid is None else valid & (positive | kept)
    u = s * scale + bias
    if positive is not None:
        u = tl.where(positive, -u, u)
    if valid is not None:
        u = tl.where(valid, u, float("-inf"))
        s = tl.where(valid, s, 0.0)  # a padded row may hold NaN
    if EASY:
        softplus, g = saturated_softplus_sigmoid(u)
    else:
        softplus, g = softplus_sigmoid(u)
    if positive is not None:
        g = tl.where(positive, -g, g)
    loss += _fold(softplus, loss.shape[0], PAIR_ROWS, loss.shape[2])
    if SCALAR_GRADS:
        gs_sum += _fold(g * s, loss.shape[0], PAIR_ROWS, loss.shape[2])
        g_sum += _fold(g, loss.shape[0], PAIR_ROWS, loss.shape[2])
    if g_ptrs is not None:
        tl.store(g_ptrs, (g * GRAD_SCALE).to(g_ptrs.dtype.element_ty))
    return loss, gs_sum, g_sum


@triton.jit(do_not_specialize=["M", "N", "diagonal", "below"])
def panel_kernel(
    x_ptr,  # (M, D)
    y_ptr,  # (N, D)
    g_ptr,  # (M, N) rounded up to whole tiles, or None
    partials_ptr,  # (1 or 3, tiles) fp32: a tile's sums of softplus(u), g*s, g
    logit_scale_ptr,  # () fp32
    logit_bias_ptr,  # () fp32
    image_ids_ptr,  # (M,) int64 or None
    text_ids_ptr,  # (N,) int64 or None
    image_keys_ptr,  # (M,) int32, of negatives kept by their hash; or None
    text_keys_ptr,  # (N,) int32, likewise
    centres_ptr,  # (M,) fp32, of negatives kept by their logit; or None
    factors_ptr,  # (M,) fp32, likewise
    least_ptr,  # (M,) fp32, likewise
    flags_ptr,  # (tile rows, tile columns) int32: whether a tile's g is not 0 throughout; or None
    M,
    N,
    diagonal,
    below,  # None without image_keys_ptr
    stride_xm,
    stride_xd,
    stride_yn,
    stride_yd,
    stride_gm,
    D: tl.constexpr,
    SCALAR_GRADS: tl.constexpr,
    GRAD_SCALE: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    GROUP_M: tl.constexpr,
    PARTS: tl.constexpr,
    ROW_GROUPS: tl.constexpr,
    PAIR_ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """One tile of a panel: g, and the three sums over its pairs."""
    pid = tl.program_id(0)
    tile_m, tile_n = _grouped_tile(pid, M, N, BLOCK_M, BLOCK_N, GROUP_M)
    row0 = tile_m * BLOCK_M
    tile = _similarity(
        x_ptr, y_ptr, row0, tile_n * BLOCK_N, M, N, stride_xm, stride_xd, stride_yn, stride_yd,
        D, INPUT_PRECISION, BLOCK_M, BLOCK_N, BLOCK_D,
    )  # fmt: skip
    scale = tl.load(logit_scale_ptr)
    bias = tl.load(logit_bias_ptr)

    # The epilogue takes the tile a few columns at a time: taken whole, its temporaries do not fit
    # the registers beside the accumulator. The branches in each part (the easy one too) keep the
    # compiler from mixing the parts again.
    WIDTH: tl.constexpr = BLOCK_N // PARTS
    CHOSEN: tl.constexpr = image_keys_ptr is not None or centres_ptr is not None
    choice = image_keys_ptr, text_keys_ptr, below, centres_ptr, factors_ptr, least_ptr
    parts = column_parts(tile, PARTS)
    zero = tl.zeros((ROW_GROUPS, 8, COLS), tl.float32)
    sums = (zero, zero, zero)
    easy = False
    if image_ids_ptr is None:
        # Early in training that is nearly every tile. (NaN stays NaN on either path.)
        easy = (scale >= 0) & (tl.max(tile) * scale + bias <= SATURATED_LOGIT)
        easy &= ~meets_diagonal_or_edge(row0, tile_n * BLOCK_N, M, N, diagonal, BLOCK_M, BLOCK_N)
    for part in tl.static_range(PARTS):
        col0 = tile_n * BLOCK_N + part * WIDTH
        block = row0, col0, M, N
        g_ptrs = None
        if g_ptr is not None:
            rows = (row0 + tl.arange(0, BLOCK_M)).to(tl.int64)
            g_ptrs = g_ptr + rows[:, None] * stride_gm + (col0 + tl.arange(0, WIDTH))[None, :]
        if image_ids_ptr is None:
            # Only there are pairs to tell apart.
            mixed = meets_diagonal_or_edge(row0, col0, M, N, diagonal, BLOCK_M, WIDTH)
        elif flags_ptr is None:
            mixed = col0 < N
        else:
            mixed = col0 < tl.cdiv(N, BLOCK_N) * BLOCK_N  # the product reads whole tiles
        if easy:
            sums = epilogue(
                parts[part], None, None, scale, bias, sums, g_ptrs, True,
                SCALAR_GRADS, GRAD_SCALE, PAIR_ROWS, CHOSEN, choice, block,
            )  # fmt: skip
        elif mixed:
            positive, valid = pair_masks(
                row0, col0, M, N, diagonal, image_ids_ptr, text_ids_ptr, BLOCK_M, WIDTH
            )
            sums = epilogue(
                parts[part], positive, valid, scale, bias, sums, g_ptrs, False,
                SCALAR_GRADS, GRAD_SCALE, PAIR_ROWS, CHOSEN, choice, block,
            )  # fmt: skip
        elif image_ids_ptr is None:
            sums = epilogue(
                parts[part], None, None, scale, bias, sums, g_ptrs, False,
                SCALAR_GRADS, GRAD_SCALE, PAIR_ROWS, CHOSEN, choice, block,
            )  # fmt: skip
        if g_ptr is None:
            tl.debug_barrier()  # as the store has: else the compiler mixes the parts, and spills

    loss, gs_sum, g_sum = sums
    tiles = tl.num_programs(0)
    tile_loss = tl.sum(loss)
    tl.store(partials_ptr + pid, tile_loss)
    if flags_ptr is not None:
        # Softplus underflows no earlier than its derivative: with no loss, every g is 0.
        flag = flags_ptr + tile_m * tl.cdiv(N, BLOCK_N) + tile_n
        tl.store(flag, (tile_loss != 0).to(tl.int32))
    if SCALAR_GRADS:
        tl.store(partials_ptr + tiles + pid, tl.sum(gs_sum))
        tl.store(partials_ptr + 2 * tiles + pid, tl.sum(g_sum))


@triton.jit(do_not_specialize=["M", "N", "diagonal"])
def count_kernel(
    x_ptr,  # (M, D)
    y_ptr,  # (N, D)
    image_ids_ptr,  # (M,) int64 or None
    text_ids_ptr,  # (N,) int64 or None
    centres_ptr,  # (M,) fp32
    factors_ptr,  # (M,) fp32
    selected_ptr,  # (M,) int32 or None
    counts_ptr,  # (M, 2^BITS) int32, added to; TALLIED: (tile columns, M, 2^BITS) uint8, written
    M,
    N,
    diagonal,
    stride_xm,
    stride_xd,
    stride_yn,
    stride_yd,
    D: tl.constexpr,
    SHIFT: tl.constexpr,  # the bin is the BITS of a place above the last SHIFT
    BITS: tl.constexpr,
    TALLIED: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    GROUP_M: tl.constexpr,
    PARTS: tl.constexpr,
):
    """One tile's negatives, counted by image and bin: see Panel.count.

    A histogram in memory costs an atomic addition a pair. A few bins can be summed up instead:
    every image's tally of the tile, four bins to a word, is stored once. With many bins that is too
    much to add; but then few pairs have the bits that are known, and those are added in memory.
    """
    tile_m, tile_n = _grouped_tile(tl.program_id(0), M, N, BLOCK_M, BLOCK_N, GROUP_M)
    row0 = tile_m * BLOCK_M
    tile = _similarity(
        x_ptr, y_ptr, row0, tile_n * BLOCK_N, M, N, stride_xm, stride_xd, stride_yn, stride_yd,
        D, INPUT_PRECISION, BLOCK_M, BLOCK_N, BLOCK_D,
    )  # fmt: skip
    rows = row0 + tl.arange(0, BLOCK_M)
    centres = tl.load(centres_ptr + rows, mask=rows < M, other=0.0)
    factors = tl.load(factors_ptr + rows, mask=rows < M, other=0.0)
    if selected_ptr is not None:
        selected = tl.load(selected_ptr + rows, mask=rows < M, other=-1)
    BINS: tl.constexpr = 2**BITS
    WIDTH: tl.constexpr = BLOCK_N // PARTS
    tl.static_assert(BLOCK_N < 256, "a byte counts the pairs of a row")
    parts = column_parts(tile, PARTS)
    zero = tl.zeros((BLOCK_M,), tl.int32)
    tally = (zero, zero, zero, zero, zero, zero, zero, zero)
    for part in tl.static_range(PARTS):
        col0 = tile_n * BLOCK_N + part * WIDTH
        positive, valid = pair_masks(
            row0, col0, M, N, diagonal, image_ids_ptr, text_ids_ptr, BLOCK_M, WIDTH
        )
        counted = valid & ~positive
        leading = place(placed(parts[part], centres, factors)) >> SHIFT
        if selected_ptr is not None:
            counted &= leading >> BITS == selected[:, None]
        bins = leading % BINS
        if TALLIED:
            if col0 < N:  # a branch keeps the compiler from mixing the parts
                tally = added(tally, byte_counts(bins, counted, BINS // 4))
        elif tl.max(counted.to(tl.int32)) > 0:
            # sums of whole numbers: the order changes nothing
            offsets = rows.to(tl.int64)[:, None] * BINS + bins
            tl.atomic_add(counts_ptr + offsets, 1, mask=counted, sem="relaxed")
        tl.debug_barrier()  # one part after the other, as in the panel kernel
    if TALLIED:
        WORDS: tl.constexpr = BINS // 4
        words_ptr = counts_ptr.to(tl.pointer_type(tl.int32))
        tally_ptrs = words_ptr + (tile_n * M + rows).to(tl.int64) * WORDS
        for word in tl.static_range(WORDS):
            tl.store(tally_ptrs + word, tally[word], mask=rows < M)
