"""TritonPanel against a float64 oracle, on a GPU or in Triton's interpreter."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import torch

from fused_siglip.kernels import GRAD_SCALE, Pairs, RandomMask, ScoreThreshold
from fused_siglip.kernels.float_keys import HALF, PLACE_BITS, key_to_float
from fused_siglip.testing.rounding import UNIT_ROUNDOFF
from support.devices import HAS_GPU, INTERPRETED

triton = pytest.importorskip("triton")
if not (HAS_GPU or INTERPRETED):
    pytest.skip(
        "the Triton kernels need a GPU or TRITON_INTERPRET=1 in the environment",
        allow_module_level=True,
    )

import triton.language as tl  # noqa: E402

from fused_siglip import siglip_loss  # noqa: E402
from fused_siglip.kernels import triton_panel  # noqa: E402
from fused_siglip.kernels.triton_math import (  # noqa: E402
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
from fused_siglip.kernels.triton_panel import TritonPanel  # noqa: E402

DEVICE = "cpu" if INTERPRETED else "cuda"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
T, B = 10.0, -10.0
# Roundings in softplus and sigmoid; on a device exp2 (to 2^-22) and rsqrt^2 (to 2^-21.4) besides.
FUNCTIONS = 8 if INTERPRETED else 24

# NumPy, under the interpreter, warns of the NaN and Inf some tests feed in.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


def features(m, n, d, dtype, seed=0):
    """Normalised rows, x_i close to y_i."""
    generator = torch.Generator().manual_seed(seed)
    shared = torch.randn(max(m, n), d, generator=generator)
    x, y = (
        torch.nn.functional.normalize(shared[:k] + torch.randn(k, d, generator=generator))
        for k in (m, n)
    )
    return x.to(DEVICE, dtype), y.to(DEVICE, dtype)


def run(x, y, t=T, b=B, positives=Pairs(), store_dlogits=True, scalar_grads=True, kept=None):  # noqa: B008
    """The sums and g (unscaled, float64) of one panel."""
    m, n = x.shape[0], y.shape[0]
    panel = TritonPanel(m, n, x.dtype, x.device, store_dlogits, scalar_grads, kept is not None)
    sums = torch.full((3,), 7.0, device=DEVICE)
    scale, bias = (torch.tensor(v, dtype=torch.float32, device=DEVICE) for v in (t, b))
    g = panel(x, y, scale, bias, positives, sums, kept)
    if g is not None:
        assert g.shape == (m, n) and g.dtype == x.dtype
        g = g.double() / GRAD_SCALE.get(x.dtype, 1.0)
    return sums, g


def pair_masks(x, y, positives, kept=None):
    """(m, n) bool: which pairs are positive, and which take part."""
    i = torch.arange(x.shape[0], device=x.device)[:, None]
    j = torch.arange(y.shape[0], device=x.device)
    positive = torch.zeros(len(x), len(y), dtype=torch.bool, device=x.device)
    valid = ~positive
    if positives.image_ids is not None:
        positive = positives.image_ids[:, None] == positives.text_ids
        valid = (positives.image_ids >= 0)[:, None] & (positives.text_ids >= 0)
    elif positives.diagonal is not None:
        positive = j == i + positives.diagonal
    if isinstance(kept, ScoreThreshold):
        value = placed(x, y, kept.centres.double(), kept.factors.double())
        valid = valid & (positive | ~(value < kept.least[:, None]))
    elif kept is not None:
        valid = valid & (positive | (hashes(kept) < kept.below))
    return positive, valid


def hashes(kept):
    """(m, n) int64: the hash of every pair, in 64 bits, where no product overflows."""
    images, texts = (k.cpu().numpy().view(np.uint32).astype(np.uint64) for k in kept[:2])
    h = images[:, None] ^ texts
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        h = ((h ^ (h >> np.uint64(shift))) * np.uint64(factor)) % np.uint64(2**32)
    return torch.from_numpy(h.astype(np.int64) - (h >= 2**31) * 2**32).to(DEVICE)


def formula(x, y, t, b, positives, dtype, kept=None):
    """Element by element in plain torch: softplus(u), g*s and g; sums are the caller's."""
    s = x.to(dtype) @ y.to(dtype).T
    positive, valid = pair_masks(x, y, positives, kept)
    sign = torch.where(positive, -1.0, 1.0).to(dtype)  # -l
    u = sign * (s * t + b)
    g = torch.where(valid, sign * torch.sigmoid(u), 0)
    softplus = u.clamp(min=0) + torch.log1p(torch.exp(-u.abs()))
    return torch.where(valid, softplus, 0), torch.where(valid, g * s, 0), g


