"""Where the time of a step goes: its pieces one by one, and what the profilers count."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import torch

from ...common.panels import gradient_products, panel_call, plan_of
from ...common.timing import interleaved, median, summary
from ...common.workloads import Case, Inputs
from ..tools import in_time, ncu_command, ncu_rows
from .run import Run, Skipped

SECTIONS = ("SpeedOfLight", "MemoryWorkloadAnalysis", "Occupancy", "WarpStateStats")
ONE_STEP = """
import sys
from benchmarks.common.workloads import Case
case = Case(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), "bfloat16", "cuda")
case.step(case.inputs())()
"""


def breakdown(run: Run) -> Iterator[dict]:
    """One panel's kernel and products alone, times the number of panels, beside the whole step."""
    size, dim = run.sizes.panels
    case = Case(run.fused, size, dim, "bfloat16", run.device)
    inputs = case.inputs()
    plan = plan_of(inputs, run.backend)
    one = Inputs(
        inputs.x[: plan.rows].to(plan.operand_dtype),
        inputs.y[: plan.cols].to(plan.operand_dtype),
        inputs.t,
        inputs.b,
    )
    kernel = panel_call(one, run.backend)
    pieces = {
        "panel kernel": kernel,
        **gradient_products(kernel()[0], one),
        "whole step": case.step(inputs),
    }
    seconds = interleaved(pieces, run.sizes.repeats, device=run.device)

    pairs, panel_pairs = size * size, plan.rows * plan.cols
    step_seconds = median(seconds.pop("whole step"))
    rest = step_seconds
    shape = {
        "kind": "breakdown",
        "device": run.device,
        "batch_size": size,
        "dim": dim,
        "dtype": case.dtype,
        "rows": plan.rows,
        "cols": plan.cols,
    }
    for piece, times in seconds.items():
        # the last panels may be smaller than the first, by so much is their time
        total = median(times) * pairs / panel_pairs
        rest -= total
        yield {
            **shape,
            "piece": piece,
            **summary(times),  # of one call
            "step_seconds": total,
            "share": total / step_seconds,
            "tflops": 2e-12 * panel_pairs * dim / median(times),
        }
    for piece, total, flops in (
        ("everything else", rest, None),
        ("whole step", step_seconds, case.products * 2 * pairs * dim),
    ):
        tflops = None if flops is None else 1e-12 * flops / total
        share = total / step_seconds
        yield {**shape, "piece": piece, "step_seconds": total, "share": share, "tflops": tflops}


def counters(run: Run) -> Iterator[dict]:
    """Time by kernel, and hardware counters of the panel kernel where they can be read."""
    if not run.on_gpu:
        raise Skipped("needs a GPU")
    size, dim = run.sizes.panels
    case = Case(run.fused, size, dim, "bfloat16", run.device)
    step = case.step(case.inputs())
    step()
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        step()
        torch.cuda.synchronize()
    events = sorted(profile.key_averages(), key=lambda event: -event.self_device_time_total)
    for event in events[:12]:
        yield {
            "kind": "kernel",
            "device": run.device,
            "batch_size": size,
            "dim": dim,
            "name": event.key[:120],
            "calls": event.count,
            "seconds": event.self_device_time_total * 1e-6,
        }
    yield from _hardware_counters(run, min(size, 8192), dim)


def _hardware_counters(run: Run, size: int, dim: int) -> Iterator[dict]:
    command = ncu_command(SECTIONS)
    command += [sys.executable, "-c", ONE_STEP, run.fused, str(size), str(dim)]
    done = in_time(command, run)
    rows = counter_table(done.stdout)
    if not rows:
        said = " ".join((done.stdout + done.stderr).split())
        raise Skipped(f"no hardware counters: {said[-300:]}")
    for row in rows:
        yield {
            "kind": "counter",
            "device": run.device,
            "batch_size": size,
            "dim": dim,
            "section": row["Section Name"],
            "name": row["Metric Name"],
            "unit": row["Metric Unit"],
            "value": row["Metric Value"],
        }


def counter_table(output: str) -> list[dict[str, str]]:
    """What ncu measured, without its advice; nothing where it failed."""
    return [row for row in ncu_rows(output) if row.get("Metric Name")]
