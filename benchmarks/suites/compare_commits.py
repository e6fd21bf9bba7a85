"""Time one CPU step of two commits in turn, and print the ratio of each pair of runs.

``python -m benchmarks.suites.compare_commits HASH`` compares that commit with the working tree at
B = 1024, D = 768, float32. Each run is a process of its own, and a commit is read from git into a
temporary folder. On a busy machine the ratios scatter: the quartiles say how far.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tarfile
import tempfile
from io import BytesIO
from pathlib import Path

from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[2]
# Prints the median seconds of a step, and which files were timed.
STEPS = """
import statistics, sys, time, torch, fused_siglip
size, dim, steps = map(int, sys.argv[1:])
torch.manual_seed(0)
x, y = (torch.nn.functional.normalize(torch.randn(size, dim), dim=1) for _ in range(2))
torch.empty(31 << 20, dtype=torch.uint8)  # see timing.py
leaves = [v.requires_grad_() for v in (x, y, torch.tensor(10.0), torch.tensor(-10.0))]
seconds = []
for step in range(steps + 3):
    start = time.perf_counter()
    torch.autograd.grad(fused_siglip.siglip_loss(*leaves), leaves)
    seconds.append(time.perf_counter() - start)
print(statistics.median(seconds[3:]), fused_siglip.__file__)
"""


def step_seconds(tree: Path, sizes: list[int]) -> float:
    command = [sys.executable, "-c", STEPS, *map(str, sizes)]
    environment = os.environ | {"PYTHONPATH": str(tree)}
    done = subprocess.run(
        command, cwd=tree, env=environment, stdout=subprocess.PIPE, text=True, check=True
    )
    seconds, path = done.stdout.split(maxsplit=1)
    if not Path(path.strip()).is_relative_to(tree):
        raise RuntimeError(f"{path.strip()} was timed: expected a file in {tree}")
    return float(seconds)


def main() -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.suites.compare_commits")
    parser.add_argument("commit")
    parser.add_argument("--batch-size", type=int, default=1024)
    parser.add_argument("--dim", type=int, default=768)
    parser.add_argument("--steps", type=int, default=30, help="of a run; its median counts")
    parser.add_argument("--pairs", type=int, default=15, help="runs of each")
    args = parser.parse_args()
    archive = subprocess.run(
        ["git", "archive", args.commit], cwd=ROOT, capture_output=True, check=True
    )
    sizes = [args.batch_size, args.dim, args.steps]
    ratios, here = [], []
    with tempfile.TemporaryDirectory() as folder:
        with tarfile.open(fileobj=BytesIO(archive.stdout)) as tar:
            tar.extractall(folder, filter="data")
        kernels = Path(folder, "fused_siglip", "kernels")
        if not kernels.exists():  # earlier commits left the link to setup.py
            kernels.symlink_to(Path("..", "kernels"))
        for _ in tqdm(range(args.pairs), unit="pair", leave=False):
            before = step_seconds(Path(folder).resolve(), sizes)
            here.append(step_seconds(ROOT, sizes))
            ratios.append(here[-1] / before)
    low, middle, high = statistics.quantiles(ratios, n=4)
    print(
        f"B = {args.batch_size}, D = {args.dim}: {statistics.median(here) * 1e3:.2f} ms here, "
        f"{middle:.3f} times {args.commit} (quartiles {low:.3f} and {high:.3f}, "
        f"{args.pairs} pairs)"
    )


if __name__ == "__main__":
    main()
