"""The block of docs/integrations.md: peak memory of each training stack's own loss and of ours."""

from __future__ import annotations

from ..common.markdown import number, table
from ..common.results import MIB, Results, select


def integrations_block(found: Results) -> list[str]:
    """Peak memory of each stack's own loss and of the fused one in its place."""
    rows = select(found.rows, kind="memory")
    sizes = sorted({row["batch_size"] for row in rows})
    lines = []
    for stack, what, loss, dim in dict.fromkeys(
        (row["stack"], row["what"], row["loss"], row["dim"]) for row in rows
    ):
        here = [select(rows, stack=stack, loss=loss, batch_size=size) for size in sizes]
        cells = [number(row["peak_extra_bytes"], ".0f", 1 / MIB) for (row,) in here]
        lines.append(
            [stack, f"{what}, D = {dim}", f"`{loss}`" if " " not in loss else loss, *cells]
        )
    header = ["stack", "measured", "loss", *(f"MiB, B = {size}" for size in sizes)]
    return [
        "Peak memory, measured, float32. " + found.source("../"),
        table(header, lines, left=3),
    ]
