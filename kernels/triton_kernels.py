"""The Triton kernels of a panel: its loss, dL/dlogits and sums; and the counts of its negatives."""

import triton
import triton.language as tl

from .triton_math import (
    SATURATED_LOGIT,
    added,
    byte_counts,
    column_subtiles,
    float_key,
    normalized_score,
    pair_hash,
    saturated_softplus_sigmoid,
    softplus_sigmoid,
)
from .triton_tiles import grouped_tile, meets_diagonal_or_edge, pair_masks, similarity
from .triton_weights import weighted_loss


@triton.jit
def selected_negatives(
    s,  # (m, n) similarities
    selection_args,  # image_keys_ptr to threshold_ptr of the panel kernel
    block,  # row0, col0, M, N
):
    """Which pairs of a block take part if they are negatives, (m, n)."""
    row0, col0, M, N = block
    image_keys_ptr, text_keys_ptr, hash_cutoff, center_ptr, inv_radius_ptr, threshold_ptr = (
        selection_args
    )
    rows = row0 + tl.arange(0, s.shape[0])
    cols = col0 + tl.arange(0, s.shape[1])
    if center_ptr is not None:
        center = tl.load(center_ptr + rows, mask=rows < M, other=0.0)
        inv_radius = tl.load(inv_radius_ptr + rows, mask=rows < M, other=0.0)
        threshold = tl.load(threshold_ptr + rows, mask=rows < M, other=0.0)
        return ~(normalized_score(s, center, inv_radius) < threshold[:, None])
    else:
        image_keys = tl.load(image_keys_ptr + rows, mask=rows < M, other=0)
        text_keys = tl.load(text_keys_ptr + cols, mask=cols < N, other=0)
        return pair_hash(image_keys[:, None], text_keys[None, :]) < hash_cutoff


