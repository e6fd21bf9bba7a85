"""Loss and all four gradients against float64, for every backend, dtype, size and label kind."""

import pytest
import torch

from fused_siglip import siglip_loss
from fused_siglip.kernels.torch_products import add_product
from fused_siglip.testing import eager_siglip_loss
from support.devices import HAS_GPU
from support.inputs import NAMES, loss_and_grads, make_inputs, one_tile
from support.tolerances import assert_as_exact_as_eager, error, oracle

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def skip_float64_on_triton(backend, dtype):
    if backend == "triton" and dtype == torch.float64:
        pytest.skip("triton has no float64")


@pytest.mark.covering(1)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [(1, 1, 1), (5, 5, 3), (64, 64, 64), (200, 200, 33)], ids=str)
def test_diagonal(backend, device, dtype, size):
    skip_float64_on_triton(backend, dtype)
    inputs = make_inputs(*size, dtype, device=device)
    actual = loss_and_grads(siglip_loss, inputs, backend=backend)
    assert actual[0].dtype == torch.promote_types(dtype, torch.float32)
    assert_as_exact_as_eager(actual, inputs)


@pytest.mark.covering(1)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("m,n", [(1, 7), (300, 140), (129, 257)])
def test_ids_that_repeat_and_pad_over_many_panels(backend, device, dtype, m, n):
    skip_float64_on_triton(backend, dtype)
    inputs = make_inputs(m, n, 40, dtype, ids=True, device=device)
    workspace = one_tile(backend, dtype, device)
    actual = loss_and_grads(siglip_loss, inputs, backend=backend, workspace_bytes=workspace)
    assert_as_exact_as_eager(actual, inputs)


@pytest.mark.parametrize("ids", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_negative_only_and_reductions(backend, device, ids, reduction):
    inputs = make_inputs(150, 90, 48, ids=ids, device=device)
    options = {"negative_only": True, "reduction": reduction}
    actual = loss_and_grads(siglip_loss, inputs, backend=backend, **options)
    assert_as_exact_as_eager(actual, inputs, **options)


@pytest.mark.covering(2)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("scale", [False, True])
@pytest.mark.parametrize("text", [False, True])
@pytest.mark.parametrize("image", [False, True])
def test_every_subset_of_inputs_that_require_grad(backend, device, image, text, scale, bias):
    requires_grad = (image, text, scale, bias)
    inputs = make_inputs(140, 140, 16, requires_grad=requires_grad, device=device)
    workspace = one_tile(backend, torch.float32, device)
    actual = loss_and_grads(siglip_loss, inputs, backend=backend, workspace_bytes=workspace)
    assert_as_exact_as_eager(actual, inputs)


@pytest.mark.covering(1)
@pytest.mark.parametrize(
    "t,b", [(100.0, -10.0), (1.0, 0.0), (1000.0, -500.0), (0.0, -1.0), (-5.0, 3.0)]
)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16), ids=str)
def test_scales_and_biases_from_tame_to_extreme(backend, device, dtype, t, b):
    inputs = make_inputs(140, 140, 48, dtype, t=t, b=b, device=device)
    actual = loss_and_grads(siglip_loss, inputs, backend=backend)
    assert_as_exact_as_eager(actual, inputs)


