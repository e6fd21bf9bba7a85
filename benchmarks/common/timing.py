"""Timing: functions in turn, beside the plain products that no exact method can do without."""

from __future__ import annotations

import functools
import re
import statistics
import time
from collections.abc import Callable, Hashable, Iterable
from dataclasses import asdict
from typing import TypeVar

import torch
from tqdm import tqdm

from .baselines import LOSSES
from .memory import peak_extra_bytes
from .results import read_text
from .workloads import Case, Inputs

QUEUE_CYCLES = 4_000_000  # of the device, 2 ms: longer than a host takes to launch a call
QUANTILES = (10, 25, 75, 90)  # in percent
USABLE_MEMORY = 0.8  # of what is available now; the rest is everybody else's

Key = TypeVar("Key", bound=Hashable)


def interleaved(
    functions: dict[Key, Callable[[], object]],
    repeats: int,
    warmup: int = 1,
    device: str = "cpu",
    on_round: Callable[[], object] = lambda: None,
    queued: bool = True,
) -> dict[Key, list[float]]:
    """Seconds of every call, ``repeats`` each. Round robin, so that drift hits all alike.

    On a GPU the calls are ``queued`` behind other work, as in a training step: what counts is the
    device's time. Otherwise the device waits for the host, which then counts too.
    """
    seconds_of: Callable[[Callable[[], object]], float] = _cpu_seconds
    if torch.device(device).type == "cuda":
        seconds_of = functools.partial(_cuda_seconds, queued=queued)
    else:
        _let_the_heap_keep_memory()
    seconds: dict[Key, list[float]] = {name: [] for name in functions}
    for turn in range(warmup + repeats):
        for name, function in functions.items():
            elapsed = seconds_of(function)
            if turn >= warmup:
                seconds[name].append(elapsed)
        on_round()
    return seconds


def _let_the_heap_keep_memory() -> None:
    """Free a block of 31 MiB, as a model frees its activations.

    glibc learns from it to keep what is freed. In a process that never had a large block it gives
    a small batch's matrices back to the system after each call, and every call pays for new pages.
    """
    torch.empty(31 << 20, dtype=torch.uint8)


