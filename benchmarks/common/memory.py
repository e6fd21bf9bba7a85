"""Peak memory of a step, measured: beyond what stood before it, and without the gradients.

``python -m benchmarks.common.memory '{"loss": "eager", "batch_size": 1024, "dim": 64}'``
measures one case in its own process and prints bytes.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import resource
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import TypeVar

import torch

from .baselines import LOSSES
from .results import ROOT
from .workloads import Case

WARM_UP_BATCH = 256
Result = TypeVar("Result")


def peak_extra_bytes(case: Case) -> int:
    """Peak memory of ``case`` above its inputs and the gradients of its inputs.

    On CUDA what torch's allocator held, in this process; on a CPU the resident set of a fresh
    process, since one that has run before may reuse memory it never gave back.
    """
    if torch.device(case.device).type == "cuda":
        return _measure(case)
    return measured_elsewhere(case)


def measured_elsewhere(case: Case, timeout: float | None = None) -> int:
    """:func:`peak_extra_bytes` in a fresh process."""
    command = [sys.executable, "-m", f"{__package__}.memory", json.dumps(asdict(case))]
    child = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=timeout)
    if child.returncode == -signal.SIGKILL:
        raise MemoryError(f"{case} was killed, most likely for want of memory")
    if child.returncode != 0:
        raise RuntimeError(f"{case} failed with code {child.returncode}:\n{child.stderr[-2000:]}")
    return int(child.stdout.split()[-1])


def _measure(case: Case) -> int:
    # Loads code and fills the libraries' own pools, which are not the loss's memory. What compiles
    # for every shape must meet this very shape; for the rest a small one does, and leaves nothing.
    small = min(WARM_UP_BATCH, case.batch_size)
    warm_up = case if LOSSES[case.loss].per_shape else replace(case, batch_size=small)
    warm_up.step(warm_up.inputs())()
    extra, (_, *gradients) = peak_bytes(case.step(case.inputs()), case.device)
    return extra - sum(g.nbytes for g in gradients)


def peak_bytes(function: Callable[[], Result], device: str = "cpu") -> tuple[int, Result]:
    """Call ``function``; return its peak memory above the state just before, and its result."""
    gc.collect()
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        result = function()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before, result
    with contextlib.suppress(OSError, AttributeError):  # glibc: give freed memory back first
        ctypes.CDLL(None).malloc_trim(0)
    before = _reset_resident_peak()
    result = function()
    return _resident_peak() - before, result


def hold_no_freed_memory() -> None:
    """From now on a freed block of 128 KiB or more leaves the resident set at once.

    glibc otherwise serves ever larger blocks from its heap, where what is freed below a block still
    in use stays resident: ranks that do the same then differ by several blocks, by chance.
    """
    with contextlib.suppress(OSError, AttributeError):
        m_mmap_threshold = -3  # malloc.h; setting it ends its growth
        ctypes.CDLL(None).mallopt(m_mmap_threshold, 128 << 10)


def _reset_resident_peak() -> int:
    with contextlib.suppress(OSError):  # Linux only; elsewhere the peak so far is the start
        Path("/proc/self/clear_refs").write_text("5")
    return _resident_peak()


def _resident_peak() -> int:
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) << 10
    unit = 1 if sys.platform == "darwin" else 1 << 10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


if __name__ == "__main__":
    print(_measure(Case(**json.loads(sys.argv[1]))))
