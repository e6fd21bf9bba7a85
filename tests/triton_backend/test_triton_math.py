"""Device functions of the Triton kernels, and the tiles that take a shorter path."""

from __future__ import annotations

from support.devices import require_triton_kernels

require_triton_kernels()


import pytest
import torch
import triton
import triton.language as tl

from fused_siglip.kernels.triton_math import (
    MODERATE_LOGIT,
    SATURATED_LOGIT,
    four_sigmoids,
    join_exps,
    larger,
    log1p_unit,
    log1p_wide,
    moderate_exp,
    saturated_softplus_sigmoid,
    softplus_sigmoid,
)
from fused_siglip.testing.rounding import UNIT_ROUNDOFF
from support.devices import INTERPRETED
from support.triton_panels import (
    DEVICE,
    check,
    one_feature,
    run,
)

# NumPy, under the interpreter, warns of the NaN and Inf some tests feed in.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


@triton.jit
def _log1p_kernel(e_ptr, out_ptr, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + i, log1p_unit(tl.load(e_ptr + i)))


def test_log1p_relative_error():
    block, blocks = 4096, 64
    half = block * blocks // 2
    e = torch.cat([torch.linspace(0, 1, half), torch.logspace(-37, 0, half)]).to(DEVICE)
    out = torch.empty_like(e)
    _log1p_kernel[(blocks,)](e, out, BLOCK=block)
    exact = torch.log1p(e.double())
    worst = ((out - exact).abs() / exact.clamp(min=1e-300)).max().item()
    # 3.3e-8 of the polynomial; the rounding of e^2 Q without fused multiply-add makes up the rest
    assert worst <= 2.8 * UNIT_ROUNDOFF[torch.float32]


@triton.jit
def _softplus_sigmoid_kernel(u_ptr, out_ptr, SATURATED: tl.constexpr, N: tl.constexpr):
    i = tl.arange(0, N)
    u = tl.load(u_ptr + i)
    if SATURATED:
        softplus, sigmoid = saturated_softplus_sigmoid(u)
    else:
        softplus, sigmoid = softplus_sigmoid(u)
    tl.store(out_ptr + i, softplus)
    tl.store(out_ptr + N + i, sigmoid)


def softplus_and_sigmoid(u, saturated):
    out = torch.empty(2, len(u), device=DEVICE)
    _softplus_sigmoid_kernel[(1,)](u, out, SATURATED=saturated, N=len(u))
    return out


def allowed(u):
    """Relative error of exp(u) with its exponent rounded once, and what follows it.

    That is 4 roundings, and on a device its approximations: exp2 to 2^-22, rsqrt^2 to 2^-21.4.
    """
    after = 4 if INTERPRETED else 16
    return (1.5 * u.double().abs() + after) * UNIT_ROUNDOFF[torch.float32]


@pytest.mark.parametrize("saturated", [False, True])
def test_softplus_and_sigmoid(saturated):
    top = SATURATED_LOGIT.value if saturated else 80.0
    u = torch.cat([torch.linspace(-80, top, 4096 - 3), torch.tensor([-1e30, -torch.inf, top])])
    u = u.to(DEVICE)
    exact = torch.stack([torch.logaddexp(u.double(), u.double() * 0), torch.sigmoid(u.double())])
    exact[:, u == -torch.inf] = 0
    actual = softplus_and_sigmoid(u, saturated)
    # below, exp2 may flush what is subnormal
    deviation = (actual - exact).abs() - 2.0**-125
    assert (deviation <= allowed(u.clamp(-128, 0)) * exact).all()
    assert (
        softplus_and_sigmoid(torch.full((16,), torch.nan, device=DEVICE), saturated).isnan().all()
    )


