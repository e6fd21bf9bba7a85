"""The sections of docs/performance.md on GPUs: what `device` and `tune` measured on each."""

from __future__ import annotations

from collections.abc import Callable

from ..common.markdown import bullet, number, table
from ..common.results import MIB, Results, fused_name, select
from ..gpu.acceptance import targets
from .tables import accuracy_table, cost_table, label, ordered, savings, shapes_table

# What a results file cannot say of itself, by its name. A newer file has none of it.
NOTES = {
    "2026-11-26-nvidia-h100-80gb-hbm3-device.json": (
        "The tree was the commit's but for the line `HOPPER` of kernels/hopper.py: that was the "
        "configuration which `python -m benchmarks.gpu.tune` had just chosen, and is the one "
        "since.",
        "The test that failed is `test_nan_and_inf_propagate_as_in_torch[nan]` of "
        "tests/triton_backend/test_hopper.py: a NaN in the features spread to the gradients "
        "of the row eight below it. The kernel has been mended since; no device has run it again.",
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


def gpu_sections(
    found: list[Results], plot: Callable[[Results], str], tuned: list[Results] = ()
) -> str:
    if not found:
        return (
            "## On a GPU\n\nNo GPU result exists yet: nothing below says how fast any of this is "
            "on one. `python -m benchmarks.gpu.device` measures it."
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
        "those of benchmarks/gpu/candidates.py at that commit; [performance-log.md]"
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
