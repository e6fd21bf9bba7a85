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
    Break("a stage is freed while its product runs", "shared", "multiply", STEP_ARRIVAL, "mbarrier.arrive(empty.index(stage), count=1, pred=k < gl.cdiv(D, BLOCK_K) - 1)"),
    Break("two products may run when a stage is freed", "shared", "multiply", "warpgroup_mma_wait(1, ", "warpgroup_mma_wait(2, "),
    Break("the last product may run in the epilogue", "shared", "consumer", LAST_WAIT, LAST_WAIT.replace("0", "1")),
    Break("the producer waits for the other phase", "shared", "producer", "i // STAGES & 1 ^ 1", "i // STAGES & 1"),
    Break("the producer does not wait", "shared", "producer", "mbarrier.wait(empty.index(stage), i // STAGES & 1 ^ 1)", "pass"),
    Break("consumers wait for the other phase", "shared", "multiply", FULL_WAIT, FULL_WAIT[:-1] + " ^ 1)"),
    Break("consumers do not wait", "shared", "multiply", FULL_WAIT, "pass"),
    Break("consumers wait for one stage alone", "shared", "multiply", FULL_WAIT, "mbarrier.wait(full.index(0), i // STAGES & 1)"),
    Break("one consumer keeps the last stage", "shared", "consumer", LAST_ARRIVAL, LAST_ARRIVAL[:-1] + ", pred=which == 0)"),
    Break("a stage is freed before anything was read", "shared", "multiply", ", pred=k > 0", ""),
    Break("either consumer frees a stage alone", "shared", "hopper_panel_kernel", "count=CONSUMERS if SHARED else 1", "count=1"),
    Break("the barrier of a full stage wants two arrivals", "shared", "hopper_panel_kernel", "full.index(s), count=1", "full.index(s), count=2"),
    Break("bytes of y not expected", "shared", "producer", BYTES, "x_desc.block_type.nbytes"),
    Break("too many bytes expected", "shared", "producer", BYTES, "2 * (" + BYTES + ")"),
    Break("x copied to the next stage", "shared", "producer", "x_bufs.index(stage)", "x_bufs.index((stage + 1) % STAGES)"),
    Break("consumers count stages anew in each tile", "shared", "multiply", "acc = warpgroup_mma_init(gl.zeros", "i = 0\n    acc = warpgroup_mma_init(gl.zeros"),
    Break("a consumer with lower rows does not multiply", "shared", "multiply", STEPS, STEPS.replace("gl.cdiv(D, BLOCK_K)", "gl.cdiv(D, BLOCK_K) * (row == 0)")),
    # the product
    Break("the last step left out by consumers", "shared", "multiply", STEPS, "range(0, D // BLOCK_K)"),
    Break("sums begin anew at every step", "shared", "multiply", "use_acc=k > 0", "use_acc=False"),
    Break("the first step is lost", "shared", "multiply", "use_acc=k > 0", "use_acc=k > 1"),
    Break("rows of consumers exchanged", "shared", "consumer", "multiply(which * ROWS,", "multiply((CONSUMERS - 1 - which) * ROWS,"),
    Break("bands of tiles one tile too high", "shared", "tile_of", "gl.minimum(tiles_m - first, GROUP_M)", "GROUP_M"),
    Break("consumers take tiles in another order", "shared", "consumer", "range(first, tiles, step)", "range(tiles - 1 - first, -1, -step)"),
    # two consumers
    Break("all consumers take the upper rows", "shared", "consumer", "row0 += which * ROWS", "row0 += 0 * ROWS"),
    Break("the third of four consumers does what the first does", "four", "hopper_panel_kernel", "(2, x_bufs,", "(0, x_bufs,"),
    Break("the sums of both consumers in one slot", "shared", "consumer", "t * CONSUMERS + which if SHARED", "t * CONSUMERS if SHARED"),
    Break("consumers do not wait for their turn", "turns", "consumer", TURN_WAIT, "pass"),
    Break("consumers wait for the other's turn", "turns", "consumer", TURN_WAIT, TURN_WAIT.replace("1 - which", "which")),
    Break("a consumer gives the turn to itself", "turns", "consumer", "turn.index(1 - which), count=1", "turn.index(which), count=1"),
    Break("a consumer's steps are counted by its own tiles", "turns", "consumer", "i = sequence * gl.cdiv(D, x_bufs.shape[2])", "i = sequence // 2 * gl.cdiv(D, x_bufs.shape[2])"),
    # which pairs are what
    Break("the diagonal on the other side", "shared", "any_pairs", "(rows + diagonal)", "(rows - diagonal)"),
    Break("the diagonal one column off", "shared", "any_pairs", "(rows + diagonal)", "(rows + diagonal + 1)"),
    Break("the row after the last takes part", "shared", "any_pairs", "rows >= M", "rows > M"),
    Break("the column after the last takes part", "shared", "any_pairs", "cols >= N", "cols > N"),
    Break("g of positives keeps the sign", "shared", "any_pairs", "g * sign", "g"),
    Break("logits of positives keep the sign", "shared", "any_pairs", "(s * scale + bias) * sign", "s * scale + bias"),
    Break("tiles right of the diagonal's corner are plain", "shared", "meets_diagonal_or_edge", "row0 + diagonal < col0 + COLS", "row0 + diagonal + ROWS < col0 + COLS"),
    Break("tiles left of the diagonal's corner are plain", "shared", "meets_diagonal_or_edge", "col0 < row0 + diagonal + ROWS", "col0 + COLS < row0 + diagonal + ROWS"),
    Break("tiles at the lower edge are plain", "shared", "meets_diagonal_or_edge", "row0 + ROWS > M", "row0 > M"),
    Break("tiles at the right edge are plain", "shared", "meets_diagonal_or_edge", "col0 + COLS > N", "col0 > N"),
    Break("the short path where t is negative", "shared", "epilogue", "(scale >= 0) & (most <= MODERATE_LOGIT)", "most <= MODERATE_LOGIT"),
    Break("products of exponentials that overflow", "shared", "epilogue", "most <= MODERATE_LOGIT", "most <= 60.0"),
    # sums and stores
    Break("the logarithm of half of the columns left out", "shared", "one_round", "log1p_wide(join_exps(a, b))", "log1p_wide(a)"),
    Break("exponentials added, not joined", "shared", "one_round", "join_exps(join_exps(e0, e1), ", "join_exps(e0 + e1, "),
    Break("the second half of a tile not reached", "shared", "rounds", "now = later", "pass"),
    Break("rounds of a half in the wrong place", "shared", "rounds", "half * (s.shape[1] // 2)", "half * WIDTH"),
    Break("half of the columns not summed", "shared", "quarters", "gl.reshape(right, rows)", "gl.reshape(left, rows)"),
    Break("a quarter of g*s not summed", "shared", "one_round", "(g1 * s1 + ", "("),
    Break("a quarter of the losses not summed", "shared", "one_round", "p0 + p1", "p0"),
    Break("sums of g*s and g exchanged", "shared", "epilogue", "partials_ptr + 2 * slots + slot, gl.sum(gl.sum(gl.sum(g_sum", "partials_ptr + 2 * slots + slot, gl.sum(gl.sum(gl.sum(gs_sum"),
    Break("g not scaled", "shared", "one_round", "whole(g0, g1, g2, g3) * GRAD_SCALE", "whole(g0, g1, g2, g3)"),
    Break("no fence before g is copied", "turns", "write_round", "fence_async_shared()", "pass"),
    Break("g written to a buffer that is being copied", "turns", "write_round", "tma.store_wait(BUFFERS - 1)", "tma.store_wait(BUFFERS)"),
    Break("g written without waiting for copies", "turns, one buffer", "write_round", "tma.store_wait(BUFFERS - 1)", "pass"),
    Break("g copied before it is there", "turns", "write_round", "buf.store(g.to(g_desc.dtype))", "pass"),
    Break("g copied to the columns after", "turns", "write_round", "[row0, col0], buf", "[row0, col0 + g.shape[1]], buf"),
    Break("consumers end before their copies", "turns", "consumer", "tma.store_wait(0)", "pass"),
    Break("consumers share buffers of g", "turns", "hopper_panel_kernel", "g_bufs1 = gl.allocate_shared_memory(g_desc.dtype, g_shape, g_desc.layout)", "g_bufs1 = g_bufs0"),
    Break("two of four consumers share buffers of g", "four", "hopper_panel_kernel", "y_bufs, g_bufs3, full", "y_bufs, g_bufs2, full"),
)  # fmt: skip
