"""The block of docs/distributed.md: the loss of the global batch in real processes."""

from __future__ import annotations

from ..common.markdown import number, table
from ..common.results import MIB, Results, select

SECONDS = ("seconds", "compute_seconds", "communication_seconds")
BYTES = ("bytes_sent", "bytes_formula", "peak_bytes", "predicted_peak_bytes")


def modes_table(rows: list[dict]) -> str:
    """Time, bytes and peak memory of every mode and world size; ours are bold."""
    lines = (
        [
            str(row["world_size"]),
            f"**{row['dist_impl']}**"
            if row["loss"] == "fused"
            else f"open_clip {row['dist_impl']}",
            *(number(row[name], ".0f", 1e3) for name in SECONDS),
            *(number(row[name], ".1f", 1 / MIB) for name in BYTES),
        ]
        for row in select(rows, kind="distributed")
    )
    header = ["W", "mode", "ms", "compute", "communication", "sent MiB", "formula", "peak MiB"]
    return table([*header, "predicted"], lines, left=0)


def growth(rows: list[dict]) -> str:
    """How much more memory a rank of the largest world takes than one of two, mode by mode."""
    rows = select(rows, kind="distributed")
    worlds = _worlds(rows)
    if not worlds:
        return "one rank alone"
    ends = worlds[0], worlds[-1]
    return ", ".join(
        f"{_name(*mode)} {_ratio(rows, *mode, *ends, 'peak_bytes') - 1:+.1%}"
        for mode in dict.fromkeys((row["loss"], row["dist_impl"]) for row in rows)
    )


def distributed_block(found: Results) -> list[str]:
    """Time, bytes and peak memory of every mode; growth; gloo's own buffers."""
    rows = select(found.rows, kind="distributed")
    first, worlds = rows[0], _worlds(rows)
    shape = f"{first['local_batch']} x {first['dim']} {first['dtype']} features on every rank"
    off = max(
        abs(row["predicted_peak_bytes"] / row["peak_bytes"] - 1)
        for row in rows
        if row["predicted_peak_bytes"] is not None
    )
    steps = zip([1, *worlds], worlds, strict=False)
    compute = ", ".join(
        f"{_ratio(rows, 'fused', 'ring', a, b, 'compute_seconds'):.1f}" for a, b in steps
    )
    own = ", ".join(
        f"{row['operation']} {row['peak_bytes'] / MIB:.1f} MiB"
        for row in select(found.rows, kind="gloo", world_size=worlds[-1])
    )
    return [
        f"Real processes with gloo on one machine, one thread each, {shape}, loss and all "
        f"gradients. Beside ours (bold), open_clip 3.3.0's four modes. {found.source('../')}",
        modes_table(rows),
        f"Peak memory per rank from W = {worlds[0]} to W = {worlds[-1]}: {growth(rows)}.",
        "![Peak memory per rank over the world size](distributed_memory.png)",
        f"- The predicted peak is off by {off:.1%} at most.\n"
        f"- From one W to the next the ring's compute took {compute} times as long.\n"
        f"- gloo's own buffers, measured alone at W = {worlds[-1]}: {own}.",
    ]


def _worlds(rows: list[dict]) -> list[int]:
    """The world sizes of several ranks."""
    return sorted({row["world_size"] for row in rows if row["world_size"] > 1})


def _name(whose: str, impl: str) -> str:
    return f"**{impl}**" if whose == "fused" else f"open_clip's {impl}"


def _ratio(rows: list[dict], whose: str, impl: str, before: int, after: int, field: str) -> float:
    old, new = (
        select(rows, loss=whose, dist_impl=impl, world_size=size)[0][field]
        for size in (before, after)
    )
    return new / old
