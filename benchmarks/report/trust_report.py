"""The blocks of docs/trust.md, each from the newest results file of its kind."""

from __future__ import annotations

import math
import re
from collections.abc import Callable

import torch

from fused_siglip.testing.rounding import UNIT_ROUNDOFF

from ..common.markdown import number, table
from ..common.results import Results, select
from .tables import label

PAGE = "docs/trust.md"
BLOCK = re.compile(r"(<!-- (\w+):begin -->\n).*?(<!-- \2:end -->)", re.DOTALL)
INVARIANTS = {
    "repeated": "the same call again gives the same bits",
    "permuted": "permuting pairs together changes nothing (with ids, each tower alone)",
    "panels": "any cut into panels changes nothing",
    "swapped": "swapping the towers swaps their gradients",
    "padded": "padding changes nothing, wherever it stands and whatever it holds",
    "upstream": "scaling the upstream gradient scales all gradients (by -1/2: to the bit)",
    "asked": "results do not depend on which gradients are asked for",
    "blocks": "the sum over blocks, with negative_only off the diagonal, is the whole",
}
OUTPUTS = {
    "loss": "loss",
    "image_grad": "dX (images)",
    "text_grad": "dY (texts)",
    "scale_grad": "dt",
    "bias_grad": "db",
}


def _seed(row: dict) -> str:
    return "-" if row["seed"] is None else str(row["seed"])


def fuzz(found: Results) -> str:
    (run,) = select(found.rows, kind="run")
    misses = "no miss" if run["misses"] == 0 else f"{run['misses']} missed"
    dtypes = (
        [f"{r['backend']}, {r['dtype']}", f"{r['cases']:,}", f"{r['share']:.3f}", r["what"],
         _seed(r)]
        for r in select(found.rows, kind="dtype")
    )  # fmt: skip
    invariants = (
        [INVARIANTS[r["law"]], f"{r['cases']:,}", f"{r['share']:.3f}", _seed(r)]
        for r in select(found.rows, kind="law")
    )
    return "\n\n".join(
        [
            f"**{run['cases']:,} cases in one run of {run['seconds']:,.0f} s: {misses}.** "
            + found.source("../"),
            table(["against float64", "cases", "worst share", "of", "seed"], dtypes),
            table(["invariant", "cases", "worst share", "seed"], invariants),
        ]
    )


def error_growth(found: Results) -> str:
    names = list(dict.fromkeys(row["loss"] for row in found.rows))
    order = " / ".join(label(name).replace("*", "") for name in names)
    parts = [f"In each cell: {order}. {found.source('../')}"]
    for dtype in dict.fromkeys(row["dtype"] for row in found.rows):
        here = select(found.rows, dtype=dtype)
        u = UNIT_ROUNDOFF[getattr(torch, dtype)]
        lines = []
        for t, size, dim in dict.fromkeys((r["t"], r["batch_size"], r["dim"]) for r in here):
            at = {"t": t, "batch_size": size, "dim": dim}
            errors = [r["errors"] for name in names for r in select(here, loss=name, **at)]
            cells = [" / ".join(_units(e[output] / u) for e in errors) for output in OUTPUTS]
            lines.append([f"{t:g}", str(size), str(dim), *cells])
        parts += [
            f"### {dtype}, u = 2^{math.log2(u):.0f}",
            table(["t", "B", "D", *OUTPUTS.values()], lines, left=0),
        ]
    return "\n\n".join(parts)


def _units(value: float) -> str:
    if not math.isfinite(value):
        return "overflow"
    if value < 0.01:
        return "<0.01"
    return f"{value:.2g}" if value < 100 else f"{value:,.0f}"


def mutations(found: Results) -> str:
    rows = select(found.rows, kind="mutation")
    caught = sum(row["caught_by"] is not None for row in rows)
    lines = ([r["what"], f"`{r['file']}`", f"`{r['caught_by'] or 'none'}`", _said(r)] for r in rows)
    return "\n\n".join(
        [
            f"{caught} of {len(rows)} are caught. {found.source('../')}",
            table(["mutation", "file", "caught by", "which said"], lines, left=4),
        ]
    )


def _said(row: dict) -> str:
    """The first words of a failure, fit for a cell."""
    said = (row["said"] or "-").removeprefix("AssertionError: ").replace("|", "/")
    said = said if len(said) <= 80 else said[:77] + "..."
    return f"`{said}`"


def longrun(found: Results) -> str:
    rows = select(found.rows, kind="checkpoint")
    same = all(row["same_bits"] for row in rows)
    lines = (
        [f"{r['step']:,}", str(r["sizes"]), str(r["graphs"]), number(r["rss_bytes"], ".0f", 2**-20),
         f"{r['objects']:,}", f"{r['share']:.2f}"]
        for r in rows
    )  # fmt: skip
    header = ["step", "sizes so far", "graphs compiled", "resident MiB", "Python objects", "share"]
    return "\n\n".join(
        [
            f"The fixed batch gave {'the same bits' if same else 'OTHER BITS'} at every "
            f"checkpoint. {found.source('../')}",
            table(header, lines, left=0),
        ]
    )


def coverage(found: Results) -> str:
    (total,) = select(found.rows, kind="total")
    lines = ([f"`{r['where']}`", r["why"]] for r in select(found.rows, kind="not covered"))
    return "\n\n".join(
        [
            f"{total['lines']:.1%} of the lines and {total['branches']:.1%} of the branches. "
            + found.source("../"),
            table(["not covered", "because"], lines, left=2),
        ]
    )


def versions(found: Results) -> str:
    lines = (
        [
            r["which"],
            r["torch"],
            r["triton"],
            r["tests_commit"][:8],
            *(f"{r[key]:,}" for key in COUNTS.values()),
        ]
        for r in select(found.rows, kind="versions")
    )
    return "\n\n".join(
        [found.source("../"), table(["", "torch", "triton", "tests at", *COUNTS], lines, left=4)]
    )


COUNTS = {
    "passed": "passed",
    "failed": "failed",
    "skipped": "skipped",
    "seconds to install": "install_seconds",
    "MB installed": "megabytes",
}
BLOCKS: dict[str, Callable[[Results], str]] = {
    block.__name__: block for block in (fuzz, error_growth, mutations, longrun, coverage, versions)
}


def filled(text: str, found: dict[str, list[Results]]) -> str:
    """The page with its blocks replaced by what the results say."""
    names = [match[2] for match in BLOCK.finditer(text)]
    if sorted(names) != sorted(BLOCKS):
        raise ValueError(f"{PAGE} has the blocks {names}: expected {list(BLOCKS)}, each once")

    def block(match: re.Match) -> str:
        several = found.get(match[2])
        said = BLOCKS[match[2]](several[0]) if several else "No results file exists yet."
        return f"{match[1]}{said}\n{match[3]}"

    return BLOCK.sub(block, text)
