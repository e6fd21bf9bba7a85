"""Run a function in several real processes that share a gloo group on this machine."""

from __future__ import annotations

import multiprocessing
import os
import tempfile
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

TIMEOUT = timedelta(seconds=60)  # a rank that died is noticed at once; one may be slow
# Optimizers import dynamo too.
PRELOADED = [
    "torch",
    "torch._dynamo.backends.common",
    "torch._functorch.aot_autograd",
    "torch.distributed.checkpoint.state_dict",
    "torch.distributed.fsdp",
    "torch.distributed.tensor",
    "torch.testing",
    "fused_siglip",
    "support.tolerances",
]


def _run(rank: int, world_size: int, directory: str, function, arguments: tuple) -> None:
    torch.set_num_threads(1)
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        os.environ.pop(name, None)  # as they were when the server started, by whatever test
    store = dist.FileStore(str(Path(directory, "store")), world_size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size, timeout=TIMEOUT)
    result = outcome(function, rank, world_size, *arguments)
    torch.save(result, Path(directory, f"{rank}.pt"))
    dist.destroy_process_group()


def launch(function, world_size: int, *arguments, limit: float = 300.0) -> list[tuple]:
    """[("returned", value) | ("raised", message) | ("died", exit code)] of every rank.

    Processes are forked from a clean server that has what is slow to import, so a launch takes
    milliseconds, not seconds.
    None of them outlives the call; one that does not end within ``limit`` seconds fails it.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    with tempfile.TemporaryDirectory() as directory:
        processes = [
            context.Process(target=_run, args=(rank, world_size, directory, function, arguments))
            for rank in range(world_size)
        ]
        for process in processes:
            process.start()
        try:
            for process in processes:
                process.join(limit)
                assert not process.is_alive(), "a rank hangs"
        finally:
            for process in processes:
                process.kill()
        results = []
        for rank, process in enumerate(processes):
            file = Path(directory, f"{rank}.pt")
            results.append(torch.load(file) if file.exists() else ("died", process.exitcode))
        return results


def outcome(function, *arguments) -> tuple:
    """("returned", value) or ("raised", message)."""
    try:
        return "returned", function(*arguments)
    except Exception as error:
        return "raised", f"{type(error).__name__}: {error}"


def _run_each(rank: int, world_size: int, function, cases: list[tuple]) -> list[tuple]:
    return [outcome(function, rank, world_size, *case) for case in cases]


def launch_each(function, world_size: int, cases: list[tuple]) -> dict[tuple, list[tuple]]:
    """What :func:`launch` returns for each case, from one group that runs one after the other.

    Where a case raises it must raise on every rank, before or after the same exchanges.
    """
    ranks = returned(launch(_run_each, world_size, function, cases))
    return {case: [rank[k] for rank in ranks] for k, case in enumerate(cases)}


def returned(results: list[tuple]) -> list:
    """The ranks' return values; fails with what a rank raised instead."""
    for kind, value in results:
        assert kind == "returned", value
    return [value for _, value in results]
