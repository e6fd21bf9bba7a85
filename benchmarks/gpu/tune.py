"""The first minutes with a GPU: which panel kernel is right and fastest, and what bounds the rest.

``python -m benchmarks.gpu.tune`` compiles every configuration of candidates.py in a process of its
own, compares it with float64, times those that are right beside the plain products, and then times
whole steps. The rows are written after each of them, so that a run that is cut short loses nothing.
A kernel that hangs is ended with its process, and the rest goes on without it.
"""

from __future__ import annotations

import argparse
import csv
import functools
import io
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import product
from pathlib import Path

import torch
from torch import Tensor

from fused_siglip import siglip_loss
from fused_siglip.kernels import BACKENDS, Pairs, panel_class
from fused_siglip.planner import plan_panels

from ..common.baselines import default_fused
from ..common.results import RESULTS, ROOT, environment, results_path, write_results
from ..common.timing import floors, interleaved, median, summary
from ..common.workloads import Case, Inputs, make_inputs, step
from .parts.checks import cuda_tool
from .parts.timings import _captured
from .row_process import Child

MIB = 1 << 20
PANEL_SIDE = 11264  # a panel's side by default, B = 65536
SCALES = (10.0, 100.0)
BIAS = -10.0
SHIPPED = "triton"
PARTS = ("products", "steps", "small", "counters")
SECTIONS = ("SpeedOfLight", "WarpStateStats", "ComputeWorkloadAnalysis")


def names(device: str) -> list[str]:
    """The candidates that this device can run."""
    if torch.device(device).type != "cuda" or torch.cuda.get_device_capability(device) != (9, 0):
        return []
    from .candidates import CANDIDATES, PORTABLE

    return [*CANDIDATES, PORTABLE]


def register(name: str) -> None:
    """Make a candidate a backend, for the rest of this process."""
    from .candidates import panel_of

    BACKENDS[name] = functools.partial(panel_of, name)


def check(name: str, dims: Sequence[int], device: str) -> Iterator[dict]:
    """Compile a candidate and compare g and the sums of ragged panels with float64.

    Then, once told to on the standard input, time it alone beside the plain product.
    """
    start = time.perf_counter()
    register(name)
    for dim, (t, diagonal) in product(dims, ((10.0, 37), (100.0, -53), (100.0, 5000))):
        inputs = make_inputs(1111, dim, "bfloat16", device, t, BIAS)
        x, y = inputs.x[:700], inputs.y[: 1111 if t == SCALES[0] else 900]
        panel = panel_class(name)(1111, 1111, x.dtype, x.device, True, True)
        panel.g.fill_(float("nan"))
        sums = torch.full((3,), float("nan"), device=x.device)
        g = panel(x, y, inputs.t, inputs.b, Pairs(diagonal=diagonal), sums)
        torch.cuda.synchronize()
        row = {"kind": "checked", "candidate": name, "dim": dim, "logit_scale": t}
        row |= {"diagonal": diagonal, "seconds": time.perf_counter() - start}
        errors = panel_errors(x, y, t, diagonal, g, sums)
        yield row | errors | {"right": max(errors.values()) <= 1}
    yield {"kind": "ready", "candidate": name}
    if sys.stdin.readline():
        for dim, t in product(dims, SCALES):
            yield timed_panel(name, make_inputs(PANEL_SIDE, dim, "bfloat16", device, t, BIAS), t)


def timed_panel(name: str, inputs: Inputs, t: float, repeats: int = 15) -> dict:
    """A panel kernel beside the plain product with half output, from CUDA graphs: what a launch
    costs the host is not the question."""
    (size, dim), device = inputs.x.shape, str(inputs.x.device)
    plain = torch.empty(size, size, dtype=inputs.x.dtype, device=device)
    functions: dict[str, Callable] = {
        "plain": functools.partial(torch.mm, inputs.x, inputs.y.T, out=plain),
        name: _panel_call(name, inputs),
    }
    if inputs.x.is_cuda:
        functions = {key: _captured(function) for key, function in functions.items()}
    seconds = interleaved(functions, repeats, device=device)
    base = median(seconds["plain"])
    return {
        "kind": "panel", "candidate": name, "size": size, "dim": dim, "logit_scale": t,
        **summary(seconds[name]), "plain_seconds": base, "over_plain": median(seconds[name]) / base,
        "tflops": 2e-12 * size * size * dim / median(seconds[name]),
    }  # fmt: skip


