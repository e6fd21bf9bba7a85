"""The first minutes with a GPU: which panel kernel is right and fastest, and what bounds the rest.

``python -m benchmarks.gpu.tune`` compiles every configuration of candidates.py in a process of its
own, compares it with float64, times those that are right beside the plain products, and then times
whole steps. The rows are written after each of them, so that a run that is cut short loses nothing.
A kernel that hangs is ended with its process, and the rest goes on without it.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch

from ..common.results import RESULTS, environment, results_path, write_results
from .row_process import RowProcess
from .tune_parts import PARTS


def names(device: str) -> list[str]:
    """The candidates that this device can run."""
    if torch.device(device).type != "cuda" or torch.cuda.get_device_capability(device) != (9, 0):
        return []
    from .candidates import CANDIDATES, PORTABLE

    return [*CANDIDATES, PORTABLE]


def check_all(
    chosen: Sequence[str], dims: Sequence[int], device: str, seconds: float
) -> Iterator[dict]:
    """Check every candidate, all at once; then time those that are right, one after the other."""
    deadline = time.monotonic() + seconds
    options = ("--device", device, "--dims", *map(str, dims))
    processes = {
        name: RowProcess("benchmarks.gpu.candidate_checks", name, *options) for name in chosen
    }
    for timing in (False, True):
        for name, process in list(processes.items()):
            if timing:
                process.go()
            for row in process.rows(deadline, silence=15 if timing else seconds):
                if row["kind"] == "ready":
                    break
                if row["kind"] != "ended":
                    yield row
                elif row["why"]:
                    yield {"kind": "failed", "candidate": name, "why": row["why"]}
                if row["kind"] == "ended" or row.get("right") is False:
                    process.close()
                    del processes[name]
                    break


def best_of(rows: Sequence[dict], most: int = 2) -> list[str]:
    """The fastest candidates, by the sum of their times."""
    times: dict[str, float] = {}
    for row in rows:
        if row["kind"] == "panel":
            times[row["candidate"]] = times.get(row["candidate"], 0.0) + row["seconds"]
    return sorted(times, key=times.__getitem__)[:most]


def run_parts(
    parts: Sequence[str],
    best: Sequence[str],
    device: str,
    deadline: float,
    take: Callable[[dict], None],
) -> None:
    """Run the parts in one process; after one that failed or hung, the rest in a fresh one."""
    parts = list(parts)
    while parts and time.monotonic() < deadline - 5:
        begun = {"part": parts[0]}
        process = RowProcess(
            "benchmarks.gpu.tune_parts", *parts, "--device", device, "--best", *best
        )
        for row in process.rows(deadline):
            if row["kind"] == "begin":
                begun["part"] = row.get("part") or begun["part"]
            else:
                take(row | (begun if row["kind"] == "ended" else {}))
        parts = parts[parts.index(begun["part"]) + 1 :] if row["why"] is not None else []


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.gpu.tune", description=__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output-dir", type=Path, default=RESULTS, help="by default results/")
    parser.add_argument("--commit", help="of the tree, where git does not know it")
    parser.add_argument("--seconds", type=float, default=195.0)
    parser.add_argument("--only", nargs="*", choices=PARTS, default=list(PARTS), metavar="part")
    parser.add_argument("--dims", type=int, nargs="+", default=[768, 1152], help="of panels")
    args = parser.parse_args(arguments)

    deadline = time.monotonic() + args.seconds
    where = environment(args.device, args.commit)
    path = args.output_dir / results_path("tune", where).name
    rows: list[dict] = []

    def take(row: dict) -> None:
        rows.append(row)
        print(show(row), flush=True)
        write_results("tune", where, rows, path)

    candidates = names(args.device)
    for row in check_all(candidates, args.dims, args.device, min(90, args.seconds / 2)):
        take(row)
    best = best_of(rows)
    print("best:", *best, flush=True)
    run_parts(args.only, best, args.device, deadline, take)
    print(f"{len(rows)} rows in {path}")
    return 0


def show(row: dict) -> str:
    """A row in one line."""
    left_out = ("seconds_p10", "seconds_p90", "kind")
    values = (f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in row.items()
              if k not in left_out and v is not None)  # fmt: skip
    return f"{row['kind']}: {' '.join(values)}"[:400]


if __name__ == "__main__":
    sys.exit(main())
