"""README's block: a table for each GPU, and what a CPU takes."""

from __future__ import annotations

from collections.abc import Iterable

from ..common.markdown import number
from ..common.results import Results, fused_name, main_shape, select
from .gpu_report import SINCE
from .tables import COLUMNS, cost_table, savings

SIZES = {"cpu": (1024, 4096, 8192), "gpu": (4096, 32768, 65536)}


def readme_table(found: Results, sizes: Iterable[int]) -> str:
    """Time over the floor and memory of every baseline, at a few sizes."""
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


def readme_block(gpu: list[Results], cpu: Results | None) -> list[str]:
    """A table for each GPU and a sentence on the CPU, or else the CPU's table."""
    shown = [found for found in gpu if select(found.rows, kind="cost")]
    parts = []
    for found in shown:
        parts += [readme_table(found, SIZES["gpu"]), tested(found)]
    if cpu is not None:
        parts.append(cpu_sentence(cpu) if shown else readme_table(cpu, SIZES["cpu"]))
    return parts
