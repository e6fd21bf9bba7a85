"""The block of docs/negatives.md: what choosing negatives costs and saves."""

from __future__ import annotations

from ..common.markdown import number, table
from ..common.results import MIB, Results, fused_name, select
from .tables import label


def negatives_block(found: Results) -> list[str]:
    """Time and memory against the share of negatives that is kept."""
    rows = select(found.rows, kind="cost")
    (everything,) = select(rows, loss=fused_name(rows), negatives=None)
    lines = []
    for loss, negatives in dict.fromkeys((row["loss"], row["negatives"]) for row in rows):
        (row,) = select(rows, loss=loss, negatives=negatives)
        relative = row["seconds"] and row["seconds"] / everything["seconds"]
        kind, keep = (negatives or "all 1").split()
        lines.append(
            [
                label(loss) if loss != "eager" else "eager, B x B mask",
                kind,
                f"{float(keep):g}",
                number(row["seconds"], ".0f", 1e3),
                number(relative, ".2f"),
                number(row["ratio_to_floor"], ".2f"),
                number(row["peak_extra_bytes"], ".0f", 1 / MIB),
            ]
        )
    header = ["loss", "negatives", "kept", "ms", "of the time with all", "x floor", "MiB"]
    shape = f"B = {rows[0]['batch_size']}, D = {rows[0]['dim']}, {rows[0]['dtype']}"
    return [
        f"Loss and all four gradients, {shape}. " + found.source("../"),
        table(header, lines, left=2),
        "![time against the share that is kept](negatives.png)",
    ]
