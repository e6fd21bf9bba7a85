"""The section of docs/performance.md on compiled code: the kernel for Hopper, the portable one."""

from __future__ import annotations

from ..common.markdown import MISSING, bullet, table
from ..common.results import Results, select

TITLE = "## What the compilers make of the panel kernels"


def compiled_section(found: Results | None, gluon: Results | None = None) -> str:
    if found is None:
        command = "`python -m benchmarks.suites.compiled`"
        return f"{TITLE}\n\nNo results file exists yet: {command} writes it."
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
    return "\n\n".join(
        [
            TITLE,
            "On sm_90 panels of half operands whose positives are on the diagonal take the kernel "
            "for Hopper (kernels/hopper_kernel.py), from two tiles a multiprocessor on. Everything "
            "else takes the portable kernel (kernels/triton_kernels.py): other GPUs, float32, "
            "positives by id, chosen negatives, small panels.",
            *_hopper(gluon),
            "### The portable kernel",
            f"Every shipped configuration, compiled ahead of time. {_source(found)} Registers are "
            "those of a thread, and programs is how many a multiprocessor holds at a time.",
            table(header, lines, left=3),
            _others(found.rows),
            _account(found.rows),
        ]
    )


def _source(found: Results) -> str:
    where = found.environment
    return (
        f"Triton {where['triton']}, {where['date'][:10]}, commit {found.commit}: "
        f"[{found.path.name}](../{found.path.as_posix()})."
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


def _hopper(gluon: Results | None) -> list[str]:
    """What is counted in the code of the kernel for Hopper."""
    if gluon is None:
        return []
    (row,) = select(gluon.rows, kind="gluon", dtype="bfloat16")
    config, costs = row["config"], row["instructions_a_pair"]
    tile = " x ".join(str(side) for side in config["tile"])
    reuse = config["tile"][0] * config["tile"][1] / sum(config["tile"])
    points = (
        f"**Roles**: one warp copies blocks of x and y into {config['stages']} stages of shared "
        f"memory, and two consumers of {config['num_warps']} warps take turns on "
        f"tiles of {tile}: one multiplies while the other is in its elementwise pass. A "
        f"multiprocessor holds one program of {row['threads']} threads, which stays.",
        f"**The elementwise pass** takes {costs['joined']:.1f} instructions a pair where the "
        f"largest logit of the tile is at most 10, stores and sums included, and "
        f"{costs['masked']:.1f} otherwise and where a round meets the diagonal or the edge.",
        f"**Registers**: {config['registers']} a thread of a consumer, {min(row['pools'])} of the "
        f"producer. {row['spills']} instructions load or store the stack, of them "
        f"{row['spills_in_loops']} in a loop: values that a tile needs once wait there while its "
        "rounds run.",
        f"**Shared memory**: {row['shared_bytes'] / 1024:.0f} KiB, for stages and the rounds of "
        "dlogits on their way to memory.",
        f"**Traffic**: a tile of {tile} does {reuse:.0f} FLOP for each byte that it loads. Blocks "
        "come in and dlogits go out by the copy engine, so no warp computes addresses.",
    )
    return [
        "### The kernel for Hopper",
        f"Counted in the disassembly, bf16, D = {row['dim']}. {_source(gluon)}",
        "\n".join(map(bullet, points)),
    ]


def _account(rows: list[dict]) -> str:
    """What the counts of sm_90, bf16 say of the portable kernel."""
    hopper = {"kernel": "panel", "target": "sm_90", "positives": "diagonal", "shipped": True}
    (half,) = select(rows, dtype="bf16", **hopper)
    (tf32,) = select(rows, precision="tf32", **hopper)
    saturated, plain, masked = (half["epilogue"][form] for form in ("saturated", "plain", "masked"))
    points = (
        f"**The elementwise pass** takes {plain:.1f} instructions a pair, stores and sums "
        f"included, and {masked:.1f} where a tile meets the diagonal or the edge. A tile whose "
        f"largest logit is at most {half['saturated_logit']:g} takes {saturated:.1f}, one of them "
        "a special function instead of two, and is as exact; to know the largest costs a maximum "
        "over the tile.",
        f"**Registers**: {half['registers']} a thread, {half['spills']} spills and "
        f"{half['shared_bytes'] / 1024:.0f} KiB of shared memory: {half['occupancy']} programs "
        "share a multiprocessor, so that one's elementwise pass can run under the other's product. "
        f"tf32 takes {tf32['registers']} and {tf32['shared_bytes'] / 1024:.0f} KiB: "
        f"{tf32['occupancy']}.",
        f"**Copies**: operands arrive by {half['async_copies']} asynchronous copy instructions in "
        "the program's text, not by the copy engine.",
        "**Accumulation in float32** happens in the library's products, outside this kernel.",
    )
    return "The portable kernel on sm_90, bf16:\n\n" + "\n".join(map(bullet, points))
