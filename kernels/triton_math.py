"""Device functions that the Triton kernels share: log-sigmoid, selection of negatives, subtiles."""

import torch
import triton
import triton.language as tl
from triton.language.extra import libdevice

from . import float_keys

_LOG2_E = tl.constexpr(1.4426950216293335)  # rounded to fp32
_LOG2_E_REST = tl.constexpr(1.9259630e-8)  # what the rounding cut off

_HALF = tl.constexpr(float_keys.HALF)
_SHIFT, _OFFSET = (tl.constexpr(number) for number in float_keys.key_format(torch.float32))


@triton.jit
def log1p_unit(e):
    """log(1 + e) for fp32 e in [0, 1], to 1.5 ulp with fused multiply-add and 2 ulp without."""
    # log1p(e) = e + e^2 Q(e). Q has degree 7: a Remez exchange in double precision on the relative
    # error of the whole expression over [0, 1] (3.3e-8), its coefficients rounded to fp32 one by
    # one from the lowest, the rest refitted after each. The leading e is exact, so tiny e lose
    # nothing, and no libdevice call is needed.
    q = 5.365446675568819e-3
    q = q * e - 3.006836213171482e-2
    q = q * e + 7.920888066291809e-2
    q = q * e - 1.375418901443481e-1
    q = q * e + 1.915384829044342e-1
    q = q * e - 2.485721707344055e-1
    q = q * e + 3.332132995128632e-1
    q = q * e - 4.999964833259583e-1
    return e * e * q + e


@triton.jit
def _exp(u):
    """exp(u) for fp32 u <= 0, without bias: the only error is that of rounding the exponent."""
    # exp2 and rsqrt become one instruction each on CUDA; exp and division add range checks that
    # cannot matter here and double the special-function part of the epilogue.
    # With log2(e) rounded, every value would err upwards, by 1.3e-7 at u = -10, and sums would add
    # that up. The rest goes into the same rounding as the product: so it counts on average.
    return tl.exp2(tl.fma(u, _LOG2_E, u * _LOG2_E_REST))


@triton.jit
def softplus_sigmoid(u):
    """softplus(u) and sigmoid(u), its derivative, from one exponential; u fp32 of any shape."""
    e = _exp(-tl.abs(u))  # NaN where u is NaN, and so are both results
    softplus = tl.maximum(u, 0.0) + log1p_unit(e)
    r = tl.rsqrt(1.0 + e)  # r^2 is as exact as Triton's own fp32 division, 2^-22
    sigmoid = tl.where(u >= 0, 1.0, e) * (r * r)
    return softplus, sigmoid


# Below it softplus and sigmoid are short polynomials in exp(u).
SATURATED_LOGIT = tl.constexpr(-4.5)


@triton.jit
def saturated_softplus_sigmoid(u):
    """softplus_sigmoid where every u is at most SATURATED_LOGIT, in half the operations."""
    # softplus = e (1 + e (a0 + a1 e)), sigmoid = e (1 + e (b0 + b1 e)), e in [0, exp(-4.5)]:
    # minimax on the relative error, 1.3e-8 and 5.2e-8, coefficients rounded to fp32 as above.
    e = _exp(u)
    softplus = e * (e * (0.32950472831726074 * e - 0.4999868869781494)) + e
    sigmoid = e * (e * (0.9847315549850464 * e - 0.9999477863311768)) + e
    return softplus, sigmoid


# Up to it 1 + exp(u) of eight pairs can be multiplied: (1 + exp(10))^8 is 5.5e34.
MODERATE_LOGIT = tl.constexpr(10.0)


@triton.jit
def moderate_exp(u):
    """exp(u) where every u is at most MODERATE_LOGIT."""
    return _exp(u)