def test_well_fitted_pairs_keep_their_relative_precision(backend, device):
    """Pairs with a large logit have tiny losses: softplus(z) - z would lose them."""
    eye = torch.eye(32, device=device)
    inputs = make_inputs(32, 32, 32, t=40.0, b=-20.0, device=device)
    inputs.image_features = eye.clone().requires_grad_()
    inputs.text_features = eye.clone().requires_grad_()
    actual = loss_and_grads(siglip_loss, inputs, backend=backend)
    exact = oracle(inputs)
    assert exact[0] < 1e-6
    for a, x in zip(actual, exact, strict=True):
        assert error(a, x) < 1e-5


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_strides(backend, device, dtype):
    plain = make_inputs(90, 90, 40, dtype, device=device)
    expected = loss_and_grads(siglip_loss, plain, backend=backend)
    x, y = plain.image_features.detach(), plain.text_features.detach()
    layouts = {
        "transposed": (x.T.contiguous().T, y.T.contiguous().T),
        "columns of a wider matrix": tuple(
            torch.cat([v, v], dim=1)[:, : v.shape[1]] for v in (x, y)
        ),
        "every second row": tuple(v.repeat_interleave(2, dim=0)[::2] for v in (x, y)),
        "every second column": tuple(v.repeat_interleave(2, dim=1)[:, ::2] for v in (x, y)),
    }
    for name, (x_view, y_view) in layouts.items():
        plain.image_features, plain.text_features = (
            v.detach().requires_grad_() for v in (x_view, y_view)
        )
        assert plain.image_features.stride() == x_view.stride()
        actual = loss_and_grads(siglip_loss, plain, backend=backend)
        for a, e in zip(actual, expected, strict=True):
            torch.testing.assert_close(a, e, msg=lambda m, name=name: f"{name}: {m}")


def test_expanded_features(backend, device):
    inputs = make_inputs(70, 70, 8, device=device)
    inputs.text_features = inputs.text_features.detach()[:1].expand(70, 8)
    actual = loss_and_grads(siglip_loss, inputs, backend=backend)
    assert_as_exact_as_eager(actual, inputs)


@pytest.mark.covering(1)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("tiles", [1, 2, 5, 1000])
def test_any_cut_into_panels(backend, device, dtype, tiles):
    inputs = make_inputs(300, 300, 48, dtype, device=device)
    workspace = tiles * one_tile(backend, dtype, device)
    actual = loss_and_grads(siglip_loss, inputs, backend=backend, workspace_bytes=workspace)
    assert_as_exact_as_eager(actual, inputs)


@pytest.mark.covering(1)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("ids", [False, True], ids=["diagonal", "ids"])
def test_a_last_panel_of_one_row_and_column(backend, device, dtype, ids):
    """A product whose output is one row may be another routine of the library."""
    skip_float64_on_triton(backend, dtype)
    size = 2 * 128 + 1
    inputs = make_inputs(size, size, 40, dtype, ids=ids, device=device)
    workspace = one_tile(backend, dtype, device)
    actual = loss_and_grads(siglip_loss, inputs, backend=backend, workspace_bytes=workspace)
    assert_as_exact_as_eager(actual, inputs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("m, k", [(1, 128), (128, 1), (1, 1)])
def test_products_of_one_row_do_not_read_what_memory_held(device, dtype, m, k):
    a, b = (torch.randn(*shape).to(device, dtype) for shape in ((m, k), (k, 48)))
    out = torch.full((m + 1, 48), torch.nan, device=device)
    out = out.to(torch.promote_types(dtype, torch.float32))
    exact = 0.5 * a.double() @ b.double()
    add_product(out[:m], a, b, 0.5, accumulate=False)
    for factor in (1, 2):
        assert error(out[:m], factor * exact) <= 2 * k * torch.finfo(out.dtype).eps
        assert out[m:].isnan().all()
        add_product(out[:m], a, b, 0.5, accumulate=True)


def test_same_inputs_same_bits(backend, device):
    inputs = make_inputs(300, 300, 64, torch.bfloat16, device=device)
    first = loss_and_grads(siglip_loss, inputs, backend=backend)
    for _ in range(1 if device == "cpu" and backend == "triton" else 5):
        again = loss_and_grads(siglip_loss, inputs, backend=backend)
        assert all(torch.equal(a, f) for a, f in zip(again, first, strict=True))


def test_padding_changes_nothing_whatever_it_holds(backend, device):
    plain = make_inputs(100, 80, 16, ids=True, device=device)
    plain.ids = {name: ids.clamp(min=0) for name, ids in plain.ids.items()}
    expected = loss_and_grads(siglip_loss, plain, backend=backend)
    padded = make_inputs(130, 140, 16, device=device)
    padded.ids = {
        name: torch.nn.functional.pad(ids, (0, extra), value=-3)
        for (name, ids), extra in zip(plain.ids.items(), (30, 60), strict=True)
    }
    for name, rows in (("image_features", 100), ("text_features", 80)):
        values = torch.full_like(getattr(padded, name), torch.nan)
        values[:rows] = getattr(plain, name)
        setattr(padded, name, values.detach().requires_grad_())
    actual = loss_and_grads(siglip_loss, padded, backend=backend)
    assert torch.all(actual[1][100:] == 0) and torch.all(actual[2][80:] == 0)
    actual[1], actual[2] = actual[1][:100], actual[2][:80]
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e)


