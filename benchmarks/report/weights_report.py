"""The block of docs/weights.md: what weights, targets and the losses of images cost."""

from __future__ import annotations

from ..common.markdown import MISSING, number, table
from ..common.results import MIB, Results, select

# By (weights, negatives) of a row: what the page calls it, and what its time is divided by.
NAMES = {
    (None, None): ("all pairs alike, on the diagonal", None),
    ("rows", None): ("`image_weights` and `text_weights`", None),
    ("label_smoothing", None): ("`label_smoothing`", None),
    ("none", None): ('`reduction="none"`', None),
    (None, "below 0.1"): ("`negatives=Below(0.1)`", None),
    ("ids", None): ("positives by id", None),
    ("ids, PositiveWeight", None): ("positives by id, `PositiveWeight`", "ids"),
    ("ids, PositiveTarget", None): ("positives by id, `PositiveTarget`", "ids"),
}

TARGETS = {"rows": 1.10, "none": 1.35}  # times the loss of equal pairs, at most


def weights_block(found: Results) -> list[str]:
    """Time beside that of the loss without them, and peak memory, by batch size."""
    rows = select(found.rows, kind="cost")
    sizes = sorted({row["batch_size"] for row in rows})
    lines = []
    for (weights, negatives), (name, base) in NAMES.items():
        cells = [name, "by id" if base else "alike"]
        for size in sizes:
            (row,) = select(rows, weights=weights, negatives=negatives, batch_size=size)
            (beside,) = select(rows, weights=base, negatives=None, batch_size=size)
            cells += [_relative(row, beside), number(row["peak_extra_bytes"], ".0f", 1 / MIB)]
        lines.append(cells)
    header = ["loss", "beside", *(c for s in sizes for c in (f"time, B = {s}", "MiB"))]
    first = rows[0]
    return [
        f"Loss and all four gradients, D = {first['dim']}, {first['dtype']}. A time is the median "
        "over the median of the loss beside it (all pairs alike, or plain positives by id) in the "
        f"same rounds, with the quartiles in parentheses. {found.source('../')}",
        table(header, lines, left=2),
        " ".join(_beside_target(rows, name) for name in TARGETS),
    ]


def _beside_target(rows: list[dict], weights: str) -> str:
    worst, size = max(
        (row["seconds"] / base["seconds"], row["batch_size"])
        for row in select(rows, weights=weights)
        for base in select(rows, weights=None, negatives=None, batch_size=row["batch_size"])
        if row["seconds"] is not None
    )
    name, _ = NAMES[weights, None]
    met = "met" if worst <= TARGETS[weights] else "missed"
    return (
        f"The target for {name} is {TARGETS[weights]:.2f} at most: {met} ({worst:.2f} at "
        f"B = {size}, the largest)."
    )


def _relative(row: dict, beside: dict) -> str:
    if row["seconds"] is None or beside["seconds"] is None:
        return MISSING
    middle, low, high = (
        row[field] / beside["seconds"] for field in ("seconds", "seconds_p25", "seconds_p75")
    )
    return f"{middle:.2f} ({low:.2f}-{high:.2f})"