def panel_errors(
    x: Tensor, y: Tensor, t: float, diagonal: int, g: Tensor, sums: Tensor
) -> dict[str, float]:
    """Errors over their bounds: the largest of g (one rounding to bf16), and of each sum."""
    s = x.double() @ y.double().T
    rows, cols = (torch.arange(n, device=x.device) for n in s.shape)
    sign = torch.where(rows[:, None] + diagonal == cols, -1.0, 1.0)
    u = sign * (t * s + BIAS)
    exact = sign * torch.sigmoid(u)
    softplus = torch.nn.functional.softplus(u, threshold=700)
    logit = abs(t) * s.abs() + abs(BIAS)  # which tensor cores may cut off at 2^-20 of itself
    bound = exact.abs() * (2.0**-8 + 2.0**-20 * logit)
    found = {"g": ((g.double() - exact).abs() / bound).max().item()}
    drift = 2.0**-20 * (exact.abs() * logit).sum()
    terms = {"loss": softplus, "gs_sum": exact * s, "g_sum": exact}
    for (name, term), total in zip(terms.items(), sums.double(), strict=True):
        found[name] = ((total - term.sum()).abs() / (2e-6 * term.abs().sum() + drift)).item()
    return {k: float("inf") if v != v else v for k, v in found.items()}


def _panel_call(name: str, inputs: Inputs) -> Callable[[], object]:
    if name != SHIPPED:
        register(name)
    x, y = inputs.x, inputs.y
    backend = name if x.is_cuda else "torch"
    if not x.is_cuda:
        x, y = x.float(), y.float()
    panel = panel_class(backend)(len(x), len(y), x.dtype, x.device, True, True)
    sums = torch.zeros(3, device=x.device)
    return lambda: panel(x, y, inputs.t, inputs.b, Pairs(diagonal=0), sums)


def products(sizes: Sequence[int], dim: int, repeats: int, device: str) -> Iterator[dict]:
    """The two products of the gradients at a panel's shape: fp32 with beta 0 and 1, and bf16."""
    for size in sizes:
        g = torch.rand(size, size, device=device).mul_(1e-3).to(torch.bfloat16)
        y = make_inputs(size, dim, "bfloat16", device).y
        half, full = torch.zeros_like(y), torch.zeros(size, dim, device=device)
        functions = {}
        for what, a in (("g y", g), ("gT x", g.T)):
            functions[what, "bf16"] = functools.partial(torch.mm, a, y, out=half)
            for beta in (0, 1) if torch.device(device).type == "cuda" else ():
                functions[what, f"fp32, beta {beta}"] = functools.partial(
                    torch.addmm, full, a, y, out_dtype=full.dtype, beta=beta, out=full
                )
        for (what, how), times in interleaved(functions, repeats, device=device).items():
            yield {
                "kind": "product", "product": what, "how": how, "size": size, "dim": dim,
                **summary(times), "tflops": 2e-12 * size * size * dim / median(times),
            }  # fmt: skip


def steps(
    chosen: Sequence[str],
    shapes: Sequence[tuple[int, int]],
    workspaces: Sequence[int | None],
    repeats: int,
    device: str,
) -> Iterator[dict]:
    """Whole steps against the three plain products, by workspace; peers at the first shape."""
    for (size, dim), t in ((shape, t) for shape in shapes for t in SCALES):
        inputs = make_inputs(size, dim, "bfloat16", device, t, BIAS)
        functions: dict[tuple, Callable] = {}
        for name in chosen:
            if name != SHIPPED and name not in BACKENDS:
                register(name)
            backend = name if inputs.x.is_cuda else "torch"
            for space in workspaces if t == SCALES[0] or name != SHIPPED else workspaces[:1]:
                loss = functools.partial(siglip_loss, backend=backend, workspace_bytes=space)
                functions[name, space] = step(loss, inputs)
                yield {"kind": "begin", "candidate": name}
                functions[name, space]()  # compiles
                _synchronize(device)
        peers = ("siglip_kernel", "eager") if (size, dim) == shapes[0] else ()
        for name in peers:
            case = Case(name, size, dim, "bfloat16", device)
            try:
                function = case.step(inputs)
                function()
            except Exception as error:
                yield {"kind": "left_out", "loss": name, "reason": str(error)[-300:]}
            else:
                functions[name, None] = function
        functions["floor", None] = floors(size, size, dim, inputs.x.dtype, device)[3]
        yield {"kind": "begin", "candidate": None}
        seconds = interleaved(functions, repeats, device=device)
        floor = median(seconds.pop(("floor", None)))
        for (name, space), times in seconds.items():
            yield {
                "kind": "step", "candidate": name, "batch_size": size, "dim": dim,
                "logit_scale": t, "workspace_bytes": space, **summary(times),
                "floor_seconds": floor, "ratio_to_floor": median(times) / floor,
                "panel": _panel_sides(name, inputs, space),
            }  # fmt: skip
        del functions
        if inputs.x.is_cuda:
            torch.cuda.empty_cache()


