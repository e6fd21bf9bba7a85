"""The benchmark of the global batch runs, and measures what it says it does."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("matplotlib")
pytest.importorskip("tqdm")
if importlib.util.find_spec("open_clip") is None:
    pytest.skip("open_clip_torch is not installed", allow_module_level=True)

ROOT = Path(__file__).resolve().parents[2]


def test_quick_run_writes_its_rows(tmp_path):
    results, plot = tmp_path / "distributed.json", tmp_path / "memory.png"
    command = [sys.executable, "-m", "benchmarks.suites.distributed", "--quick"]
    done = subprocess.run(
        [*command, "--output", str(results), "--plot", str(plot)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert max(map(len, done.stdout.splitlines()[1:-1])) <= 100
    assert plot.stat().st_size > 1000
    rows = json.loads(results.read_text())["rows"]
    modes = [r for r in rows if r["kind"] == "distributed"]
    assert len(modes) == 6 * 3
    for row in modes:
        assert row["bytes_sent"] == pytest.approx(row["bytes_formula"], rel=0.05)
        assert 0 <= row["communication_seconds"] < row["seconds"]
        assert row["compute_seconds"] > 0 and row["peak_bytes"] > 0
        alike = [r["mean_loss"] for r in modes if r["world_size"] == row["world_size"]]
        assert alike == pytest.approx([row["mean_loss"]] * 6, rel=1e-5)
    assert {r["world_size"] for r in rows if r["kind"] == "gloo"} == {2, 3}
