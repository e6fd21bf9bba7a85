"""How far the loss and its gradients are from exact: by dtype, as t, B and D grow.

``python -m benchmarks.suites.error_growth`` measures the fused loss beside eager in the same dtype
and writes a results file, of which docs/trust.md has the tables. Errors of float64 features are
measured against extended precision (numpy's longdouble), all others against float64.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from ..common.baselines import LOSSES, obstacles
from ..common.reference import LossAndGrads, float64_reference
from ..common.results import environment, write_results
from ..common.workloads import Inputs, make_inputs, step

BASELINES = ("fused_triton", "fused_torch", "eager")
DTYPES = ("float64", "float32", "float16", "bfloat16")
BIAS = -10.0
BASE = {"t": 10.0, "batch_size": 512, "dim": 256}
GROWING = {
    "t": (1.0, 10.0, 100.0, 1000.0, 10000.0),
    "batch_size": (64, 512, 2048),
    "dim": (32, 256, 1024),
}
QUICK = {"t": (10.0, 100.0), "batch_size": (32,), "dim": (16,)}


def points(growing: dict[str, Sequence[float]]) -> list[dict]:
    """The base and, from there, one of t, B and D at a time."""
    base = {key: BASE[key] if BASE[key] in values else values[0] for key, values in growing.items()}
    found = [base | {key: value} for key, values in growing.items() for value in values]
    return [point for k, point in enumerate(found) if point not in found[:k]]


def extended_reference(x: torch.Tensor, y: torch.Tensor, t: float, b: float) -> list[np.ndarray]:
    """[loss, dX, dY, dt, db] in numpy's longdouble: 64 bits of mantissa on x86."""
    x, y = (v.double().cpu().numpy().astype(np.longdouble) for v in (x, y))
    size, (t, b) = len(x), (np.longdouble(v) for v in (t, b))
    s = x @ y.T
    label = 2 * np.eye(size, dtype=np.longdouble) - 1
    u = -label * (t * s + b)
    e = np.exp(-np.abs(u))
    loss = (np.maximum(u, 0) + np.log1p(e)).sum()
    dlogits = -label * np.where(u >= 0, 1, e) / (1 + e)
    return [
        v / size
        for v in (loss, t * (dlogits @ y), t * (dlogits.T @ x), (dlogits * s).sum(), dlogits.sum())
    ]


def largest_errors(actual: Sequence[torch.Tensor], exact: Sequence) -> dict[str, float]:
    """max|a - e| / max|e| of each output."""
    errors = {}
    for name, a, e in zip(LossAndGrads._fields, actual, exact, strict=True):
        a, e = (v.double().cpu().numpy() if isinstance(v, torch.Tensor) else v for v in (a, e))
        errors[name] = float(np.abs(a - e).max() / np.abs(e).max())
    return errors


def measure(names: Sequence[str], dtype: str, point: dict, device: str) -> list[dict]:
    """A row for each loss at one point."""
    t = point["t"]
    inputs = make_inputs(point["batch_size"], point["dim"], dtype, device, t, BIAS)
    if dtype == "float64":
        inputs = Inputs(*(v.double() for v in inputs))
        exact = extended_reference(inputs.x, inputs.y, t, BIAS)
    else:
        exact = float64_reference(*inputs)
    return [
        {
            "kind": "error_growth",
            "loss": name,
            "dtype": dtype,
            **point,
            "errors": largest_errors(step(LOSSES[name].loss, inputs)(), exact),
        }
        for name in names
        if not (name == "fused_triton" and dtype == "float64")
    ]


def run(device: str, growing: dict[str, Sequence[float]], progress: bool = True) -> list[dict]:
    found = obstacles(device)
    names = [name for name in BASELINES if found[name] is None]
    todo = [(dtype, point) for dtype in DTYPES for point in points(growing)]
    rows = []
    for dtype, point in tqdm(todo, leave=False, disable=not progress):
        rows += measure(names, dtype, point, device)
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.suites.error_growth", description=__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: does it run at all?")
    parser.add_argument("--output", type=Path, help="results file; by default under results/")
    args = parser.parse_args(arguments)
    where = environment(args.device)
    rows = run(args.device, QUICK if args.quick else GROWING)
    print(f"{len(rows)} rows written to {write_results('error_growth', where, rows, args.output)}")


if __name__ == "__main__":
    main()
