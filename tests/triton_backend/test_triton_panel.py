"""The Triton panel kernel against float64, on a GPU or in Triton's interpreter."""

from __future__ import annotations

from support.devices import require_triton_kernels

require_triton_kernels()

from itertools import product

import pytest
import torch

from fused_siglip import siglip_loss
from fused_siglip.kernels import Ids, Pairs, PanelSpec, triton_panel
from fused_siglip.kernels.triton_operands import round_to_tf32
from fused_siglip.kernels.triton_panel import TritonPanel
from fused_siglip.testing.rounding import UNIT_ROUNDOFF
from support.triton_panels import (
    DEVICE,
    DTYPES,
    B,
    T,
    affine,
    agree,
    check,
    features,
    formula,
    run,
)

# NumPy, under the interpreter, warns of the NaN and Inf some tests feed in.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


@pytest.mark.covering(1)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "m, n, d",
    [
        *[(1, 1, 1), (1, 130, 64), (127, 129, 48), (128, 128, 64), (129, 1, 65), (257, 300, 48)],
        *[(127, 384, 48), (384, 127, 48)],  # one row, one column short of tiles off the diagonal
    ],
)
def test_sizes(m, n, d, dtype):
    check(*features(m, n, d, dtype), positives=Pairs(diagonal=0))


@pytest.mark.parametrize("diagonal", [None, 0, 1, -1, 127, 128, -128, 140, -150, 299, 300, -1000])
def test_diagonals(diagonal):
    check(*features(150, 300, 16, torch.float32), positives=Pairs(diagonal=diagonal))


@pytest.mark.covering(1)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("transposed", [(False, True), (True, False)])
def test_strides(transposed, dtype):
    """The kernel is right with any strides, though the sweep copies such features."""
    x, y = features(70, 140, 48, dtype)
    x, y = (
        f.T.contiguous().T if flag else torch.stack((f, f), 1)[:, 1]
        for f, flag in zip((x, y), transposed, strict=True)
    )
    assert x.stride() != (48, 1) and y.stride() != (48, 1)
    check(x, y, positives=Pairs(diagonal=3))
    check(x, y[:, :1].expand(140, 48))


@pytest.mark.parametrize("dtype", DTYPES)
def test_ids_with_repeats_and_padding(dtype):
    m, n = 140, 200
    x, y = features(m, n, 48, dtype)
    generator = torch.Generator().manual_seed(1)
    ids = [torch.randint(-2, 20, (k,), generator=generator).to(DEVICE) for k in (m, n)]
    ids = [torch.where(i > 10, i + 2**40, i) for i in ids]  # int64 in earnest
    check(x, y, positives=Pairs(None, Ids(*ids)))
    clean = run(x, y, positives=Pairs(None, Ids(*ids)))
    x[ids[0] < 0] = torch.nan
    y[ids[1] < 0] = torch.inf
    padded = run(x, y, positives=Pairs(None, Ids(*ids)))
    assert torch.equal(clean[0], padded[0]) and torch.equal(clean[1], padded[1])
    nothing = torch.full((m,), -1, device=DEVICE)
    sums, dlogits = run(x, y, positives=Pairs(None, Ids(nothing, ids[1])))
    assert not sums.any() and not dlogits.any()


@pytest.mark.covering(1)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("t, b", [(100.0, -10.0), (100.0, 0.0), (1.0, 0.0), (0.0, -40.0)])
def test_scales_and_biases(t, b, dtype):
    check(*features(60, 60, 48, dtype), t=t, b=b, positives=Pairs(diagonal=0))


@pytest.mark.parametrize("t, b", [(1e4, 0.0), (-1e4, 1e4), (0.0, 1e30), (0.0, -1e30)])
def test_extreme_logits_are_finite(t, b):
    x, y = features(20, 20, 16, torch.float32)
    sums, dlogits = run(x, y, t, b, Pairs(diagonal=0))
    exact = formula(x, y, t, b, Pairs(diagonal=0), torch.float64)
    torch.testing.assert_close(sums[0].double(), exact[0].sum(), rtol=1e-4, atol=0)
    assert dlogits.abs().max() <= 1 and dlogits.isfinite().all()


