"""docs/performance.md: its introduction, and what was measured on a CPU and in the demo."""

from __future__ import annotations

from ..common.markdown import number, table
from ..common.results import Results, main_shape, select
from .tables import accuracy_table, cost_table, savings

INTRODUCTION = """\
# Performance

`python -m benchmarks.report.render` writes this page from the newest files in
[benchmarks/results](../benchmarks/results); [benchmarks/README.md](../benchmarks/README.md) says
how each number is measured. x floor (x GEMM floor) is a loss's time over that of the plain matrix
products that no exact method can avoid, in the same run: 1.00 would be free. MiB is peak memory
beyond inputs and gradients. The logit scale is t, and t = 10 where a table does not say."""


def cpu_section(found: Results | None, plot: str) -> str:
    title = "## On a CPU"
    if found is None:
        return f"{title}\n\nNo results file of a CPU exists yet."
    rows = found.rows
    cost = select(rows, kind="cost")
    shape = main_shape(cost)
    return "\n\n".join(
        filter(None, [
            title,
            f"Loss and all four gradients, {shape['dtype']}, D = {shape['dim']}, "
            f"{found.environment['threads']} threads. {found.source('../')}",
            f"![x GEMM floor against the batch size]({plot})",
            cost_table(cost),
            savings(rows),
            "Gradients' error against float64 (root mean square, relative; the worse of both "
            "towers):",
            accuracy_table(rows),
        ])
    )  # fmt: skip


def demo_section(found: Results | None) -> str:
    title = "## The demo"
    if found is None:
        return f"{title}\n\nNo results file of the demo exists yet."
    trained = select(found.rows, kind="training")
    lines = [
        [
            f"{row['loss']} {row['dtype']}",
            number(row["losses"][0], ".3f"),
            number(row["losses"][-1], ".3f"),
            *(f"{share:.1%}" for share in row["accuracy"].values()),
        ]
        for row in trained
    ]
    languages = list(trained[0]["accuracy"]) if trained else []
    cost = select(found.rows, kind="cost")
    parts = [title, f"`make demo-full`. {found.source('../')}"]
    if trained:
        parts += [
            "Loss at the first and the last step; zero-shot accuracy by language of the prompts:",
            table(["", "first", "last", *languages], lines),
        ]
    if cost:
        parts += [f"Time and memory, D = {cost[0]['dim']}, {cost[0]['dtype']}:", cost_table(cost)]
    return "\n\n".join(parts)
