"""The sections of docs/performance.md and of README's block, as functions of results files."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from .markdown import Results, bullet, number, table
from .plots import main_shape
from .targets import MIB, fused_name, select, targets

NAMES = {
    "fused_torch": "**fused_siglip**, torch backend",
    "fused_triton": "**fused_siglip**, Triton backend",
    "siglip_kernel": "siglip-kernel",
    "compiled": "torch.compile of eager",
    "eager": "eager",
    "open_clip": "open_clip's SigLipLoss",
    "row_chunked": "rows in chunks of 512, under autograd",
    "one_rounding": "the exact gradient, rounded once",
    "library_fp32": "library product, elementwise kernel",
    "library_in_place": "the same in place, rounded similarities",
    "portable": "fused_siglip, its portable kernel",
}


def label(name: str) -> str:
    return NAMES.get(name, name)


def ordered(names: Iterable[str]) -> list[str]:
    """Contestants: ours first, then the fastest peers."""
    known = list(NAMES)
    return sorted(set(names), key=lambda n: known.index(n) if n in known else len(known))


COLUMNS = {  # title: (field of a row, format, factor)
    "x floor": ("ratio_to_floor", ".2f", 1.0),
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
    names = ordered(row["loss"] for row in cost)
    return table(["", *header], ([label(n), *(cell(n, *at) for at in shown)] for n in names))


def _operands(row: dict) -> str:
    return "tf32" if row["matmul_precision"] == "high" else row["dtype"]


def shapes_table(rows: list[dict], shown: Iterable[tuple[str, str]]) -> str:
    """A line for each operands, shape and t that was timed; the ``shown`` (loss, column) of it."""
    full = select(rows, mode="full")
    keys = ("dtype", "matmul_precision", "dim", "logit_scale", "batch_size")
    main = [row[key] for row in full[:1] for key in keys[:2]]
    shapes = sorted(
        {tuple(row[key] for key in keys) for row in full},
        key=lambda shape: (list(shape[:2]) != main, *shape),
    )
    shown = list(shown)

    def cells(shape: tuple) -> list[str]:
        here = select(full, **dict(zip(keys, shape, strict=True)))
        found = [_operands(here[0]), *(format(n, "g") for n in shape[2:4]), str(shape[4])]
        for loss, column in shown:
            field, spec, factor = COLUMNS[column]
            (row,) = select(here, loss=loss) or [{}]
            found.append(number(row.get(field), spec, factor))
        return found

    header = [column if loss == "" else f"{label(loss)}, {column}" for loss, column in shown]
    return table(["operands", "D", "t", "B", *header], map(cells, shapes))


def accuracy_table(rows: list[dict], **fields: object) -> str:
    """Root mean square errors of the feature gradients, relative to those gradients'."""
    chosen = select(rows, kind="accuracy", **fields)
    names = ordered(row["loss"] for row in chosen)
    keys = ("dtype", "matmul_precision", "logit_scale", "batch_size", "dim")
    shapes = list(dict.fromkeys(tuple(row.get(key) for key in keys) for row in chosen))

    def cells(shape: tuple) -> list[str]:
        at = dict(zip(keys, shape, strict=True))
        found = [_operands(at), f"{at['logit_scale']:g}", str(at["batch_size"]), str(at["dim"])]
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
    at = {k: frozen[k] for k in ("batch_size", "dim", "dtype", "logit_scale") if k in frozen}
    (full,), (forward,) = (select(timed, mode=mode, **at) for mode in ("full", "no_grad"))
    return (
        f"At B = {at['batch_size']}, D = {at['dim']} a step with a frozen image tower takes "
        f"{frozen['seconds'] / full['seconds']:.2f} of the full time, and one under `no_grad` "
        f"{forward['ratio_to_floor']:.2f} times the one product that it needs."
    )


def readme_table(found: Results, sizes: Iterable[int]) -> str:
    """Time over the floor and memory of every contestant, at a few sizes."""
    cost = select(found.rows, kind="cost")
    shape = main_shape(cost)
    parts = [
        f"Loss and all four gradients, {shape['dtype']}, D = {shape['dim']}. {found.source()}",
        cost_table(cost, sizes, ("x floor", "MiB")),
        savings(found.rows),
    ]
    return "\n\n".join(filter(None, parts))


