"""benchmarks/device.py on a CPU: alive, and its results file whole."""

import json
import subprocess
import sys


def test_quick_run_on_a_cpu(tmp_path):
    command = [sys.executable, "-m", "benchmarks.device", "--device", "cpu", "--quick"]
    command += ["--output-dir", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "failed: none" in done.stdout
    (path,) = tmp_path.glob("*.json")
    results = json.loads(path.read_text())
    assert results["environment"]["torch"] and results["rows"]
