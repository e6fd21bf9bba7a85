"""Programs of several ranks, started as a user starts them."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from typing import Any

# DDP keeps gloo's threads alive after destroy_process_group (torch 2.13: no line of ours is needed
# to see it). Where one of them still lets go of its last tensor when the interpreter ends, torch
# aborts the process: pytorch/pytorch issue 190489, pull request 179291.
TORCH_ABORT = "terminate called without an active exception"


def run_ranks(command: Sequence[str], **options: Any) -> str:
    """Standard output of a program; once more where torch aborted it at its end."""
    for attempt in range(2):
        done = subprocess.run(command, capture_output=True, text=True, **options)
        if done.returncode == 0 or attempt or TORCH_ABORT not in done.stderr:
            break
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout
