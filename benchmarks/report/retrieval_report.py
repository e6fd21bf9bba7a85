"""The block of docs/retrieval.md: what the ranks of a large batch cost."""

from __future__ import annotations

from ..common.markdown import number, table
from ..common.results import MIB, Results, select

_NAMES = {
    "retrieval_ranks": "**retrieval_ranks**, both directions",
    "topk": "torch.topk over chunks of rows, both directions",
    "product": "one product in panels, nothing else",
    "logit_statistics": "**logit_statistics**",
}


def retrieval_block(found: Results) -> list[str]:
    """Time and memory of each method, and the recalls that two of them found."""
    rows = select(found.rows, kind="retrieval")
    (product,) = select(rows, method="product")
    lines = [
        [
            _NAMES[row["method"]],
            str(row["products"]),
            number(row["seconds"], ".1f"),
            number(row["seconds"] / product["seconds"], ".2f"),
            number(row["peak_extra_bytes"], ".0f", 1 / MIB),
        ]
        for row in rows
    ]
    header = ["", "products", "s", "x the product", "MiB"]
    first = rows[0]
    shape = f"{first['batch_size']:,} pairs, D = {first['dim']}, {first['dtype']}"
    recalls = {row["method"]: row["recall"] for row in rows if row["recall"]}
    percent = [", ".join(f"{100 * r:.2f}%" for r in side) for side in recalls["retrieval_ranks"]]
    by = "both methods" if recalls["retrieval_ranks"] == recalls["topk"] else "retrieval_ranks"
    return [
        f"{shape}, {found.environment['threads']} threads. " + found.source("../"),
        table(header, lines, left=1),
        f"R@1, R@5 and R@10 of these features are {percent[0]} from images to texts and "
        f"{percent[1]} from texts to images, by {by}.",
    ]