def tested(found: Results) -> str:
    """What the device run says of correctness, in one sentence."""
    repeated = select(found.rows, kind="determinism")
    said = []
    for row in select(found.rows, kind="tests")[-1:]:
        since = SINCE.get(found.path.name, "")
        said.append(f"{row['passed']} tests passed and {row['failed']} failed{since}")
    if repeated and not any(row["different"] for row in repeated):
        said.append(f"{repeated[0]['runs']} repeated runs gave the same bits")
    return f"On this device {'; '.join(said)}." if said else ""


def cpu_sentence(found: Results) -> str:
    """The largest size on a CPU, fused beside eager."""
    cost = select(found.rows, kind="cost", mode="full")
    cost = [row for row in select(cost, **main_shape(cost)) if row["seconds"]]
    size = max(row["batch_size"] for row in cost)
    (fused,), (eager,) = (
        select(cost, loss=name, batch_size=size) for name in (fused_name(cost), "eager")
    )
    ratios, sizes = (
        [number(row[field], spec, factor) for row in (fused, eager)]
        for field, spec, factor in (COLUMNS["x floor"], COLUMNS["MiB"])
    )
    return (
        f"On a CPU ({found.environment['threads']} threads, {fused['dtype']}, B = {size}, "
        f"D = {fused['dim']}) it takes {ratios[0]} times the floor and {sizes[0]} MiB, eager "
        f"{ratios[1]} times and {sizes[1]} MiB. {found.source()}"
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


def gpu_sections(
    found: list[Results], plot: Callable[[Results], str], tuned: list[Results] = ()
) -> str:
    if not found:
        return (
            "## On a GPU\n\nNo GPU result exists yet: nothing below says how fast any of this is "
            "on one. `python -m benchmarks.device` measures it."
        )
    kernels = {results.environment["device"]: results for results in tuned}
    return "\n\n".join(
        _gpu_section(results, plot(results), kernels.get(results.environment["device"]))
        for results in found
    )


def _gpu_section(found: Results, plot: str, tuned: Results | None) -> str:
    rows = found.rows
    lines = [(t.what, t.measured, t.target, t.verdict) for t in targets(rows)]
    parts = [
        f"## On one {found.environment['device']}",
        f"{found.source('../')} What the run had to show, and what it showed (- was not measured):",
        table(["", "measured", "target", "met"], lines),
        notes(found),
    ]
    for row in select(rows, kind="part", status="failed"):
        parts.append(f"The part `{row['part']}` failed.")
    cost = select(rows, kind="cost")
    if cost:
        names = ordered(row["loss"] for row in select(cost, mode="full"))
        fused = fused_name(cost)
        times = [(fused, "ms"), *((name, "x floor") for name in names)]
        parts += [
            f"![x GEMM floor against the batch size]({plot})",
            "### Time\n\nLoss and all four gradients. Every call is queued behind other work, so "
            "that these are times of the device: what a launch costs the host is not in them.",
            shapes_table(cost, times),
            savings(rows),
            "### Memory\n\nMiB beyond the inputs and the gradients that are returned. With half "
            "operands the fused loss's figure holds float32 accumulators of both gradients, less "
            "the half gradients that they turn into.",
            shapes_table(
                [row for row in cost if row["logit_scale"] == cost[0]["logit_scale"]],
                [(name, "MiB") for name in names],
            ),
        ]
    for kind, title, make in GPU_TABLES:
        chosen = select(rows, kind=kind)
        if chosen:
            parts += [title, make(chosen)]
    if tuned is not None:
        parts.append(kernels_section(tuned, cost))
    return "\n\n".join(filter(None, parts))


# What a results file cannot say of itself, by its name. A newer file has none of it.
NOTES = {
    "2026-11-26-nvidia-h100-80gb-hbm3-device.json": (
        "The tree was the commit's but for the line `HOPPER` of kernels/hopper.py: that was the "
        "configuration which `python -m benchmarks.tune` had just chosen, and is the one since.",
        "The test that failed is `test_nan_and_inf_propagate_as_in_torch[nan]` of "
        "tests/test_hopper.py: a NaN in the features spread to the gradients of the row eight "
        "below it. The kernel has been mended since; no device has run it again.",
        'The gradient error over eager\'s is that of float32 with `matmul_precision` "high" at '
        "t = 100. Tensor cores cut float32 operands off to tf32 where the library rounds them; the "
        "kernel's operands are rounded first since, which no device has run yet. "
        "In every other dtype the error is at most 1.02 times eager's.",
        "Two accuracy targets cannot be met: at B = 32768, t = 100 siglip-kernel's image gradients "
        "err by 1.96 roundings to bf16 and eager's by 2.74. 0.45 of the one and a third of the "
        "other are less than the one rounding that every bf16 gradient takes.",
        "torch.compile was timed in a round of its own, beside a floor of its own.",
        "This run ended before B = 1,048,576, latency as called and from a CUDA graph, the "
        "breakdown of a step, panel sizes, other panels, compute-sanitizer and the hardware "
        "counters.",
    ),
}


SINCE = {
    "2026-11-26-nvidia-h100-80gb-hbm3-device.json": (
        " (a NaN reached a row too many: mended since, not run on a device again)"
    ),
}


def notes(found: Results) -> str:
    return "\n".join(bullet(note) for note in NOTES.get(found.path.name, ()))


def kernels_section(found: Results, cost: list[dict]) -> str:
    """The panel kernel alone, as the newest run of tune.py timed its configurations."""
    timed = select(found.rows, kind="panel", commit=found.environment["commit"])
    timed = timed or select(found.rows, kind="panel")
    if not timed:
        return ""
    scales = sorted({row["logit_scale"] for row in timed})
    dim = timed[0]["dim"]
    names = dict.fromkeys(row["candidate"] for row in timed)

    def at(name: str, t: float, field: str) -> float | None:
        found = select(timed, candidate=name, logit_scale=t, dim=dim)
        return found[0].get(field) if found else None

    lines = (
        [
            f"`{name}`",
            *(number(at(name, t, "seconds"), ".0f", 1e6) for t in scales),
            *(number(at(name, t, "over_plain"), ".2f") for t in scales),
        ]
        for name in names
    )
    size = timed[0]["size"]
    header = [*(f"us, t = {t:g}" for t in scales), *(f"x product, t = {t:g}" for t in scales)]
    parts = [
        "### The panel kernel alone",
        f"A panel of {size} x {size} pairs, D = {dim}, bf16, from a CUDA graph, beside the plain "
        f"product by the library with half output. {found.source('../')} The configurations are "
        "those of benchmarks/candidates.py at that commit; [performance-log.md]"
        "(performance-log.md) has what was tried before.",
        table(["configuration", *header], lines),
        _bound(timed, cost),
    ]
    return "\n\n".join(filter(None, parts))


def _bound(timed: list[dict], cost: list[dict]) -> str:
    """How much of a step's excess over the floor is the panel kernel's."""
    best = min(timed, key=lambda row: row["seconds"])
    at = {"dim": best["dim"], "dtype": "bfloat16", "mode": "full", "loss": "fused_triton"}
    steps = select(cost, logit_scale=best["logit_scale"], **at)
    if not steps:
        return ""
    step = max(steps, key=lambda row: row["batch_size"])
    panels = (step["batch_size"] / best["size"]) ** 2
    excess = panels * (best["seconds"] - best["plain_seconds"])
    whole = step["seconds"] - step["floor_seconds"]
    return (
        f"What bounds a step: at B = {step['batch_size']}, D = {step['dim']}, "
        f"t = {step['logit_scale']:g} it takes {1e3 * whole:.1f} ms more than the floor. The panel "
        f"kernel's excess over the plain product, for that many pairs, is {1e3 * excess:.1f} ms of "
        "them. The rest is what the two products of the gradients cost more with float32 "
        "accumulators, panel by panel, and the pass that multiplies by the upstream gradient; no "
        "run has told these apart yet. What bounds the panel kernel itself is not known either: "
        "no hardware counters have been read."
    )


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
    return table(["workspace, MiB", "panel", "ms", "x floor"], lines)


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
        "### Accuracy\n\nGradients' error against float64 (root mean square, relative; the worse "
        "of both towers). At the two largest B it is that of 64 sampled rows.",
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
    header = ["loss", "negatives", "kept", "ms", "of the time with all", "x floor", "MiB"]
    shape = f"B = {rows[0]['batch_size']}, D = {rows[0]['dim']}, {rows[0]['dtype']}"
    return "\n\n".join(
        [
            f"Loss and all four gradients, {shape}. " + found.source("../"),
            table(header, lines, left=2),
            "![time against the share that is kept](negatives.png)",
        ]
    )
