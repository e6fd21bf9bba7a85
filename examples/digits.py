"""Train on handwritten digits and written captions, then measure time and memory.

``python -m examples.digits`` from the repository root. Needs no download and no GPU.

1. A small image tower and a small text tower learn from scikit-learn's handwritten digits with
   captions in five languages: with the fused loss, with the eager loss from the same seed, and with
   the eager loss in float64, which tells how far rounding alone moves a training run.
2. Loss and gradients of random features: time and peak memory of the fused loss, the eager loss
   and the row-chunked loss, up to a batch of 16384.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from benchmarks.common.baselines import default_fused
from benchmarks.common.results import environment, write_results
from benchmarks.common.timing import compare_sizes

from .captions import load_splits
from .report import (
    cost_table,
    plot_costs,
    plot_training,
    training_table,
)
from .training import Run, train

SEED = 0
ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Plan:
    steps: int  # of training
    dim: int  # D of the features that are timed
    repeats: dict[int, int]  # batch size: how often each loss is timed


FULL = Plan(steps=300, dim=512, repeats={1024: 20, 2048: 10, 4096: 5, 8192: 3, 16384: 2})
QUICK = Plan(steps=100, dim=64, repeats={256: 2, 512: 2})


def train_all(steps: int, device: str) -> list[Run]:
    splits = load_splits(SEED)
    kinds = (("fused", torch.float32), ("eager", torch.float32), ("eager", torch.float64))
    return [train(loss, dtype, splits, steps, SEED, device) for loss, dtype in kinds]


def measure(plan: Plan, device: str) -> list[dict]:
    baselines = (default_fused(device), "eager", "row_chunked")
    rows = []
    for size, repeats in plan.repeats.items():
        rows += compare_sizes([size], plan.dim, "float32", device, baselines, repeats)
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="examples.digits", description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="small sizes: does it run at all?")
    parser.add_argument(
        "--output-dir",
        type=Path,
        help="for plots and results; by default docs/ and benchmarks/results/, "
        "build/demo/ with --quick",
    )
    args = parser.parse_args(arguments)
    plan = QUICK if args.quick else FULL
    folder = args.output_dir or (ROOT / "build/demo" if args.quick else None)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    where = environment(device)
    print(f"{where['device']}, {where['threads']} threads, torch {where['torch']}\n")

    runs = train_all(plan.steps, device)
    print(training_table(runs), flush=True)
    rows = measure(plan, device)
    print("\n" + cost_table(rows))

    docs = folder or ROOT / "docs"
    docs.mkdir(parents=True, exist_ok=True)
    written = [docs / "demo_training.png", docs / "demo_scaling.png"]
    plot_training(runs, written[0])
    plot_costs(rows, where, written[1])
    results = [{"kind": "training", "seed": SEED, **asdict(run)} for run in runs] + rows
    written.append(write_results("demo", where, results, folder and folder / "demo.json"))
    print("\nwritten: " + ", ".join(os.path.relpath(path) for path in written))


if __name__ == "__main__":
    main()
