"""``python -m fused_siglip --bench``: the loss beside eager and the products it cannot avoid."""

from __future__ import annotations

import re
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize

from ..loss import siglip_loss
from .environment import dtype_name
from .reference import eager_siglip_loss

DIM = 768
BATCHES = (256, 512, 1024, 2048, 4096, 8192, 16384, 32768)
PROBED = 512  # the batch whose products tell how fast the machine is
ROUNDS = 5
BUDGET_SECONDS = 30.0
# Of the plain products' time, what a round of all three may take: 5 (eager, on a GPU) + 2 + 1.
ROUND_FLOORS = 8
# B x B matrices that eager and the plain products hold at once.
PAIR_MATRICES = 8
CPU_BYTES = 4 << 30  # what a measurement on a CPU takes at most


class Expected(NamedTuple):
    """Times of the loss and of eager over those of the plain products, measured elsewhere."""

    where: str
    loss: float
    eager: float


# The tables of docs/performance.md; a test compares them with the results files.
EXPECTED = {
    "cuda": Expected("an H100, bfloat16, B = 32768", 1.14, 3.82),
    "cpu": Expected("a CPU with 2 threads, float32, B = 8192", 1.11, 2.39),
}


def bench(device: str, budget: float = BUDGET_SECONDS) -> dict[str, Any]:
    """Seconds of a call, by turns: the loss with all gradients, eager, and three plain products.

    The largest batch is measured that fits ``budget`` seconds and half of the free memory. On a
    CPU the features are float32, on a GPU bfloat16. Returns the medians in seconds, and the size.
    """
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    floor = _functions(PROBED, dtype, device)["floor"]
    probe = min(_interleaved({"floor": floor}, 3, device)["floor"])
    batch = choose_batch(probe, _free_bytes(device), dtype.itemsize, budget)
    seconds = _interleaved(_functions(batch, dtype, device), ROUNDS, device)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    return {
        "device": device,
        "dtype": dtype_name(dtype),
        "batch": batch,
        "dim": DIM,
        "rounds": ROUNDS,
        "seconds": medians,
        "x_floor": {name: medians[name] / medians["floor"] for name in ("loss", "eager")},
    }


def choose_batch(probe_seconds: float, free_bytes: int, itemsize: int, budget: float) -> int:
    """The largest batch whose rounds fit the budget and whose eager loss fits half the memory.

    Time is taken to grow with the square of the batch, from ``probe_seconds`` at :data:`PROBED`.
    """

    def fits(batch: int) -> bool:
        floor = probe_seconds * (batch / PROBED) ** 2
        needed = PAIR_MATRICES * batch**2 * itemsize
        return floor * ROUND_FLOORS * (ROUNDS + 1) <= budget and needed <= free_bytes // 2

    return max(filter(fits, BATCHES), default=BATCHES[0])


def summary(times: dict[str, Any]) -> str:
    """What was measured, beside what was measured elsewhere, and what larger batches would take."""
    seconds, ratio, batch = times["seconds"], times["x_floor"], times["batch"]
    expected = EXPECTED[times["device"]]
    lines = [
        f"loss and all gradients, B = {batch}, D = {times['dim']}, {times['dtype']}, median of "
        f"{times['rounds']} (floor: the three plain products that no exact method can avoid)",
        f"  floor {seconds['floor'] * 1e3:10.2f} ms",
        f"  loss  {seconds['loss'] * 1e3:10.2f} ms  {ratio['loss']:.2f} x floor",
        f"  eager {seconds['eager'] * 1e3:10.2f} ms  {ratio['eager']:.2f} x floor",
        f"for comparison: {expected.loss:.2f} and {expected.eager:.2f} x floor on {expected.where} "
        "(docs/performance.md)",
        "to expect, where time grows with the square of the batch: "
        + ", ".join(
            f"B = {size}: {seconds['loss'] * (size / batch) ** 2:.3g} s"
            for size in (2 * batch, 4 * batch, 8 * batch)
        ),
    ]
    if ratio["loss"] > 2:
        lines.append(
            "more than twice the floor: the batch is small, or other programs use the cores (on a "
            "CPU threads that spin then take each other's time: OMP_WAIT_POLICY=passive helps), or "
            "this is worth an issue"
        )
    return "\n".join(lines)


def _functions(batch: int, dtype: torch.dtype, device: str) -> dict[str, Callable[[], object]]:
    generator = torch.Generator(device).manual_seed(0)
    x, y = (
        normalize(torch.randn(batch, DIM, generator=generator, device=device)).to(dtype)
        for _ in range(2)
    )
    leaves = [x.requires_grad_(), y.requires_grad_()]
    leaves += [torch.tensor(v, device=device, requires_grad=True) for v in (10.0, -10.0)]
    dlogits = torch.empty(batch, batch, dtype=dtype, device=device)
    grads = torch.empty_like(x), torch.empty_like(y)

    def step(loss: Callable[..., Tensor]) -> Callable[[], object]:
        return lambda: torch.autograd.grad(loss(*leaves), leaves)

    @torch.no_grad()
    def floor() -> None:
        torch.mm(x, y.T, out=dlogits)
        torch.mm(dlogits, y, out=grads[0])
        torch.mm(dlogits.T, x, out=grads[1])

    return {"floor": floor, "loss": step(siglip_loss), "eager": step(eager_siglip_loss)}


def _interleaved(
    functions: dict[str, Callable[[], object]], rounds: int, device: str
) -> dict[str, list[float]]:
    """Seconds of every call, in turn, so that drift hits all alike; the first round warms up."""
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for turn in range(rounds + 1):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            if device != "cpu":
                torch.cuda.synchronize()
            if turn:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def _free_bytes(device: str) -> int:
    if device != "cpu":
        return torch.cuda.mem_get_info()[0]
    try:
        match = re.search(r"MemAvailable:\s+(\d+)", Path("/proc/meminfo").read_text())
    except OSError:  # not Linux
        match = None
    return min(int(match[1]) << 10, CPU_BYTES) if match else CPU_BYTES // 2
