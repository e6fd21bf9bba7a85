"""What ranks and statistics of a large batch cost, beside the sorted rows that one would write.

    python -m benchmarks.suites.retrieval      # measures, and writes a results file

Both directions of retrieval: retrieval_ranks; torch.topk over chunks of rows, which gives R@K alone
and takes a product a direction; and a bare product in panels, which no exact method can do without.
logit_statistics is in the same table. Every call is made in a fresh process, which also measures
its peak memory.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from fused_siglip import logit_statistics, retrieval_ranks

from ..common.memory import peak_bytes
from ..common.results import ROOT, environment, write_results
from ..common.timing import summary

KS = (1, 5, 10)
# The cosine of a matched pair is 1 / (1 + NOISE^2) on average: as large as the largest cosine with
# 65,536 texts that have nothing to do with the image, at D = 768.
NOISE = 2.45
ROWS_AT_ONCE = 128  # of topk: 32 MiB of similarities with 65,536 texts
PANEL = 2048  # of the bare product
WARM_UP = 4096

Recalls = list[list[float]]  # R@K for each of KS, of images and of texts


def make_features(size: int, dim: int, device: str) -> tuple[Tensor, Tensor]:
    """Normalized rows, some of which find their own pair; float32, on a GPU bfloat16."""
    generator = torch.Generator(device).manual_seed(0)

    def normal() -> Tensor:
        return torch.randn(size, dim, generator=generator, device=device)

    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    shared = normal()
    x, y = (F.normalize(shared + NOISE * normal()).to(dtype) for _ in range(2))
    return x, y


def by_ranks(x: Tensor, y: Tensor) -> Recalls:
    return [[(ranks <= k).double().mean().item() for k in KS] for ranks in retrieval_ranks(x, y)]


def by_topk(x: Tensor, y: Tensor) -> Recalls:
    return [_recall_by_topk(x, y), _recall_by_topk(y, x)]


def _recall_by_topk(x: Tensor, y: Tensor) -> list[float]:
    hits = torch.zeros(len(KS), dtype=torch.int64, device=x.device)
    for start in range(0, len(x), ROWS_AT_ONCE):
        rows = torch.arange(start, min(start + ROWS_AT_ONCE, len(x)), device=x.device)
        top = (x[rows] @ y.T).topk(min(max(KS), len(y))).indices
        found = top == rows[:, None]
        hits += torch.stack([found[:, :k].any(1).sum() for k in KS])
    return (hits.double() / len(x)).tolist()


def bare_product(x: Tensor, y: Tensor) -> None:
    s = x.new_empty(PANEL, PANEL)
    for rows in x.split(PANEL):
        for cols in y.split(PANEL):
            torch.mm(rows, cols.T, out=s[: len(rows), : len(cols)])


def statistics(x: Tensor, y: Tensor) -> list[float]:
    return torch.stack(list(logit_statistics(x, y, 10.0, -10.0))).tolist()


METHODS: dict[str, tuple[Callable[[Tensor, Tensor], object], int]] = {  # and how many products
    "retrieval_ranks": (by_ranks, 1),
    "topk": (by_topk, 2),
    "product": (bare_product, 1),
    "logit_statistics": (statistics, 0),
}


def measure_here(method: str, size: int, dim: int, device: str) -> dict:
    """Seconds, peak memory beside the features, and what the method found."""
    function, _ = METHODS[method]
    # loads code, fills the libraries' pools: with as many rows as are taken at one time
    function(*make_features(min(size, WARM_UP), dim, device))
    x, y = make_features(size, dim, device)
    start = time.perf_counter()
    peak, found = peak_bytes(lambda: function(x, y), device)
    return {
        "seconds": time.perf_counter() - start,
        "peak_extra_bytes": peak,
        "found": found,
        "dtype": str(x.dtype).removeprefix("torch."),
    }


def measure_elsewhere(*case: object) -> dict:
    """:func:`measure_here` in a fresh process."""
    command = [sys.executable, "-m", "benchmarks.suites.retrieval", "--case", json.dumps(case)]
    child = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if child.returncode != 0:
        raise RuntimeError(f"{case} failed with code {child.returncode}:\n{child.stderr[-2000:]}")
    return json.loads(child.stdout.splitlines()[-1])


def measure(size: int, dim: int, device: str, repeats: int) -> list[dict]:
    """A row for each method."""
    runs: dict[str, list[dict]] = {method: [] for method in METHODS}
    for _ in range(repeats):
        for method, found in runs.items():
            found.append(measure_elsewhere(method, size, dim, device))
    return [
        {
            "kind": "retrieval",
            "method": method,
            "batch_size": size,
            "dim": dim,
            "dtype": found[0]["dtype"],
            "device": device,
            "products": METHODS[method][1],
            "repeats": repeats,
            **summary([run["seconds"] for run in found]),
            "peak_extra_bytes": max(run["peak_extra_bytes"] for run in found),
            "recall": found[0]["found"] if method in ("retrieval_ranks", "topk") else None,
        }
        for method, found in runs.items()
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.suites.retrieval", description=__doc__)
    parser.add_argument("--size", type=int, default=65536, help="pairs")
    parser.add_argument("--dim", type=int, default=768)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--device", choices=("cpu", "cuda"))
    parser.add_argument("--case", help=argparse.SUPPRESS)  # of measure_elsewhere
    parser.add_argument("--output", type=Path, help="results file; by default under results/")
    args = parser.parse_args(arguments)
    if args.case:
        print(json.dumps(measure_here(*json.loads(args.case))))
        return
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    found = environment(device)
    rows = measure(args.size, args.dim, device, args.repeats)
    for row in rows:
        print(f"{row['method']}: {row['seconds']:.3g} s, {row['peak_extra_bytes'] / 2**20:.0f} MiB")
    print(f"written to {write_results('retrieval', found, rows, args.output)}")


if __name__ == "__main__":
    main()