@pytest.mark.covering(1)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("shape", [(10, 20), (130, 256)])
def test_nan_and_inf_propagate_as_in_torch(shape, value):
    x, y = features(*shape, 16, torch.float32)
    x[3, 5] = value
    y[7, 5] = 0  # inf * 0
    positives = Pairs(diagonal=0)
    sums, dlogits = run(x, y, positives=positives)
    exact = formula(x, y, T, B, positives, torch.float64)
    for actual, terms in zip(sums.double(), exact, strict=True):
        assert actual.isnan() == terms.sum().isnan() and actual.isinf() == terms.sum().isinf()
    assert torch.equal(dlogits.isnan(), exact[2].isnan())
    torch.testing.assert_close(dlogits[3], exact[2][3], rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("positives", [Pairs(diagonal=-20), "ids"])
def test_variants_agree_and_repeat_to_the_bit(positives):
    x, y = features(150, 260, 48, torch.bfloat16)
    if positives == "ids":
        ids = torch.arange(150, device=DEVICE) % 50, torch.arange(260, device=DEVICE) % 70
        positives = Pairs(None, Ids(*ids))
    sums, dlogits = run(x, y, positives=positives)
    again = run(x, y, positives=positives)
    assert torch.equal(sums, again[0]) and torch.equal(dlogits, again[1])
    forward, none = run(x, y, positives=positives, store_dlogits=False, scalar_grads=False)
    assert none is None and agree(forward[:1], sums[:1]) and forward[1:].tolist() == [7.0, 7.0]
    scalars, none = run(x, y, positives=positives, store_dlogits=False)
    assert none is None and agree(scalars, sums)
    loss, only_dlogits = run(x, y, positives=positives, scalar_grads=False)
    assert agree(loss, forward) and agree(only_dlogits, dlogits, UNIT_ROUNDOFF[x.dtype])


class Spy:
    """A kernel that notes the arguments it is launched with."""

    def __init__(self, kernel):
        self.kernel, self.launches = kernel, []

    def __getitem__(self, grid):
        def launch(*arguments, **options):
            self.launches.append(arguments)
            return self.kernel[grid](*arguments, **options)

        return launch


def off_by_one(tensor):
    """The same values, one element behind an aligned address."""
    return torch.cat([tensor.new_zeros(1), tensor.reshape(-1)])[1:].view(tensor.shape)


@pytest.mark.covering(1)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("ids", [None, "off by one", "every second"])
def test_the_sweep_launches_nothing_at_an_odd_address(monkeypatch, ids, dtype):
    """Those would be other kernels, which read element by element and spill."""
    m, n = 150, 260
    x, y = features(m, n, 48, dtype)
    labels = {}
    if ids is not None:
        labels = {
            "image_ids": torch.arange(m, device=DEVICE) % 50,
            "text_ids": torch.arange(n, device=DEVICE) % 70 - 1,
        }
    options = {"negative_only": ids is None, "backend": "triton"}
    tile = PanelSpec(*TritonPanel.tile, dtype, True, True)
    options["workspace_bytes"] = TritonPanel.workspace_bytes(tile)
    scalars = [torch.tensor(v, device=DEVICE) for v in (T, B)]

    def gradients(x, y, labels):
        leaves = [f.detach().requires_grad_() for f in (x, y)]
        loss = siglip_loss(*leaves, *scalars, **labels, **options)
        return [loss, *torch.autograd.grad(loss, leaves)]

    spy = Spy(triton_panel.panel_kernel)
    monkeypatch.setattr(triton_panel, "panel_kernel", spy)
    expected = gradients(x, y, labels)
    if ids == "off by one":
        labels = {name: off_by_one(values) for name, values in labels.items()}
    elif ids is not None:
        labels = {name: torch.stack([v, v - 1], 1)[:, 0] for name, v in labels.items()}
    for moved in ((off_by_one(x), y), (x, off_by_one(y))):
        assert any(f.data_ptr() % 16 for f in moved)
        actual = gradients(*moved, labels)
        assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))
    tensors = [a for launch in spy.launches for a in launch if isinstance(a, torch.Tensor)]
    assert len(spy.launches) >= 3 * 2 and len(tensors) >= 6 * len(spy.launches)
    assert not any(t.data_ptr() % 16 for t in tensors)


def test_smaller_panels_reuse_the_workspace():
    x, y = features(256, 384, 16, torch.float32)
    panel = TritonPanel(PanelSpec(256, 384, x.dtype, True, True), x.device)
    for m, n in [(256, 384), (100, 384), (256, 130), (1, 1)]:
        sums = torch.empty(3, device=DEVICE)
        dlogits = panel(x[:m], y[:n], affine(), Pairs(diagonal=0), sums)
        fresh = run(x[:m], y[:n], positives=Pairs(diagonal=0))
        assert torch.equal(sums, fresh[0]) and torch.equal(dlogits.double(), fresh[1])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("store_dlogits, scalar_grads", list(product([False, True], repeat=2)))
def test_workspace_bytes(store_dlogits, scalar_grads, dtype):
    for (rows, cols), filters_negatives in product([(128, 256), (100, 300), (1, 1)], [False, True]):
        spec = PanelSpec(rows, cols, dtype, store_dlogits, scalar_grads, filters_negatives)
        panel = TritonPanel(spec, torch.device(DEVICE))
        allocated = sum(t.nbytes for t in vars(panel).values() if isinstance(t, torch.Tensor))
        assert allocated == TritonPanel.workspace_bytes(spec)


def test_tf32_operands_are_rounded_not_cut():
    """To the nearest of 10 bits: half a unit in the last of them at most, in no direction."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1000, 100, generator=generator) * 2.0 ** torch.arange(-50, 50)
    rounded = round_to_tf32(x)
    assert torch.equal(rounded.view(torch.int32) & 0x1FFF, torch.zeros_like(x, dtype=torch.int32))
    error = (rounded.double() - x.double()) / x.abs().double()
    assert error.abs().max() <= 2.0**-11
    assert (error * x.sign()).mean().abs() <= 2.0**-11 / x.numel() ** 0.5
    special = torch.tensor([0.0, -0.0, torch.nan, torch.inf, -torch.inf, 1.0, -3.0])
    same = round_to_tf32(special)
    assert torch.equal(same.nan_to_num(7.0), special.nan_to_num(7.0)) and same[2].isnan()
    half = torch.ones(3, dtype=torch.float16)
    assert round_to_tf32(half) is half


def test_float64_is_refused():
    with pytest.raises(ValueError, match="float64"):
        TritonPanel(PanelSpec(128, 128, torch.float64, True, True), torch.device(DEVICE))
