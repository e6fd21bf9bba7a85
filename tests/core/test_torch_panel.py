"""The torch backend on a CPU: strips, four pairs at a time, sums from products."""

import pytest
import torch

from fused_siglip import siglip_loss
from fused_siglip.kernels import Affine, Pairs, PanelSpec
from fused_siglip.kernels.torch_panel import GROUPED, TorchPanel
from fused_siglip.spec import Execution
from fused_siglip.sweep import GradBuffers, sweep
from fused_siglip.testing import eager_siglip_loss
from support.inputs import loss_and_grads, make_inputs
from support.tolerances import error_ratios


@pytest.fixture
def grouped_strips(monkeypatch):
    """Of every large strip, whether its pairs could be taken four at a time."""
    seen = []
    grouped = TorchPanel._grouped

    def spy(self, u):
        loss = grouped(self, u)
        if u.numel() >= GROUPED:
            seen.append(loss is not None)
        return loss

    monkeypatch.setattr(TorchPanel, "_grouped", spy)
    return seen


@pytest.mark.covering(1)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("d", [8, 1100], ids=["N > D", "N < D"])
@pytest.mark.parametrize(
    "t,b,fit",
    [
        (10, -11.1, {True}),
        (10, -10, {True}),
        (100, -101.1, None),
        (100, -10, None),
        (100, 150, {False}),
    ],
)
def test_within_the_rounding_bound(grouped_strips, t, b, fit, d, dtype):
    """1044 pairs square: strips of 251 rows. e^(4 * 50) does not fit float32."""
    inputs = make_inputs(1044, 1044, d, dtype, t=t, b=b)
    actual = loss_and_grads(siglip_loss, inputs)
    found = error_ratios(actual, inputs, g_dtype=torch.promote_types(dtype, torch.float32))
    assert max(found.values()) <= 1, found
    assert len(grouped_strips) >= 3
    assert fit is None or dtype == torch.float64 or set(grouped_strips) == fit


@pytest.mark.parametrize("negative_only", [False, True])
@pytest.mark.parametrize("d", [1, 8])
@pytest.mark.parametrize("b", [-11.371, -2.371, -1.371, 18.629])
def test_equal_terms_are_the_worst_of_sums(grouped_strips, b, d, negative_only):
    """All pairs alike, up to where four of them just fit: every rounding goes the same way."""
    x = torch.full((1000, d), d**-0.5)
    inputs = make_inputs(1000, 1000, d, t=1.37, b=b)
    inputs.image_features, inputs.text_features = (x.clone().requires_grad_() for _ in range(2))
    actual = loss_and_grads(siglip_loss, inputs, negative_only=negative_only)
    found = error_ratios(actual, inputs, negative_only=negative_only)
    assert max(found.values()) <= 1, found
    assert all(grouped_strips) and grouped_strips


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_passes_through_as_in_torch(grouped_strips, value):
    inputs = make_inputs(600, 600, 8)
    with torch.no_grad():
        inputs.image_features[3, 2] = value
    actual = loss_and_grads(siglip_loss, inputs)
    expected = loss_and_grads(eager_siglip_loss, inputs)
    assert False in grouped_strips
    exact = loss_and_grads(eager_siglip_loss, inputs.to(torch.float64))
    for ours, theirs, wide in zip(actual, expected, exact, strict=True):
        assert torch.equal(ours.isfinite(), theirs.isfinite())
        finite = theirs.isfinite()
        if finite.any():  # a sum of 600 terms: a few roundings of the largest
            few = 8 * torch.finfo(torch.float32).eps * wide[finite].abs().max()
            assert (ours - wide)[finite].abs().max() <= few


@pytest.mark.parametrize("frozen", ["none", "images", "texts"])
@pytest.mark.parametrize("adds", [False, True])
def test_scale_gradient_from_either_product(frozen, adds):
    """Of many panels, and beside what a ring's earlier texts left in dX."""
    inputs = make_inputs(400, 300, 16, torch.float64)
    x, y, t, b = (v.detach() for v in inputs.tensors())

    def sums(grad_x, grad_y, add_to_grad_x=False):
        out = GradBuffers(grad_x, grad_y, True, add_to_grad_x, factor=0.37)
        return sweep(x, y, Affine(t, b), Pairs(0), out, Execution("torch", 1 << 18)).sum(1)

    expected = sums(None, None)  # a pass over the pairs
    actual = sums(
        None if frozen == "images" else torch.ones_like(x),
        None if frozen == "texts" else torch.ones_like(y),
        adds,
    )
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=0)


def test_rounded_products_do_not_give_the_scale_gradient():
    """Below "highest" the products may round dlogits, so that the sum takes a pass of its own."""
    panels = []
    for precision in ("highest", "high"):
        torch.set_float32_matmul_precision(precision)
        try:
            panel = TorchPanel(
                PanelSpec(64, 64, torch.float32, True, True, wide=True), torch.device("cpu")
            )
            panels.append(panel.dscale_from_products)
        finally:
            torch.set_float32_matmul_precision("highest")
    assert panels == [True, False]


def test_no_product_with_a_scale_of_0_hides_nan():
    inputs = make_inputs(20, 20, 8, t=0.0)
    with torch.no_grad():
        inputs.image_features[3, 2] = torch.nan
    assert siglip_loss(*inputs.tensors()).isnan()


def test_backward_of_the_loss_itself_takes_the_saved_memory():
    inputs = make_inputs(40, 40, 8)
    loss = siglip_loss(*inputs.tensors())
    saved = loss.grad_fn.saved_tensors[1]
    grads = torch.autograd.grad(loss, inputs.tensors())
    assert grads[0].data_ptr() == saved.data_ptr()
