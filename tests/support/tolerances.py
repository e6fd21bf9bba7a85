"""The float64 oracle, errors against it, and how large they may be."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from fused_siglip.testing import eager_siglip_loss
from fused_siglip.testing.pair_terms import without_padding
from fused_siglip.testing.rounding import UNIT_ROUNDOFF, excess, rounding_errors
from support.expected_negatives import masks_for_negatives
from support.inputs import NAMES, Inputs, loss_and_grads


def oracle(inputs: Inputs, **options) -> list[Tensor | None]:
    """Of float64: 0 is what padding holds, which may be NaN, since autograd would carry that on."""
    inputs = inputs.to(torch.float64)
    for side in ("image", "text"):
        ids = inputs.ids.get(f"{side}_ids")
        features = getattr(inputs, f"{side}_features")
        features.detach().copy_(without_padding(features.detach(), ids))
    weights = {
        name: without_padding(w.double(), inputs.ids.get(name.replace("weights", "ids")))
        for name, w in inputs.weights.items()
    }
    return loss_and_grads(eager_siglip_loss, replace(inputs, weights=weights), **options)


def error(actual: Tensor, exact: Tensor) -> float:
    """Largest deviation, relative to the largest exact element (so that 1/B cancels)."""
    if exact.numel() == 0:
        return 0.0
    difference = (actual.double() - exact).abs().max()
    return (difference / exact.abs().max().clamp(min=torch.finfo(torch.float64).tiny)).item()


def error_ratios(
    actual: list[Tensor | None],
    inputs: Inputs,
    *,
    g_dtype: torch.dtype | None = None,
    **options,
) -> dict[str, float]:
    """By output, how much of the error that rounding may cause there is against float64."""
    options, with_rounding = masks_for_negatives(inputs, options)
    exact = oracle(inputs, **options)
    errors = rounding_errors(
        *inputs.tensors(), **inputs.ids, **inputs.weights, g_dtype=g_dtype, **with_rounding
    )
    found = {}
    for name, a, x, e in zip(("loss", *NAMES), actual, exact, errors, strict=True):
        if x is None:
            assert a is None, f"{name}: a gradient nobody asked for"
            continue
        assert a.shape == x.shape, name
        found[name] = excess(a, x, e)
    return found


def conditions(inputs: Inputs, exact: list[Tensor | None], **options) -> list[float]:
    """How much relative errors of the terms of [loss, dX, dY, dt, db] grow in their sums: the sum
    of absolute terms over the largest absolute sum."""
    x, y, t, b = (tensor.detach().double() for tensor in inputs.tensors())
    z = (t * x @ y.T + b).requires_grad_()
    identity = torch.eye(y.shape[0], dtype=torch.float64, device=y.device)
    (dlogits,) = torch.autograd.grad(
        eager_siglip_loss(z, identity, 1.0, **inputs.ids, **options), z
    )
    dlogits = dlogits.abs()
    absolute = [
        t.abs() * dlogits @ y.abs(),
        t.abs() * dlogits.T @ x.abs(),
        (dlogits * (x @ y.T).abs()).sum(),
        dlogits.sum(),
    ]
    grown = [1.0]
    for terms, total in zip(absolute, exact[1:], strict=True):
        largest = 0.0 if total is None or total.numel() == 0 else total.abs().max().item()
        grown.append(terms.max().item() / largest if largest else 1.0)
    return grown


def assert_as_exact_as_eager(actual: list[Tensor | None], inputs: Inputs, **options) -> None:
    """Hold loss and gradients to float64, within the error of the eager loss in the same dtype.

    Twice that error, since both are a draw of rounding errors; and never less than two roundings of
    the result plus what rounding z once does to exp(z) and to the sums of it, since a single number
    can be exact by luck. On a GPU exp2 and rsqrt are approximations besides (8 roundings at most),
    which do not cancel where all pairs are alike. In float64 the oracle is eager, so what is
    allowed is eager's error in float32, scaled.
    """
    exact = oracle(inputs, **options)
    dtype = inputs.image_features.dtype
    measured_in = torch.float32 if dtype == torch.float64 else dtype
    largest_z = (inputs.logit_scale.abs() + inputs.logit_bias.abs()).item()
    approximations = 8 if inputs.image_features.is_cuda else 0
    unit = UNIT_ROUNDOFF[torch.promote_types(dtype, torch.float32)]
    rounding_terms = (largest_z + approximations) * unit
    shrink = UNIT_ROUNDOFF[dtype] / UNIT_ROUNDOFF[measured_in]
    eager = loss_and_grads(eager_siglip_loss, inputs.to(measured_in), **options)
    exact_there = oracle(inputs.to(measured_in), **options)
    grown = conditions(inputs, exact, **options)
    for name, a, e, there, x, growth in zip(
        ("loss", *NAMES), actual, eager, exact_there, exact, grown, strict=True
    ):
        if x is None:
            assert a is None, f"{name}: a gradient nobody asked for"
            continue
        assert a.shape == x.shape, name
        floor = 2 * UNIT_ROUNDOFF[a.dtype] + rounding_terms * growth
        allowed = max(2 * shrink * error(e, there), floor)
        assert error(a, x) <= allowed, f"{name}: {error(a, x):.2e}, allowed {allowed:.2e}"
