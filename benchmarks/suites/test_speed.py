"""pytest-benchmark cases for a look while working: ``pytest benchmarks/suites/test_speed.py``.

One loss after the other; a comparison to report is bench_loss's, which interleaves them.
"""

import pytest
import torch

from benchmarks.common.baselines import default_fused
from benchmarks.common.timing import floors
from benchmarks.common.workloads import Case

pytest.importorskip("pytest_benchmark")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DIM = 256
SIZES = (512, 2048)


def synchronized(function):
    def call():
        function()
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    return call


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("loss", [default_fused(DEVICE), "eager", "row_chunked"])
def test_forward_and_backward(benchmark, loss, size):
    benchmark.group = f"B = {size}, D = {DIM}"
    case = Case(loss, size, DIM, device=DEVICE)
    benchmark(synchronized(case.step(case.inputs())))


@pytest.mark.parametrize("size", SIZES)
def test_floor(benchmark, size):
    benchmark.group = f"B = {size}, D = {DIM}"
    benchmark(synchronized(floors(size, size, DIM, torch.float32, DEVICE)[3]))
