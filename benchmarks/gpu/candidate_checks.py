"""One configuration of the panel kernel alone: whether it is right, and how fast it is.

Runs in a process of its own, which prints rows: ``python -m benchmarks.gpu.candidate_checks NAME``.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import product

import torch
from torch import Tensor

from ..common.panels import panel_call, register
from ..common.timing import interleaved, median, summary
from ..common.workloads import Inputs, make_inputs
from .candidates import panel_of
from .parts.timings import captured

PANEL_SIDE = 11264  # a panel's side by default, B = 65536
SCALES = (10.0, 100.0)
BIAS = -10.0


def check(name: str, dims: Sequence[int], device: str) -> Iterator[dict]:
    """Compile a candidate and compare dlogits and the sums of ragged panels with float64.

    Then, once told to on the standard input, time it alone beside the plain product.
    """
    start = time.perf_counter()
    register(name, panel_of(name))
    for dim, (t, diagonal) in product(dims, ((10.0, 37), (100.0, -53), (100.0, 5000))):
        x, y, *scalars = make_inputs(1111, dim, "bfloat16", device, t, BIAS)
        x, y = x[:700], y[: 1111 if t == SCALES[0] else 900]
        ragged = Inputs(x, y, *scalars)
        call = panel_call(ragged, name, diagonal=diagonal, side=1111, unwritten=float("nan"))
        dlogits, sums = call()
        torch.cuda.synchronize()
        row = {"kind": "checked", "candidate": name, "dim": dim, "logit_scale": t}
        row |= {"diagonal": diagonal, "seconds": time.perf_counter() - start}
        errors = panel_errors(x, y, t, diagonal, dlogits, sums)
        yield row | errors | {"right": max(errors.values()) <= 1}
    yield {"kind": "ready", "candidate": name}
    if sys.stdin.readline():
        for dim, t in product(dims, SCALES):
            yield timed_panel(name, make_inputs(PANEL_SIDE, dim, "bfloat16", device, t, BIAS), t)


def timed_panel(name: str, inputs: Inputs, t: float, repeats: int = 15) -> dict:
    """Time a panel kernel beside the plain product with half output.

    Both are replayed from CUDA graphs, so that what a launch costs the host does not count.
    """
    (size, dim), device = inputs.x.shape, str(inputs.x.device)
    plain = torch.empty(size, size, dtype=inputs.x.dtype, device=device)
    functions: dict[str, Callable] = {
        "plain": functools.partial(torch.mm, inputs.x, inputs.y.T, out=plain),
        name: panel_call(inputs, name),
    }
    functions = {key: captured(function) for key, function in functions.items()}
    seconds = interleaved(functions, repeats, device=device)
    base = median(seconds["plain"])
    return {
        "kind": "panel", "candidate": name, "size": size, "dim": dim, "logit_scale": t,
        **summary(seconds[name]), "plain_seconds": base, "over_plain": median(seconds[name]) / base,
        "tflops": 2e-12 * size * size * dim / median(seconds[name]),
    }  # fmt: skip


def panel_errors(
    x: Tensor, y: Tensor, t: float, diagonal: int, dlogits: Tensor, sums: Tensor
) -> dict[str, float]:
    """Errors over their bounds: the largest of dlogits (one rounding to bf16), and of each sum."""
    s = x.double() @ y.double().T
    rows, cols = (torch.arange(n, device=x.device) for n in s.shape)
    sign = torch.where(rows[:, None] + diagonal == cols, -1.0, 1.0)
    u = sign * (t * s + BIAS)
    exact = sign * torch.sigmoid(u)
    softplus = torch.nn.functional.softplus(u, threshold=700)
    logit = abs(t) * s.abs() + abs(BIAS)  # which tensor cores may cut off at 2^-20 of itself
    bound = exact.abs() * (2.0**-8 + 2.0**-20 * logit)
    found = {"dlogits": ((dlogits.double() - exact).abs() / bound).max().item()}
    drift = 2.0**-20 * (exact.abs() * logit).sum()
    terms = {"loss": softplus, "dscale_sum": exact * s, "dbias_sum": exact}
    for (name, term), total in zip(terms.items(), sums.double(), strict=True):
        found[name] = ((total - term.sum()).abs() / (2e-6 * term.abs().sum() + drift)).item()
    return {k: float("inf") if v != v else v for k, v in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.gpu.candidate_checks", description=__doc__)
    parser.add_argument("name")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dims", type=int, nargs="+")
    args = parser.parse_args()
    for row in check(args.name, args.dims, args.device):
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
