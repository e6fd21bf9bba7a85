"""The run that chooses among kernels: it runs on a CPU, finds wrong panels, survives what hangs."""

from __future__ import annotations

import json
import time

import pytest
import torch

pytest.importorskip("triton")
pytest.importorskip("tqdm")

from benchmarks.common.workloads import make_inputs
from benchmarks.gpu import tune
from benchmarks.gpu.candidate_checks import BIAS, SCALES, panel_errors
from benchmarks.gpu.candidates import CANDIDATES, PORTABLE, panel_of
from benchmarks.gpu.row_process import RowProcess
from fused_siglip.kernels.hopper import HOPPER


def test_runs_on_a_cpu(tmp_path, capsys):
    assert tune.main(["--device", "cpu", "--output-dir", str(tmp_path)]) == 0
    (path,) = tmp_path.glob("*-tune.json")
    kinds = {row["kind"] for row in json.loads(path.read_text())["rows"]}
    assert kinds >= {"product", "step", "small", "ended"}
    assert "step: candidate=triton" in capsys.readouterr().out


def exact_panel(t, diagonal):
    inputs = make_inputs(60, 32, "bfloat16", "cpu", t, BIAS)
    x, y = inputs.x[:50], inputs.y
    s = x.double() @ y.double().T
    positive = torch.arange(50)[:, None] + diagonal == torch.arange(60)
    sign = torch.where(positive, -1, 1)
    u = sign * (t * s + BIAS)
    dlogits = sign * torch.sigmoid(u)
    sums = torch.stack([torch.nn.functional.softplus(u).sum(), (dlogits * s).sum(), dlogits.sum()])
    return x, y, dlogits.to(torch.bfloat16), sums.float()


@pytest.mark.parametrize("t", SCALES)
def test_a_wrong_panel_is_found(t):
    x, y, dlogits, sums = exact_panel(t, 3)
    assert max(panel_errors(x, y, t, 3, dlogits, sums).values()) <= 1
    wrong = dlogits.clone()
    wrong[7, 8] *= 1.02
    assert panel_errors(x, y, t, 3, wrong, sums)["dlogits"] > 1
    wrong[7, 8] = torch.nan  # not written
    assert panel_errors(x, y, t, 3, wrong, sums)["dlogits"] == float("inf")
    assert panel_errors(x, y, t, 2, dlogits, sums)["dlogits"] > 1  # another diagonal
    for i, name in enumerate(("loss", "dscale_sum", "dbias_sum")):
        off = sums.clone()
        off[i] *= 1.01
        found = panel_errors(x, y, t, 3, dlogits, off)
        assert found[name] > 1 and found["dlogits"] <= 1


def test_a_process_that_hangs_is_ended(tmp_path, monkeypatch):
    hangs = 'import time\nprint(\'{"kind": "row"}\', flush=True)\ntime.sleep(60)\n'
    (tmp_path / "hangs.py").write_text(hangs)
    (tmp_path / "dies.py").write_text("raise RuntimeError('as it happens')\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    child = RowProcess("hangs")
    rows = list(child.rows(time.monotonic() + 60, silence=5))
    assert [row["kind"] for row in rows] == ["row", "ended"]
    assert rows[-1]["why"] == "no row for 5 s" and child.process.wait() != 0
    (ended,) = RowProcess("dies").rows(time.monotonic() + 60)
    assert "as it happens" in ended["why"]


def test_candidates_and_their_order():
    assert CANDIDATES["shipped"] == HOPPER and PORTABLE not in CANDIDATES
    assert panel_of("group_8").hopper.group_m == 8 and panel_of("group_8").hopper_tiles == 0
    assert panel_of(PORTABLE).hopper_tiles == float("inf")
    rows = [
        {"kind": "panel", "candidate": name, "seconds": seconds}
        for name, seconds in (("a", 2.0), ("b", 1.0), ("a", 1.0), ("b", 1.5), ("c", 9.0))
    ]
    assert tune.best_of(rows) == ["b", "a"]