def check(x, y, t=T, b=B, positives=Pairs(), kept=None):  # noqa: B008
    """Against float64. The logits are the source of error: eager fp32 has them rounded as we do.

    g and each term of the sums may deviate by 4 times what eager fp32 deviates at most, plus the
    roundings of fp32 in the functions and, for g, what storing it costs. A sum may deviate by
    that for every term, all in one direction, plus the roundings of adding up.
    """
    sums, g = run(x, y, t, b, positives, kept=kept)
    exact = formula(x, y, t, b, positives, torch.float64, kept)
    eager = formula(x, y, t, b, positives, torch.float32, kept)
    eps = UNIT_ROUNDOFF[torch.float32]
    for actual, e, f in zip(sums.double(), exact, eager, strict=True):
        deviation = (f.double() - e).abs().sum()
        slack = 4 * deviation + (FUNCTIONS + 24) * eps * e.abs().sum()
        assert (actual - e.sum()).abs() <= slack, (actual, e.sum(), slack)
    # relative to each element: a small gradient is held to its own size. The smallest numbers a
    # format has bound that from below.
    deviation = ((eager[2].double() - exact[2]).abs() / exact[2].abs().clamp(min=1e-300)).max()
    tiny = torch.finfo(x.dtype).tiny
    slack = (4 * deviation + FUNCTIONS * eps + UNIT_ROUNDOFF[x.dtype]) * exact[2].abs()
    slack += tiny / GRAD_SCALE.get(x.dtype, 1)
    assert ((g - exact[2]).abs() <= slack).all()
    return g


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
    check(x, y, positives=Pairs(None, *ids))
    clean = run(x, y, positives=Pairs(None, *ids))
    x[ids[0] < 0] = torch.nan
    y[ids[1] < 0] = torch.inf
    padded = run(x, y, positives=Pairs(None, *ids))
    assert torch.equal(clean[0], padded[0]) and torch.equal(clean[1], padded[1])
    nothing = torch.full((m,), -1, device=DEVICE)
    sums, g = run(x, y, positives=Pairs(None, nothing, ids[1]))
    assert not sums.any() and not g.any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("t, b", [(100.0, -10.0), (100.0, 0.0), (1.0, 0.0), (0.0, -40.0)])
def test_scales_and_biases(t, b, dtype):
    check(*features(60, 60, 48, dtype), t=t, b=b, positives=Pairs(diagonal=0))


@pytest.mark.parametrize("t, b", [(1e4, 0.0), (-1e4, 1e4), (0.0, 1e30), (0.0, -1e30)])
def test_extreme_logits_are_finite(t, b):
    x, y = features(20, 20, 16, torch.float32)
    sums, g = run(x, y, t, b, Pairs(diagonal=0))
    exact = formula(x, y, t, b, Pairs(diagonal=0), torch.float64)
    torch.testing.assert_close(sums[0].double(), exact[0].sum(), rtol=1e-4, atol=0)
    assert g.abs().max() <= 1 and g.isfinite().all()


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("shape", [(10, 20), (130, 256)])
def test_nan_and_inf_propagate_as_in_torch(shape, value):
    x, y = features(*shape, 16, torch.float32)
    x[3, 5] = value
    y[7, 5] = 0  # inf * 0
    positives = Pairs(diagonal=0)
    sums, g = run(x, y, positives=positives)
    exact = formula(x, y, T, B, positives, torch.float64)
    for actual, terms in zip(sums.double(), exact, strict=True):
        assert actual.isnan() == terms.sum().isnan() and actual.isinf() == terms.sum().isinf()
    assert torch.equal(g.isnan(), exact[2].isnan())
    torch.testing.assert_close(g[3], exact[2][3], rtol=0, atol=0, equal_nan=True)


