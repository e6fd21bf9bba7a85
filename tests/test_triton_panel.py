"""TritonPanel against a float64 oracle, on a GPU or in Triton's interpreter."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from conftest import HAS_GPU, INTERPRETED

from fused_siglip.kernels import GRAD_SCALE, Positives
from fused_siglip.rounding import UNIT_ROUNDOFF

triton = pytest.importorskip("triton")
if not (HAS_GPU or INTERPRETED):
    pytest.skip(
        "the Triton kernels need a GPU or TRITON_INTERPRET=1 in the environment",
        allow_module_level=True,
    )

import triton.language as tl  # noqa: E402

from fused_siglip.kernels.math import (  # noqa: E402
    EASY_LOGIT,
    easy_softplus_sigmoid,
    log1p_unit,
    softplus_sigmoid,
)
from fused_siglip.kernels.panel_triton import TritonPanel  # noqa: E402

DEVICE = "cpu" if INTERPRETED else "cuda"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
T, B = 10.0, -10.0

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


def run(x, y, t=T, b=B, positives=Positives(), write_g=True, scalar_grads=True):  # noqa: B008
    """The sums and g (unscaled, float64) of one panel."""
    m, n = x.shape[0], y.shape[0]
    panel = TritonPanel(m, n, x.dtype, x.device, write_g, scalar_grads)
    sums = torch.full((3,), 7.0, device=DEVICE)
    scale, bias = (torch.tensor(v, dtype=torch.float32, device=DEVICE) for v in (t, b))
    g = panel(x, y, scale, bias, positives, sums)
    if g is not None:
        assert g.shape == (m, n) and g.dtype == x.dtype
        g = g.double() / GRAD_SCALE.get(x.dtype, 1.0)
    return sums, g


def formula(x, y, t, b, positives, dtype):
    """Element by element in plain torch: softplus(u), g*s and g; sums are the caller's."""
    s = x.to(dtype) @ y.to(dtype).T
    i = torch.arange(x.shape[0], device=x.device)[:, None]
    j = torch.arange(y.shape[0], device=x.device)
    positive = torch.zeros_like(s, dtype=torch.bool)
    valid = ~positive
    if positives.image_ids is not None:
        positive = positives.image_ids[:, None] == positives.text_ids
        valid = (positives.image_ids >= 0)[:, None] & (positives.text_ids >= 0)
    elif positives.diagonal is not None:
        positive = j == i + positives.diagonal
    sign = torch.where(positive, -1.0, 1.0).to(dtype)  # -l
    u = sign * (s * t + b)
    g = torch.where(valid, sign * torch.sigmoid(u), 0)
    softplus = u.clamp(min=0) + torch.log1p(torch.exp(-u.abs()))
    return torch.where(valid, softplus, 0), torch.where(valid, g * s, 0), g


def check(x, y, t=T, b=B, positives=Positives()):  # noqa: B008
    """Against float64. The logits are the source of error: eager fp32 has them rounded as we do.

    g and each term of the sums may deviate by 4 times what eager fp32 deviates at most, plus 4
    roundings of fp32 in the functions and, for g, what storing it costs. A sum may deviate by
    that for every term, all in one direction, plus the roundings of adding up.
    """
    sums, g = run(x, y, t, b, positives)
    exact = formula(x, y, t, b, positives, torch.float64)
    eager = formula(x, y, t, b, positives, torch.float32)
    eps = UNIT_ROUNDOFF[torch.float32]
    for actual, e, f in zip(sums.double(), exact, eager, strict=True):
        deviation = (f.double() - e).abs().sum()
        slack = 4 * deviation + 32 * eps * e.abs().sum()
        assert (actual - e.sum()).abs() <= slack, (actual, e.sum(), slack)
    # relative to each element: a small gradient is held to its own size. The smallest numbers a
    # format has bound that from below.
    deviation = ((eager[2].double() - exact[2]).abs() / exact[2].abs().clamp(min=1e-300)).max()
    tiny = torch.finfo(x.dtype).tiny
    slack = (4 * deviation + 8 * eps + UNIT_ROUNDOFF[x.dtype]) * exact[2].abs()
    slack += tiny / GRAD_SCALE.get(x.dtype, 1)
    assert ((g - exact[2]).abs() <= slack).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "m, n, d",
    [(1, 1, 1), (1, 130, 64), (127, 129, 32), (128, 128, 48), (129, 1, 65), (257, 300, 40)],
)
def test_sizes(m, n, d, dtype):
    check(*features(m, n, d, dtype), positives=Positives(diagonal=0))


