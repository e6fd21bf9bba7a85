"""What choosing negatives costs and saves, against the share that is kept.

    python -m benchmarks.suites.negatives      # measures, and writes a results file

Loss and all four gradients of one batch: all negatives, a random, the hardest and the easiest share
of them, and what one would write without ``negatives=``, the eager loss with a B x B mask.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch

from ..common.baselines import default_fused
from ..common.results import environment, write_results
from ..common.timing import measure
from ..common.workloads import Case

SHARES = (0.5, 0.25, 0.1, 0.05, 0.01, 0.001, 0.0001)
EAGER_SHARES = (0.1,)


def cases(size: int, dim: int, device: str) -> list[Case]:
    fused, shape = default_fused(device), (size, dim, "float32" if device == "cpu" else "bfloat16")
    chosen = [(fused, None)]
    chosen += [(fused, f"{kind} {keep}") for kind in ("random", "hardest") for keep in SHARES]
    chosen += [(fused, f"easiest {keep}") for keep in SHARES[2::2]]
    chosen += [("eager", None)]
    chosen += [("eager", f"{kind} {keep}") for kind in ("random", "hardest")
               for keep in EAGER_SHARES]  # fmt: skip
    return [Case(loss, *shape, device, negatives=negatives) for loss, negatives in chosen]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.suites.negatives", description=__doc__)
    parser.add_argument("--size", type=int, help="batch size; 4096 on a CPU, 32768 on a GPU")
    parser.add_argument("--dim", type=int, default=768)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", choices=("cpu", "cuda"))
    parser.add_argument("--output", type=Path, help="results file; by default under results/")
    args = parser.parse_args(arguments)
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    size = args.size or (4096 if device == "cpu" else 32768)
    found = environment(device)
    rows = measure(cases(size, args.dim, device), args.repeats)
    for row in rows:
        milliseconds = "-" if row["seconds"] is None else f"{row['seconds'] * 1e3:.1f} ms"
        print(f"{row['loss']}, {row['negatives'] or 'all'}: {milliseconds}")
    print(f"written to {write_results('negatives', found, rows, args.output)}")


if __name__ == "__main__":
    main()
