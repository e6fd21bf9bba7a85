"""Time, memory and accuracy of the fused loss beside the others.

``python -m benchmarks.suites.loss`` prints tables and writes their rows to a file under results/;
README.md here says how each number is measured.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path

import torch
from torch import Tensor
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, profile, record_function

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
from ..common.timing import beside_floor, floors, measure, obstacle
from ..common.workloads import Case, make_inputs

PARTS = ("time", "memory", "breakdown", "accuracy")
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
    late_sizes: Sequence[int] = ()  # time at the t of late training
    repeats: int = 8  # calls of each function, at least
    rows: int = 1 << 16  # in all calls of a function, at least: a small batch has more of them
    left_out: Sequence[str] = ()  # baselines


PLANS = {
    "cpu": Plan(
        batch_sizes=(512, 1024, 2048, 4096, 8192),
        dtypes=("float32",),
        late_sizes=(1024, 4096),
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
    "late_sizes": (256,),
    "memory_sizes": (512,),
    "accuracy_sizes": (128,),
    "dims": (64,),
    "repeats": 2,
    "rows": 0,
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


def breakdown(case: Case, calls: int) -> dict:
    """A step on a CPU in shares of the floor: its products, torch's other operators, and the rest.

    torch's profiler says how long operators take, the floor's in the same rounds. It slows Python
    down, so that the host's share is what is left of the ratio that was timed without it.
    """
    inputs = case.inputs()
    step = case.step(inputs)
    whole = beside_floor({"step": step}, inputs, calls)["step"]["ratio_to_floor"]
    (m, d), n = inputs.x.shape, len(inputs.y)
    floor = floors(m, n, d, inputs.x.dtype, case.device)[3]
    floor()  # its outputs' pages
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        for _ in range(calls):
            with record_function("floor"):
                floor()
            with record_function("step"):
                step()
    seconds = dict.fromkeys(("floor", "products", "passes"), 0.0)
    for event in profiler.events():
        if event.name.startswith("aten::"):
            product = event.name in ("aten::mm", "aten::addmm")
            what = "products" if product else "passes"
            seconds[what if _outermost(event) == "step" else "floor"] += event.self_cpu_time_total
    products, passes = (seconds[what] / seconds["floor"] for what in ("products", "passes"))
    return {
        "kind": "breakdown",
        **asdict(case),
        "calls": calls,
        "ratio_to_floor": whole,
        "products": products,
        "passes": passes,
        "host": whole - products - passes,
    }


def _outermost(event: FunctionEvent) -> str:
    while event.cpu_parent is not None:
        event = event.cpu_parent
    return event.name


def heading(row: dict) -> str:
    text = f"B = {row['batch_size']}, D = {row['dim']}, {row['dtype']}, t = {row['logit_scale']:g}"
    if row["kind"] == "accuracy":
        text += f", b = {row['logit_bias']:g}: error against float64"
    if row["kind"] == "breakdown":
        text += ": shares of the floor"
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


def breakdown_table(row: dict) -> str:
    fields = ("ratio_to_floor", "products", "passes", "host")
    return aligned(["step", *fields[1:]], [[number(row[field]) for field in fields]])


def accuracy_table(rows: list[dict]) -> str:
    feature_grads = product(("image_grad", "text_grad"), ("max", "rms"))
    columns = [("loss", "max"), *feature_grads, ("scale_grad", "max"), ("bias_grad", "max")]
    lines = ([r["loss"], *(f"{r['errors'][n][k]:.1e}" for n, k in columns)] for r in rows)
    return aligned(["", "loss", "dX max", "dX rms", "dY max", "dY rms", "dt", "db"], lines)


class _Run:
    """The parts of a run: each measures, and prints its tables as they come."""

    def __init__(self, plan: Plan, device: str):
        reasons = {name: reason for name, reason in obstacles(device).items() if reason}
        reasons |= dict.fromkeys(plan.left_out, "not in a quick run")
        for name, reason in reasons.items():
            print(f"left out: {name} ({reason})")
        self.plan, self.device, self.fused = plan, device, default_fused(device)
        self.names = [name for name in BASELINES if name not in reasons]
        self.backends = [name for name in self.names if name.startswith("fused_")]
        self.rows: list[dict] = []

    def _show(self, table: str, new: list[dict]) -> None:
        print(f"\n{heading(new[0])}\n{table}", flush=True)
        self.rows.extend(new)

    def _shapes(self, sizes: Sequence[int]) -> Iterator[tuple[int, int, str, str]]:
        """What a Case starts with, after its loss."""
        for dim, dtype, size in product(self.plan.dims, self.plan.dtypes, sizes):
            yield size, dim, dtype, self.device

    def _calls(self, size: int) -> int:
        return max(self.plan.repeats, self.plan.rows // size)

    def costs(self, timed: bool, memory: bool) -> None:
        for shape in self._shapes(self.plan.batch_sizes):
            cases = [Case(name, *shape) for name in self.names]
            modes = product(self.backends, ("frozen", "no_grad"))
            cases += [Case(name, *shape, mode) for name, mode in modes]
            new = measure(cases, self._calls(shape[0]) if timed else 0, memory=memory)
            self._show(cost_table(new, self.fused), new)
        for shape in self._shapes(self.plan.late_sizes if timed else ()):
            cases = [Case(name, *shape, logit_scale=SCALES[1]) for name in self.names]
            new = measure(cases, self._calls(shape[0]), memory=False)
            self._show(cost_table(new, self.fused), new)
        for shape in self._shapes(self.plan.memory_sizes if memory else ()):
            new = measure([Case(name, *shape) for name in self.backends], 0)
            self._show(cost_table(new, self.fused), new)

    def breakdowns(self) -> None:
        if torch.device(self.device).type != "cpu":
            return  # the device run has its own
        for shape in self._shapes(self.plan.batch_sizes):
            new = breakdown(Case(self.fused, *shape), self._calls(shape[0]))
            self._show(breakdown_table(new), [new])

    def accuracies(self) -> None:
        plan = self.plan
        for dim, dtype, size, t in product(
            plan.dims, plan.accuracy_dtypes, plan.accuracy_sizes, SCALES
        ):
            cases = [Case(name, size, dim, dtype, self.device) for name in self.names]
            new = accuracy([case for case in cases if obstacle(case) is None], t, BIAS)
            self._show(accuracy_table(new), new)


def run(plan: Plan, device: str, parts: Sequence[str]) -> list[dict]:
    """Measure everything in the plan, printing each table when its rows are there."""
    this = _Run(plan, device)
    if "time" in parts or "memory" in parts:
        this.costs("time" in parts, "memory" in parts)
    if "breakdown" in parts:
        this.breakdowns()
    if "accuracy" in parts:
        this.accuracies()
    return this.rows


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
        sizes = args.batch_sizes
        plan = replace(
            plan, batch_sizes=sizes, late_sizes=sizes, memory_sizes=(), accuracy_sizes=sizes
        )
    if args.dtypes:
        plan = replace(plan, dtypes=args.dtypes, accuracy_dtypes=args.dtypes)
    if args.dims:
        plan = replace(plan, dims=args.dims)
    if args.repeats:
        plan = replace(plan, repeats=args.repeats, rows=0)
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
