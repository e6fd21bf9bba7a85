"""python -m fused_siglip: passes here, says why it falls back, fails where the loss is wrong."""

import subprocess
import sys

import pytest
import torch

from fused_siglip import siglip_loss
from fused_siglip.testing import selfcheck

CALLS = selfcheck.CALLS
CHECKED = 12  # lines of errors with one backend: 4 dtypes, 3 calls


def rows(output: str) -> list[list[float]]:
    return [[float(v) for v in line.split()[-5:]] for line in output.splitlines()
            if line.startswith(("  torch  ", "  triton "))]  # fmt: skip


def test_passes_as_a_command():
    done = subprocess.run(
        [sys.executable, "-m", "fused_siglip"], capture_output=True, text=True, timeout=120
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert torch.__version__ in done.stdout and "2048" in done.stdout
    assert done.stdout.splitlines()[-1].startswith("PASS")
    found = rows(done.stdout)
    assert len(found) >= CHECKED and all(0 <= v <= 1 for row in found for v in row)


@pytest.fixture
def on_the_cpu(monkeypatch):
    """And smaller calls: what is tested here is what the command says of them."""
    small = {name: (m // 6, n // 6, d // 6, *rest) for name, (m, n, d, *rest) in CALLS.items()}
    monkeypatch.setattr(selfcheck, "CALLS", small)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


def test_says_why_it_falls_back(on_the_cpu, monkeypatch, capsys):
    assert selfcheck.main() == 0
    output = capsys.readouterr().out
    assert (
        "falls back to torch instead of triton for float32, bfloat16, float16: it needs" in output
    )
    assert "for float64: it has no float64" in output
    assert "half features are converted to float32 in panels: cpu has no product" in output
    monkeypatch.setattr("fused_siglip.kernels.registry._TRITON_INSTALLED", False)
    assert selfcheck.main() == 0
    assert "instead of triton: triton is not installed" in capsys.readouterr().out


@pytest.mark.parametrize("output", ["loss", "image", "text", "scale", "bias"])
def test_fails_where_the_loss_is_wrong(on_the_cpu, monkeypatch, capsys, output):
    """Off by 1e-4, more than rounding can do, in one output of one dtype."""
    k = selfcheck.OUTPUTS.index(output) - 1

    def wrong(*inputs, **options):
        loss = siglip_loss(*inputs, **options)
        if inputs[0].dtype != torch.float32:
            return loss
        if k < 0:
            return loss + loss.detach() * 1e-4
        inputs[k].register_hook(lambda grad: grad * (1 + 1e-4))
        return loss

    monkeypatch.setattr(selfcheck, "siglip_loss", wrong)
    assert selfcheck.main() == 1
    said = capsys.readouterr().out
    verdict = said[said.index("FAIL: please report everything above and this:") :].splitlines()[2:]
    assert verdict and all(line.startswith("torch  float32   ") for line in verdict)
    assert all(f": {output} errs " in line for line in verdict)


def test_an_exception_is_reported_with_the_rest(on_the_cpu, monkeypatch, capsys):
    def broken(*inputs, **options):
        raise RuntimeError("as it happens")

    monkeypatch.setattr(selfcheck, "siglip_loss", broken)
    assert selfcheck.main() == 1
    said = capsys.readouterr().out
    assert said.count("as it happens\n") == CHECKED and "FAIL" in said


def test_different_bits_are_reported(on_the_cpu, monkeypatch, capsys):
    monkeypatch.setattr(
        selfcheck, "siglip_loss", lambda *i, **o: siglip_loss(*i, **o) + 1e-4 * torch.rand(())
    )
    assert selfcheck.main() == 1
    assert "the same inputs gave other bits the second time" in capsys.readouterr().out