@triton.jit
def _fold(t, ROW_GROUPS: tl.constexpr, PAIR_ROWS: tl.constexpr, FOLD_COLS: tl.constexpr):
    """Sums of (m, n) values as (ROW_GROUPS, 8, FOLD_COLS).

    Row 8 i + j goes to (i, j), the columns to column modulo FOLD_COLS; with PAIR_ROWS = 2 rows that
    are 8 apart are added first. With the numbers of the config, each thread adds its own values
    only.
    """
    rows: tl.constexpr = t.shape[0] // (8 * ROW_GROUPS * PAIR_ROWS)
    t = tl.reshape(t, (rows, ROW_GROUPS, PAIR_ROWS, 8, t.shape[1] // FOLD_COLS, FOLD_COLS))
    return tl.sum(tl.sum(tl.sum(t, 4), 2), 0)


@triton.jit
def epilogue(
    s,  # (m, n) similarities of one subtile
    positive,  # (m, n) or None: no pair is positive
    valid,  # (m, n); None exactly where positive is: every pair takes part
    scale,
    bias,
    sums,  # running sums of the loss, dlogits*s, dlogits and, if there is a 4th, |dlogits|: folded
    dlogits_ptrs,  # (m, n) or None
    SATURATED: tl.constexpr,  # negatives alone, and every u is at most SATURATED_LOGIT
    SCALAR_GRADS: tl.constexpr,
    GRAD_SCALE: tl.constexpr,
    PAIR_ROWS: tl.constexpr,
    HAS_SELECTION: tl.constexpr = False,  # only selected_negatives(s, ...) take part
    selection_args=None,
    block=None,
    WEIGHTED: tl.constexpr = False,  # pairs have weights
    weight_args=None,
):
    loss, dscale_sum, dbias_sum = sums[0], sums[1], sums[2]
    if HAS_SELECTION:
        selection = selected_negatives(s, selection_args, block)
        valid = selection if valid is None else valid & (positive | selection)
    if WEIGHTED:
        softplus, dlogits, s = weighted_loss(
            s, positive, valid, scale, bias, weight_args, block, SATURATED
        )
    else:
        u = s * scale + bias
        if positive is not None:
            u = tl.where(positive, -u, u)
        if valid is not None:
            u = tl.where(valid, u, float("-inf"))
            s = tl.where(valid, s, 0.0)  # a padded row may hold NaN
        if SATURATED:
            softplus, dlogits = saturated_softplus_sigmoid(u)
        else:
            softplus, dlogits = softplus_sigmoid(u)
        if positive is not None:
            dlogits = tl.where(positive, -dlogits, dlogits)
    loss += _fold(softplus, loss.shape[0], PAIR_ROWS, loss.shape[2])
    if SCALAR_GRADS:
        dscale_sum += _fold(dlogits * s, loss.shape[0], PAIR_ROWS, loss.shape[2])
        dbias_sum += _fold(dlogits, loss.shape[0], PAIR_ROWS, loss.shape[2])
    if dlogits_ptrs is not None:
        tl.store(dlogits_ptrs, (dlogits * GRAD_SCALE).to(dlogits_ptrs.dtype.element_ty))
    if len(sums) == 4:
        size = sums[3] + _fold(tl.abs(dlogits), loss.shape[0], PAIR_ROWS, loss.shape[2])
        return loss, dscale_sum, dbias_sum, size
    else:
        return loss, dscale_sum, dbias_sum


@triton.jit(do_not_specialize=["M", "N", "diagonal", "hash_cutoff", "aligned_diagonal"])
def panel_kernel(
    x_ptr,  # (M, D)
    y_ptr,  # (N, D)
    dlogits_ptr,  # (M, N) rounded up to whole tiles, or None
    partials_ptr,  # (1 or 3, tiles) fp32: a tile's sums of softplus(u), dlogits*s, dlogits
    logit_scale_ptr,  # () fp32
    logit_bias_ptr,  # () fp32
    image_ids_ptr,  # (M,) int64 or None
    text_ids_ptr,  # (N,) int64 or None
    image_keys_ptr,  # (M,) int32, of negatives that take part by a hash; or None
    text_keys_ptr,  # (N,) int32, likewise
    center_ptr,  # (M,) fp32, of negatives that take part by their logit; or None
    inv_radius_ptr,  # (M,) fp32, likewise
    threshold_ptr,  # (M,) fp32, likewise
    image_weights_ptr,  # (M,) fp32, of pairs with weights; or None: 1
    text_weights_ptr,  # (N,) fp32, likewise
    image_shares_ptr,  # (M,) fp32, of positives with shares; or None
    text_shares_ptr,  # (N,) fp32, likewise
    targets_ptr,  # (5,) fp32: see PairWeights; or None
    aligned_diagonal,  # pair (i, i + it) has aligned_share for its share; or None
    aligned_share,
    flags_ptr,  # (tile rows, tile columns) int32, 0 where all dlogits of a tile are 0; or None
    image_losses_ptr,  # (tile columns, M) fp32: sums of a tile's rows; or None
    M,
    N,
    diagonal,
    hash_cutoff,  # None without image_keys_ptr
    stride_xm,
    stride_xd,
    stride_yn,
    stride_yd,
    stride_zm,
    D: tl.constexpr,
    SCALAR_GRADS: tl.constexpr,
    GRAD_SCALE: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    GROUP_M: tl.constexpr,
    SUBTILES: tl.constexpr,
    ROW_GROUPS: tl.constexpr,  # with image_losses_ptr BLOCK_M // 8, and PAIR_ROWS 1
    PAIR_ROWS: tl.constexpr,
    FOLD_COLS: tl.constexpr,
):
    """One tile of a panel: dlogits, and the three sums over its pairs."""
    pid = tl.program_id(0)
    tile_m, tile_n = grouped_tile(pid, M, N, BLOCK_M, BLOCK_N, GROUP_M)
    row0 = tile_m * BLOCK_M
    tile = similarity(
        x_ptr, y_ptr, row0, tile_n * BLOCK_N, M, N, stride_xm, stride_xd, stride_yn, stride_yd,
        D, INPUT_PRECISION, BLOCK_M, BLOCK_N, BLOCK_D,
    )  # fmt: skip
    scale = tl.load(logit_scale_ptr)
    bias = tl.load(logit_bias_ptr)

    # The epilogue takes the tile a few columns at a time: taken whole, its temporaries do not fit
    # the registers beside the accumulator. The branches in each subtile (also the saturated one)
    # keep the compiler from mixing the subtiles again.
    WIDTH: tl.constexpr = BLOCK_N // SUBTILES
    HAS_SELECTION: tl.constexpr = image_keys_ptr is not None or center_ptr is not None
    selection_args = (
        image_keys_ptr, text_keys_ptr, hash_cutoff, center_ptr, inv_radius_ptr, threshold_ptr,
    )  # fmt: skip
    WEIGHTED: tl.constexpr = (image_weights_ptr is not None or text_weights_ptr is not None) or (
        image_shares_ptr is not None or targets_ptr is not None
    )
    weight_args = (
        image_weights_ptr, text_weights_ptr, image_shares_ptr, text_shares_ptr, targets_ptr,
        aligned_diagonal, aligned_share,
    )  # fmt: skip
    # No subtile takes the form without positives. With a selection and weights it would spill.
    MIXED_EVERYWHERE: tl.constexpr = image_ids_ptr is not None or (WEIGHTED and HAS_SELECTION)
    subtiles = column_subtiles(tile, SUBTILES)
    zero = tl.zeros((ROW_GROUPS, 8, FOLD_COLS), tl.float32)
    sums = (zero, zero, zero)
    if WEIGHTED and flags_ptr is not None:
        sums = (zero, zero, zero, zero)
    saturated = False
    if image_ids_ptr is None:
        # Early in training that is nearly every tile. (NaN stays NaN on either path.)
        saturated = (scale >= 0) & (tl.max(tile) * scale + bias <= SATURATED_LOGIT)
        saturated &= ~meets_diagonal_or_edge(
            row0, tile_n * BLOCK_N, M, N, diagonal, BLOCK_M, BLOCK_N
        )
    for subtile in tl.static_range(SUBTILES):
        col0 = tile_n * BLOCK_N + subtile * WIDTH
        block = row0, col0, M, N
        dlogits_ptrs = None
        if dlogits_ptr is not None:
            rows = (row0 + tl.arange(0, BLOCK_M)).to(tl.int64)
            cols = col0 + tl.arange(0, WIDTH)
            dlogits_ptrs = dlogits_ptr + rows[:, None] * stride_zm + cols[None, :]
        if not MIXED_EVERYWHERE:
            # Positives and pairs past the edge are only there.
            mixed = meets_diagonal_or_edge(row0, col0, M, N, diagonal, BLOCK_M, WIDTH)
        elif flags_ptr is None:
            mixed = col0 < N
        else:
            mixed = col0 < tl.cdiv(N, BLOCK_N) * BLOCK_N  # the product reads whole tiles
        if saturated:
            sums = epilogue(
                subtiles[subtile], None, None, scale, bias, sums, dlogits_ptrs, True,
                SCALAR_GRADS, GRAD_SCALE, PAIR_ROWS, HAS_SELECTION, selection_args, block,
                WEIGHTED, weight_args,
            )  # fmt: skip
        elif mixed:
            positive, valid = pair_masks(
                row0, col0, M, N, diagonal, image_ids_ptr, text_ids_ptr, BLOCK_M, WIDTH
            )
            sums = epilogue(
                subtiles[subtile], positive, valid, scale, bias, sums, dlogits_ptrs, False,
                SCALAR_GRADS, GRAD_SCALE, PAIR_ROWS, HAS_SELECTION, selection_args, block,
                WEIGHTED, weight_args,
            )  # fmt: skip
        elif not MIXED_EVERYWHERE:
            sums = epilogue(
                subtiles[subtile], None, None, scale, bias, sums, dlogits_ptrs, False,
                SCALAR_GRADS, GRAD_SCALE, PAIR_ROWS, HAS_SELECTION, selection_args, block,
                WEIGHTED, weight_args,
            )  # fmt: skip
        if dlogits_ptr is None:
            tl.debug_barrier()  # as the store has: else the compiler mixes the subtiles, and spills

    loss, dscale_sum, dbias_sum = sums[0], sums[1], sums[2]
    tiles = tl.num_programs(0)
    tile_loss = tl.sum(loss)
    tl.store(partials_ptr + pid, tile_loss)
    if flags_ptr is not None:
        flag = flags_ptr + tile_m * tl.cdiv(N, BLOCK_N) + tile_n
        if WEIGHTED:
            # Losses may have either sign, and add up to 0.
            tl.store(flag, (tl.sum(sums[3]) != 0).to(tl.int32))
        else:
            # Softplus underflows no earlier than its derivative: with no loss, all dlogits are 0.
            tl.store(flag, (tile_loss != 0).to(tl.int32))
    if image_losses_ptr is not None:
        rows = row0 + tl.arange(0, BLOCK_M)
        of_rows = tl.reshape(tl.sum(loss, 2), (BLOCK_M,))
        tl.store(image_losses_ptr + tile_n.to(tl.int64) * M + rows, of_rows, mask=rows < M)
    if SCALAR_GRADS:
        tl.store(partials_ptr + tiles + pid, tl.sum(dscale_sum))
        tl.store(partials_ptr + 2 * tiles + pid, tl.sum(dbias_sum))


@triton.jit(do_not_specialize=["M", "N", "diagonal"])
def count_kernel(
    x_ptr,  # (M, D)
    y_ptr,  # (N, D)
    image_ids_ptr,  # (M,) int64 or None
    text_ids_ptr,  # (N,) int64 or None
    center_ptr,  # (M,) fp32
    inv_radius_ptr,  # (M,) fp32
    prefix_ptr,  # (M,) int32 or None
    counts_ptr,  # (M, 2^BITS) int32, added to; TALLIED: (tile columns, M, 2^BITS) uint8, written
    M,
    N,
    diagonal,
    stride_xm,
    stride_xd,
    stride_yn,
    stride_yd,
    D: tl.constexpr,
    SHIFT: tl.constexpr,  # the bin is the BITS of a float_key above the last SHIFT
    BITS: tl.constexpr,
    TALLIED: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    GROUP_M: tl.constexpr,
    SUBTILES: tl.constexpr,
):
    """One tile's negatives, counted by image and bin: see Panel.count.

    A histogram in memory costs an atomic addition a pair. A few bins can be summed up instead:
    every image's tally of the tile, four bins to a word, is stored once. With many bins that is too
    much to add; but then few pairs have the bits that are known, and those are added in memory.
    """
    tile_m, tile_n = grouped_tile(tl.program_id(0), M, N, BLOCK_M, BLOCK_N, GROUP_M)
    row0 = tile_m * BLOCK_M
    tile = similarity(
        x_ptr, y_ptr, row0, tile_n * BLOCK_N, M, N, stride_xm, stride_xd, stride_yn, stride_yd,
        D, INPUT_PRECISION, BLOCK_M, BLOCK_N, BLOCK_D,
    )  # fmt: skip
    rows = row0 + tl.arange(0, BLOCK_M)
    center = tl.load(center_ptr + rows, mask=rows < M, other=0.0)
    inv_radius = tl.load(inv_radius_ptr + rows, mask=rows < M, other=0.0)
    if prefix_ptr is not None:
        prefix = tl.load(prefix_ptr + rows, mask=rows < M, other=-1)
    BINS: tl.constexpr = 2**BITS
    WIDTH: tl.constexpr = BLOCK_N // SUBTILES
    tl.static_assert(BLOCK_N < 256, "a byte counts the pairs of a row")
    subtiles = column_subtiles(tile, SUBTILES)
    zero = tl.zeros((BLOCK_M,), tl.int32)
    tally = (zero, zero, zero, zero, zero, zero, zero, zero)
    for subtile in tl.static_range(SUBTILES):
        col0 = tile_n * BLOCK_N + subtile * WIDTH
        positive, valid = pair_masks(
            row0, col0, M, N, diagonal, image_ids_ptr, text_ids_ptr, BLOCK_M, WIDTH
        )
        counted = valid & ~positive
        leading = float_key(normalized_score(subtiles[subtile], center, inv_radius)) >> SHIFT
        if prefix_ptr is not None:
            counted &= leading >> BITS == prefix[:, None]
        bins = leading % BINS
        if TALLIED:
            if col0 < N:  # a branch keeps the compiler from mixing the subtiles
                tally = added(tally, byte_counts(bins, counted, BINS // 4))
        elif tl.max(counted.to(tl.int32)) > 0:
            # sums of whole numbers: the order changes nothing
            offsets = rows.to(tl.int64)[:, None] * BINS + bins
            tl.atomic_add(counts_ptr + offsets, 1, mask=counted, sem="relaxed")
        tl.debug_barrier()  # one subtile after the other, as in the panel kernel
    if TALLIED:
        WORDS: tl.constexpr = BINS // 4
        words_ptr = counts_ptr.to(tl.pointer_type(tl.int32))
        tally_ptrs = words_ptr + (tile_n * M + rows).to(tl.int64) * WORDS
        for word in tl.static_range(WORDS):
            tl.store(tally_ptrs + word, tally[word], mask=rows < M)
