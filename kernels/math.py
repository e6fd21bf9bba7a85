"""Device mathematics of the log-sigmoid, shared by the Triton kernels."""

import triton
import triton.language as tl

_LOG2_E = tl.constexpr(1.4426950216293335)  # rounded to fp32
_LOG2_E_REST = tl.constexpr(1.3350e-8)  # ln 2 times what the rounding cut off


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
def softplus_sigmoid(u):
    """softplus(u) and sigmoid(u), its derivative, from one exponential; u fp32 of any shape."""
    # exp2 and rsqrt become one instruction each on CUDA; exp and division add range checks that
    # cannot matter here (e is in [0, 1]) and double the special-function part of the epilogue.
    # rsqrt(v)^2 is as exact as Triton's own fp32 division, 2^-22.
    a = tl.abs(u)
    e = tl.exp2(-a * _LOG2_E)  # NaN where u is NaN, and so are both results
    # Without the rest every e errs upwards, by 1.3e-7 at u = -10: sums would add that up.
    e -= e * tl.minimum(a, 128.0) * _LOG2_E_REST  # the minimum: not 0 * inf
    softplus = tl.maximum(u, 0.0) + log1p_unit(e)
    r = tl.rsqrt(1.0 + e)
    sigmoid = tl.where(u >= 0, 1.0, e) * (r * r)
    return softplus, sigmoid