def agree(a, b, unit=UNIT_ROUNDOFF[torch.float32]):
    """To the bit in the interpreter; a device's compiler may fuse other operations in each form."""
    if INTERPRETED:
        return torch.equal(a, b)
    return torch.allclose(a, b, rtol=16 * unit, atol=0)


@pytest.mark.parametrize("positives", [Pairs(diagonal=-20), "ids"])
def test_variants_agree_and_repeat_to_the_bit(positives):
    x, y = features(150, 260, 48, torch.bfloat16)
    if positives == "ids":
        positives = Pairs(
            None, torch.arange(150, device=DEVICE) % 50, torch.arange(260, device=DEVICE) % 70
        )
    sums, g = run(x, y, positives=positives)
    again = run(x, y, positives=positives)
    assert torch.equal(sums, again[0]) and torch.equal(g, again[1])
    forward, none = run(x, y, positives=positives, store_dlogits=False, scalar_grads=False)
    assert none is None and agree(forward[:1], sums[:1]) and forward[1:].tolist() == [7.0, 7.0]
    scalars, none = run(x, y, positives=positives, store_dlogits=False)
    assert none is None and agree(scalars, sums)
    loss, only_g = run(x, y, positives=positives, scalar_grads=False)
    assert agree(loss, forward) and agree(only_g, g, UNIT_ROUNDOFF[x.dtype])


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
    options["workspace_bytes"] = TritonPanel.workspace_bytes(*TritonPanel.tile, dtype, True, True)
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
    panel = TritonPanel(256, 384, x.dtype, x.device, True, True)
    scale, bias = (torch.tensor(v, device=DEVICE) for v in (T, B))
    for m, n in [(256, 384), (100, 384), (256, 130), (1, 1)]:
        sums = torch.empty(3, device=DEVICE)
        g = panel(x[:m], y[:n], scale, bias, Pairs(diagonal=0), sums)
        fresh = run(x[:m], y[:n], positives=Pairs(diagonal=0))
        assert torch.equal(sums, fresh[0]) and torch.equal(g.double(), fresh[1])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("store_dlogits, scalar_grads", list(product([False, True], repeat=2)))
def test_workspace_bytes(store_dlogits, scalar_grads, dtype):
    for (rows, cols), filters_negatives in product([(128, 256), (100, 300), (1, 1)], [False, True]):
        panel = TritonPanel(
            rows, cols, dtype, torch.device(DEVICE), store_dlogits, scalar_grads, filters_negatives
        )
        allocated = sum(t.nbytes for t in vars(panel).values() if isinstance(t, torch.Tensor))
        args = (rows, cols, dtype, store_dlogits, scalar_grads, filters_negatives)
        assert allocated == TritonPanel.workspace_bytes(*args)


