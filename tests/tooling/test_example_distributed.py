"""The laptop script, started as its docstring says."""

import re
import sys
from pathlib import Path

from support.launched import run_ranks

ROOT = Path(__file__).resolve().parents[2]


def test_two_ranks_get_the_loss_of_one():
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
    output = run_ranks([*command, "2", "examples/train_distributed.py"], cwd=ROOT, timeout=120)
    losses = [float(value) for value in re.findall(r"^step .* loss (.+)$", output, re.M)]
    assert len(losses) == 7 and losses[-1] < losses[0] / 4
    last = output.splitlines()[-1]
    together, alone = re.fullmatch(r"the whole batch: (.+) on 2 ranks, (.+) on one", last).groups()
    assert abs(float(together) - float(alone)) <= 1e-5 * float(alone)
