"""docs/performance.md: its introduction, and what was measured on a CPU and in the demo."""

from __future__ import annotations

from examples.emoji.data import LANGUAGES

from ..common.markdown import number, table
from ..common.results import Results, main_shape, select
from .tables import accuracy_table, cost_table, savings

INTRODUCTION = """\
# Performance

`python -m benchmarks.report.render` writes this page from the newest files in
[benchmarks/results](../benchmarks/results), and [the benchmarks' page](../benchmarks/README.md)
says how each number is measured. "x floor" (x GEMM floor) is a loss's time divided by that of the
plain matrix products that no exact method can avoid, in the same run, so 1.00 would be free. "MiB"
is peak memory beyond inputs and gradients. The logit scale is t, and t = 10 where a table does not
say."""


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
            f"The table is for the loss and all four gradients in {shape['dtype']} with "
            f"D = {shape['dim']}, on {found.environment['threads']} threads. {found.source('../')}",
            f"![x GEMM floor against the batch size]({plot})",
            cost_table(cost),
            savings(rows),
            *_late(cost),
            *_breakdown(rows),
            "The next table has the gradients' error against float64 (root mean square, relative; "
            "the worse of both towers):",
            accuracy_table(rows),
        ])
    )  # fmt: skip


def _late(cost: list[dict]) -> list[str]:
    """Times at the largest t, where there are others."""
    late = max(row["logit_scale"] for row in cost)
    if late == cost[0]["logit_scale"]:
        return []
    return [
        f"Late in training, at t = {late:g}:",
        cost_table(select(cost, logit_scale=late), columns=("x floor", "ms")),
    ]


def _breakdown(rows: list[dict]) -> list[str]:
    """What a step takes beside the floor, by the profiler."""
    chosen = select(rows, kind="breakdown")
    if not chosen:
        return []
    fields = ("ratio_to_floor", "products", "passes", "host")
    lines = [[str(row["batch_size"]), *(number(row[field]) for field in fields)] for row in chosen]
    return [
        "The next table says where a step's time goes, in shares of the floor. The passes are all "
        "that torch's operators do to pairs and features beside the products. The host's share is "
        "what is left: Python, torch's dispatch and autograd.",
        table(["B", "x floor", "products", "passes", "host"], lines, left=0),
    ]


def demo_section(found: Results | None) -> str:
    title = "## The demo"
    if found is None:
        return f"{title}\n\nNo results file of the demo exists yet."
    recall = select(found.rows, kind="recall")
    lines = [
        [kind, language, str(row["names"]), f"{row['first']:.1%}", f"{row['five']:.1%}"]
        for key, kind in (
            ("held_out", "of emoji with other names"),
            ("unseen_emoji", "of emoji without"),
        )
        for language in ("all", "no tone", "not alike", *LANGUAGES)
        for row in select(recall, split=key, language=language)
        if key == "held_out" or language == "all"
    ]
    cost = select(found.rows, kind="cost")
    return "\n\n".join([
        title,
        f"`make demo-full`. {found.source('../')}",
        f"Held-out names, and how often their picture is found among {recall[0]['pictures']}; "
        '"no tone" leaves out emoji that are another one in a tone of skin, and "not alike" names '
        "that another language spells the same:",
        table(["held-out names", "language", "", "first", "among five"], lines, left=2),
        f"Time and memory of the loss by the number of names in a batch, each beside the "
        f"pictures of its emoji; D = {cost[0]['dim']}, {cost[0]['dtype']}:",
        cost_table(cost),
    ])  # fmt: skip
