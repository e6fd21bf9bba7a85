"""The laptop script, started as its docstring says."""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_two_ranks_get_the_loss_of_one():
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
    done = subprocess.run(
        [*command, "2", "examples/train_distributed.py"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    losses = [float(value) for value in re.findall(r"^step .* loss (.+)$", done.stdout, re.M)]
    assert len(losses) == 7 and losses[-1] < losses[0] / 4
    last = done.stdout.splitlines()[-1]
    together, alone = re.fullmatch(r"the whole batch: (.+) on 2 ranks, (.+) on one", last).groups()
    assert abs(float(together) - float(alone)) <= 1e-5 * float(alone)