def _cpu_seconds(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def _cuda_seconds(function: Callable[[], object], queued: bool) -> float:
    _l2_flusher().zero_()
    if queued:
        torch.cuda._sleep(QUEUE_CYCLES)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    function()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1e-3


@functools.cache
def _l2_flusher() -> torch.Tensor:
    size = 2 * torch.cuda.get_device_properties().L2_cache_size
    return torch.empty(size, dtype=torch.int8, device="cuda")


median = statistics.median


def quantile(values: Iterable[float], q: float) -> float:
    return torch.tensor(list(values), dtype=torch.float64).quantile(q).item()


def summary(seconds: list[float] | None) -> dict[str, float | None]:
    """Median and quantiles, as the rows of results name them; None for what was not timed."""
    return {
        "seconds": median(seconds) if seconds else None,
        **{f"seconds_p{q}": quantile(seconds, q / 100) if seconds else None for q in QUANTILES},
    }


def floors(
    m: int, n: int, d: int, dtype: torch.dtype, device: str
) -> dict[int, Callable[[], None]]:
    """By their number, the plain products no exact method can do without; outputs preallocated.

    3: X Y^T, G^T X, G Y; 2 (image tower frozen): without G Y; 1 (forward only): X Y^T. G is what
    X Y^T wrote: the same dtype and shape, and one matrix less to hold.
    """
    x, y = (torch.randn(rows, d, dtype=dtype, device=device) for rows in (m, n))
    dx, dy = torch.empty_like(x), torch.empty_like(y)
    dlogits = torch.empty(m, n, dtype=dtype, device=device)

    def run(products: int) -> None:
        torch.mm(x, y.T, out=dlogits)
        if products >= 2:
            torch.mm(dlogits.T, x, out=dy)
        if products >= 3:
            torch.mm(dlogits, y, out=dx)

    return {products: functools.partial(run, products) for products in (1, 2, 3)}


def beside_floor(
    functions: dict[Key, Callable[[], object]], inputs: Inputs, repeats: int
) -> dict[Key, dict[str, float | None]]:
    """Times of whole steps on these inputs, in turn with the three plain products.

    For each function the fields that rows of results have: see :func:`measure`.
    """
    device = str(inputs.x.device)
    (m, d), n = inputs.x.shape, len(inputs.y)
    floor = floors(m, n, d, inputs.x.dtype, device)[3]
    *steps, plain = interleaved({**functions, "floor": floor}, repeats, device=device).values()
    base = median(plain)
    return {
        key: {
            **summary(times),
            "floor_seconds": base,
            "ratio_to_floor": median(times) / base,
        }
        for key, times in zip(functions, steps, strict=True)
    }


def measure(
    cases: list[Case], repeats: int, *, memory: bool = True, progress: bool = True
) -> list[dict]:
    """One row a case: its time, the time of the floor in the same rounds, its peak extra memory.

    The cases share batch size, dim, dtype, device and t. A row is the case's fields and

    - matmul_precision: how float32 products are computed ("highest": exactly; else as tf32)
    - seconds, seconds_p10, p25, p75, p90: median and quantiles of ``repeats`` calls
    - floor_seconds: median of as many plain products as the case needs
    - ratio_to_floor: seconds / floor_seconds
    - peak_extra_bytes: see memory.py
    - skipped: why nothing was measured, or None

    What was not measured is None; ``repeats`` 0 leaves out all times.
    """
    shapes = {(c.batch_size, c.dim, c.dtype, c.device, c.logit_scale) for c in cases}
    if len(shapes) != 1:
        raise ValueError(f"the cases have {len(shapes)} different shapes: expected one")
    ((size, dim, dtype_name, device, _),) = shapes
    dtype = getattr(torch, dtype_name)
    skipped = {case: obstacle(case) for case in cases}
    runnable = [case for case in cases if skipped[case] is None]

    floor = {}
    if repeats and size * size * dtype.itemsize < available_bytes(device):
        floor = floors(size, size, dim, dtype, device)

    # on CUDA this is also how a case is found not to fit
    probed = runnable if memory or torch.device(device).type == "cuda" else []
    peaks: dict[Case, int] = {}
    seconds: dict[str, list[float]] = {}
    steps = len(probed) + (1 + repeats if repeats else 0)
    description = f"B = {size}, {dtype_name}"
    with tqdm(total=steps, desc=description, leave=False, disable=not progress) as bar:
        for case in probed:
            try:
                peaks[case] = peak_extra_bytes(case)
            except (MemoryError, torch.OutOfMemoryError):
                skipped[case] = "out of memory"
            bar.update()
        runnable = [case for case in runnable if skipped[case] is None]
        if repeats and runnable:
            inputs = runnable[0].inputs()
            functions = {_label(case): case.step(inputs) for case in runnable}
            needed = {case.products for case in runnable}
            functions |= {_floor_label(n): run for n, run in floor.items() if n in needed}
            seconds = interleaved(functions, repeats, device=device, on_round=bar.update)

    return [_cost_row(case, repeats, seconds, peaks.get(case), skipped[case]) for case in cases]


def _cost_row(
    case: Case,
    repeats: int,
    seconds: dict[str, list[float]],
    peak: int | None,
    skipped: str | None,
) -> dict:
    times = seconds.get(_label(case))
    floor_times = seconds.get(_floor_label(case.products)) if times else None
    return {
        "kind": "cost",
        **asdict(case),
        "matmul_precision": torch.get_float32_matmul_precision(),
        "products": case.products,
        "repeats": repeats,
        **summary(times),
        "floor_seconds": median(floor_times) if floor_times else None,
        "ratio_to_floor": median(times) / median(floor_times) if floor_times else None,
        "peak_extra_bytes": peak,
        "skipped": skipped,
    }


def _label(case: Case) -> str:
    return f"{case.loss} {case.mode} {case.negatives} {case.weights}"


def _floor_label(products: int) -> str:
    return f"floor {products}"


def compare_sizes(
    batch_sizes: Iterable[int],
    dim: int,
    dtype: str,
    device: str,
    baselines: Iterable[str],
    repeats: int,
    progress: bool = True,
) -> list[dict]:
    """Time and peak extra memory of each baseline at each size: the rows of :func:`measure`."""
    rows = []
    for size in batch_sizes:
        cases = [Case(name, size, dim, dtype, device) for name in baselines]
        rows += measure(cases, repeats, progress=progress)
    return rows


def obstacle(case: Case) -> str | None:
    """Why a case cannot be measured here, or None where it can."""
    baseline = LOSSES[case.loss]
    reason = baseline.obstacle(torch.device(case.device).type)
    # on CUDA one may try and fail; a CPU out of memory ends processes, and not only this one
    if reason is not None or torch.device(case.device).type == "cuda":
        return reason
    itemsize = getattr(torch, case.dtype).itemsize
    need = baseline.pair_matrices * case.batch_size**2 * itemsize
    have = available_bytes(case.device)
    if need > have:
        return f"would need about {need / 2**30:.0f} GiB, {have / 2**30:.0f} GiB are free"
    return None


def available_bytes(device: str) -> int:
    """Memory that a measurement may fill."""
    if torch.device(device).type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
    else:
        match = re.search(r"MemAvailable:\s+(\d+)", read_text("/proc/meminfo"))
        free = int(match[1]) << 10 if match else 8 << 30
    return int(free * USABLE_MEMORY)
