"""What compiled code says, without a GPU: a table, and what follows for each idea for speed."""

from __future__ import annotations

import textwrap

from .markdown import MISSING, Results, table
from .targets import select

TITLE = "## What the compilers make of the panel kernel"


def compiled_section(found: Results | None) -> str:
    if found is None:
        return f"{TITLE}\n\nNo results file exists yet: `python -m benchmarks.compiled` writes it."
    shipped = select(found.rows, kind="compiled", shipped=True, kernel="panel")
    lines = (
        [
            row["target"],
            "tf32" if row["precision"] == "tf32" else row["dtype"],
            row["positives"],
            str(row["registers"]),
            str(row["spills"]),
            str(row["stack_bytes"]),
            f"{row['shared_bytes'] / 1024:.0f}",
            MISSING if row["occupancy"] is None else str(row["occupancy"]),
            row["tensor_core"] or MISSING,
        ]
        for row in shipped
    )
    header = ["GPU", "operands", "positives", "registers", "spills", "stack, bytes"]
    header += ["shared, KiB", "programs", "matrix instruction"]
    triton = found.environment["triton"]
    source = f"[{found.path.name}](../{found.path.as_posix()})"
    return "\n\n".join(
        [
            TITLE,
            f"Every shipped configuration, compiled ahead of time by triton {triton}: {source}. "
            "Registers are a thread's; programs is how many a multiprocessor holds at a time.",
            table(header, lines, left=3),
            _others(found.rows),
            _account(found.rows),
        ]
    )


def _others(rows: list[dict]) -> str:
    """The kernels beside the panel kernel: one a line, one target a column."""
    beside = [r for r in select(rows, kind="compiled") if r["kernel"] != "panel"]
    targets, kernels = (list(dict.fromkeys(r[key] for r in beside)) for key in ("target", "kernel"))
    lines = ([kernel, *(_fits(row) for row in select(beside, kernel=kernel))] for kernel in kernels)
    spills = sum(row["spills"] for row in beside)
    return (
        f"The other kernels, bf16: registers / programs. Spills, all together: {spills}.\n\n"
        + table(["", *targets], lines)
    )


def _fits(row: dict) -> str:
    programs = MISSING if row["occupancy"] is None else row["occupancy"]
    return f"{row['registers']} / {programs}"


def _account(rows: list[dict]) -> str:
    """What the counts of sm_90, bf16 say of each lead. Only a device says what that is worth."""
    hopper = {"kernel": "panel", "target": "sm_90", "positives": "diagonal", "shipped": True}
    (half,) = select(rows, dtype="bf16", **hopper)
    (tf32,) = select(rows, precision="tf32", **hopper)
    (wide,) = select(rows, kind="compiled", shipped=False)
    easy, plain, masked = (half["epilogue"][form] for form in ("easy", "plain", "masked"))
    reuse, wide_reuse = (
        row["block_m"] * row["block_n"] / (row["block_m"] + row["block_n"]) for row in (half, wide)
    )
    points = (
        f"**The elementwise pass** costs {plain:.1f} instructions a pair, stores and sums "
        f"included, and {masked:.1f} where a tile meets the diagonal or the edge, counted in the "
        "disassembly.",
        f"**Registers**: {half['registers']} a thread, {half['spills']} spills, "
        f"{half['stack_bytes']} bytes of stack, and {half['shared_bytes'] / 1024:.0f} KiB of "
        f"shared memory: {half['occupancy']} programs share a multiprocessor, so that one's "
        f"epilogue can run under the other's product. tf32 takes {tf32['registers']} and "
        f"{tf32['shared_bytes'] / 1024:.0f} KiB: {tf32['occupancy']}.",
        "**Warp specialisation** is not compiled in; overlap is left to the "
        f"{half['occupancy']} programs. [performance-log.md](performance-log.md) says why.",
        f"**Tile traffic**: a tile of {half['block_m']} x {half['block_n']} does {reuse:.0f} FLOP "
        f"for each byte that it loads, one of {wide['block_m']} x {wide['block_n']} "
        f"{wide_reuse:.0f}. The larger one compiles with {wide['spills']} spills "
        f"({wide['registers']} registers), but then a multiprocessor holds {wide['occupancy']}. "
        f"Operands arrive by {half['async_copies']} asynchronous copy instructions in the "
        "program's text, not by the bulk copy engine.",
        "**Fewer special functions**: a tile whose largest logit is at most "
        f"{half['easy_logit']:g} takes {easy:.1f} instructions a pair, one of them a special "
        "function instead of two, and is as "
        "exact. To know it costs a maximum over the tile.",
        "**Accumulation in fp32** happens in the library's products, outside this kernel.",
    )
    bullets = (
        textwrap.fill(f"- {p}", 100, subsequent_indent="  ", break_on_hyphens=False) for p in points
    )
    title = "What follows for sm_90 and bf16; only a device can say what it is worth."
    return f"{title}\n\n" + "\n".join(bullets)
