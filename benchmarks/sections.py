"""The sections of docs/performance.md and of README's block, as functions of results files."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from .markdown import Results, number, table
from .plots import main_shape
from .targets import MIB, fused_name, select, targets

NAMES = {
    "fused_torch": "**fused_siglip**, torch backend",
    "fused_triton": "**fused_siglip**, Triton backend",
    "eager": "eager",
    "compiled": "torch.compile of eager",
    "row_chunked": "rows in chunks of 512, under autograd",
    "open_clip": "open_clip's SigLipLoss",
    "siglip_kernel": "siglip-kernel",
    "one_rounding": "the exact gradient, rounded once",
    "library_fp32": "library product, elementwise kernel",
    "library_in_place": "the same in place, rounded similarities",
    "portable": "fused_siglip, its portable kernel",
}


def label(name: str) -> str:
    return NAMES.get(name, name)


COLUMNS = {  # title: (field of a row, format, factor)
    "r": ("ratio_to_floor", ".2f", 1.0),
    "ms": ("seconds", ".2f", 1e3),
    "MiB": ("peak_extra_bytes", ".0f", 1 / MIB),
}


def cost_table(
    rows: list[dict], sizes: Iterable[int] | None = None, columns: Iterable[str] = tuple(COLUMNS)
) -> str:
    """Time and memory of every contestant, at the dim and dtype of the first row."""
    cost = select(rows, mode="full", **main_shape(rows))
    timed = sorted({row["batch_size"] for row in cost if row["seconds"] is not None})
    shown = [(size, c) for size in sizes or timed if size in timed for c in columns]

    def cell(name: str, size: int, column: str) -> str:
        field, spec, factor = COLUMNS[column]
        (row,) = select(cost, loss=name, batch_size=size) or [{}]
        return number(row.get(field), spec, factor)

    first = next(iter(columns))
    header = [f"{c}, B = {size}" if c == first else c for size, c in shown]
    names = dict.fromkeys(row["loss"] for row in cost)
    return table(["", *header], ([label(n), *(cell(n, *at) for at in shown)] for n in names))


def accuracy_table(rows: list[dict], **fields: object) -> str:
    """Root mean square errors of the feature gradients, relative to those gradients'."""
    chosen = select(rows, kind="accuracy", **fields)
    names = list(dict.fromkeys(row["loss"] for row in chosen))
    keys = ("dtype", "matmul_precision", "logit_scale", "batch_size", "dim")
    shapes = list(dict.fromkeys(tuple(row.get(key) for key in keys) for row in chosen))

    def cells(shape: tuple) -> list[str]:
        at = dict(zip(keys, shape, strict=True))
        dtype = "tf32" if at["matmul_precision"] == "high" else at["dtype"]
        found = [dtype, f"{at['logit_scale']:g}", str(at["batch_size"]), str(at["dim"])]
        for name in names:
            here = [row for row in chosen if row["loss"] == name]
            here = [row for row in here if all(row.get(key) == at[key] for key in keys)]
            errors = here[0]["errors"] if here else None
            worst = errors and max(errors[k]["rms"] for k in ("image_grad", "text_grad"))
            found.append(number(worst, ".1e"))
        return found

    return table(["dtype", "t", "B", "D", *map(label, names)], map(cells, shapes), left=1)


def savings(rows: list[dict]) -> str:
    """What a frozen tower and no gradients cost, at the largest size where that was timed."""
    fused = fused_name(rows)
    timed = [row for row in select(rows, kind="cost", loss=fused) if row["seconds"]]
    frozen = max(select(timed, mode="frozen"), key=lambda row: row["batch_size"], default=None)
    if frozen is None:
        return ""
    at = {key: frozen[key] for key in ("batch_size", "dim", "dtype")}
    (full,), (forward,) = (select(timed, mode=mode, **at) for mode in ("full", "no_grad"))
    return (
        f"At B = {at['batch_size']}, D = {at['dim']} a frozen image tower takes "
        f"{frozen['seconds'] / full['seconds']:.2f} of the full time, and `no_grad` "
        f"{forward['ratio_to_floor']:.2f} of one product."
    )


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
            f"![Time over that of the plain products]({plot})",
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
    parts = [title, f"`make demo`. {found.source('../')}"]
    if trained:
        parts += [
            "Loss at the first and the last step; zero-shot accuracy by language of the prompts:",
            table(["", "first", "last", *languages], lines),
        ]
    if cost:
        parts += [f"Time and memory, D = {cost[0]['dim']}, {cost[0]['dtype']}:", cost_table(cost)]
    return "\n\n".join(parts)