@pytest.mark.parametrize("diagonal", [None, 0, 1, -1, 127, 128, -128, 140, -150, 299, 300, -1000])
def test_diagonals(diagonal):
    check(*features(150, 300, 16, torch.float32), positives=Positives(diagonal=diagonal))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("transposed", list(product([False, True], repeat=2)))
def test_strides(transposed, dtype):
    x, y = features(70, 140, 48, dtype)
    x, y = (
        f.T.contiguous().T if flag else torch.stack((f, f), 1)[:, 1]
        for f, flag in zip((x, y), transposed, strict=True)
    )
    assert x.stride() != (48, 1) and y.stride() != (48, 1)
    check(x, y, positives=Positives(diagonal=3))
    check(x.flip(0).expand(70, 48), y[:, :1].expand(140, 48))


@pytest.mark.parametrize("dtype", DTYPES)
def test_ids_with_repeats_and_padding(dtype):
    m, n = 140, 200
    x, y = features(m, n, 32, dtype)
    generator = torch.Generator().manual_seed(1)
    ids = [torch.randint(-2, 20, (k,), generator=generator).to(DEVICE) for k in (m, n)]
    ids = [torch.where(i > 10, i + 2**40, i) for i in ids]  # int64 in earnest
    check(x, y, positives=Positives(None, *ids))
    clean = run(x, y, positives=Positives(None, *ids))
    x[ids[0] < 0] = torch.nan
    y[ids[1] < 0] = torch.inf
    padded = run(x, y, positives=Positives(None, *ids))
    assert torch.equal(clean[0], padded[0]) and torch.equal(clean[1], padded[1])
    nothing = torch.full((m,), -1, device=DEVICE)
    sums, g = run(x, y, positives=Positives(None, nothing, ids[1]))
    assert not sums.any() and not g.any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("t, b", [(100.0, -10.0), (100.0, 0.0), (1.0, 0.0), (0.0, -40.0)])
def test_scales_and_biases(t, b, dtype):
    check(*features(60, 60, 64, dtype), t=t, b=b, positives=Positives(diagonal=0))


