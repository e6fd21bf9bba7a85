"""The torch backend on a CPU: strips, low logits four at a time, sums from products."""

import pytest
import torch

from fused_siglip import siglip_loss
from fused_siglip.kernels import Affine, Pairs, PanelSpec
from fused_siglip.kernels.torch_panel import GROUPED_LOGIT, TorchPanel
from fused_siglip.spec import Execution
from fused_siglip.sweep import GradBuffers, sweep
from support.inputs import loss_and_grads, make_inputs
from support.tolerances import error_ratios


@pytest.fixture
def grouped_strips(monkeypatch):
    """How many strips took the short path."""
    seen = []
    grouped_strip = TorchPanel._grouped_strip

    def spy(self, z, diagonal):
        seen.append(z.shape)
        return grouped_strip(self, z, diagonal)

    monkeypatch.setattr(TorchPanel, "_grouped_strip", spy)
    return seen


@pytest.mark.covering(1)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("d", [8, 1100], ids=["N > D", "N < D"])
@pytest.mark.parametrize(
    "t,b,saturated", [(10, -11.1, 3), (100, -101.1, 3), (10, -10, None), (100, -10, 0)]
)
def test_within_the_rounding_bound(grouped_strips, t, b, saturated, d, dtype):
    """1044 pairs square: strips of 251 rows. Logits up to the limit, from both sides."""
    inputs = make_inputs(1044, 1044, d, dtype, t=t, b=b)
    actual = loss_and_grads(siglip_loss, inputs)
    found = error_ratios(actual, inputs, g_dtype=torch.promote_types(dtype, torch.float32))
    assert max(found.values()) <= 1, found
    assert saturated is None or (
        len(grouped_strips) >= saturated if saturated else not grouped_strips
    )


@pytest.mark.parametrize("negative_only", [False, True])
@pytest.mark.parametrize("d", [1, 8])
def test_equal_terms_are_the_worst_of_sums(grouped_strips, d, negative_only):
    """All pairs alike, at the limit: every rounding goes the same way."""
    x = torch.full((1000, d), d**-0.5)
    inputs = make_inputs(1000, 1000, d, t=1.37, b=GROUPED_LOGIT - 1.371)
    inputs.image_features, inputs.text_features = (x.clone().requires_grad_() for _ in range(2))
    actual = loss_and_grads(siglip_loss, inputs, negative_only=negative_only)
    found = error_ratios(actual, inputs, negative_only=negative_only)
    assert max(found.values()) <= 1, found
    assert grouped_strips


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
