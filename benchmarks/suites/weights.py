"""What weights, targets and the losses of single images cost, beside the loss of equal pairs.

    python -m benchmarks.suites.weights      # measures, and writes a results file

Loss and all four gradients of one batch. All cases of a batch size run in the same interleaved
rounds, so that their times may be divided by one another.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch

from ..common.baselines import default_fused
from ..common.results import environment, write_results
from ..common.timing import measure
from ..common.workloads import WEIGHTS, Case

MARGIN = 0.1  # of Below


def cases(size: int, dim: int, device: str) -> list[Case]:
    """Equal pairs first, then what may be asked for besides."""
    dtype = "float32" if device == "cpu" else "bfloat16"
    shape = (default_fused(device), size, dim, dtype, device)
    weighted = [Case(*shape, weights=name) for name in WEIGHTS]
    return [Case(*shape), *weighted, Case(*shape, negatives=f"below {MARGIN}")]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.suites.weights", description=__doc__)
    parser.add_argument("--sizes", type=int, nargs="+", default=[1024, 2048, 4096, 8192])
    parser.add_argument("--dim", type=int, default=768)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--device", choices=("cpu", "cuda"))
    parser.add_argument("--output", type=Path, help="results file; by default under results/")
    args = parser.parse_args(arguments)
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    found = environment(device)
    rows = []
    for size in args.sizes:
        found_here = measure(cases(size, args.dim, device), args.repeats)
        for row in found_here:
            milliseconds = "-" if row["seconds"] is None else f"{row['seconds'] * 1e3:.1f} ms"
            print(f"{size}, {row['weights'] or row['negatives'] or 'equal pairs'}: {milliseconds}")
        rows += found_here
    print(f"written to {write_results('weights', found, rows, args.output)}")


if __name__ == "__main__":
    main()