def test_tf32_operands_are_rounded_not_cut():
    """To the nearest of 10 bits: half a unit in the last of them at most, in no direction."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1000, 100, generator=generator) * 2.0 ** torch.arange(-50, 50)
    rounded = triton_panel.round_to_tf32(x)
    assert torch.equal(rounded.view(torch.int32) & 0x1FFF, torch.zeros_like(x, dtype=torch.int32))
    error = (rounded.double() - x.double()) / x.abs().double()
    assert error.abs().max() <= 2.0**-11
    assert (error * x.sign()).mean().abs() <= 2.0**-11 / x.numel() ** 0.5
    special = torch.tensor([0.0, -0.0, torch.nan, torch.inf, -torch.inf, 1.0, -3.0])
    same = triton_panel.round_to_tf32(special)
    assert torch.equal(same.nan_to_num(7.0), special.nan_to_num(7.0)) and same[2].isnan()
    half = torch.ones(3, dtype=torch.float16)
    assert triton_panel.round_to_tf32(half) is half


def test_float64_is_refused():
    with pytest.raises(ValueError, match="float64"):
        TritonPanel(128, 128, torch.float64, torch.device(DEVICE), True, True)


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
def _softplus_sigmoid_kernel(u_ptr, out_ptr, EASY: tl.constexpr, N: tl.constexpr):
    i = tl.arange(0, N)
    u = tl.load(u_ptr + i)
    if EASY:
        softplus, sigmoid = saturated_softplus_sigmoid(u)
    else:
        softplus, sigmoid = softplus_sigmoid(u)
    tl.store(out_ptr + i, softplus)
    tl.store(out_ptr + N + i, sigmoid)


def softplus_and_sigmoid(u, easy):
    out = torch.empty(2, len(u), device=DEVICE)
    _softplus_sigmoid_kernel[(1,)](u, out, EASY=easy, N=len(u))
    return out


def allowed(u):
    """Relative error of exp(u) with its exponent rounded once, and what follows it.

    That is 4 roundings, and on a device its approximations: exp2 to 2^-22, rsqrt^2 to 2^-21.4.
    """
    after = 4 if INTERPRETED else 16
    return (1.5 * u.double().abs() + after) * UNIT_ROUNDOFF[torch.float32]


@pytest.mark.parametrize("easy", [False, True])
def test_softplus_and_sigmoid(easy):
    top = SATURATED_LOGIT.value if easy else 80.0
    u = torch.cat([torch.linspace(-80, top, 4096 - 3), torch.tensor([-1e30, -torch.inf, top])])
    u = u.to(DEVICE)
    exact = torch.stack([torch.logaddexp(u.double(), u.double() * 0), torch.sigmoid(u.double())])
    exact[:, u == -torch.inf] = 0
    actual = softplus_and_sigmoid(u, easy)
    # below, exp2 may flush what is subnormal
    deviation = (actual - exact).abs() - 2.0**-125
    assert (deviation <= allowed(u.clamp(-128, 0)) * exact).all()
    assert softplus_and_sigmoid(torch.full((16,), torch.nan, device=DEVICE), easy).isnan().all()


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


def one_feature(logits, n):
    """Features whose similarities are these numbers: pair (i, j) has logits[i]."""
    x, y = (torch.zeros(k, 16, device=DEVICE) for k in (len(logits), n))
    x[:, 0], y[:, 0] = logits, 1
    return x, y


@pytest.mark.parametrize("steps", [-1, 0, 1])
def test_a_tile_at_the_threshold(steps):
    """Easy up to and with SATURATED_LOGIT; either path is as exact as the other."""
    largest = torch.tensor(SATURATED_LOGIT.value)
    for _ in range(abs(steps)):
        largest = torch.nextafter(largest, largest + steps)
    logits = torch.linspace(-80, SATURATED_LOGIT.value - 0.01, 128)
    logits[77] = largest
    sums, g = run(*one_feature(logits, 128), t=1.0, b=0.0)
    exact = logits.double().to(DEVICE)
    sigmoid = exact.sigmoid()[:, None]
    assert ((g - sigmoid).abs() <= allowed(exact)[:, None] * sigmoid).all()
    terms = [torch.log1p(exact.exp()), exact.sigmoid() * exact, exact.sigmoid()]
    for actual, t in zip(sums.double(), terms, strict=True):
        assert (actual - 128 * t.sum()).abs() <= 128 * (allowed(exact) * t.abs()).sum()
    if INTERPRETED:  # which path it was: a device may fuse other operations in another kernel
        _, expected = softplus_and_sigmoid(logits, easy=steps <= 0)
        assert torch.equal(g[:, 5].float(), expected)


@pytest.mark.parametrize("t", [1.0, -1.0])
def test_tiles_are_easy_by_their_largest_logit(t):
    """A negative scale turns the order round; a single pair above the threshold counts."""
    for logits in (torch.linspace(-90, 3, 128), torch.linspace(-3, 90, 128)):
        check(*one_feature(logits, 256), t=t, b=0.0)


@pytest.mark.parametrize("value", [torch.nan, -torch.inf])
def test_nan_and_inf_in_an_easy_tile(value):
    logits = torch.full((128,), -20.0)
    logits[3] = value
    sums, g = run(*one_feature(logits, 128), t=1.0, b=0.0)
    assert torch.equal(g[3].isnan(), torch.full((128,), value != value, device=DEVICE))
    assert value != value or not g[3].any()
    assert not g[4:].isnan().any()
    assert sums[0].isnan() == (value != value) and sums[1].isnan()  # 0 * inf, as in torch


# --- negatives that are chosen ---


def by_hash(m, n, keep=0.3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    keys = [torch.randint(-(2**31), 2**31, (k,), generator=generator).int() for k in (m, n)]
    for k in keys:
        k[:1] = -(2**31)
    return RandomMask(*(k.to(DEVICE) for k in keys), round(keep * 2**32) - 2**31)


def by_logit(x, y, keep=0.3):
    """Thresholds in the widest gap near ``keep``: rounding decides about no pair."""
    centre = y.double().mean(0)
    reach = (y.double() - centre).norm(dim=1).max() + centre.norm() / 16
    centres = (x.double() @ centre).float()
    factors = (1 / 1.01 / x.double().norm(dim=1) / reach).float()
    value = placed(x, y, centres.double(), factors.double()).sort(1, descending=True).values
    value = torch.nn.functional.pad(value, (0, 1), value=-1.0)
    near = slice(max(int(keep * len(y)) - 4, 0), int(keep * len(y)) + 4)
    gaps = value[:, :-1] - value[:, 1:]
    widest, at = gaps[:, near].max(1, keepdim=True)
    assert widest.min() > 2**-17
    between = value.gather(1, at + near.start) - widest / 2
    return ScoreThreshold(centres, factors, between[:, 0].float())


def placed(x, y, centres, factors):  # (m, n), (m,), (m,) -> (m, n)
    s = x.to(factors.dtype) @ y.to(factors.dtype).T
    return (s - centres[:, None]) * factors[:, None]


def labels(m, n, low=-2):
    generator = torch.Generator().manual_seed(1)
    ids = [torch.randint(low, 20, (k,), generator=generator).to(DEVICE) for k in (m, n)]
    return Pairs(None, *ids)


POSITIVES = {
    "none": lambda m, n: Pairs(),
    "diagonal": lambda m, n: Pairs(diagonal=-20),
    "ids": labels,
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("positives", POSITIVES)
@pytest.mark.parametrize("choice", ["hash", "logit"])
@pytest.mark.parametrize("b", [-15.0, 0.0], ids=["easy", "plain"])
def test_chosen_negatives(b, choice, positives, dtype):
    x, y = features(150, 300, 48, dtype)
    positives = POSITIVES[positives](150, 300)
    kept = by_hash(150, 300) if choice == "hash" else by_logit(x, y)
    g = check(x, y, b=b, positives=positives, kept=kept)
    _, valid = pair_masks(x, y, positives, kept)
    assert torch.equal(g != 0, valid) and 0.2 < valid.double().mean() < 0.4


@pytest.mark.parametrize("m, n, d", [(1, 1, 1), (127, 129, 48), (129, 1, 16), (128, 256, 16)])
@pytest.mark.parametrize("keep", [0.01, 0.99])
def test_sizes_of_chosen_negatives(m, n, d, keep):
    x, y = features(m, n, d, torch.float32)
    for kept in (by_hash(m, n, keep), by_logit(x, y, keep)):
        check(x, y, positives=Pairs(diagonal=0), kept=kept)


@pytest.mark.parametrize("below", [1 - 2**31, 2**31 - 1])
def test_the_least_and_the_most_that_a_hash_keeps(below):
    x, y = features(130, 130, 16, torch.float32)
    kept = by_hash(130, 130)._replace(below=below)
    g = check(x, y, positives=Pairs(diagonal=0), kept=kept)
    assert (g != 0).sum() == (130 if below < 0 else 130**2)


@pytest.mark.parametrize("choice", ["hash", "logit"])
@pytest.mark.parametrize("positives", ["diagonal", "ids"])
def test_variants_of_a_choice_agree_and_repeat_to_the_bit(positives, choice):
    x, y = features(150, 260, 48, torch.bfloat16)
    positives = POSITIVES[positives](150, 260)
    kept = by_hash(150, 260) if choice == "hash" else by_logit(x, y)
    sums, g = run(x, y, positives=positives, kept=kept)
    again = run(x, y, positives=positives, kept=kept)
    assert torch.equal(sums, again[0]) and torch.equal(g, again[1])
    scalars, none = run(x, y, positives=positives, store_dlogits=False, kept=kept)
    assert none is None and agree(scalars, sums)
    forward, _ = run(x, y, positives=positives, store_dlogits=False, scalar_grads=False, kept=kept)
    assert agree(forward[:1], sums[:1]) and forward[1:].tolist() == [7.0, 7.0]


def test_nan_is_dropped_by_a_hash_and_kept_by_a_logit():
    x, y = features(130, 140, 16, torch.float32)
    kept = by_hash(130, 140), by_logit(x, y)
    x[3] = torch.nan
    (sums, g), (_, by_value) = (run(x, y, kept=k) for k in kept)
    assert torch.equal(g[3].isnan(), hashes(kept[0])[3] < kept[0].below) and sums[0].isnan()
    assert by_value[3].isnan().all()
    assert not g[4:].isnan().any() and not by_value[4:].isnan().any()
    none_of_it = kept[0]._replace(below=-(2**31))  # keeps nothing
    sums, g = run(x, y, kept=none_of_it)
    assert sums.tolist() == [0, 0, 0] and not g.any()


# Whole rows of tiles in which only positives can be kept, and the others' negatives by their logit.
TILED = 300, 420  # 3 x 4 tiles


def tiled_choice(x, y):
    kept = by_logit(x, y)
    kept.least[128:256] = 2.0**20
    return kept


def panel_of(x, y, positives, kept, rows=None, cols=None):
    """A panel after its call, and g; its workspace held other numbers before."""
    panel = TritonPanel(rows or len(x), cols or len(y), x.dtype, x.device, True, True, True)
    panel.g.fill_(torch.nan)
    panel.flags.fill_(-1)
    panel.lists.fill_(-1)
    scale, bias = (torch.tensor(v, device=DEVICE) for v in (T, B))
    return panel, panel(x, y, scale, bias, positives, torch.empty(3, device=DEVICE), kept)


def tiles_kept(x, y, positives, kept):  # (tile rows, tile columns) bool
    _, valid = pair_masks(x, y, positives, kept)
    m, n = valid.shape
    whole = torch.zeros(-(-m // 128) * 128, -(-n // 128) * 128, dtype=torch.bool, device=x.device)
    whole[:m, :n] = valid
    return whole.unflatten(1, (-1, 128)).unflatten(0, (-1, 128)).any(3).any(1)


@pytest.mark.parametrize("positives", POSITIVES)
def test_flags_tell_which_tiles_hold_what_is_kept(positives):
    x, y = features(*TILED, 16, torch.float32)
    positives = POSITIVES[positives](*TILED)
    if positives.image_ids is not None:
        positives.image_ids[128:256] += 20 * (positives.text_ids[128:].max() >= 0)
        positives.text_ids[256:384] = -1
    kept = tiled_choice(x, y)
    panel, _ = panel_of(x, y, positives, kept)
    expected = tiles_kept(x, y, positives, kept)
    assert expected.any() and not expected.all()
    assert torch.equal(panel.flags.view(3, 4), expected.int())
    x[140] = torch.nan
    panel, _ = panel_of(x, y, positives, kept)
    expected[1] = True
    if positives.image_ids is not None:
        expected[:, 2] = False
    assert torch.equal(panel.flags.view(3, 4), expected.int())


def check_product(panel, g, other, transposed, alpha=0.5):
    """Against float64; added to what is in out, or overwriting it."""
    a = (g.T if transposed else g).double()
    out = torch.randn(len(a), other.shape[1], device=DEVICE)
    exact = alpha * a @ other.double()
    # a rounding for every term, none of the products of half operands; and for the last sum
    slack = alpha * (a.shape[1] + 4) * (a.abs() @ other.double().abs())
    added = out.clone()
    panel.add_product(added, g, other, alpha, False, transposed)
    eps = UNIT_ROUNDOFF[torch.float32]
    assert ((added - (out.double() + exact)).abs() <= eps * (slack + 2 * out.abs())).all()
    fresh = torch.full_like(out, torch.nan)
    panel.add_product(fresh, g, other, alpha, True, transposed)
    assert ((fresh - exact).abs() <= eps * slack).all()
    again = torch.full_like(out, torch.nan)
    panel.add_product(again, g, other, alpha, True, transposed)
    assert torch.equal(again, fresh)
    return fresh


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("positives", POSITIVES)
@pytest.mark.parametrize("transposed", [False, True])
def test_products(transposed, positives, dtype):
    x, y = features(*TILED, 48, dtype)
    panel, g = panel_of(x, y, POSITIVES[positives](*TILED), tiled_choice(x, y))
    assert panel.skips
    other = x if transposed else y
    wide = torch.cat([other, torch.full_like(other[:, :8], torch.nan)], 1)
    check_product(panel, g, wide[:, :48], transposed)  # rows further apart than they are long
    check_product(panel, g, other.T.contiguous().T, transposed)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("positives", ["diagonal", "ids"])
@pytest.mark.parametrize("transposed", [False, True])
def test_products_where_the_library_has_none(transposed, positives, dtype):
    """Of half operands into fp32, as on ROCm: all tiles, whatever lies beyond the last pair."""
    m, n = 130, 200
    x, y = features(m, n, 48, dtype)
    panel = TritonPanel(256, 384, dtype, x.device, True, True)
    panel.library = False
    panel.g.fill_(torch.nan)
    scale, bias = (torch.tensor(v, device=DEVICE) for v in (T, B))
    g = panel(x, y, scale, bias, POSITIVES[positives](m, n), torch.empty(3, device=DEVICE))
    check_product(panel, g, x if transposed else y, transposed)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("m, n, d", [(1, 1, 1), (130, 257, 200), (257, 1, 16), (128, 128, 128)])
def test_products_of_smaller_panels_in_the_same_workspace(m, n, d, transposed):
    x, y = features(m, n, d, torch.float32)
    panel, g = panel_of(x, y, labels(m, n), by_hash(m, n, 5e-4), rows=384, cols=512)
    assert panel.skips
    check_product(panel, g, x if transposed else y, transposed)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("transposed", [False, True])
def test_a_tile_in_which_nothing_is_kept_is_not_read(transposed, dtype):
    x, y = features(*TILED, 48, dtype)
    kept = tiled_choice(x, y)
    panel, g = panel_of(x, y, Pairs(diagonal=0), kept)
    flags = tiles_kept(x, y, Pairs(diagonal=0), kept)
    assert flags.tolist() == [[True] * 4, [False, True, False, False], [True] * 4]
    other = x if transposed else y
    clean = check_product(panel, g, other, transposed)
    whole = panel.g.unflatten(1, (-1, 128)).unflatten(0, (-1, 128))  # a view
    whole[1, :, 0] = whole[1, :, 2:] = torch.nan
    planted = torch.full_like(clean, torch.nan)
    panel.add_product(planted, g, other, 0.5, True, transposed)
    assert torch.equal(planted, clean)
    if transposed:  # images of the second row of tiles meet texts of the second column alone
        other = other.clone()
        other[128:256] = torch.nan
        panel.add_product(planted, g, other, 0.5, True, transposed)
        assert torch.equal(
            planted.isnan().all(1).nonzero()[:, 0], torch.arange(128, 256).to(DEVICE)
        )
        assert torch.equal(planted[:128], clean[:128]) and torch.equal(planted[256:], clean[256:])


@pytest.mark.parametrize("transposed", [False, True])
def test_no_tile_is_looked_for_among_many_random_pairs(transposed):
    """The product is then the library's, which does not take lists."""
    x, y = features(*TILED, 48, torch.float32)
    panel, g = panel_of(x, y, Pairs(diagonal=0), by_hash(*TILED, 2e-3), rows=384, cols=512)
    assert not panel.skips and panel.flags.view(-1)[:12].all()
    check_product(panel, g, x if transposed else y, transposed)
    assert (panel.lists == -1).all()


