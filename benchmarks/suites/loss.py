"""Time, memory and accuracy of the fused loss beside the others.

``python -m benchmarks.suites.loss`` prints tables and writes their rows to a file under results/;
README.md here says how each number is measured.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

import torch
from torch import Tensor

from ..common.baselines import BASELINES, default_fused, obstacles
from ..common.markdown import aligned, number
from ..common.reference import (
    LossAndGrads,
    float64_reference,
    relative_errors,
    rounded_once,
    sampled_reference,
)
from ..common.results import MIB, environment, write_results
from ..common.timing import measure, obstacle
from ..common.workloads import Case, make_inputs

PARTS = ("time", "memory", "accuracy")
SCALES = (10.0, 100.0)  # t at the start of training, and where it ends up
BIAS = -10.0


@dataclass(frozen=True)
class Plan:
    """What a run covers: (batch size, dtype) grids for each part."""

    batch_sizes: Sequence[int]  # time and memory
    dtypes: Sequence[str]
    memory_sizes: Sequence[int]  # memory of the fused loss alone
    accuracy_sizes: Sequence[int]
    accuracy_dtypes: Sequence[str]
    dims: Sequence[int] = (768,)
    repeats: int = 5
    left_out: Sequence[str] = ()  # baselines


PLANS = {
    "cpu": Plan(
        batch_sizes=(1024, 4096, 8192),
        dtypes=("float32",),
        memory_sizes=(32768,),
        accuracy_sizes=(1024, 2048),
        accuracy_dtypes=("float32", "bfloat16"),
    ),
    "cuda": Plan(
        batch_sizes=(1024, 4096, 16384, 32768, 65536),
        dtypes=("bfloat16", "float32"),
        memory_sizes=(),
        accuracy_sizes=(1024, 4096, 16384),
        accuracy_dtypes=("float32", "bfloat16", "float16"),
        dims=(768, 1152),
        repeats=20,
    ),
}
QUICK = {
    "batch_sizes": (256,),
    "memory_sizes": (512,),
    "accuracy_sizes": (128,),
    "dims": (64,),
    "repeats": 2,
    "left_out": ("compiled",),  # it takes longer to compile than all the rest to run
}


def accuracy(cases: Iterable[Case], t: float, b: float, sample: Tensor | None = None) -> list[dict]:
    """Errors of loss and gradients against float64, a row a case, and one for a single rounding.

    With ``sample`` only these rows of the feature gradients are compared, for a large batch.
    """
    rows = []
    for case in cases:
        inputs = make_inputs(case.batch_size, case.dim, case.dtype, case.device, t, b)
        if not rows:
            if sample is None:
                exact = float64_reference(*inputs)
            else:
                exact = sampled_reference(*inputs, sample)
            once = rounded_once(exact, inputs.x.dtype)
            rows.append(_accuracy_row(replace(case, loss="one_rounding"), t, b, once, exact))
        actual = LossAndGrads(*case.step(inputs)())
        if sample is not None:
            actual = actual._replace(
                image_grad=actual.image_grad[sample], text_grad=actual.text_grad[sample]
            )
        rows.append(_accuracy_row(case, t, b, actual, exact))
    return rows


def _accuracy_row(
    case: Case, t: float, b: float, actual: LossAndGrads, exact: LossAndGrads
) -> dict:
    return {
        "kind": "accuracy",
        "loss": case.loss,
        "batch_size": case.batch_size,
        "dim": case.dim,
        "dtype": case.dtype,
        "device": case.device,
        "matmul_precision": torch.get_float32_matmul_precision(),
        "compared_rows": len(exact.image_grad),
        "logit_scale": t,
        "logit_bias": b,
        "errors": relative_errors(actual, exact),
    }


def heading(row: dict) -> str:
    text = f"B = {row['batch_size']}, D = {row['dim']}, {row['dtype']}"
    if row["kind"] == "accuracy":
        text += f", t = {row['logit_scale']:g}, b = {row['logit_bias']:g}: error against float64"
    return text


def cost_table(rows: list[dict], fused: str) -> str:
    """Time and memory; ``fused`` names the loss that the others are compared with."""
    base = next((r["seconds"] for r in rows if (r["loss"], r["mode"]) == (fused, "full")), None)
    lines = [
        [
            r["loss"],
            r["mode"],
            *(number(r[name], ".2f", 1e3) for name in ("seconds", "seconds_p10", "seconds_p90")),
            number(r["floor_seconds"], ".2f", 1e3),
            number(r["ratio_to_floor"]),
            number(r["seconds"] / base if r["seconds"] and base else None),
            number(r["peak_extra_bytes"], ".1f", 1 / MIB),
        ]
        for r in rows
    ]
    header = ("loss", "mode", "ms", "p10", "p90", "floor ms", "x floor", "/ fused", "extra MiB")
    left_out = [f"{r['loss']} {r['mode']} skipped: {r['skipped']}" for r in rows if r["skipped"]]
    return "\n".join([aligned(header, lines), *left_out])


def accuracy_table(rows: list[dict]) -> str:
    feature_grads = product(("image_grad", "text_grad"), ("max", "rms"))
    columns = [("loss", "max"), *feature_grads, ("scale_grad", "max"), ("bias_grad", "max")]
    lines = ([r["loss"], *(f"{r['errors'][n][k]:.1e}" for n, k in columns)] for r in rows)
    return aligned(["", "loss", "dX max", "dX rms", "dY max", "dY rms", "dt", "db"], lines)


def run(plan: Plan, device: str, parts: Sequence[str]) -> list[dict]:
    """Measure everything in the plan, printing each table when its rows are there."""
    reasons = {name: reason for name, reason in obstacles(device).items() if reason}
    reasons |= dict.fromkeys(plan.left_out, "not in a quick run")
    names = [name for name in BASELINES if name not in reasons]
    backends = [name for name in names if name.startswith("fused_")]
    fused = default_fused(device)
    for name, reason in reasons.items():
        print(f"left out: {name} ({reason})")
    rows: list[dict] = []

    def show(table: str, new: list[dict]) -> None:
        print(f"\n{heading(new[0])}\n{table}", flush=True)
        rows.extend(new)

    time, memory = "time" in parts, "memory" in parts
    if time or memory:
        for dim, dtype, size in product(plan.dims, plan.dtypes, plan.batch_sizes):
            cases = [Case(name, size, dim, dtype, device) for name in names]
            cases += [
                Case(name, size, dim, dtype, device, mode)
                for name in backends
                for mode in ("frozen", "no_grad")
            ]
            new = measure(cases, plan.repeats if time else 0, memory=memory)
            show(cost_table(new, fused), new)
    if memory:
        for dim, dtype, size in product(plan.dims, plan.dtypes, plan.memory_sizes):
            cases = [Case(name, size, dim, dtype, device) for name in backends]
            new = measure(cases, 0)
            show(cost_table(new, fused), new)
    if "accuracy" in parts:
        for dim, dtype, size, t in product(
            plan.dims, plan.accuracy_dtypes, plan.accuracy_sizes, SCALES
        ):
            cases = [Case(name, size, dim, dtype, device) for name in names]
            new = accuracy([case for case in cases if obstacle(case) is None], t, BIAS)
            show(accuracy_table(new), new)
    return rows


def parse(arguments: Sequence[str] | None) -> tuple[argparse.Namespace, Plan]:
    parser = argparse.ArgumentParser(prog="benchmarks.suites.loss", description=__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batch-sizes", type=int, nargs="+", help="for every part")
    parser.add_argument("--dims", type=int, nargs="+")
    parser.add_argument("--dtypes", nargs="+", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--repeats", type=int, help="calls of each function")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, help="parts to run")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: does it run at all?")
    parser.add_argument("--output", type=Path, help="results file; by default under results/")
    args = parser.parse_args(arguments)

    plan = PLANS[torch.device(args.device).type]
    if args.quick:
        plan = replace(plan, **QUICK)
    if args.batch_sizes:
        plan = replace(
            plan, batch_sizes=args.batch_sizes, memory_sizes=(), accuracy_sizes=args.batch_sizes
        )
    if args.dtypes:
        plan = replace(plan, dtypes=args.dtypes, accuracy_dtypes=args.dtypes)
    if args.dims:
        plan = replace(plan, dims=args.dims)
    if args.repeats:
        plan = replace(plan, repeats=args.repeats)
    return args, plan


def main(arguments: Sequence[str] | None = None) -> None:
    args, plan = parse(arguments)
    where = environment(args.device)
    print(", ".join(f"{key} {value}" for key, value in where.items() if key != "commit"))
    rows = run(plan, args.device, args.only)
    path = write_results("loss", where, rows, args.output)
    print(f"\n{len(rows)} rows written to {path}")


if __name__ == "__main__":
    main()