def gpu_sections(found: list[Results], plot: Callable[[Results], str]) -> str:
    if not found:
        return (
            "## On a GPU\n\nNo GPU result exists yet: nothing below says how fast any of this is "
            "on one. `python -m benchmarks.device` measures it."
        )
    return "\n\n".join(_gpu_section(results, plot(results)) for results in found)


def _gpu_section(found: Results, plot: str) -> str:
    rows = found.rows
    lines = [(t.what, t.measured, t.target, t.verdict) for t in targets(rows)]
    parts = [
        f"## On one {found.environment['device']}",
        f"{found.source('../')} Its targets:",
        table(["", "measured", "target", "met"], lines),
    ]
    for row in select(rows, kind="part", status="failed"):
        parts.append(f"The part `{row['part']}` failed.")
    cost = select(rows, kind="cost")
    if cost:
        shape = main_shape(cost)
        parts += [
            f"![Time over that of the plain products]({plot})",
            f"Loss and gradients, {shape['dtype']}, D = {shape['dim']}:",
            cost_table(cost, (1024, 4096, 32768, 65536)),
            savings(rows),
        ]
    for kind, title, make in GPU_TABLES:
        chosen = select(rows, kind=kind)
        if chosen:
            parts += [title, make(chosen)]
    return "\n\n".join(filter(None, parts))


def _breakdown(rows: list[dict]) -> str:
    lines = (
        [
            r["piece"],
            number(r["step_seconds"], ".2f", 1e3),
            f"{r['share']:.1%}",
            number(r["tflops"], ".0f"),
        ]
        for r in rows
    )
    return table(["", "ms a step", "share", "TFLOP/s"], lines)


def _panels(rows: list[dict]) -> str:
    lines = (
        [
            "default" if r["workspace_bytes"] is None else f"{r['workspace_bytes'] / MIB:g}",
            f"{r['rows']} x {r['cols']}",
            number(r["seconds"], ".2f", 1e3),
            number(r["ratio_to_floor"], ".3f"),
        ]
        for r in rows
    )
    return table(["workspace, MiB", "panel", "ms", "r"], lines)


def _latency(rows: list[dict]) -> str:
    sizes = sorted({row["batch_size"] for row in rows})
    kinds = list(dict.fromkeys((row["loss"], row["graph"]) for row in rows))

    def cells(kind: tuple[str, bool]) -> list[str]:
        name, graph = kind
        here = {r["batch_size"]: r["seconds"] for r in select(rows, loss=name, graph=graph)}
        title = label(name) + (", CUDA graph" if graph else "")
        return [title, *(number(here.get(size), ".1f", 1e6) for size in sizes)]

    return table(["microseconds", *(f"B = {size}" for size in sizes)], map(cells, kinds))


def _counters(rows: list[dict]) -> str:
    return table(["counter", "unit", "value"], ([r["name"], r["unit"], r["value"]] for r in rows))


GPU_TABLES = (
    ("breakdown", "Where the time goes:", _breakdown),
    ("ablation", "Beside other panels in the same sweep:", cost_table),
    ("panels", "Time against the workspace:", _panels),
    ("latency", "Small batches:", _latency),
    (
        "accuracy",
        "Gradients' error against float64 (root mean square, relative; the worse of both towers):",
        accuracy_table,
    ),
    ("counter", "Hardware counters of the panel kernel:", _counters),
)


def stacks_table(found: Results) -> str:
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
    return "\n\n".join(
        [
            "Peak memory, measured, float32. " + found.source("../"),
            table(header, lines, left=3),
        ]
    )


def negatives_table(found: Results) -> str:
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
    header = ["loss", "negatives", "kept", "ms", "of the time with all", "r", "MiB"]
    shape = f"B = {rows[0]['batch_size']}, D = {rows[0]['dim']}, {rows[0]['dtype']}"
    return "\n\n".join(
        [
            f"Loss and all four gradients, {shape}. " + found.source("../"),
            table(header, lines, left=2),
            "![time against the share that is kept](negatives.png)",
        ]
    )
