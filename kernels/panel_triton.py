import triton
import triton.language as tl

from .math import softplus_sigmoid


@triton.jit
def _grouped_tile(pid, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr):
    """Row and column of tile ``pid``: column by column inside bands of GROUP_M rows of tiles."""
    tiles_m = tl.cdiv(M, BLOCK_M)
    band = GROUP_M * tl.cdiv(N, BLOCK_N)
    first = pid // band * GROUP_M
    height = tl.minimum(tiles_m - first, GROUP_M)
    return first + pid % band % height, pid % band // height


@triton.jit
def _similarity(
    x_ptr, y_ptr, rows, cols, M, N, D, stride_xm, stride_xd, stride_yn, stride_yd,
    INPUT_PRECISION: tl.constexpr, EVEN_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):
    d = tl.arange(0, BLOCK_D).to(tl.int64)
    x_rows = tl.minimum(rows, M - 1).to(tl.int64)
    y_rows = tl.minimum(cols, N - 1).to(tl.int64)
    x_ptrs = x_ptr + x_rows[:, None] * stride_xm + d[None, :] * stride_xd
    y_ptrs = y_ptr + y_rows[None, :] * stride_yn + d[:, None] * stride_yd
    s = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for d0 in range(0, D, BLOCK_D):
        if EVEN_D:
            x = tl.load(x_ptrs)
            y = tl.load(y_ptrs)
        else:
            x = tl.load(x_ptrs, mask=d[None, :] < D - d0, other=0.0)
            y = tl.load(y_ptrs, mask=d[:, None] < D - d0, other=0.0)
        s = tl.dot(x, y, s, input_precision=INPUT_PRECISION)
        x_ptrs += BLOCK_D * stride_xd
        y_ptrs += BLOCK_D * stride_yd
    return s


@triton.jit
def _epilogue(
    s, loss, gs_sum, g_sum, col0, rows, row_keys, row_valid, g_ptr, scale, bias, text_ids_ptr, mixed, N, stride_gm,
    SCALAR_GRADS: tl.constexpr, GRAD_SCALE: tl.constexpr, SPLIT: tl.constexpr,
):
    BLOCK_M: tl.constexpr = s.shape[0]
    WIDTH: tl.constexpr = s.shape[1]
    if SPLIT > 1:
        HALF: tl.constexpr = WIDTH // 2
        left, right = tl.split(tl.permute(tl.reshape(s, (BLOCK_M, 2, HALF)), (0, 2, 1)))
        loss, gs_sum, g_sum = _epilogue(left, loss, gs_sum, g_sum, col0, rows, row_keys, row_valid, g_ptr, scale, bias, text_ids_ptr, mixed, N, stride_gm, SCALAR_GRADS, GRAD_SCALE, SPLIT // 2)
        return _epilogue(right, loss, gs_sum, g_sum, col0 + HALF, rows, row_keys, row_valid, g_ptr, scale, bias, text_ids_ptr, mixed, N, stride_gm, SCALAR_GRADS, GRAD_SCALE, SPLIT // 2)
    else:
        cols = col0 + tl.arange(0, WIDTH)
        if text_ids_ptr is None:
            col_keys = cols
            col_valid = cols < N
        else:
            col_keys = tl.load(text_ids_ptr + cols, mask=cols < N, other=-1)
            col_valid = col_keys >= 0
        u = s * scale + bias
        if mixed:
            valid = row_valid[:, None] & col_valid[None, :]
            s = tl.where(valid, s, 0.0)
            u = tl.where(row_keys[:, None] == col_keys[None, :], -u, u)
            u = tl.where(valid, u, float("-inf"))
        softplus, g = softplus_sigmoid(u)
        if mixed:
            g = tl.where(row_keys[:, None] == col_keys[None, :], -g, g)
        loss += tl.sum(softplus, 1)
        if SCALAR_GRADS:
            gs_sum += tl.sum(g * s, 1)
            g_sum += tl.sum(g, 1)
        if g_ptr is not None:
            tl.store(g_ptr + rows.to(tl.int64)[:, None] * stride_gm + cols[None, :], (g * GRAD_SCALE).to(g_ptr.dtype.element_ty))
        return loss, gs_sum, g_sum


@triton.jit(do_not_specialize=["M", "N", "diagonal"])
def panel_kernel(
    x_ptr, y_ptr, g_ptr, partials_ptr, logit_scale_ptr, logit_bias_ptr, image_ids_ptr, text_ids_ptr,
    M, N, D, diagonal, stride_xm, stride_xd, stride_yn, stride_yd, stride_gm,
    SCALAR_GRADS: tl.constexpr, GRAD_SCALE: tl.constexpr, INPUT_PRECISION: tl.constexpr, EVEN_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, GROUP_M: tl.constexpr, SPLIT: tl.constexpr,
):
    pid = tl.program_id(0)
    tile_m, tile_n = _grouped_tile(pid, M, N, BLOCK_M, BLOCK_N, GROUP_M)
    row0 = tile_m * BLOCK_M
    col0 = tile_n * BLOCK_N
    rows = row0 + tl.arange(0, BLOCK_M)
    cols = col0 + tl.arange(0, BLOCK_N)
    s = _similarity(x_ptr, y_ptr, rows, cols, M, N, D, stride_xm, stride_xd, stride_yn, stride_yd, INPUT_PRECISION, EVEN_D, BLOCK_M, BLOCK_N, BLOCK_D)
    scale = tl.load(logit_scale_ptr)
    bias = tl.load(logit_bias_ptr)
    if image_ids_ptr is None:
        row_keys = rows + diagonal
        row_valid = rows < M
        edge = (row0 + BLOCK_M > M) | (col0 + BLOCK_N > N)
        mixed = edge | ((row0 + diagonal < col0 + BLOCK_N) & (col0 < row0 + diagonal + BLOCK_M))
    else:
        row_keys = tl.load(image_ids_ptr + rows, mask=rows < M, other=-1)
        row_valid = row_keys >= 0
        mixed = True
    zero = tl.zeros((BLOCK_M,), tl.float32)
    loss, gs_sum, g_sum = _epilogue(s, zero, zero, zero, col0, rows, row_keys, row_valid, g_ptr, scale, bias, text_ids_ptr, mixed, N, stride_gm, SCALAR_GRADS, GRAD_SCALE, SPLIT)
    tiles = tl.num_programs(0)
    tl.store(partials_ptr + pid, tl.sum(loss, 0))
    if SCALAR_GRADS:
        tl.store(partials_ptr + tiles + pid, tl.sum(gs_sum, 0))
        tl.store(partials_ptr + 2 * tiles + pid, tl.sum(g_sum, 0))
