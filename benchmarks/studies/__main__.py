"""Run the paper's claims at a small scale, and build docs/paper.md from what was measured.

``python -m benchmarks.studies --all`` from the repository root takes minutes on two cores, no
download and no GPU; the study of more than a hundred languages is left out where its names are not
unpacked (many_languages.py). What has been run already is not run again: an interrupted run goes on
where it stopped. To run a study anew, delete its file in benchmarks/studies/results/.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from ..common.results import ROOT
from . import (
    batch_size,
    languages,
    locked,
    many_languages,
    negatives,
    noise,
    page,
    picture_losses,
    picture_negatives,
    starts,
)
from .page import FULL, Folders
from .runner import run
from .study import Study

STUDIES: list[Study] = [
    batch_size.STUDY,
    picture_losses.STUDY,
    starts.STUDY,
    locked.STUDY,
    languages.STUDY,
    many_languages.STUDY,
    negatives.STUDY,
    picture_negatives.STUDY,
    noise.STUDY,
]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="benchmarks.studies", description=__doc__.split("\n\n")[0]
    )
    what = parser.add_mutually_exclusive_group(required=True)
    names = [study.name for study in STUDIES]
    what.add_argument("--all", action="store_true", help="run every study, then build the page")
    what.add_argument("--study", choices=names, action="append", help="run this one (repeatable)")
    what.add_argument("--page", action="store_true", help="run nothing: only build the page")
    parser.add_argument("--quick", action="store_true", help="tiny runs, in build/paper/")
    parser.add_argument("--output-dir", type=Path, help="for results, page and plots")
    args = parser.parse_args(arguments)
    folders = FULL
    if args.quick or args.output_dir:
        folder = args.output_dir or ROOT / "build/paper"
        folders = Folders(folder, folder)
    if not args.page:
        chosen = [study for study in STUDIES if args.all or study.name in args.study]
        run(chosen, folders, args.quick)
    page.write(STUDIES, folders)
    print(f"written: {os.path.relpath(folders.page)}")


if __name__ == "__main__":
    main()
