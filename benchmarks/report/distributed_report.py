"""The block of docs/distributed.md, as a function of the results file."""

from __future__ import annotations

from ..common.markdown import Results, number, table
from ..gpu.acceptance import MIB, select


def ranks_block(found: Results) -> list[str]:
    """Time, bytes and peak memory of every mode and world size; growth; gloo's own buffers."""
    rows = select(found.rows, kind="distributed")
    lines = [
        [
            str(r["world_size"]),
            f"**{r['dist_impl']}**" if r["loss"] == "fused" else f"open_clip {r['dist_impl']}",
            *(
                number(r[name], ".0f", 1e3)
                for name in ("seconds", "compute_seconds", "communication_seconds")
            ),
            *(
                number(r[name], ".1f", 1 / MIB)
                for name in ("bytes_sent", "bytes_formula", "peak_bytes", "predicted_peak_bytes")
            ),
        ]
        for r in rows
    ]
    header = ["W", "mode", "ms", "compute", "communication", "sent MiB", "formula", "peak MiB"]
    first = rows[0]
    shape = f"{first['local_batch']} x {first['dim']} {first['dtype']} features on every rank"
    sizes = sorted({r["world_size"] for r in rows if r["world_size"] > 1})
    ends = sizes[0], sizes[-1]
    grown = ", ".join(
        f"{_name(*mode)} {_ratio(rows, *mode, *ends, 'peak_bytes') - 1:+.1%}"
        for mode in dict.fromkeys((r["loss"], r["dist_impl"]) for r in rows)
    )
    off = max(
        abs(r["predicted_peak_bytes"] / r["peak_bytes"] - 1)
        for r in rows
        if r["predicted_peak_bytes"] is not None
    )
    steps = zip([1, *sizes], sizes, strict=False)
    compute = ", ".join(
        f"{_ratio(rows, 'fused', 'ring', a, b, 'compute_seconds'):.1f}" for a, b in steps
    )
    own = ", ".join(
        f"{r['operation']} {r['peak_bytes'] / MIB:.1f} MiB"
        for r in select(found.rows, kind="gloo", world_size=sizes[-1])
    )
    return [
        f"Real processes with gloo on one machine, one thread each, {shape}, loss and all "
        f"gradients. Beside ours (bold), open_clip 3.3.0's four modes. {found.source('../')}",
        table([*header, "predicted"], lines, left=0),
        f"Peak memory per rank from W = {sizes[0]} to W = {sizes[-1]}: {grown}.",
        "![Peak memory per rank over the world size](distributed_memory.png)",
        f"- The predicted peak is off by {off:.1%} at most.\n"
        f"- From one W to the next the ring's compute took {compute} times as long.\n"
        f"- gloo's own buffers, measured alone at W = {sizes[-1]}: {own}.",
    ]


def _name(whose: str, impl: str) -> str:
    return f"**{impl}**" if whose == "fused" else f"open_clip's {impl}"


def _ratio(rows: list[dict], whose: str, impl: str, before: int, after: int, field: str) -> float:
    old, new = (
        select(rows, loss=whose, dist_impl=impl, world_size=size)[0][field]
        for size in (before, after)
    )
    return new / old
