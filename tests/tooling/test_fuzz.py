"""The fuzz command: it counts, it stops at the first miss, and what it prints runs that again."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("tqdm")  # of benchmarks.common.timing

ROOT = Path(__file__).resolve().parents[2]
SABOTAGE = """
import sys, torch
from soak import fuzz
from support import calls
right = calls.siglip_loss
def wrong(x, y, *scalars, **options):  # forgets the last image of large batches
    loss = right(x, y, *scalars, **options)
    return loss * (1 - 1e-4) if len(x) > 100 else loss
calls.siglip_loss = wrong
sys.exit(fuzz.main(sys.argv[1:]))
"""


def run(*arguments: str) -> subprocess.CompletedProcess:
    environment = os.environ | {"PYTHONPATH": "tests", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True
    )


def test_counts_and_writes_results(tmp_path):
    path = tmp_path / "fuzz.json"
    done = run("-m", "soak.fuzz", "--cases", "30", "--first", "0", "--output", str(path))
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.endswith("no miss\n")
    rows = json.loads(path.read_text())["rows"]
    by_kind = {kind: [r for r in rows if r["kind"] == kind] for kind in ("run", "dtype", "law")}
    assert by_kind["run"][0]["cases"] == 30 and by_kind["run"][0]["misses"] == 0
    for kind in ("dtype", "law"):
        assert sum(row["cases"] for row in by_kind[kind]) == 30
        assert all(0 <= row["share"] <= 1 for row in by_kind[kind])


def test_stops_at_the_first_miss_which_one_line_runs_again():
    done = run("-c", SABOTAGE, "--cases", "1000", "--first", "0")
    assert done.returncode == 1, done.stdout + done.stderr
    last = done.stdout.splitlines()[-1]
    command, seed = last.rsplit(" ", 1)
    assert command == "PYTHONPATH=tests python -m soak.fuzz --seed"
    assert done.stdout.startswith(f"seeds from 0\n{int(seed) + 1} cases in ")
    again = run("-c", SABOTAGE, "--seed", seed)
    assert (again.returncode, again.stderr) == (1, "") and "MISS: " in again.stdout
    assert again.stdout.startswith("Case(backend=")
