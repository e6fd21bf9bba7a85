"""``make fuzz MINUTES=n``: the laws of the loss on random calls, until the first miss.

A seed is a case: what missed is run again by ``PYTHONPATH=tests python -m soak.fuzz --seed N``.
Error ratios are errors over the largest that rounding can cause; above 1 is a failure.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import random
import sys
import time
import traceback
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.common.markdown import table
from benchmarks.common.results import environment, write_results
from support.devices import HAS_GPU
from support.invariants import INVARIANTS, check
from support.strategies import DTYPES, Case, random_case


def drawn(seed: int) -> tuple[Case, str]:
    """The case of a seed and the law it is held to."""
    draw = random.Random(seed)
    case = random_case(draw)
    return case, draw.choice(tuple(INVARIANTS))


@dataclass
class Worst:
    """Of some kind of cases: how many there were, and the worst of them."""

    cases: int = 0
    share: float = 0.0
    what: str = "-"
    seed: int | None = None

    def add(self, seed: int, ratios: dict[str, float]) -> None:
        self.cases += 1
        for what, share in ratios.items():
            if share > self.share:
                self.share, self.what, self.seed = share, what, seed


@dataclass
class Tally:
    cases: int = 0
    skipped: int = 0
    dtypes: dict[tuple[str, str], Worst] = field(default_factory=dict)
    laws: dict[str, Worst] = field(default_factory=dict)

    def add(self, seed: int, case: Case, ratios: dict[str, float]) -> None:
        self.cases += 1
        exact = {k: v for k, v in ratios.items() if k not in INVARIANTS}
        law = {k: v for k, v in ratios.items() if k in INVARIANTS}
        self.dtypes.setdefault((case.backend, case.dtype), Worst()).add(seed, exact)
        for name in law:
            self.laws.setdefault(name, Worst()).add(seed, law)

    def rows(self) -> list[dict]:
        return [
            {"kind": "dtype", "backend": backend, "dtype": dtype, **vars(worst)}
            for (backend, dtype), worst in sorted(
                self.dtypes.items(), key=lambda item: (item[0][0], DTYPES.index(item[0][1]))
            )
        ] + [
            {"kind": "law", "law": name, **vars(self.laws[name])}
            for name in INVARIANTS
            if name in self.laws
        ]

    def summary(self) -> str:
        by_kind: dict[str, list[list[str]]] = {"dtype": [], "law": []}
        for row in self.rows():
            name = row["law"] if row["kind"] == "law" else f"{row['backend']} {row['dtype']}"
            cells = [name, str(row["cases"]), f"{row['share']:.3f}", row["what"], str(row["seed"])]
            by_kind[row["kind"]].append(cells)
        header = ["cases", "worst share", "of", "seed"]
        return "\n\n".join(
            table([title, *header], lines)
            for title, lines in (("against float64", by_kind["dtype"]), ("law", by_kind["law"]))
        )


def missed(seed: int) -> tuple[Case, dict[str, float], str | None]:
    """Run the case of a seed: the case, its ratios, and what missed (None: nothing)."""
    case, law = drawn(seed)
    try:
        ratios = check(case, law)
    except Exception:
        return case, {}, traceback.format_exc()
    misses = [f"{k}: {v:.3g} times what rounding may cause" for k, v in ratios.items() if v > 1]
    return case, ratios, "; ".join(misses) or None


def fuzz(tally: Tally, first: int, until: float, most: int | None) -> int | None:
    """Try seeds from ``first`` until the clock says so; the seed that missed, or None."""
    triton = importlib.util.find_spec("triton") is not None
    said = time.monotonic()
    for seed in range(first, sys.maxsize if most is None else first + most):
        if time.monotonic() >= until:
            break
        if drawn(seed)[0].backend == "triton" and not triton:
            tally.skipped += 1
            continue
        case, ratios, miss = missed(seed)
        tally.add(seed, case, ratios)
        if miss:
            return seed
        if time.monotonic() >= said + 60:
            said = time.monotonic()
            print(f"{tally.cases} cases, no miss", flush=True)
    return None


def report(seed: int) -> int:
    """Say how the case of one seed fares: the exit status."""
    case, ratios, miss = missed(seed)
    print(case)
    for what, share in ratios.items():
        print(f"{what}: {share:.3g}")
    print(f"MISS: {miss}" if miss else "no miss")
    return int(miss is not None)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="fuzz", description=__doc__)
    parser.add_argument("--minutes", type=float, default=1.0)
    parser.add_argument("--cases", type=int, help="no more than these")
    parser.add_argument("--first", type=int, help="the first seed; the clock's by default")
    parser.add_argument("--seed", type=int, help="this case alone")
    parser.add_argument("--output", type=Path, help="write a results file")
    args = parser.parse_args(arguments)
    if not HAS_GPU:
        os.environ["TRITON_INTERPRET"] = "1"  # nothing has imported triton yet
    warnings.simplefilter("ignore", RuntimeWarning)  # numpy's, of NaN in the interpreter
    if args.seed is not None:
        return report(args.seed)

    first = int(time.time()) * 1000 if args.first is None else args.first
    tally, start, found = Tally(), time.monotonic(), environment()
    print(f"seeds from {first}", flush=True)
    try:
        miss = fuzz(tally, first, start + 60 * args.minutes, args.cases)
    except KeyboardInterrupt:
        miss = None
    seconds = time.monotonic() - start
    skipped = f", {tally.skipped} of triton skipped (not installed)" if tally.skipped else ""
    print(f"{tally.cases} cases in {seconds:.0f} s{skipped}\n\n{tally.summary()}\n")
    if args.output is not None:
        run = {"kind": "run", "cases": tally.cases, "misses": int(miss is not None)}
        run |= {"seconds": seconds, "first_seed": first, "last_seed": first + tally.cases - 1}
        write_results("fuzz", found, [run, *tally.rows()], args.output)
    if miss is None:
        print("no miss")
        return 0
    report(miss)
    print(f"\nPYTHONPATH=tests python -m soak.fuzz --seed {miss}")
    return 1


if __name__ == "__main__":
    sys.exit(main())