@triton.jit
def _moderate_kernel(u_ptr, out_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    e0 = moderate_exp(tl.load(u_ptr + i))
    e1 = moderate_exp(tl.load(u_ptr + N + i))
    e2 = moderate_exp(tl.load(u_ptr + 2 * N + i))
    e3 = moderate_exp(tl.load(u_ptr + 3 * N + i))
    g0, g1, g2, g3 = four_sigmoids(e0, e1, e2, e3)
    four = join_exps(join_exps(e0, e1), join_exps(e2, e3))
    tl.store(out_ptr + i, e0)
    tl.store(out_ptr + N + i, e1)
    tl.store(out_ptr + 2 * N + i, e2)
    tl.store(out_ptr + 3 * N + i, e3)
    tl.store(out_ptr + 4 * N + i, g0)
    tl.store(out_ptr + 5 * N + i, g1)
    tl.store(out_ptr + 6 * N + i, g2)
    tl.store(out_ptr + 7 * N + i, g3)
    tl.store(out_ptr + 8 * N + i, join_exps(four, four))


def test_functions_of_moderate_logits():
    """Exponentials, each sigmoid of four, and eight joined, up to where eight would overflow."""
    top, n = MODERATE_LOGIT.value, 4096
    u = torch.linspace(-80, top, n)
    u = torch.stack([u, u.flip(0), u.roll(n // 3), u[:: n // 64].repeat_interleave(n // 64)])
    u[:, 0], u[:, 1] = top, torch.tensor([top, -torch.inf, top, -80.0])
    u = u.to(DEVICE)
    out = torch.empty(9, n, device=DEVICE)
    _moderate_kernel[(1,)](u, out, N=n)
    e, sigmoids, eight = out[:4].double(), out[4:8], out[8]
    assert ((e - u.double().exp()).abs() - 2.0**-125 <= allowed(u.clamp(min=-128)) * e).all()
    eps = UNIT_ROUNDOFF[torch.float32]
    exact = e / (1 + e)
    # 10 roundings, and rsqrt^2 on a device
    after = 10 if INTERPRETED else 18
    assert ((sigmoids - exact).abs() - 2.0**-125 <= after * eps * exact).all()
    exact = torch.expm1(2 * e.log1p().sum(0))
    assert eight.isfinite().all() and ((eight - exact).abs() <= 9 * eps * exact).all()


@triton.jit
def _log1p_wide_kernel(e_ptr, out_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(out_ptr + i, log1p_wide(tl.load(e_ptr + i)))


@pytest.mark.skipif(INTERPRETED, reason="no libdevice there: see test_gluon_panel.py")
def test_log1p_wide():
    e = torch.cat([torch.linspace(0, 2, 2048), torch.logspace(-37, 34.7, 2048)]).to(DEVICE)
    out = torch.empty_like(e)
    _log1p_wide_kernel[(1,)](e, out, N=len(e))
    exact = torch.log1p(e.double())
    # beyond 1: two units of the logarithm, and the roundings of its argument and of the product
    slack = torch.where(e <= 1, 2.8, 8.0) * UNIT_ROUNDOFF[torch.float32] * exact
    assert ((out - exact).abs() <= slack).all()


@triton.jit
def _largest_kernel(x_ptr, out_ptr, N: tl.constexpr):
    tl.store(out_ptr, tl.reduce(tl.load(x_ptr + tl.arange(0, N)), 0, larger))


@pytest.mark.parametrize("at", [0, 1, 77, 127, None])
def test_nan_is_the_largest(at):
    x = torch.linspace(-3, 90, 128)
    x[-1] = torch.inf
    if at is not None:
        x[at] = torch.nan
    largest = torch.empty(1, device=DEVICE)
    _largest_kernel[(1,)](x.to(DEVICE), largest, N=128)
    assert largest.isnan() == (at is not None) and (at is not None or largest.isinf())


@pytest.mark.parametrize("steps", [-1, 0, 1])
def test_a_tile_at_the_threshold(steps):
    """Easy up to and with SATURATED_LOGIT; either path is as exact as the other."""
    largest = torch.tensor(SATURATED_LOGIT.value)
    for _ in range(abs(steps)):
        largest = torch.nextafter(largest, largest + steps)
    logits = torch.linspace(-80, SATURATED_LOGIT.value - 0.01, 128)
    logits[77] = largest
    sums, dlogits = run(*one_feature(logits, 128), t=1.0, b=0.0)
    exact = logits.double().to(DEVICE)
    sigmoid = exact.sigmoid()[:, None]
    assert ((dlogits - sigmoid).abs() <= allowed(exact)[:, None] * sigmoid).all()
    terms = [torch.log1p(exact.exp()), exact.sigmoid() * exact, exact.sigmoid()]
    for actual, t in zip(sums.double(), terms, strict=True):
        assert (actual - 128 * t.sum()).abs() <= 128 * (allowed(exact) * t.abs()).sum()
    if INTERPRETED:  # which path it was: a device may fuse other operations in another kernel
        _, expected = softplus_and_sigmoid(logits, saturated=steps <= 0)
        assert torch.equal(dlogits[:, 5].float(), expected)


@pytest.mark.parametrize("t", [1.0, -1.0])
def test_tiles_are_saturated_by_their_largest_logit(t):
    """A negative scale turns the order round; a single pair above the threshold counts."""
    for logits in (torch.linspace(-90, 3, 128), torch.linspace(-3, 90, 128)):
        check(*one_feature(logits, 256), t=t, b=0.0)


@pytest.mark.parametrize("value", [torch.nan, -torch.inf])
def test_nan_and_inf_in_an_easy_tile(value):
    logits = torch.full((128,), -20.0)
    logits[3] = value
    sums, dlogits = run(*one_feature(logits, 128), t=1.0, b=0.0)
    assert torch.equal(dlogits[3].isnan(), torch.full((128,), value != value, device=DEVICE))
    assert value != value or not dlogits[3].any()
    assert not dlogits[4:].isnan().any()
    assert sums[0].isnan() == (value != value) and sums[1].isnan()  # 0 * inf, as in torch
