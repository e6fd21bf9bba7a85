"""The Gluon panel kernel broken on purpose: each break must be caught."""

from __future__ import annotations

import ast
from typing import NamedTuple


class Break(NamedTuple):
    """Of one function, formatted as by ast.unparse: comments and line breaks do not matter."""

    what: str
    config: str  # where to look first
    function: str
    old: str  # occurs once there
    new: str

    def edit(self, source: str) -> str:
        """The file's source, broken; ValueError where it is not what this break was made for."""
        tree = ast.parse(source)
        found = [f for f in tree.body if isinstance(f, ast.FunctionDef) and f.name == self.function]
        text = ast.unparse(found[0]) if found else ""
        if text.count(self.old) != 1:
            raise ValueError(
                f"{self.what}: {self.function} holds {self.old!r} {text.count(self.old)} times: "
                "expected once"
            )
        tree.body[tree.body.index(found[0])] = ast.parse(text.replace(self.old, self.new)).body[0]
        return ast.unparse(tree)


FULL_WAIT = "mbarrier.wait(full.index(stage), i // STAGES & 1)"
LAST_WAIT = "tile = warpgroup_mma_wait(0, deps=(acc,))"
LAST_ARRIVAL = "mbarrier.arrive(empty.index((i + STAGES - 1) % STAGES), count=1)"
STEP_ARRIVAL = "mbarrier.arrive(empty.index((i + STAGES - 1) % STAGES), count=1, pred=k > 0)"
BYTES = "x_desc.block_type.nbytes + y_desc.block_type.nbytes"
TURN_WAIT = "mbarrier.wait(turn.index(which), sequence // 2 & 1 ^ 1 - which)"
STEPS = "range(0, gl.cdiv(D, BLOCK_K))"

