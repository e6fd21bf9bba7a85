"""``make soak-gluon``: the Gluon panel kernel on the emulator, each case in an order of its own.

A seed is a case and an order: what missed runs again by ``--seed N``.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from types import ModuleType

from support.gluon.arrays import Deadlock, Fault, Race
from support.gluon.language import load
from support.gluon.panel import KERNEL, random_case, run


def missed(kernel: ModuleType, seed: int) -> str | None:
    """What went wrong with a seed."""
    try:
        run(kernel, random_case(seed), seed)
    except (Race, Deadlock, Fault, AssertionError) as error:
        return f"{type(error).__name__}: {error}"
    return None


def main(arguments: Sequence[str] | None = None, edit: Callable[[str], str] | None = None) -> int:
    """edit: what to do to the kernel's source first."""
    parser = argparse.ArgumentParser(prog="gluon_soak", description=__doc__)
    parser.add_argument("--schedules", type=int, default=2000)
    parser.add_argument("--first", type=int, help="the first seed; the clock's by default")
    parser.add_argument("--seed", type=int, help="this one alone")
    args = parser.parse_args(arguments)
    first = int(time.time()) * 1000 if args.first is None else args.first
    seeds = range(first, first + args.schedules) if args.seed is None else [args.seed]
    kernel, said = load(KERNEL, edit), time.monotonic()
    for done, seed in enumerate(seeds):
        miss = missed(kernel, seed)
        if miss:
            print(f"{random_case(seed)}\n{miss}")
            print(f"PYTHONPATH=tests python -m soak.gluon_soak --seed {seed}")
            return 1
        if time.monotonic() >= said + 60:
            said = time.monotonic()
            print(f"{done + 1} schedules, no miss", flush=True)
    print(f"{len(seeds)} schedules, no miss")
    return 0


if __name__ == "__main__":
    sys.exit(main())
