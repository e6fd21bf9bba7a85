"""The warp-specialised kernel on a Hopper GPU, against float64. Elsewhere: test_gluon_panel.py."""

from __future__ import annotations

import pytest
import torch

from support.devices import HAS_GPU, INTERPRETED

triton = pytest.importorskip("triton")
if not HAS_GPU or INTERPRETED or torch.cuda.get_device_capability() != (9, 0):
    pytest.skip("needs a Hopper GPU", allow_module_level=True)

from test_triton_panel import check, features, formula, run

from fused_siglip import siglip_loss
from fused_siglip.kernels import GRAD_SCALE, Pairs, PanelSpec, hopper
from fused_siglip.kernels.triton_math import MODERATE_LOGIT
from fused_siglip.kernels.triton_panel import TritonPanel
from support.inputs import loss_and_grads, make_inputs
from support.tolerances import error, oracle

HALVES = [torch.bfloat16, torch.float16]
pytestmark = pytest.mark.skipif(not hopper._GLUON, reason="written for triton 3.6")


@pytest.fixture(autouse=True)
def launches(monkeypatch):
    """Panels of any size go to the kernel; what was launched is counted."""
    monkeypatch.setattr(TritonPanel, "hopper_tiles", 0)
    calls = []
    launch = hopper.launch_panel

    def counted(*arguments):
        calls.append(arguments)
        launch(*arguments)

    monkeypatch.setattr(hopper, "launch_panel", counted)
    yield calls
    assert calls


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize(
    "m, n, d",
    [
        *[(1, 1, 16), (1, 130, 64), (127, 129, 48), (256, 384, 64), (129, 1, 80), (257, 300, 208)],
        *[(3000, 2100, 48), (2100, 3001, 208), (5000, 129, 64)],  # many tiles a program
    ],
)
def test_sizes(m, n, d, dtype):
    check(*features(m, n, d, dtype), positives=Pairs(diagonal=0))


@pytest.mark.parametrize("t", [10.0, 100.0, -10.0])
@pytest.mark.parametrize("diagonal", [None, 0, 1, -1, 127, 128, -128, 140, -150, 299, -1000])
def test_diagonals(diagonal, t):
    check(*features(150, 300, 48, torch.bfloat16), t=t, positives=Pairs(diagonal=diagonal))


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize(
    "t, b", [(100.0, -10.0), (100.0, 0.0), (1.0, 0.0), (0.0, -40.0), (10.0, 9.0), (300.0, -10.0)]
)
def test_scales_and_biases(t, b, dtype):
    """On both sides of MODERATE_LOGIT."""
    check(*features(700, 600, 48, dtype), t=t, b=b, positives=Pairs(diagonal=0))


@pytest.mark.parametrize("above", [False, True])
def test_tiles_at_the_threshold(above):
    """Every logit of a tile is the largest the short path takes, or one just above it."""
    x, y = features(256, 256, 48, torch.bfloat16)
    x = x[:1].expand(256, 48).contiguous()
    s = (x.double() @ y.double().T).max().item()
    bias = MODERATE_LOGIT.value - 10.0 * s + (1e-3 if above else -1e-3)
    check(x, y, t=10.0, b=bias, positives=Pairs())


@pytest.mark.parametrize("t", [10.0, 0.0])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_nan_and_inf_propagate_as_in_torch(value, t):
    x, y = features(130, 256, 48, torch.bfloat16)
    x[3, 5] = value
    sums, dlogits = run(x, y, t=t, positives=Pairs(diagonal=0))
    softplus, _, exact_dlogits = formula(x, y, t, -10.0, Pairs(diagonal=0), torch.float64)
    assert torch.equal(sums[0].isnan(), softplus.sum().isnan())
    assert torch.equal(dlogits.isnan(), exact_dlogits.isnan())


def test_variants_agree_and_repeat_to_the_bit():
    x, y = features(900, 700, 48, torch.bfloat16)
    at = Pairs(diagonal=-20)
    sums, dlogits = run(x, y, positives=at)
    for _ in range(20):
        again = run(x, y, positives=at)
        assert torch.equal(again[0], sums) and torch.equal(again[1], dlogits)
    alone, none = run(x, y, positives=at, store_dlogits=False)
    assert none is None and torch.equal(alone, sums)
    loss, _ = run(x, y, positives=at, store_dlogits=False, scalar_grads=False)
    torch.testing.assert_close(loss[0], sums[0], rtol=1e-6, atol=0)
    assert torch.equal(run(x, y, positives=at, scalar_grads=False)[1], dlogits)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_the_sweep_over_several_panels(dtype, launches):
    """Panels of unequal sizes, also of one row."""
    inputs = make_inputs(2 * 384 + 1, 2 * 384 + 1, 48, dtype, device="cuda")
    space = TritonPanel.workspace_bytes(PanelSpec(384, 384, dtype, True, True))
    exact = oracle(inputs)
    actual = loss_and_grads(siglip_loss, inputs, backend="triton", workspace_bytes=space)
    assert len(launches) == 9
    TritonPanel.hopper_tiles = 1 << 30  # the fixture puts it back
    expected = loss_and_grads(siglip_loss, inputs, backend="triton", workspace_bytes=space)
    assert len(launches) == 9
    for a, e, x in zip(actual, expected, exact, strict=True):
        assert error(a, x) <= 1.5 * error(e, x) + 1e-6


def test_fp16_gradients_are_scaled():
    assert GRAD_SCALE[torch.float16] > 1
    x, y = features(300, 300, 48, torch.float16)
    check(x, y, t=10.0, b=-20.0, positives=Pairs(diagonal=0))
