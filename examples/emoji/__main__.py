"""Train on emoji and their names in fourteen languages, or find the emoji that a text names.

``python -m examples.emoji`` from the repository root trains two small towers in under two minutes
on two cores, without download and without GPU: pictures of 3,953 emoji with their names in
fourteen languages. Then it looks for emoji by names they were never trained with, and measures the
loss's time and memory. It writes to build/demo/.

``python -m examples.emoji "red car" "猫"`` answers from the model that was trained.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from .data import need_modules
from .search import MODEL, load_index
from .show import lines

ROOT = Path(__file__).resolve().parents[2]
OUTPUT = ROOT / "build/demo"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="examples.emoji", description=__doc__.split("\n")[0])
    parser.add_argument("texts", nargs="*", help="what to look for, in any of the languages")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--quick", action="store_true", help="few steps: does it run at all?")
    length.add_argument("--full", action="store_true", help="more repeats and larger batches")
    target = parser.add_mutually_exclusive_group()
    target.add_argument(
        "--output-dir",
        type=Path,
        default=OUTPUT,
        help="where model, plots and results are (default: build/demo)",
    )
    target.add_argument(
        "--record",
        action="store_true",
        help="with --full: replace the pictures in docs/ and add a file to benchmarks/results/",
    )
    args = parser.parse_args(arguments)
    if args.record and not args.full:
        parser.error("--record: expected --full beside it, since docs/ shows the full run")
    if args.texts and (args.quick or args.full):
        parser.error("--quick, --full: expected without texts, which ask a trained model")
    # a terminal that cannot show a letter gets its number
    sys.stdout.reconfigure(errors="backslashreplace")
    try:
        need_modules()
        if args.texts:
            print(lines(load_index(args.output_dir / MODEL), args.texts, [""] * len(args.texts)))
            return
    except (ModuleNotFoundError, FileNotFoundError) as error:
        parser.error(str(error))
    from .demo import run  # which takes a second for torch

    run("quick" if args.quick else "full" if args.full else "short", args.output_dir, args.record)


if __name__ == "__main__":
    main()
