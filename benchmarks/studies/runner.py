"""Runs what is missing of some studies, in processes of their own."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed

import torch
from tqdm import tqdm

from ..common.results import environment
from .page import Folders
from .study import Study


def run(studies: list[Study], folders: Folders, quick: bool) -> None:
    where = environment()  # once: the files that a run writes make the tree dirty
    for study in studies:
        if obstacle := study.obstacle():
            print(f"{study.name} is left out: {obstacle}")
    studies = [study for study in studies if not study.obstacle()]
    beside = [study for study in studies if not study.alone]
    _run_cells(beside, folders, quick, where, processes=_cores())
    for study in studies:
        if study.alone:
            _run_cells([study], folders, quick, where, processes=1)


def _run_cells(
    studies: list[Study], folders: Folders, quick: bool, where: dict, processes: int
) -> None:
    """The cells that are missing, of all studies in one pool: no core waits for a study to end."""
    threads = max(1, _cores() // processes)
    pool = ProcessPoolExecutor(
        processes, multiprocessing.get_context("spawn"), _start_worker, (threads,)
    )
    waiting = {}
    with pool, contextlib.ExitStack() as bars:
        for position, study in enumerate(studies):
            results = folders.file(study)
            cells = study.cells(quick)
            missing = results.missing(cells)
            bar = bars.enter_context(
                tqdm(
                    total=len(cells),
                    initial=len(cells) - len(missing),
                    desc=study.name,
                    unit="run",
                    position=position,
                )
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


def _cores() -> int:
    """That this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _timed(function: Callable[[dict], dict], cell: dict) -> tuple[dict, float]:
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
