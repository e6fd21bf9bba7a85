"""What rounding may do to the loss and its gradients: tolerance of the tests and the self-check."""

from __future__ import annotations

import torch
from torch import Tensor

from ..kernels import GRAD_SCALE, accumulate_dtype

UNIT_ROUNDOFF = {
    torch.float64: 2.0**-53,
    torch.float32: 2.0**-24,
    torch.float16: 2.0**-11,
    torch.bfloat16: 2.0**-8,
}


@torch.no_grad()
def rounding_errors(  # noqa: PLR0913, the arguments of siglip_loss and more
    image_features: Tensor,  # (M, D)
    text_features: Tensor,  # (N, D)
    logit_scale: Tensor,  # one element
    logit_bias: Tensor,  # one element
    *,
    image_ids: Tensor | None = None,  # (M,)
    text_ids: Tensor | None = None,  # (N,)
    negative_only: bool = False,
    kept: Tensor | None = None,  # (M, N) bool
    unsure: Tensor | None = None,  # (M, N) bool
    reduction: str = "mean",
    g_dtype: torch.dtype | None = None,
) -> list[Tensor]:  # (), (M, D), (N, D), (), ()
    """What rounding may do to each element of [loss, dX, dY, dt, db], in float64.

    The worst case, to first order in the unit roundoff u of the accumulation (float32's; float64's
    for float64 features): an n-term sum errs by n u of its absolute terms, and comes near that
    where all terms are equal. Similarities sum D products; logits are rounded three times (the
    exponential rounds its argument once more); log-sigmoid and sigmoid err by 8 u (Triton's
    reciprocal square root by 4 u); the two products sum N and M terms, sums over all pairs are made
    in blocks. ``g_dtype`` is the dtype in which dL/dz enters the products, by default the features'
    own. ``kept`` names the negatives that take part (None: all), ``unsure`` those that rounding
    alone may have kept or dropped. Rounding the results themselves is left to :func:`excess`.
    Float64 in the oracle errs too, and is counted; products on a GPU may be cut off instead of
    rounded, which errs twice as much.
    """
    dtype = image_features.dtype
    x, y = (features.detach().double() for features in (image_features, text_features))
    t, b = (value.detach().double().reshape(()) for value in (logit_scale, logit_bias))
    accumulate = accumulate_dtype(dtype)
    u = UNIT_ROUNDOFF[accumulate] + UNIT_ROUNDOFF[torch.float64]
    u_sum = 2 * u if x.is_cuda else u
    m, n, d = len(x), *y.shape
    x, y = _without_padding(x, image_ids), _without_padding(y, text_ids)
    positive, valid, images = _pair_masks(x, y, image_ids, text_ids, negative_only)
    if kept is not None:
        valid = valid & (kept | positive if unsure is None else kept | positive | unsure)
    divisor = max(images, 1) if reduction == "mean" else 1

    s, ds = x @ y.T, d * u_sum * (x.abs() @ y.T.abs())
    z = t * s + b
    v = torch.where(positive, -z, z)
    dz = t.abs() * ds + u * (t.abs() * s.abs() + 3 * z.abs())
    p, softplus, d_term, d_g = _log_sigmoid_errors(v, dz, valid, u, accumulate)
    if unsure is not None:
        d_term, d_g = d_term + unsure * softplus, d_g + unsure * p
    stored = d_g  # in the dtype of the products
    if (g_dtype or dtype) != accumulate:
        stored = d_g + _stored_errors(p + d_g, g_dtype or dtype) * valid

    pairs = min(m * n, 128)
    errors = [
        d_term.sum() + pairs * u * softplus.sum(),
        t.abs() * (stored @ y.abs() + (n + 3) * u_sum * (p @ y.abs())),
        t.abs() * (stored.T @ x.abs() + (m + 3) * u_sum * (p.T @ x.abs())),
        (s.abs() * d_g + p * ds).sum() + (pairs + 2) * u * (p * s.abs()).sum(),
        d_g.sum() + pairs * u * p.sum(),
    ]
    return [e / divisor for e in errors]


def _stored_errors(largest: Tensor, dtype: torch.dtype) -> Tensor:
    """What writing dL/dz of at most this size in ``dtype`` may do to it."""
    return UNIT_ROUNDOFF[dtype] * largest + smallest(dtype) / GRAD_SCALE.get(dtype, 1.0)


def _without_padding(features: Tensor, ids: Tensor | None) -> Tensor:
    """Features with zeros in padded rows, which may hold anything."""
    return features if ids is None else torch.where(ids[:, None] < 0, 0, features)


def _pair_masks(
    x: Tensor,
    y: Tensor,
    image_ids: Tensor | None,
    text_ids: Tensor | None,
    negative_only: bool,
) -> tuple[Tensor, Tensor, int]:  # (M, N) bool, (M, N) bool
    """Which pairs are positive, which take part, and how many images are no padding."""
    positive = torch.zeros(len(x), len(y), dtype=torch.bool, device=x.device)
    valid, images = ~positive, len(x)
    if image_ids is not None and text_ids is not None:
        valid = (image_ids >= 0)[:, None] & (text_ids >= 0)
        images = int((image_ids >= 0).sum())
        if not negative_only:
            positive = image_ids[:, None] == text_ids
    elif not negative_only:
        positive.fill_diagonal_(True)
    return positive, valid, images


def _log_sigmoid_errors(
    v: Tensor, dz: Tensor, valid: Tensor, u: float, accumulate: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # (M, N) each
    """sigmoid(v) and softplus(v), and what errors ``dz`` of v and rounding do to softplus and
    sigmoid; 0 for pairs that are not ``valid``."""
    tiny = torch.finfo(accumulate).tiny  # exponentials may be flushed to 0 below
    p, q = v.sigmoid(), (-v).sigmoid()
    softplus = v.clamp(min=0) + torch.log1p(torch.exp(-v.abs()))
    grown = torch.expm1(dz.clamp(max=700))  # sigmoid'(v) is p q, and changes by exp(dz) at most
    d_term = torch.minimum(p * grown, dz) + 8 * u * softplus + tiny
    d_g = (p * q * grown).clamp(max=1) + 8 * u * p + tiny
    p, softplus, d_term, d_g = (torch.where(valid, w, 0) for w in (p, softplus, d_term, d_g))
    return p, softplus, d_term, d_g


def smallest(dtype: torch.dtype) -> float:
    """The smallest subnormal number."""
    info = torch.finfo(dtype)
    return info.tiny * info.eps


def rounded(value: Tensor, dtype: torch.dtype) -> Tensor:
    """What rounding ``value`` to ``dtype`` may do to it."""
    return UNIT_ROUNDOFF[dtype] * value.abs().double() + smallest(dtype)


def excess(actual: Tensor, exact: Tensor, errors: Tensor) -> float:
    """The largest deviation over what is allowed: ``errors``, and rounding the result to its dtype.

    NaN counts as infinite. A result beyond the largest finite number may be that or infinity.
    """
    if exact.numel() == 0:
        return 0.0
    largest = torch.finfo(actual.dtype).max
    a, x = (v.double().clamp(-largest, largest).reshape(errors.shape) for v in (actual, exact))
    allowed = errors + rounded(x.abs() + errors, actual.dtype)
    return ((a - x).abs() / allowed).nan_to_num(torch.inf).max().item()