@pytest.mark.parametrize("t, b", [(1e4, 0.0), (-1e4, 1e4), (0.0, 1e30), (0.0, -1e30)])
def test_extreme_logits_are_finite(t, b):
    x, y = features(20, 20, 16, torch.float32)
    sums, g = run(x, y, t, b, Positives(diagonal=0))
    exact = formula(x, y, t, b, Positives(diagonal=0), torch.float64)
    torch.testing.assert_close(sums[0].double(), exact[0].sum(), rtol=1e-4, atol=0)
    assert g.abs().max() <= 1 and g.isfinite().all()


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("shape", [(10, 20), (130, 256)])
def test_nan_and_inf_propagate_as_in_torch(shape, value):
    x, y = features(*shape, 16, torch.float32)
    x[3, 5] = value
    y[7, 5] = 0  # inf * 0
    positives = Positives(diagonal=0)
    sums, g = run(x, y, positives=positives)
    exact = formula(x, y, T, B, positives, torch.float64)
    for actual, terms in zip(sums.double(), exact, strict=True):
        assert actual.isnan() == terms.sum().isnan() and actual.isinf() == terms.sum().isinf()
    assert torch.equal(g.isnan(), exact[2].isnan())
    torch.testing.assert_close(g[3], exact[2][3], rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("positives", [Positives(diagonal=-20), "ids"])
def test_variants_agree_and_repeat_to_the_bit(positives):
    x, y = features(150, 260, 32, torch.bfloat16)
    if positives == "ids":
        positives = Positives(
            None, torch.arange(150, device=DEVICE) % 50, torch.arange(260, device=DEVICE) % 70
        )
    sums, g = run(x, y, positives=positives)
    again = run(x, y, positives=positives)
    assert torch.equal(sums, again[0]) and torch.equal(g, again[1])
    forward, none = run(x, y, positives=positives, write_g=False, scalar_grads=False)
    assert none is None and forward.tolist() == [sums[0].item(), 7.0, 7.0]
    scalars, none = run(x, y, positives=positives, write_g=False)
    assert none is None and torch.equal(scalars, sums)
    only_g = run(x, y, positives=positives, scalar_grads=False)
    assert only_g[0].tolist() == forward.tolist() and torch.equal(only_g[1], g)


def test_smaller_panels_reuse_the_workspace():
    x, y = features(256, 384, 16, torch.float32)
    panel = TritonPanel(256, 384, x.dtype, x.device, True, True)
    scale, bias = (torch.tensor(v, device=DEVICE) for v in (T, B))
    for m, n in [(256, 384), (100, 384), (256, 130), (1, 1)]:
        sums = torch.empty(3, device=DEVICE)
        g = panel(x[:m], y[:n], scale, bias, Positives(diagonal=0), sums)
        fresh = run(x[:m], y[:n], positives=Positives(diagonal=0))
        assert torch.equal(sums, fresh[0]) and torch.equal(g.double(), fresh[1])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("write_g, scalar_grads", list(product([False, True], repeat=2)))
def test_workspace_bytes(write_g, scalar_grads, dtype):
    for rows, cols in [(128, 256), (100, 300), (1, 1)]:
        panel = TritonPanel(rows, cols, dtype, torch.device(DEVICE), write_g, scalar_grads)
        allocated = sum(t.nbytes for t in vars(panel).values() if isinstance(t, torch.Tensor))
        args = (rows, cols, dtype, write_g, scalar_grads)
        assert allocated == TritonPanel.workspace_bytes(*args)


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
        softplus, sigmoid = easy_softplus_sigmoid(u)
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
    top = EASY_LOGIT.value if easy else 80.0
    u = torch.cat([torch.linspace(-80, top, 4096 - 3), torch.tensor([-1e30, -torch.inf, top])])
    u = u.to(DEVICE)
    exact = torch.stack([torch.logaddexp(u.double(), u.double() * 0), torch.sigmoid(u.double())])
    exact[:, u == -torch.inf] = 0
    actual = softplus_and_sigmoid(u, easy)
    # below, exp2 may flush what is subnormal
    deviation = (actual - exact).abs() - 2.0**-125
    assert (deviation <= allowed(u.clamp(-128, 0)) * exact).all()
    assert softplus_and_sigmoid(torch.full((16,), torch.nan, device=DEVICE), easy).isnan().all()


def one_feature(logits, n):
    """Features whose similarities are these numbers: pair (i, j) has logits[i]."""
    x, y = (torch.zeros(k, 16, device=DEVICE) for k in (len(logits), n))
    x[:, 0], y[:, 0] = logits, 1
    return x, y


@pytest.mark.parametrize("steps", [-1, 0, 1])
def test_a_tile_at_the_threshold(steps):
    """Easy up to and with EASY_LOGIT; either path is as exact as the other."""
    largest = torch.tensor(EASY_LOGIT.value)
    for _ in range(abs(steps)):
        largest = torch.nextafter(largest, largest + steps)
    logits = torch.linspace(-80, EASY_LOGIT.value - 0.01, 128)
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
