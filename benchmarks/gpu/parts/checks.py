"""Whether the loss is right: tests, float64, repeated runs, checkers of memory and of races."""

from __future__ import annotations

import importlib.util
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from itertools import product

import torch

from ...common.results import ROOT
from ...common.workloads import Case
from ...suites.loss import BIAS, SCALES, accuracy
from ..tools import cuda_tool, in_time
from .run import Run, Skipped, matmul_precision, usable

COMPARED_ROWS = 64  # of a large batch
EAGER_FITS = 32768  # beyond, its pair matrices take tens of GiB
OPERANDS = (
    ("bfloat16", "highest"),
    ("float16", "highest"),
    ("float32", "highest"),
    ("float32", "high"),  # tf32
)
# What the checkers of the CUDA toolkit run: ragged tiles, every kernel variant. D = 72 is padded.
SMALL_CASES = """
import torch
from fused_siglip import siglip_loss
for dtype, ids in ((torch.bfloat16, False), (torch.bfloat16, True), (torch.float32, False)):
    x, y = (torch.randn(200, 72, device="cuda", dtype=dtype) / 9 for _ in range(2))
    t, b = torch.tensor(10.0, device="cuda"), torch.tensor(-10.0, device="cuda")
    labels = torch.arange(200, device="cuda") // 2 - 1
    options = dict(image_ids=labels, text_ids=labels) if ids else {}
    leaves = [v.requires_grad_() for v in (x, y, t, b)]
    siglip_loss(*leaves, backend="triton", **options).backward()
with torch.no_grad():
    siglip_loss(x, y, t, b, backend="triton")
torch.cuda.synchronize()
print("small cases done")
"""
SUMMARY = {
    "memcheck": r"ERROR SUMMARY: (\d+) error",
    "racecheck": r"RACECHECK SUMMARY: (\d+) hazard",
}


# Warnings of other versions than those the tests are pinned to are not what is tested here; and
# pytest-benchmark, where installed, warns of xdist.
PYTEST = ("-m", "pytest", "-q", "--tb=line", "-W", "default", "-p", "no:benchmark")


def tests(run: Run) -> Iterator[dict]:
    """The tests that mean something on this device, in a process of their own."""
    command = [sys.executable, *PYTEST, "-v", *run.sizes.tests]
    if run.on_gpu and importlib.util.find_spec("xdist"):
        command += ["-n", "16"]  # most of the time goes into compiling kernels
    limit = None if run.seconds_left() == float("inf") else max(run.seconds_left(), 1)
    with tempfile.TemporaryFile("w+") as output:  # what it has said is kept beyond the limit
        pytest = subprocess.Popen(
            command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            code = pytest.wait(limit)
        except subprocess.TimeoutExpired:
            os.killpg(pytest.pid, signal.SIGKILL)  # its workers too
            pytest.wait()
            code = None
        output.seek(0)
        said = output.read()
    yield {"kind": "tests", "device": run.device, "exit_code": code, **pytest_summary(said)}
    if code is None:
        raise Skipped("no time left to end python's tests")
    if code:
        last = said.strip().splitlines()[-3:]
        raise RuntimeError(f"pytest ended with code {code}: " + "; ".join(last))


def pytest_summary(output: str) -> dict:
    """How many tests passed, failed, ... by the lines of pytest -v, and which failed."""
    found: dict = {}
    for word in ("passed", "failed", "error", "skipped"):
        found[word] = len(
            re.findall(rf"^(?:\[gw.*%\] {word.upper()} |\S+::.* {word.upper()} )", output, re.M)
        )
    return found | {"failures": re.findall(r"^(?:FAILED|ERROR) (.{1,300})", output, re.M)[:20]}


def correctness(run: Run) -> Iterator[dict]:
    """Every baseline against float64; of a large batch only sampled rows of dX and dY."""
    names = run.main_baselines()
    yield from usable(names, run)
    for (dtype, precision), (size, dim), t in product(OPERANDS, run.sizes.accuracy, SCALES):
        if (precision == "high" and not run.on_gpu) or (dtype == "float16" and t != SCALES[0]):
            continue  # a CPU has no tf32
        if dtype != "bfloat16" and (size, dim) != run.sizes.accuracy[0]:
            continue  # every shape and dtype is compiled anew
        run.needs(5, f"{dtype}, {precision}, B = {size}")
        with matmul_precision(precision):
            yield from accuracy(_cases(names, size, dim, dtype, run), t, BIAS)
    for (size, dim), t in product(run.sizes.sampled, SCALES):
        run.needs(5, f"B = {size}")
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
        same = []
        for _ in range(run.sizes.runs - 1):
            same.append(all(map(torch.equal, step(), first)))
            if run.seconds_left() < 1:
                break
        yield {
            "kind": "determinism",
            "loss": case.loss,
            "batch_size": size,
            "dim": dim,
            "dtype": dtype,
            "device": run.device,
            "runs": 1 + len(same),
            "different": same.count(False),
        }


def sanitizer(run: Run) -> Iterator[dict]:
    """The CUDA toolkit's checkers over our kernels, in processes of their own."""
    if not run.on_gpu:
        raise Skipped("needs a GPU")
    tool_path = cuda_tool("compute-sanitizer")
    # torch's caching allocator would hide an access beyond a tensor
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    small_cases = [sys.executable, "-c", SMALL_CASES]
    compiles = in_time(small_cases, run, env=environment)  # unwatched, for that would be slow
    if compiles.returncode:
        raise RuntimeError(f"the small cases fail: {compiles.stderr[-500:]}")
    for tool in SUMMARY:
        watch = [tool_path, "--tool", tool, "--kernel-name", "kns=panel_kernel"]
        done = in_time([*watch, *small_cases], run, env=environment)
        said = done.stdout + done.stderr
        found = findings(tool, said)
        yield {
            "kind": "sanitizer",
            "device": run.device,
            "tool": tool,
            "findings": found,
            "output": said[-1500:],
        }
        if found is None:
            raise RuntimeError(f"{tool} did not reach the end of the small cases")


def findings(tool: str, output: str) -> int | None:
    """How many errors or hazards a checker counted; None where it did not get to the end."""
    found = re.search(SUMMARY[tool], output)
    return int(found[1]) if found and "small cases done" in output else None