@pytest.mark.parametrize("transposed", [False, True])
def test_a_product_of_nothing(transposed):
    x, y = features(*TILED, 48, torch.float32)
    panel, g = panel_of(x, y, Pairs(), by_hash(*TILED)._replace(below=-(2**31)))
    assert not panel.flags.any() and not g.any()
    out = torch.full((TILED[transposed], 48), 3.0, device=DEVICE)
    other = torch.full((TILED[not transposed], 48), torch.nan, device=DEVICE)
    panel.add_product(out, g, other, 1.0, False, transposed)
    assert (out == 3).all()
    panel.add_product(out, g, other, 1.0, True, transposed)
    assert (out == 0).all()


# --- counting ---


def whole_numbers(m, n, d, dtype):
    """Features whose similarities are whole numbers, exact in every dtype."""
    generator = torch.Generator().manual_seed(2)
    return (torch.randint(-3, 4, (k, d), generator=generator).to(DEVICE, dtype) for k in (m, n))


def places(x, y, centres, factors):
    """(m, n): the place of every pair in [0, 2^20), by its definition."""
    value = placed(x, y, centres, factors).cpu().numpy()
    mantissa, exponent = np.frexp(np.abs(value).astype(np.float64))  # in [1/2, 1): exponents +1
    magnitude = (exponent + 30) * 2**14 + np.floor((2 * mantissa - 1) * 2**14)
    magnitude = np.where(value == 0, 0, np.clip(magnitude, 0, HALF - 1)).astype(np.int64)
    return HALF + np.where(value < 0, -1 - magnitude, magnitude)