def test_nothing_but_padding(backend, device):
    inputs = make_inputs(3, 4, 8, device=device)
    inputs.ids = {"image_ids": torch.full((3,), -1), "text_ids": torch.arange(4)}
    inputs.ids = {name: ids.to(device) for name, ids in inputs.ids.items()}
    assert all(torch.all(v == 0) for v in loss_and_grads(siglip_loss, inputs, backend=backend))


@pytest.mark.parametrize("m,n", [(0, 0), (0, 5), (5, 0)])
def test_empty_batch(backend, device, m, n):
    inputs = make_inputs(m, n, 8, device=device)
    options = {"negative_only": m != n}
    actual = loss_and_grads(siglip_loss, inputs, backend=backend, **options)
    assert [v.shape for v in actual] == [(), (m, 8), (n, 8), (), ()]
    assert all(torch.all(v == 0) for v in actual)


@pytest.mark.covering(1)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, in the interpreter
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("name", NAMES)
def test_nan_and_inf_pass_through_as_in_eager(backend, device, name, value):
    inputs = make_inputs(140, 140, 8, device=device)
    with torch.no_grad():
        getattr(inputs, name).view(-1)[-1] = value
    actual = loss_and_grads(siglip_loss, inputs, backend=backend)
    eager = loss_and_grads(eager_siglip_loss, inputs)
    for part, a, e in zip(("loss", *NAMES), actual, eager, strict=True):
        if name == "logit_scale" and abs(value) == torch.inf and part.startswith("logit"):
            continue  # sum g*s and sum g are finite at infinite t; eager's chain rule has inf * 0
        finite = torch.isfinite(a) & ~torch.isfinite(e)
        assert not finite.any(), f"{part} is finite where eager's is not"


@pytest.mark.parametrize("t", [10.0, 100.0])
def test_bf16_gradients_err_by_hardly_more_than_their_own_rounding(backend, device, t):
    """Logits are never rounded to bf16: at t = 100 that alone is most of eager's error."""
    size = 256 if backend == "triton" and not HAS_GPU else 1024  # the interpreter is slow
    inputs = make_inputs(size, size, 768, torch.bfloat16, t=t, device=device)
    exact = oracle(inputs)
    actual = loss_and_grads(siglip_loss, inputs, backend=backend)
    eager = loss_and_grads(eager_siglip_loss, inputs.to(torch.bfloat16))
    for k in (1, 2):
        rms = [
            ((v.double() - exact[k]).norm() / exact[k].norm()).item()
            for v in (actual[k], eager[k], exact[k].to(torch.bfloat16))
        ]
        fused, by_eager, one_rounding = rms
        assert fused <= 1.4 * one_rounding
        if t == 100.0:
            assert 3 * fused <= by_eager


def test_fp16_gradients_of_easy_negatives_are_not_lost(backend, device):
    """g is near 4.5e-5, subnormal in fp16; panels in fp16 are scaled by a power of two."""
    inputs = make_inputs(256, 256, 64, torch.float16, device=device)
    options = {"negative_only": True, "reduction": "sum"}
    actual = loss_and_grads(siglip_loss, inputs, backend=backend, **options)
    exact = oracle(inputs, **options)
    for a, x in zip(actual[1:3], exact[1:3], strict=True):
        rounded_once = (x.to(torch.float16).double() - x).norm()
        assert (a.double() - x).norm() <= 1.6 * rounded_once


def test_gradcheck_in_float64():
    for ids in (False, True):
        inputs = make_inputs(7, 7, 4, torch.float64, ids=ids, t=3.0, b=-1.0)

        def loss(*tensors, ids=inputs.ids):
            return siglip_loss(*tensors, **ids)

        assert torch.autograd.gradcheck(loss, inputs.tensors())
