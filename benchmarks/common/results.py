"""Results files: their rows, where and when these were taken, the newest file of each kind."""

from __future__ import annotations

import datetime
import json
import platform
import re
import subprocess
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NamedTuple

import torch

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"
MIB, GIB = 2**20, 2**30


class Results(NamedTuple):
    path: Path  # relative to the repository root
    environment: dict
    rows: list[dict]

    @property
    def commit(self) -> str:
        """The commit that rows came from, and whether the tree had changes beside it."""
        where = self.environment
        changed = " with changes" if where.get("dirty") else ""
        return f"{(where['commit'] or 'unknown')[:8]}{changed}"

    def source(self, up: str = "") -> str:
        """The sentence that says where numbers come from; ``up`` leads to the root."""
        where = self.environment
        on_gpu = where.get("capability", "")[:1].isdigit()
        triton = f", triton {where['triton']}" if on_gpu else ""
        return (
            f"{where['device']}, torch {where['torch']}{triton}, {where['date'][:10]}, commit "
            f"{self.commit}: "
            f"[{self.path.name}]({up}{self.path.as_posix()})."
        )


def select(rows: Iterable[dict], **fields: object) -> list[dict]:
    """The rows with these values in these fields."""
    return [row for row in rows if all(row.get(k) == v for k, v in fields.items())]


def fused_name(rows: Iterable[dict]) -> str:
    """The fused loss that a user gets on the device that wrote the rows."""
    names = {row.get("loss") for row in rows}
    return "fused_triton" if "fused_triton" in names else "fused_torch"


def main_shape(rows: list[dict]) -> dict:
    """The dim and dtype that plots and tables of several losses show: the first measured."""
    keys = ("dim", "dtype", "matmul_precision", "logit_scale")
    return {key: rows[0][key] for key in keys if key in rows[0]}


def load(folder: Path = RESULTS) -> dict[str, list[Results]]:
    """By the kind in a file's name (loss, device, ...) the newest file of each device, newest
    first."""
    newest: dict[tuple[str, str], Results] = {}
    for path in sorted(folder.glob("*.json")):
        content = json.loads(path.read_text())
        relative = path.relative_to(ROOT) if path.is_relative_to(ROOT) else path
        results = Results(relative, content["environment"], content["rows"])
        key = (path.stem.rsplit("-", 1)[-1], results.environment["device"])
        if key not in newest or results.environment["date"] > newest[key].environment["date"]:
            newest[key] = results
    found: dict[str, list[Results]] = {}
    for (name, _), results in newest.items():
        found.setdefault(name, []).append(results)
    for several in found.values():
        several.sort(key=lambda results: results.environment["date"], reverse=True)
    return found


def environment(device: str = "cpu", commit: str | None = None) -> dict:
    """Where and when: what a reader needs to judge a number, and nothing that names the machine.

    ``commit`` is the tree's, for a copy of it that git knows nothing or something else about.
    """
    if torch.device(device).type == "cuda":
        name = torch.cuda.get_device_name(device)
        capability = ".".join(map(str, torch.cuda.get_device_capability(device)))
    else:
        match = re.search(r"model name\s*:\s*(.+)", read_text("/proc/cpuinfo"))
        name = match[1].strip() if match else platform.machine()
        capability = torch.backends.cpu.get_cpu_capability()
    return {
        "device": name,
        "capability": capability,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "python": platform.python_version(),
        "commit": commit or _git("rev-parse", "HEAD"),
        "dirty": bool(_git("status", "--porcelain")),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def results_path(name: str, environment: dict) -> Path:
    device = re.sub(r"[^a-z0-9]+", "-", environment["device"].lower()).strip("-")
    return RESULTS / f"{environment['date'][:10]}-{device}-{name}.json"


def write_results(name: str, environment: dict, rows: list[dict], path: Path | None = None) -> Path:
    """Write {environment, rows} to ``path``, by default :func:`results_path`; a row is a line."""
    path = path or results_path(name, environment)
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = ",\n".join(map(json.dumps, rows))
    path.write_text(f'{{"environment": {json.dumps(environment)}, "rows": [\n{lines}\n]}}\n')
    return path


def read_text(path: str) -> str:
    """A file of the system, or nothing where there is none."""
    try:
        return Path(path).read_text()
    except OSError:
        return ""


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None
