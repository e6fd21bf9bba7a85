"""Where a tile is, its similarities, and which of its pairs are positive: shared by the kernels."""

import triton
import triton.language as tl


@triton.jit
def grouped_tile(pid, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr):
    """Row and column of tile ``pid``: down the columns of bands GROUP_M tiles high, so that the
    programs running at one time share few blocks of x and y, and these stay in L2."""
    band = GROUP_M * tl.cdiv(N, BLOCK_N)
    first = pid // band * GROUP_M
    height = tl.minimum(tl.cdiv(M, BLOCK_M) - first, GROUP_M)
    return first + pid % band % height, pid % band // height


@triton.jit
def similarity(
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
def meets_diagonal_or_edge(
    row0, col0, M, N, diagonal, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):
    """Whether a block holds a pair on the diagonal, or one past the last row or column."""
    meets = (row0 + diagonal < col0 + BLOCK_N) & (col0 < row0 + diagonal + BLOCK_M)
    return meets | (row0 + BLOCK_M > M) | (col0 + BLOCK_N > N)
