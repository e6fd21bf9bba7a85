"""``make test`` again and again, alone and beside programs that burn the cores: is it ever red?

    PYTHONPATH=tests python -m soak.repeat --runs 10 --busy 4 --output FILE

The last ``--busy`` runs have a program a core beside them that does nothing but count. Ends with
status 1 at the first run that fails.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import resource
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks.common.results import ROOT, environment, write_results


@contextlib.contextmanager
def burning(programs: int) -> Iterator[None]:
    """So many programs that take a core each."""
    children = [subprocess.Popen([sys.executable, "-c", "while True: pass"])
                for _ in range(programs)]  # fmt: skip
    try:
        yield
    finally:
        for child in children:
            child.kill()
            child.wait()


def run(busy: bool) -> dict:
    """One run: a row of the results file."""
    with burning(os.cpu_count() or 1 if busy else 0):
        before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
        child = subprocess.run(["make", "test"], cwd=ROOT, capture_output=True, text=True)
        wall, after = time.monotonic() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    said = re.findall(r"^=+ (.*) in [\d.]+s.*=+$", child.stdout, re.MULTILINE)
    if child.returncode:
        print(child.stdout[-5000:], child.stderr[-2000:])
    return {
        "kind": "run",
        "busy": busy,
        "status": child.returncode,
        "wall_s": round(wall, 1),
        # of waited-for processes, without the programs that burn, which end later
        "cpu_s": round(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, 1),
        "pytest": said,
    }


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="repeat", description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=10)
    parser.add_argument("--busy", type=int, default=0, help="so many of them beside busy cores")
    parser.add_argument("--output", type=Path, help="results file, written after every run")
    args = parser.parse_args(arguments)
    found, rows = environment(), []
    for k in range(args.runs):
        rows.append(run(busy=k >= args.runs - args.busy))
        print(rows[-1], flush=True)
        if args.output is not None:
            write_results("test_runs", found, rows, args.output)
        if rows[-1]["status"]:
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
