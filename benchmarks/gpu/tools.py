"""The CUDA toolkit's programs, run from the repository root and within the time that is left."""

from __future__ import annotations

import csv
import glob
import io
import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from ..common.results import ROOT
from .parts.run import Run, Skipped

TOOLS = ("/usr/local/cuda/bin", "/opt/nvidia/nsight-compute/*")  # NVIDIA's default folders


def cuda_tool(name: str) -> str:
    """Path of a tool of the CUDA toolkit."""
    folders = [f"{os.environ['CUDA_HOME']}/bin"] if "CUDA_HOME" in os.environ else []
    folders += [folder for pattern in TOOLS for folder in sorted(glob.glob(pattern), reverse=True)]
    path = shutil.which(name) or shutil.which(name, path=os.pathsep.join(folders))
    if path is None:
        raise Skipped(f"{name} is not installed")
    return path


def in_time(command: list[str], run: Run, **options: object) -> subprocess.CompletedProcess:
    """Run a command until the part's deadline; Skipped, with what it said last, beyond that."""
    limit = None if run.seconds_left() == float("inf") else max(run.seconds_left(), 1)
    options = {"cwd": ROOT, "capture_output": True, "text": True, **options}
    try:
        return subprocess.run(command, timeout=limit, **options)
    except subprocess.TimeoutExpired as ended:
        said = b"".join(filter(None, (ended.stdout, ended.stderr)))  # bytes, even so
        said = " ".join(said.decode(errors="replace").split())[-200:]
        raise Skipped(f"no time left to end {Path(command[0]).name}: {said}") from None


def ncu_command(sections: Sequence[str], *options: str) -> list[str]:
    """The command for ncu to read these sections of one launch of the panel kernel, as CSV."""
    # clock control would set the card's clocks, which are not ours to set
    command = [cuda_tool("ncu"), "--csv", "--clock-control", "none", "--launch-count", "1"]
    command += ["--kernel-name", "regex:.*panel_kernel.*", *options]
    return command + [argument for name in sections for argument in ("--section", name)]


def ncu_rows(output: str) -> list[dict[str, str]]:
    """The rows of ncu's CSV, which follows what ncu and the program print; none where it failed."""
    table = output[output.find('"ID"') :]
    return list(csv.DictReader(io.StringIO(table))) if table.startswith('"ID"') else []
