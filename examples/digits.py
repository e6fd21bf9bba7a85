"""Train on handwritten digits and written captions, then measure time and memory.

``python -m examples.digits`` from the repository root needs no download and no GPU and takes one to
two minutes on two cores. It writes to build/demo/.

1. A small image tower and a small text tower learn from scikit-learn's handwritten digits with
   captions in five languages. They train with the fused loss, with the eager loss from the same
   seed, and with the eager loss in float64, which tells how far rounding alone moves a run.
2. Time and peak memory of loss and gradients are measured on random features, for the fused loss,
   the eager loss and the row-chunked loss, up to a batch of 8192.

``--full`` times each loss more often and goes up to a batch of 16384, in about five minutes.
``--full --record`` is the run that docs/ shows.
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
from .report import cost_table, plot_costs, plot_training, training_table
from .training import Run, train

SEED = 0
ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Plan:
    steps: int  # of training
    dim: int  # D of the features that are timed
    repeats: dict[int, int]  # batch size: how often each loss is timed


QUICK = Plan(steps=100, dim=64, repeats={256: 2, 512: 2})
SHORT = Plan(steps=300, dim=512, repeats={1024: 10, 2048: 5, 4096: 3, 8192: 1})
FULL = Plan(steps=300, dim=512, repeats={1024: 20, 2048: 10, 4096: 5, 8192: 3, 16384: 2})


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
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--quick", action="store_true", help="small sizes: does it run at all?")
    length.add_argument("--full", action="store_true", help="more repeats and larger batches")
    target = parser.add_mutually_exclusive_group()
    target.add_argument(
        "--output-dir",
        type=Path,
        default=ROOT / "build/demo",
        help="where plots and results go (default: build/demo)",
    )
    target.add_argument(
        "--record",
        action="store_true",
        help="with --full: replace the plots in docs/ and add a file to benchmarks/results/",
    )
    args = parser.parse_args(arguments)
    if args.record and not args.full:
        parser.error("--record: expected --full beside it, since docs/ shows the full run")
    plan = QUICK if args.quick else FULL if args.full else SHORT
    device = "cuda" if torch.cuda.is_available() else "cpu"
    where = environment(device)
    print(f"{where['device']}, {where['threads']} threads, torch {where['torch']}\n", flush=True)

    print(f"training: three runs of {plan.steps} steps", flush=True)
    runs = train_all(plan.steps, device)
    print("\n" + training_table(runs))
    sizes = ", ".join(map(str, plan.repeats))
    print(f"\ntime and memory at batch sizes {sizes}", flush=True)
    rows = measure(plan, device)
    print("\n" + cost_table(rows))

    folder = ROOT / "docs" if args.record else args.output_dir
    folder.mkdir(parents=True, exist_ok=True)
    written = [folder / "demo_training.png", folder / "demo_scaling.png"]
    plot_training(runs, written[0])
    plot_costs(rows, where, written[1])
    results = [{"kind": "training", "seed": SEED, **asdict(run)} for run in runs] + rows
    # without a path of its own the file goes to benchmarks/results/
    path = None if args.record else folder / "demo.json"
    written.append(write_results("demo", where, results, path))
    print("\nwritten: " + ", ".join(os.path.relpath(path) for path in written))


if __name__ == "__main__":
    main()