def histogram(bins, counted, size):
    return np.stack(
        [np.bincount(row[mask], minlength=size) for row, mask in zip(bins, counted, strict=True)]
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("positives", POSITIVES)
@pytest.mark.parametrize("factor", [4e-3, -2e-3, 2.0], ids=["up", "down", "past the range"])
def test_counts(factor, positives, dtype):
    m, n = 150, 300
    x, y = whole_numbers(m, n, 48, dtype)
    positives = POSITIVES[positives](m, n)
    units = torch.linspace(-9, 9, m), torch.linspace(factor, 0.9 * factor, m)
    units = tuple(of_images.to(DEVICE) for of_images in units)
    panel = TritonPanel(m, n, dtype, torch.device(DEVICE), False, False, True)
    q = places(x, y, *units)
    positive, valid = (mask.cpu().numpy() for mask in pair_masks(x, y, positives))
    left = PLACE_BITS
    for step, bits in enumerate(TritonPanel.count_bits):
        known, inside = None, valid & ~positive
        if step > 0:
            known = (q >> left)[:, 7]
            known[10:20] = -1  # no bits
            inside = inside & (q >> left == known[:, None])
            known = torch.from_numpy(known).int().to(DEVICE)
        left -= bits
        counts = torch.full((m, 2**bits), 5, dtype=torch.int32, device=DEVICE)
        panel.count(x, y, positives, *units, known, step, counts)
        expected = histogram(q >> left & 2**bits - 1, inside, 2**bits)
        assert inside.any() and np.array_equal(counts.cpu().numpy(), 5 + expected)
    assert left == 0


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_threshold_keeps_what_was_counted(dtype):
    """Similarities that are not exact: the panel kernel rounds them as the counting one did."""
    x, y = features(140, 200, 48, dtype)
    *units, least = by_logit(x, y)
    panel = TritonPanel(140, 200, dtype, torch.device(DEVICE), False, False, True)
    counts = torch.zeros(140, 32, dtype=torch.int32, device=DEVICE)
    panel.count(x, y, Pairs(diagonal=0), *units, None, 0, counts)
    assert (counts.sum(1) == 199).all()
    for first in (0, 15, 16, 30):
        least = torch.full_like(least, first * 2**PLACE_BITS // 32, dtype=torch.int64)
        least = key_to_float(least, torch.float32)
        _, g = run(
            x, y, t=1.0, b=0.0, positives=Pairs(diagonal=0), kept=ScoreThreshold(*units, least)
        )
        assert torch.equal((g != 0).sum(1), 1 + counts[:, first:].sum(1))


def test_nan_counts_as_the_largest():
    x, y = features(10, 20, 16, torch.float32)
    *units, _ = by_logit(x, y)
    x[3] = torch.nan
    panel = TritonPanel(10, 20, x.dtype, x.device, False, False, True)
    counts = torch.zeros(10, 32, dtype=torch.int32, device=DEVICE)
    panel.count(x, y, Pairs(), *units, None, 0, counts)
    assert counts[3, -1] == 20 and (counts.sum(1) == 20).all()


def test_a_bin_may_hold_all_texts_of_a_tile():
    """128 of them in a byte of the tally, also in the one with the sign of its word."""
    x, y = one_feature(torch.linspace(-1, 1, 40), 256)
    units = (torch.zeros(40, device=DEVICE), torch.ones(40, device=DEVICE))
    panel = TritonPanel(40, 256, x.dtype, x.device, False, False, True)
    counts = torch.zeros(40, 32, dtype=torch.int32, device=DEVICE)
    panel.count(x, y, Pairs(), *units, None, 0, counts)
    assert counts.max(1).values.eq(256).all() and counts.count_nonzero(0)[[3, 31]].eq(0).sum() < 2
