"""The panel kernel for Hopper in Gluon: persistent, warp-specialized, fed by the copy engine.

One producer warp copies blocks of x and y into a ring of shared-memory stages. Two consumers of
eight warps take turns (ping-pong): each owns whole tiles, and one multiplies while the other turns
its tile into dlogits and its sums. For half operands and positives on the diagonal.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_init,
    warpgroup_mma_wait,
)

from .triton_math import (
    MODERATE_LOGIT,
    column_subtiles,
    four_sigmoids,
    join_exps,
    larger,
    log1p_wide,
    moderate_exp,
    softplus_sigmoid,
)


@gluon.jit
def tile_of(t, tiles_m, tiles_n, GROUP_M: gl.constexpr):
    """Row and column of tile ``t``: down the columns of bands GROUP_M tiles high."""
    band = GROUP_M * tiles_n
    first = t // band * GROUP_M
    height = gl.minimum(tiles_m - first, GROUP_M)
    return first + t % band % height, t % band // height


@gluon.jit
def quarters(t):
    """(m, n) as four of (m / 16, 8, n / 2), without leaving registers: a thread holds rows that are
    8 apart, and columns of both halves."""
    left, right = column_subtiles(t, 2)
    rows: gl.constexpr = (t.shape[0] // 16, 2, 8, t.shape[1] // 2)
    a, b = gl.split(gl.permute(gl.reshape(left, rows), (0, 2, 3, 1)))
    c, d = gl.split(gl.permute(gl.reshape(right, rows), (0, 2, 3, 1)))
    return a, b, c, d


@gluon.jit
def whole(a, b, c, d):
    """The (m, n) whose quarters these are."""
    rows: gl.constexpr = a.shape[0] * 16
    left = gl.reshape(gl.permute(gl.join(a, b), (0, 3, 1, 2)), (rows, a.shape[2]))
    right = gl.reshape(gl.permute(gl.join(c, d), (0, 3, 1, 2)), (rows, a.shape[2]))
    return gl.reshape(gl.permute(gl.join(left, right), (0, 2, 1)), (rows, 2 * a.shape[2]))


@gluon.jit
def last_halves(t):
    """(k, 8, n) to two of (k, 8, n / 2)."""
    halves = gl.reshape(t, (t.shape[0], t.shape[1], 2, t.shape[2] // 2))
    return gl.split(gl.permute(halves, (0, 1, 3, 2)))


@gluon.jit
def producer(
    x_desc, y_desc, x_bufs, y_bufs, full, empty, tiles_m, tiles_n,
    D: gl.constexpr, GROUP_M: gl.constexpr,
):  # fmt: skip
    """Copies the blocks of every tile, in the order in which the consumers take them."""
    STAGES: gl.constexpr = x_bufs.shape[0]
    BLOCK_M: gl.constexpr = x_desc.block_type.shape[0]
    BLOCK_K: gl.constexpr = x_desc.block_type.shape[1]
    BLOCK_N: gl.constexpr = y_desc.block_type.shape[0]
    i = 0
    for t in range(gl.program_id(0), tiles_m * tiles_n, gl.num_programs(0)):
        tm, tn = tile_of(t, tiles_m, tiles_n, GROUP_M)
        for k in range(0, D, BLOCK_K):
            stage = i % STAGES
            mbarrier.wait(empty.index(stage), ((i // STAGES) & 1) ^ 1)
            bar = full.index(stage)
            mbarrier.expect(bar, x_desc.block_type.nbytes + y_desc.block_type.nbytes)
            tma.async_copy_global_to_shared(x_desc, [tm * BLOCK_M, k], bar, x_bufs.index(stage))
            tma.async_copy_global_to_shared(y_desc, [tn * BLOCK_N, k], bar, y_bufs.index(stage))
            i += 1


@gluon.jit
def multiply(i, x_bufs, y_bufs, full, empty, D: gl.constexpr):
    """x y^T of the tile whose blocks follow the ring's i-th; and where the ring stands then."""
    STAGES: gl.constexpr = x_bufs.shape[0]
    BLOCK_M: gl.constexpr = x_bufs.shape[1]
    BLOCK_K: gl.constexpr = x_bufs.shape[2]
    BLOCK_N: gl.constexpr = y_bufs.shape[1]
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, BLOCK_N, 16])
    acc = warpgroup_mma_init(gl.zeros((BLOCK_M, BLOCK_N), gl.float32, layout))
    for k in range(0, gl.cdiv(D, BLOCK_K)):
        stage = i % STAGES
        mbarrier.wait(full.index(stage), (i // STAGES) & 1)
        x = x_bufs.index(stage)
        y = y_bufs.index(stage).permute((1, 0))
        acc = warpgroup_mma(x, y, acc, is_async=True, use_acc=k > 0)
        acc = warpgroup_mma_init(warpgroup_mma_wait(1, deps=(acc,)))
        # the step before is done: its stage is free
        mbarrier.arrive(empty.index((i + STAGES - 1) % STAGES), count=1, pred=k > 0)
        i += 1
    return acc, i


@gluon.jit
def any_pairs(s, row0, col0, M, N, diagonal, scale, bias):
    """softplus and dlogits of pairs that may be positive or lie past the edge, where they are 0."""
    rows = row0 + gl.arange(0, s.shape[0], gl.SliceLayout(1, s.type.layout))
    cols = col0 + gl.arange(0, s.shape[1], gl.SliceLayout(0, s.type.layout))
    positive = (rows + diagonal)[:, None] == cols[None, :]
    sign = gl.where(positive, gl.full_like(s, -1.0), gl.full_like(s, 1.0))
    past = (rows >= M)[:, None] | (cols >= N)[None, :]
    u = gl.where(past, gl.full_like(s, float("-inf")), (s * scale + bias) * sign)
    softplus, dlogits = softplus_sigmoid(u)
    return softplus, dlogits * sign


@gluon.jit
def meets_diagonal_or_edge(row0, col0, M, N, diagonal, ROWS: gl.constexpr, COLS: gl.constexpr):
    """As in triton_tiles.py; here too, so that the emulator's tests can break this kernel alone."""
    meets = (row0 + diagonal < col0 + COLS) & (col0 < row0 + diagonal + ROWS)
    return meets | (row0 + ROWS > M) | (col0 + COLS > N)


@gluon.jit
def write_round(dlogits, row0, col0, k, out_desc, out_bufs):
    """dlogits of one round to memory, by the copy engine; what lies past the edge it leaves out."""
    BUFFERS: gl.constexpr = out_bufs.shape[0]  # divides the rounds of a tile: k starts anew in each
    buf = out_bufs.index(k % BUFFERS)
    tma.store_wait(BUFFERS - 1)  # what was last in this buffer has left it
    buf.store(dlogits.to(out_desc.dtype))
    fence_async_shared()
    tma.async_copy_shared_to_global(out_desc, [row0, col0], buf)


@gluon.jit
def one_round(
    s, at, row0, col0, M, N, diagonal, scale, bias, moderate, loss, dscale_sum, dbias_sum, out_desc,
    out_bufs, GRAD_SCALE: gl.constexpr, SCALAR_GRADS: gl.constexpr,
):  # fmt: skip
    """Write dlogits of s, the columns from ``at`` on of the tile at col0, and add to its sums."""
    ROWS: gl.constexpr = s.shape[0]
    WIDTH: gl.constexpr = s.shape[1]
    s0, s1, s2, s3 = quarters(s)
    mixed = meets_diagonal_or_edge(row0, col0 + at, M, N, diagonal, ROWS, WIDTH)
    if moderate & ~mixed:
        e0 = moderate_exp(s0 * scale + bias)
        e1 = moderate_exp(s1 * scale + bias)
        e2 = moderate_exp(s2 * scale + bias)
        e3 = moderate_exp(s3 * scale + bias)
        a, b = last_halves(join_exps(join_exps(e0, e1), join_exps(e2, e3)))
        loss += log1p_wide(join_exps(a, b))
        d0, d1, d2, d3 = four_sigmoids(e0, e1, e2, e3)
    else:
        softplus, dlogits = any_pairs(s, row0, col0 + at, M, N, diagonal, scale, bias)
        p0, p1, p2, p3 = quarters(softplus)
        a, b = last_halves((p0 + p1) + (p2 + p3))
        loss += a + b
        d0, d1, d2, d3 = quarters(dlogits)
    if SCALAR_GRADS:
        dscale_sum = d3 * s3 + (d2 * s2 + (d1 * s1 + (d0 * s0 + dscale_sum)))
        dbias_sum += (d0 + d1) + (d2 + d3)
    if out_desc is not None:
        dlogits = whole(d0, d1, d2, d3) * GRAD_SCALE
        write_round(dlogits, row0, col0 + at, at // WIDTH, out_desc, out_bufs)
    return loss, dscale_sum, dbias_sum


@gluon.jit
def rounds(
    s, at, row0, col0, M, N, diagonal, scale, bias, moderate, loss, dscale_sum, dbias_sum, out_desc,
    out_bufs, WIDTH: gl.constexpr, GRAD_SCALE: gl.constexpr, SCALAR_GRADS: gl.constexpr,
):  # fmt: skip
    """one_round for every WIDTH columns of s, the columns from ``at`` on of a tile.

    Loops, though registers cannot be indexed: one half after the other moves to where the loop
    works. Unrolled, the code of a tile runs once and is fetched anew every time, which takes longer
    than to run it.
    """
    if s.shape[1] == WIDTH:
        loss, dscale_sum, dbias_sum = one_round(
            s, at, row0, col0, M, N, diagonal, scale, bias, moderate, loss, dscale_sum, dbias_sum,
            out_desc, out_bufs, GRAD_SCALE, SCALAR_GRADS,
        )  # fmt: skip
    else:
        now, later = column_subtiles(s, 2)
        for half in range(0, 2):
            loss, dscale_sum, dbias_sum = rounds(
                now, at + half * (s.shape[1] // 2), row0, col0, M, N, diagonal, scale, bias,
                moderate, loss, dscale_sum, dbias_sum, out_desc, out_bufs, WIDTH, GRAD_SCALE,
                SCALAR_GRADS,
            )  # fmt: skip
            now = later
    return loss, dscale_sum, dbias_sum


@gluon.jit
def epilogue(
    tile, row0, col0, M, N, diagonal, scale, bias, out_desc, out_bufs, partials_ptr, index, tiles,
    WIDTH: gl.constexpr, GRAD_SCALE: gl.constexpr, SCALAR_GRADS: gl.constexpr,
):  # fmt: skip
    """dlogits of the index-th of all tiles, and its three sums."""
    # NaN is the largest: four_sigmoids would spread it to pairs that do not have it
    most = gl.reduce(gl.reduce(tile, 1, larger), 0, larger) * scale + bias
    moderate = (scale > 0) & (most <= MODERATE_LOGIT)  # 0 times -inf is NaN, too
    first = column_subtiles(tile, tile.shape[1] // WIDTH)[0]
    zero = quarters(gl.full_like(first, 0.0))[0]
    loss, dscale_sum, dbias_sum = rounds(
        tile, 0, row0, col0, M, N, diagonal, scale, bias, moderate, last_halves(zero)[0], zero,
        zero, out_desc, out_bufs, WIDTH, GRAD_SCALE, SCALAR_GRADS,
    )  # fmt: skip
    gl.store(partials_ptr + index, gl.sum(gl.sum(gl.sum(loss, 2), 1), 0))
    if SCALAR_GRADS:
        gl.store(partials_ptr + tiles + index, gl.sum(gl.sum(gl.sum(dscale_sum, 2), 1), 0))
        gl.store(partials_ptr + 2 * tiles + index, gl.sum(gl.sum(gl.sum(dbias_sum, 2), 1), 0))


@gluon.jit
def consumer(
    which: gl.constexpr, x_bufs, y_bufs, out_bufs, full, empty, turn, partials_ptr, out_desc,
    scale_ptr, bias_ptr, M, N, diagonal, tiles_m, tiles_n,
    D: gl.constexpr, GROUP_M: gl.constexpr, WIDTH: gl.constexpr, GRAD_SCALE: gl.constexpr,
    SCALAR_GRADS: gl.constexpr,
):  # fmt: skip
    """Multiplies the blocks of every other tile of this program; turns them into its outputs."""
    STAGES: gl.constexpr = x_bufs.shape[0]
    scale = gl.load(scale_ptr)
    bias = gl.load(bias_ptr)
    tiles = tiles_m * tiles_n
    programs = gl.num_programs(0)
    for t in range(gl.program_id(0) + which * programs, tiles, 2 * programs):
        tm, tn = tile_of(t, tiles_m, tiles_n, GROUP_M)
        sequence = t // programs
        i = sequence * gl.cdiv(D, x_bufs.shape[2])
        # else a waiting consumer could take a later fill of the same parity for its own
        mbarrier.wait(turn.index(which), ((sequence // 2) & 1) ^ (1 - which))
        acc, i = multiply(i, x_bufs, y_bufs, full, empty, D)
        mbarrier.arrive(turn.index(1 - which), count=1)
        tile = warpgroup_mma_wait(0, deps=(acc,))
        mbarrier.arrive(empty.index((i + STAGES - 1) % STAGES), count=1)
        epilogue(
            tile, tm * x_bufs.shape[1], tn * y_bufs.shape[1], M, N, diagonal, scale, bias, out_desc,
            out_bufs, partials_ptr, t, tiles, WIDTH, GRAD_SCALE, SCALAR_GRADS,
        )  # fmt: skip
    if out_desc is not None:
        tma.store_wait(0)


@gluon.jit(do_not_specialize=["M", "N", "diagonal"])
def hopper_panel_kernel(
    x_desc,  # (M, D), blocks of BLOCK_M x BLOCK_K
    y_desc,  # (N, D), blocks of BLOCK_N x BLOCK_K
    out_desc,  # (M, N) or more, blocks of BLOCK_M x WIDTH; or None
    partials_ptr,  # (1 or 3, tiles) fp32: a tile's sums of softplus(u), dlogits*s, dlogits
    scale_ptr,  # () fp32
    bias_ptr,  # () fp32
    M,
    N,
    diagonal,
    D: gl.constexpr,
    GROUP_M: gl.constexpr,
    STAGES: gl.constexpr,
    WIDTH: gl.constexpr,  # columns of a round of the epilogue
    GRAD_SCALE: gl.constexpr,
    SCALAR_GRADS: gl.constexpr,
    STORE_BUFFERS: gl.constexpr,  # rounds of dlogits on their way to memory, of each consumer
    REGISTERS: gl.constexpr,  # of a consumer's thread
    num_warps: gl.constexpr,  # of a consumer
):
    """dlogits of a panel, and the three sums over the pairs of each tile."""
    BLOCK_M: gl.constexpr = x_desc.block_type.shape[0]
    BLOCK_K: gl.constexpr = x_desc.block_type.shape[1]
    BLOCK_N: gl.constexpr = y_desc.block_type.shape[0]
    x_bufs = gl.allocate_shared_memory(x_desc.dtype, [STAGES, BLOCK_M, BLOCK_K], x_desc.layout)
    y_bufs = gl.allocate_shared_memory(y_desc.dtype, [STAGES, BLOCK_N, BLOCK_K], y_desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    turn = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for s in gl.static_range(2):
        mbarrier.init(turn.index(s), count=1)
    for s in gl.static_range(STAGES):
        mbarrier.init(full.index(s), count=1)
        mbarrier.init(empty.index(s), count=1)
    if out_desc is not None:
        out_shape: gl.constexpr = [STORE_BUFFERS, BLOCK_M, WIDTH]
        out_bufs0 = gl.allocate_shared_memory(out_desc.dtype, out_shape, out_desc.layout)
        out_bufs1 = gl.allocate_shared_memory(out_desc.dtype, out_shape, out_desc.layout)
    else:
        out_bufs0: gl.constexpr = None
        out_bufs1: gl.constexpr = None
    tiles_m = gl.cdiv(M, BLOCK_M)
    tiles_n = gl.cdiv(N, BLOCK_N)
    gl.warp_specialize([
        (consumer, (0, x_bufs, y_bufs, out_bufs0, full, empty, turn, partials_ptr, out_desc,
                    scale_ptr, bias_ptr, M, N, diagonal, tiles_m, tiles_n, D, GROUP_M, WIDTH,
                    GRAD_SCALE, SCALAR_GRADS)),
        (consumer, (1, x_bufs, y_bufs, out_bufs1, full, empty, turn, partials_ptr, out_desc,
                    scale_ptr, bias_ptr, M, N, diagonal, tiles_m, tiles_n, D, GROUP_M, WIDTH,
                    GRAD_SCALE, SCALAR_GRADS)),
        (producer, (x_desc, y_desc, x_bufs, y_bufs, full, empty, tiles_m, tiles_n, D, GROUP_M)),
    ], [num_warps, 1], [REGISTERS, 24])  # fmt: skip