@triton.jit
def larger(a, b):
    """The larger of two, NaN where one is NaN."""
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def four_sigmoids(e0, e1, e2, e3):
    """sigmoid(u) of four pairs from their exp(u), by one reciprocal: special functions are scarce.

    1 / (w0 w1 w2 w3) times three of the w is the reciprocal of the fourth.
    """
    w0 = 1.0 + e0
    w1 = 1.0 + e1
    w2 = 1.0 + e2
    w3 = 1.0 + e3
    w01 = w0 * w1
    w23 = w2 * w3
    r = tl.rsqrt(w01 * w23)
    r = r * r
    r01 = r * w23
    r23 = r * w01
    return e0 * (r01 * w1), e1 * (r01 * w0), e2 * (r23 * w3), e3 * (r23 * w2)


@triton.jit
def join_exps(a, b):
    """(1 + a)(1 + b) - 1, so that log1p of it is log1p(a) + log1p(b): one logarithm for several."""
    return a * b + (a + b)


@triton.jit
def log1p_wide(e):
    """log(1 + e) for fp32 e >= 0: to 1.5 ulp up to 1, to 2^-22 of itself beyond."""
    # a logarithm of 1 + e alone would lose what 1 + e rounds off, which is most of a small e
    return tl.where(e <= 1.0, log1p_unit(e), libdevice.fast_log2f(1.0 + e) * 0.6931471805599453)


@triton.jit
def pair_hash(image_keys, text_keys):
    """int32 hash of pairs (fused_siglip/selection/hashing.py) from int32 keys that broadcast."""
    h = image_keys.to(tl.uint32, bitcast=True) ^ text_keys.to(tl.uint32, bitcast=True)
    h ^= h >> 16  # of uint32: zeros come in from the left
    h *= 0x7FEB352D
    h ^= h >> 15
    h *= 0x846CA68B
    return h.to(tl.int32, bitcast=True)


@triton.jit
def normalized_score(s, center, inv_radius):
    """What thresholds are compared with: the same bits whenever they are found or applied."""
    return (s - center[:, None]) * inv_radius[:, None]


@triton.jit
def float_key(value):
    """fp32 to int32 in [0, 2^KEY_BITS): see float_keys.py."""
    bits = tl.abs(value).to(tl.int32, bitcast=True)
    magnitude = tl.minimum(tl.maximum((bits >> _SHIFT) - _OFFSET, 0), _HALF - 1)
    return tl.where(value < 0, ~magnitude, magnitude) + _HALF


@triton.jit
def byte_counts(bins, counted, WORDS: tl.constexpr, FIRST: tl.constexpr = 0):
    """How many of a row's ``counted`` elements are in bin 4 w + k: byte k of word FIRST + w.

    bins int32, counted bool, of shape (m, n), n < 256; returns WORDS int32 of shape (m,).
    """
    if WORDS == 1:
        # one of the word's bytes: no byte can reach the next, and the sign bit is a bit like others
        one = tl.where(counted & (bins >> 2 == FIRST), 1 << (bins % 4 * 8), 0)
        return (tl.sum(one, 1),)
    else:
        lower = byte_counts(bins, counted, WORDS // 2, FIRST)
        return lower + byte_counts(bins, counted, WORDS // 2, FIRST + WORDS // 2)


@triton.jit
def added(a, b):
    """The sums of two tuples' elements."""
    if len(a) == 1:
        return (a[0] + b[0],)
    else:
        return (a[0] + b[0],) + added(a[1:], b[1:])  # noqa: RUF005 (Triton cannot unpack)


@triton.jit
def column_subtiles(s, SUBTILES: tl.constexpr):
    """``s`` cut into SUBTILES column blocks, left to right, without leaving registers."""
    if SUBTILES == 1:
        return (s,)
    else:
        halves = tl.reshape(s, (s.shape[0], 2, s.shape[1] // 2))
        left, right = tl.split(tl.permute(halves, (0, 2, 1)))
        return column_subtiles(left, SUBTILES // 2) + column_subtiles(right, SUBTILES // 2)
