"""Run the paper's claims at a small scale, and build docs/paper.md from what was measured.

``python -m examples.paper --all`` from the repository root: minutes on two cores, no download, no
GPU. What has been run already is not run again: an interrupted run goes on where it stopped. To
run a study anew, delete its file in examples/paper/results/.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

import torch
from tqdm import tqdm

from benchmarks.harness import environment
from benchmarks.memory import ROOT

from . import page
from .page import FULL, Folders
from .study import Study

STUDIES: list[Study] = []


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="examples.paper", description=__doc__.split("\n\n")[0])
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


def run(studies: list[Study], folders: Folders, quick: bool) -> None:
    where = environment()  # once: the files that a run writes make the tree dirty
    beside = [study for study in studies if not study.alone]
    _run_cells(beside, folders, quick, where, processes=len(os.sched_getaffinity(0)))
    for study in studies:
        if study.alone:
            _run_cells([study], folders, quick, where, processes=1)


def _run_cells(
    studies: list[Study], folders: Folders, quick: bool, where: dict, processes: int
) -> None:
    """The cells that are missing, of all studies in one pool: no core waits for a study to end."""
    threads = max(1, len(os.sched_getaffinity(0)) // processes)
    pool = ProcessPoolExecutor(
        processes, multiprocessing.get_context("spawn"), _start_worker, (threads,)
    )
    with pool:
        waiting = {}
        for position, study in enumerate(studies):
            results = folders.file(study)
            cells = study.cells(quick)
            missing = results.missing(cells)
            bar = tqdm(
                total=len(cells),
                initial=len(cells) - len(missing),
                desc=study.name,
                unit="run",
                position=position,
            )
            for cell in missing:
                waiting[pool.submit(_timed, study.run, cell)] = (results, cell, bar)
        try:
            for future in as_completed(waiting):
                results, cell, bar = waiting[future]
                results.add(cell, *future.result(), where)
                bar.update()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _timed(function, cell: dict) -> tuple[dict, float]:
    start = time.perf_counter()
    result = function(cell)
    return result, time.perf_counter() - start


def _start_worker(threads: int) -> None:
    torch.set_num_threads(threads)
    threading.Thread(target=_leave_with_parent, daemon=True).start()


def _leave_with_parent() -> None:
    """A worker whose parent was killed would wait for work for ever."""
    multiprocessing.parent_process().join()
    os._exit(1)


if __name__ == "__main__":
    main()
