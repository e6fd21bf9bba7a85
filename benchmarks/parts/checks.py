"""Is it right? The tests, float64, the same bits every time, memory and race checkers."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from itertools import product

import torch

from ..bench_loss import BIAS, SCALES, accuracy
from ..cases import Case
from ..memory import ROOT
from .run import Run, Skipped, matmul_precision, usable

COMPARED_ROWS = 64  # of a large batch
EAGER_FITS = 32768  # beyond, its pair matrices take tens of GiB
OPERANDS = (
    ("bfloat16", "highest"),
    ("float16", "highest"),
    ("float32", "highest"),
    ("float32", "high"),  # tf32
)
# what the checkers of the CUDA toolkit run: ragged tiles, ids, every kernel variant
SMALL_CASES = """
import torch
from fused_siglip import siglip_loss
for dtype in (torch.bfloat16, torch.float32):
    for size, ids in ((200, False), (130, True)):
        x, y = (torch.randn(size, 72, device="cuda", dtype=dtype) / 9 for _ in range(2))
        t, b = torch.tensor(10.0, device="cuda"), torch.tensor(-10.0, device="cuda")
        labels = torch.arange(size, device="cuda") // 2 - 1
        options = dict(image_ids=labels, text_ids=labels) if ids else {}
        with torch.no_grad():
            siglip_loss(x, y, t, b, backend="triton", **options)
        leaves = [v.requires_grad_() for v in (x, y, t, b)]
        siglip_loss(*leaves, backend="triton", **options).backward()
torch.cuda.synchronize()
print("small cases done")
"""
SUMMARY = {
    "memcheck": r"ERROR SUMMARY: (\d+) error",
    "racecheck": r"RACECHECK SUMMARY: (\d+) hazard",
}


def tests(run: Run) -> Iterator[dict]:
    """The tests that mean something on this device, in a process of their own."""
    command = [sys.executable, "-m", "pytest", "-q", "--tb=line", *run.sizes.tests]
    if run.on_gpu and importlib.util.find_spec("xdist"):
        command += ["-n", "8"]  # most of the time goes into compiling kernels
    limit = None if run.seconds_left() == float("inf") else run.seconds_left()
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=limit)
    found = re.findall(r"(\d+) (passed|failed|skipped|error)", done.stdout)
    counts = {word: int(number) for number, word in found}
    row = {"kind": "tests", "device": run.device, "exit_code": done.returncode}
    row |= {word: counts.get(word, 0) for word in ("passed", "failed", "error", "skipped")}
    row["failures"] = re.findall(r"^(?:FAILED|ERROR) (.{1,300})", done.stdout, re.MULTILINE)[:20]
    yield row
    if done.returncode:
        last = (done.stdout + done.stderr).strip().splitlines()[-3:]
        raise RuntimeError(f"pytest ended with code {done.returncode}: " + "; ".join(last))


def correctness(run: Run) -> Iterator[dict]:
    """Every contestant against float64; of a large batch only sampled rows of dX and dY."""
    names = run.main_contestants()
    yield from usable(names, run)
    for (dtype, precision), (size, dim), t in product(OPERANDS, run.sizes.accuracy, SCALES):
        if (precision == "high" and not run.on_gpu) or (dtype == "float16" and t != SCALES[0]):
            continue  # a CPU has no tf32
        with matmul_precision(precision):
            yield from accuracy(_cases(names, size, dim, dtype, run), t, BIAS)
    for (size, dim), t in product(run.sizes.sampled, SCALES):
        generator = torch.Generator(run.device).manual_seed(0)
        sample = torch.randperm(size, generator=generator, device=run.device)[:COMPARED_ROWS]
        fits = names if size <= EAGER_FITS else [n for n in names if n != "eager"]
        yield from accuracy(_cases(fits, size, dim, "bfloat16", run), t, BIAS, sample)
        if run.on_gpu:
            torch.cuda.empty_cache()


def _cases(names: list[str], size: int, dim: int, dtype: str, run: Run) -> list[Case]:
    # the peer takes half precision only
    return [
        Case(name, size, dim, dtype, run.device)
        for name in names
        if name != "siglip_kernel" or dtype == "bfloat16"
    ]


def determinism(run: Run) -> Iterator[dict]:
    """How many different results ``runs`` calls on the same inputs have."""
    size, dim = run.sizes.determinism
    for dtype in ("bfloat16", "float32"):
        case = Case(run.fused, size, dim, dtype, run.device)
        step = case.step(case.inputs())
        first = step()
        same = [all(map(torch.equal, step(), first)) for _ in range(run.sizes.runs - 1)]
        yield {
            "kind": "determinism",
            "loss": case.loss,
            "batch_size": size,
            "dim": dim,
            "dtype": dtype,
            "device": run.device,
            "runs": run.sizes.runs,
            "different": same.count(False),
        }


def cuda_tool(name: str) -> str:
    """Path of a tool of the CUDA toolkit."""
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    path = shutil.which(name) or shutil.which(name, path=f"{home}/bin")
    if path is None:
        raise Skipped(f"{name} is not installed")
    return path


def sanitizer(run: Run) -> Iterator[dict]:
    """The CUDA toolkit's checkers over our kernels, in processes of their own."""
    if not run.on_gpu:
        raise Skipped("needs a GPU")
    tool_path = cuda_tool("compute-sanitizer")
    # torch's caching allocator would hide an access beyond a tensor
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    python = partial(subprocess.run, cwd=ROOT, capture_output=True, text=True, env=environment)
    compiles = python([sys.executable, "-c", SMALL_CASES])  # unwatched, for that would be slow
    if compiles.returncode:
        raise RuntimeError(f"the small cases fail: {compiles.stderr[-500:]}")
    for tool, summary in SUMMARY.items():
        watch = [tool_path, "--tool", tool, "--kernel-regex", "kns=panel_kernel"]
        try:
            done = python(
                [*watch, sys.executable, "-c", SMALL_CASES], timeout=max(run.seconds_left(), 1)
            )
        except subprocess.TimeoutExpired:
            raise Skipped(f"no time left to end {tool}") from None
        found = re.search(summary, done.stdout + done.stderr)
        ended = "small cases done" in done.stdout
        yield {
            "kind": "sanitizer",
            "device": run.device,
            "tool": tool,
            "findings": int(found[1]) if found and ended else None,
            "output": (done.stdout + done.stderr)[-1500:],
        }
        if not (found and ended):
            raise RuntimeError(f"{tool} did not reach the end of the small cases")