BREAKS = (
    # the ring of stages
    Break("a stage is freed while its product runs", "shipped", "multiply", STEP_ARRIVAL, "mbarrier.arrive(empty.index(stage), count=1, pred=k < gl.cdiv(D, BLOCK_K) - 1)"),
    Break("two products may run when a stage is freed", "shipped", "multiply", "warpgroup_mma_wait(1, ", "warpgroup_mma_wait(2, "),
    Break("the last product may run in the epilogue", "shipped", "consumer", LAST_WAIT, LAST_WAIT.replace("0", "1")),
    Break("the producer waits for the other phase", "shipped", "producer", "i // STAGES & 1 ^ 1", "i // STAGES & 1"),
    Break("the producer does not wait", "shipped", "producer", "mbarrier.wait(empty.index(stage), i // STAGES & 1 ^ 1)", "pass"),
    Break("consumers wait for the other phase", "shipped", "multiply", FULL_WAIT, FULL_WAIT[:-1] + " ^ 1)"),
    Break("consumers do not wait", "shipped", "multiply", FULL_WAIT, "pass"),
    Break("consumers wait for one stage alone", "shipped", "multiply", FULL_WAIT, "mbarrier.wait(full.index(0), i // STAGES & 1)"),
    Break("one consumer keeps the last stage", "shipped", "consumer", LAST_ARRIVAL, LAST_ARRIVAL[:-1] + ", pred=which == 0)"),
    Break("a stage is freed before anything was read", "shipped", "multiply", ", pred=k > 0", ""),
    Break("the barrier of a full stage wants two arrivals", "shipped", "hopper_panel_kernel", "full.index(s), count=1", "full.index(s), count=2"),
    Break("bytes of y not expected", "shipped", "producer", BYTES, "x_desc.block_type.nbytes"),
    Break("too many bytes expected", "shipped", "producer", BYTES, "2 * (" + BYTES + ")"),
    Break("x copied to the next stage", "shipped", "producer", "x_bufs.index(stage)", "x_bufs.index((stage + 1) % STAGES)"),
    Break("consumers count stages anew in each tile", "shipped", "multiply", "acc = warpgroup_mma_init(gl.zeros", "i = 0\n    acc = warpgroup_mma_init(gl.zeros"),
    # the product
    Break("the last step left out by consumers", "shipped", "multiply", STEPS, "range(0, D // BLOCK_K)"),
    Break("sums begin anew at every step", "shipped", "multiply", "use_acc=k > 0", "use_acc=False"),
    Break("the first step is lost", "shipped", "multiply", "use_acc=k > 0", "use_acc=k > 1"),
    Break("bands of tiles one tile too high", "shipped", "tile_of", "gl.minimum(tiles_m - first, GROUP_M)", "GROUP_M"),
    Break("consumers take tiles in another order", "shipped", "consumer", "tile_of(t, tiles_m", "tile_of(tiles - 1 - t, tiles_m"),
    # two consumers
    Break("the sums of both consumers in one slot", "shipped", "consumer", "partials_ptr, t, tiles", "partials_ptr, t - which * programs, tiles"),
    Break("consumers exchange their tiles", "shipped", "consumer", "which * programs", "(1 - which) * programs"),
    Break("a consumer multiplies every tile", "shipped", "consumer", "tiles, 2 * programs)", "tiles, programs)"),
    Break("the barrier of a turn wants two arrivals", "shipped", "hopper_panel_kernel", "turn.index(s), count=1", "turn.index(s), count=2"),
    Break("consumers do not wait for their turn", "shipped", "consumer", TURN_WAIT, "pass"),
    Break("consumers wait for the other's turn", "shipped", "consumer", TURN_WAIT, TURN_WAIT.replace("1 - which", "which")),
    Break("a consumer gives the turn to itself", "shipped", "consumer", "turn.index(1 - which), count=1", "turn.index(which), count=1"),
    Break("a consumer's steps are counted by its own tiles", "shipped", "consumer", "i = sequence * gl.cdiv(D, x_bufs.shape[2])", "i = sequence // 2 * gl.cdiv(D, x_bufs.shape[2])"),
    # which pairs are what
    Break("the diagonal on the other side", "shipped", "any_pairs", "(rows + diagonal)", "(rows - diagonal)"),
    Break("the diagonal one column off", "shipped", "any_pairs", "(rows + diagonal)", "(rows + diagonal + 1)"),
    Break("the row after the last takes part", "shipped", "any_pairs", "rows >= M", "rows > M"),
    Break("the column after the last takes part", "shipped", "any_pairs", "cols >= N", "cols > N"),
    Break("dlogits of positives keeps the sign", "shipped", "any_pairs", "dlogits * sign", "dlogits"),
    Break("logits of positives keep the sign", "shipped", "any_pairs", "(s * scale + bias) * sign", "s * scale + bias"),
    Break("tiles right of the diagonal's corner are plain", "shipped", "meets_diagonal_or_edge", "row0 + diagonal < col0 + COLS", "row0 + diagonal + ROWS < col0 + COLS"),
    Break("tiles left of the diagonal's corner are plain", "shipped", "meets_diagonal_or_edge", "col0 < row0 + diagonal + ROWS", "col0 + COLS < row0 + diagonal + ROWS"),
    Break("tiles at the lower edge are plain", "shipped", "meets_diagonal_or_edge", "row0 + ROWS > M", "row0 > M"),
    Break("tiles at the right edge are plain", "shipped", "meets_diagonal_or_edge", "col0 + COLS > N", "col0 > N"),
    Break("the short path where t is negative", "shipped", "epilogue", "(scale > 0) & (most <= MODERATE_LOGIT)", "most <= MODERATE_LOGIT"),
    Break("products of exponentials that overflow", "shipped", "epilogue", "most <= MODERATE_LOGIT", "most <= 60.0"),
    Break("the maximum ignores NaN", "shipped", "epilogue", "gl.reduce(gl.reduce(tile, 1, larger), 0, larger)", "gl.max(gl.max(tile, 1), 0)"),
    Break("the maximum of the first columns alone", "shipped", "epilogue", "gl.reduce(tile, 1, larger)", "gl.reduce(column_subtiles(tile, 2)[0], 1, larger)"),
    # sums and stores
    Break("the logarithm of half of the columns left out", "shipped", "one_round", "log1p_wide(join_exps(a, b))", "log1p_wide(a)"),
    Break("exponentials added, not joined", "shipped", "one_round", "join_exps(join_exps(e0, e1), ", "join_exps(e0 + e1, "),
    Break("the second half of a tile not reached", "shipped", "rounds", "now = later", "pass"),
    Break("rounds of a half in the wrong place", "shipped", "rounds", "half * (s.shape[1] // 2)", "half * WIDTH"),
    Break("half of the columns not summed", "shipped", "quarters", "gl.reshape(right, rows)", "gl.reshape(left, rows)"),
    Break("a quarter of dlogits*s not summed", "shipped", "one_round", "(d1 * s1 + ", "("),
    Break("a quarter of the losses not summed", "shipped", "one_round", "p0 + p1", "p0"),
    Break("sums of dlogits*s and dlogits exchanged", "shipped", "epilogue", "partials_ptr + 2 * tiles + index, gl.sum(gl.sum(gl.sum(dbias_sum", "partials_ptr + 2 * tiles + index, gl.sum(gl.sum(gl.sum(dscale_sum"),
    Break("dlogits not scaled", "shipped", "one_round", "whole(d0, d1, d2, d3) * GRAD_SCALE", "whole(d0, d1, d2, d3)"),
    Break("no fence before dlogits is copied", "shipped", "write_round", "fence_async_shared()", "pass"),
    Break("dlogits written to a buffer that is being copied", "shipped", "write_round", "tma.store_wait(BUFFERS - 1)", "tma.store_wait(BUFFERS)"),
    Break("dlogits written without waiting for copies", "one buffer", "write_round", "tma.store_wait(BUFFERS - 1)", "pass"),
    Break("buffers that do not divide the rounds of a tile", "shipped", "hopper_panel_kernel", "[STORE_BUFFERS, BLOCK_M, WIDTH]", "[3, BLOCK_M, WIDTH]"),
    Break("dlogits copied before it is there", "shipped", "write_round", "buf.store(dlogits.to(out_desc.dtype))", "pass"),
    Break("dlogits copied to the columns after", "shipped", "write_round", "[row0, col0], buf", "[row0, col0 + dlogits.shape[1]], buf"),
    Break("consumers end before their copies", "shipped", "consumer", "tma.store_wait(0)", "pass"),
    Break("consumers share buffers of dlogits", "shipped", "hopper_panel_kernel", "out_bufs1 = gl.allocate_shared_memory(out_desc.dtype, out_shape, out_desc.layout)", "out_bufs1 = out_bufs0"),
)  # fmt: skip
