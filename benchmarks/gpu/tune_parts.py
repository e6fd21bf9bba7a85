"""What `tune` measures beyond one configuration: products, whole steps, small batches, counters.

Runs in a process of its own, which prints rows: ``python -m benchmarks.gpu.tune_parts PART ...``.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence

import torch

from fused_siglip import siglip_loss

from ..common.baselines import default_fused
from ..common.panels import panel_call, plan_of, register
from ..common.results import MIB, ROOT
from ..common.timing import beside_floor, interleaved, median, summary
from ..common.workloads import Case, Inputs, make_inputs, step
from .candidate_checks import BIAS, PANEL_SIDE, SCALES
from .parts.run import trial
from .parts.timings import called_and_replayed
from .tools import ncu_command, ncu_rows

SHIPPED = "triton"
SECTIONS = ("SpeedOfLight", "WarpStateStats", "ComputeWorkloadAnalysis")


def products(best: Sequence[str], device: str) -> Iterator[dict]:
    """The two products of the gradients at a panel's shape: fp32 with beta 0 and 1, and bf16."""
    on_gpu = _on_gpu(device)
    dim, repeats = (768, 12) if on_gpu else (32, 1)
    for size in (8192, PANEL_SIDE, 16384) if on_gpu else (256,):
        dlogits = torch.rand(size, size, device=device).mul_(1e-3).to(torch.bfloat16)
        y = make_inputs(size, dim, "bfloat16", device).y
        half, full = torch.zeros_like(y), torch.zeros(size, dim, device=device)
        functions = {}
        for what, a in (("dlogits Y", dlogits), ("dlogits^T X", dlogits.T)):
            functions[what, "bf16"] = functools.partial(torch.mm, a, y, out=half)
            for beta in (0, 1) if on_gpu else ():
                functions[what, f"fp32, beta {beta}"] = functools.partial(
                    torch.addmm, full, a, y, out_dtype=full.dtype, beta=beta, out=full
                )
        for (what, how), times in interleaved(functions, repeats, device=device).items():
            yield {
                "kind": "product", "product": what, "how": how, "size": size, "dim": dim,
                **summary(times), "tflops": 2e-12 * size * size * dim / median(times),
            }  # fmt: skip


def steps(best: Sequence[str], device: str) -> Iterator[dict]:
    """Whole steps against the three plain products, by workspace; peers at the first shape."""
    on_gpu = _on_gpu(device)
    shapes = ((32768, 768), (65536, 768), (65536, 1152)) if on_gpu else ((256, 32),)
    names = (SHIPPED, *best)
    for (size, dim), t in ((shape, t) for shape in shapes for t in SCALES):
        inputs = make_inputs(size, dim, "bfloat16", device, t, BIAS)
        functions: dict[tuple[str, int | None], Callable] = {}
        for name in names:
            # the shipped kernel's default is compared at one temperature
            both = on_gpu and (t == SCALES[0] or name != SHIPPED)
            for space in (None, 480 * MIB) if both else (None,):
                loss = functools.partial(
                    siglip_loss, backend=name if on_gpu else "torch", workspace_bytes=space
                )
                functions[name, space] = step(loss, inputs)
                yield {"kind": "begin", "candidate": name}
                functions[name, space]()  # compiles
                if on_gpu:
                    torch.cuda.synchronize()
        for name in ("siglip_kernel", "eager") if (size, dim) == shapes[0] else ():
            why = trial(name, device)
            if why is None:
                functions[name, None] = Case(name, size, dim, "bfloat16", device).step(inputs)
            else:
                yield {"kind": "left_out", "loss": name, "reason": why}
        yield {"kind": "begin", "candidate": None}
        for (name, space), times in beside_floor(functions, inputs, 8 if on_gpu else 1).items():
            yield {
                "kind": "step", "candidate": name, "batch_size": size, "dim": dim,
                "logit_scale": t, "workspace_bytes": space, **times,
                "panel": _panel_sides(name, inputs, space) if name in names else None,
            }  # fmt: skip
        del functions
        if on_gpu:
            torch.cuda.empty_cache()


def _panel_sides(name: str, inputs: Inputs, space: int | None) -> tuple[int, int] | None:
    if not inputs.x.is_cuda:
        return None
    plan = plan_of(inputs, name, space)
    return plan.rows, plan.cols


def small(best: Sequence[str], device: str) -> Iterator[dict]:
    """A small batch as called, and replayed from a CUDA graph."""
    size, dim, repeats = (1024, 768, 60) if _on_gpu(device) else (64, 32, 5)
    for row in called_and_replayed((default_fused(device), "eager"), size, dim, repeats, device):
        yield row | {"kind": "small"} if row["kind"] == "latency" else row


def counters(best: Sequence[str], device: str) -> Iterator[dict]:
    """Hardware counters of one launch of each kernel."""
    for name in best if _on_gpu(device) else ():
        command = ncu_command(SECTIONS, "--page", "raw", "--launch-skip", "1")
        command += [sys.executable, "-m", __spec__.name, "--launch", name]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        found = ncu_rows(done.stdout)
        if len(found) < 2:  # the units come first
            said = " ".join((done.stdout + done.stderr).split())[-300:]
            yield {"kind": "left_out", "loss": f"counters of {name}", "reason": said}
            continue
        units, values = found[:2]
        yield {
            "kind": "counters", "candidate": name, "size": PANEL_SIDE,
            "values": {key: [values[key], units[key]] for key in values if "__" in key},
        }  # fmt: skip


PARTS = {part.__name__: part for part in (products, steps, small, counters)}


def launch_twice(name: str, device: str) -> None:
    """Two launches of a panel kernel, for a profiler."""
    call = panel_call(make_inputs(PANEL_SIDE, 768, "bfloat16", device, SCALES[1], BIAS), name)
    call()
    call()
    torch.cuda.synchronize()


def _on_gpu(device: str) -> bool:
    return torch.device(device).type == "cuda"


def main() -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.gpu.tune_parts", description=__doc__)
    parser.add_argument("parts", nargs="*", choices=PARTS, metavar="part")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--best", nargs="*", default=[], help="candidates to go on with")
    parser.add_argument("--launch", help="only launch this candidate, for a profiler")
    args = parser.parse_args()
    for name in {*args.best, args.launch} - {None}:
        from .candidates import panel_of  # which imports triton

        register(name, panel_of(name))
    if args.launch:
        launch_twice(args.launch, args.device)
        return
    for part in args.parts:
        begin = {"kind": "begin", "part": part, "candidate": None}
        for row in itertools.chain([begin], PARTS[part](args.best, args.device)):
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