def _panel_sides(name: str, inputs: Inputs, space: int | None) -> tuple[int, int] | None:
    if name not in BACKENDS or not inputs.x.is_cuda:
        return None
    units = torch.cuda.get_device_properties(inputs.x.device).multi_processor_count
    (m, d), n = inputs.x.shape, len(inputs.y)
    plan = plan_panels(
        m, n, d, inputs.x.dtype, "cuda", name, multiprocessors=units, workspace_bytes=space
    )
    return plan.rows, plan.cols


def small(size: int, dim: int, repeats: int, device: str) -> Iterator[dict]:
    """A small batch as called, and replayed from a CUDA graph."""
    inputs = make_inputs(size, dim, "bfloat16", device)
    functions: dict[tuple[str, bool], Callable] = {}
    for name in (default_fused(device), "eager"):
        function = Case(name, size, dim, "bfloat16", device).step(inputs)
        functions[name, False] = function
        if torch.device(device).type == "cuda":
            functions[name, True] = _captured(function)
    for (name, graph), times in interleaved(functions, repeats, 3, device, queued=False).items():
        yield {
            "kind": "small", "loss": name, "graph": graph, "batch_size": size, "dim": dim,
            **summary(times),
        }  # fmt: skip


def counters(chosen: Sequence[str], size: int) -> Iterator[dict]:
    """Hardware counters of one launch of each kernel."""
    for name in chosen if torch.cuda.is_available() else ():
        # clock control would set the card's clocks, which are not ours to set
        command = [cuda_tool("ncu"), "--csv", "--page", "raw", "--clock-control", "none"]
        command += ["--launch-count", "1", "--launch-skip", "1"]
        command += ["--kernel-name", "regex:.*panel_kernel.*"]
        command += [argument for section in SECTIONS for argument in ("--section", section)]
        command += [sys.executable, "-m", "benchmarks.gpu.tune", "--one", name]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        table = done.stdout[done.stdout.find('"ID"') :]
        found = list(csv.DictReader(io.StringIO(table))) if table.startswith('"ID"') else []
        if len(found) < 2:  # the units come first
            said = " ".join((done.stdout + done.stderr).split())[-300:]
            yield {"kind": "left_out", "loss": f"counters of {name}", "reason": said}
            continue
        units, values = found[:2]
        yield {
            "kind": "counters", "candidate": name, "size": size,
            "values": {key: [values[key], units[key]] for key in values if "__" in key},
        }  # fmt: skip


def one(name: str, size: int, device: str) -> None:
    """Two launches of a panel kernel, for a profiler."""
    call = _panel_call(name, make_inputs(size, 768, "bfloat16", device, SCALES[1], BIAS))
    call()
    call()
    torch.cuda.synchronize()


def measure(args: argparse.Namespace) -> Iterator[dict]:
    """Everything that is timed, in one process."""
    on_gpu = torch.device(args.device).type == "cuda"
    repeats, size = (12, PANEL_SIDE) if on_gpu else (1, 256)
    parts: dict[str, Callable[[], Iterator[dict]]] = {
        "products": lambda: products(
            (8192, 11264, 16384) if on_gpu else (256,), 768 if on_gpu else 32, repeats, args.device
        ),
        "steps": lambda: steps(
            (SHIPPED, *args.best),
            ((32768, 768), (65536, 768), (65536, 1152)) if on_gpu else ((256, 32),),
            (None, 480 * MIB) if on_gpu else (None,),
            8 if on_gpu else 1,
            args.device,
        ),
        "small": lambda: small(
            1024 if on_gpu else 64, 768 if on_gpu else 32, 5 * repeats, args.device
        ),
        "counters": lambda: counters(args.best, size),
    }
    for name in args.parts:
        yield {"kind": "begin", "part": name, "candidate": None}
        yield from parts[name]()


def _synchronize(device: str) -> None:
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()


def check_all(
    chosen: Sequence[str], dims: Sequence[str], device: str, seconds: float
) -> Iterator[dict]:
    """Check every candidate, all at once; then time those that are right, one after the other."""
    deadline = time.monotonic() + seconds
    children = {
        name: Child("benchmarks.gpu.tune", "--check", name, "--device", device, "--dims", *dims)
        for name in chosen
    }
    for tell in ("checked", "panel"):
        for name, child in list(children.items()):
            if tell == "panel":
                child.go()
            for row in child.rows(deadline, silence=seconds if tell == "checked" else 15):
                if row["kind"] == "ready":
                    break
                if row["kind"] != "ended":
                    yield row
                if row["kind"] == "ended" and row["why"]:
                    yield {"kind": "failed", "candidate": name, "why": row["why"]}
                if row["kind"] == "ended" or row.get("right") is False:
                    child.close()
                    del children[name]
                    break


def best_of(rows: Sequence[dict], most: int = 2) -> list[str]:
    """The fastest candidates, by the sum of their times."""
    times: dict[str, float] = {}
    for row in rows:
        if row["kind"] == "panel":
            times[row["candidate"]] = times.get(row["candidate"], 0.0) + row["seconds"]
    return sorted(times, key=times.__getitem__)[:most]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.gpu.tune", description=__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--quick", action="store_true", help="on a CPU: does it run at all?")
    parser.add_argument("--output-dir", type=Path, default=RESULTS, help="by default results/")
    parser.add_argument("--commit", help="of the tree, where git cannot tell")
    parser.add_argument("--seconds", type=float, default=195.0)
    parser.add_argument("--only", nargs="*", choices=PARTS, default=list(PARTS), metavar="part")
    parser.add_argument("--dims", type=int, nargs="+", default=[768, 1152], help="of panels")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--check", help=argparse.SUPPRESS)
    parser.add_argument("--parts", nargs="*", help=argparse.SUPPRESS)
    parser.add_argument("--best", nargs="*", default=[], help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if args.one:
        one(args.one, PANEL_SIDE, args.device)
        return 0
    if args.check or args.parts:
        for row in check(args.check, args.dims, args.device) if args.check else measure(args):
            print(json.dumps(row), flush=True)
        return 0

    deadline = time.monotonic() + args.seconds
    where = environment(args.device)
    where["commit"] = where["commit"] or args.commit
    path = args.output_dir / results_path("tune", where).name
    rows: list[dict] = []

    def take(row: dict) -> None:
        rows.append(row)
        print(show(row), flush=True)
        write_results("tune", where, rows, path)

    candidates, dims = names(args.device), [str(dim) for dim in args.dims]
    for row in check_all(candidates, dims, args.device, min(90, args.seconds / 2)):
        take(row)
    best = best_of(rows)
    print("best:", *best, flush=True)
    parts = list(args.only)
    while parts and time.monotonic() < deadline - 5:
        begun = {"part": parts[0]}
        child = Child(
            "benchmarks.gpu.tune",
            "--parts",
            *parts,
            "--device",
            args.device,
            "--dims",
            *dims,
            "--best",
            *best,
        )
        for row in child.rows(deadline):
            if row["kind"] == "begin":
                begun["part"] = row.get("part") or begun["part"]
            else:
                take(row | (begun if row["kind"] == "ended" else {}))
        # what failed or hung is left out
        parts = [] if rows[-1]["why"] is None else parts[parts.index(begun["part"]) + 1 :]
    print(f"{len(rows)} rows in {path}")
    return 0


def show(row: dict) -> str:
    """One line."""
    left_out = ("seconds_p10", "seconds_p90", "kind")
    values = (f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in row.items()
              if k not in left_out and v is not None)  # fmt: skip
    return f"{row['kind']}: {' '.join(values)}"[:400]


if __name__ == "__main__":
    os.environ.setdefault("PYTHONUNBUFFERED", "1")
    sys.exit(main())
