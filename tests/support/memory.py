"""Memory as torch's allocator counts it: the same on every machine, however busy."""

from __future__ import annotations

import itertools
import json
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch


def peak_allocated(function: Callable[[], object]) -> int:
    """Most bytes that torch held on the CPU at one time, beyond those before the call."""
    with torch.profiler.profile(profile_memory=True) as profile:
        kept = function()
    del kept
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "trace.json")
        profile.export_chrome_trace(str(file))
        events = json.loads(file.read_text())["traceEvents"]
    memory = sorted((e for e in events if e["name"] == "[memory]"), key=lambda e: e["ts"])
    return max(itertools.accumulate(e["args"]["Bytes"] for e in memory), default=0)
