"""What rounding may do to the loss and its gradients: tolerance of the tests and the self-check.

The worst case, to first order in the unit roundoff u of the accumulation (float32's; float64's for
float64 features): an n-term sum errs by n u of its absolute terms, and comes near that where all
terms are equal. Similarities sum D products; logits are rounded three times (the exponential rounds
its argument once more); log-sigmoid and sigmoid err by 8 u (Triton's reciprocal square root by
4 u); the two products sum N and M terms, sums over all pairs are made in blocks. What a pair counts
is rounded too, and what smoothed targets have in common is a sum of its own. Float64 in the oracle
errs too, and is counted; products on a GPU may be cut off instead of rounded, which errs twice as
much.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..kernels import GRAD_SCALE, accumulate_dtype
from ..positives import Positives
from .pair_terms import (
    WEIGHT_ROUNDINGS,
    PairMasks,
    PairTerms,
    log_sigmoid_errors,
    masks_of_pairs,
    pair_terms,
    without_padding,
)

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
    image_weights: Tensor | None = None,  # (M,)
    text_weights: Tensor | None = None,  # (N,)
    positives: Positives | None = None,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
    upstream: Tensor | None = None,  # (M,)
    g_dtype: torch.dtype | None = None,
) -> list[Tensor]:  # () or (M,), (M, D), (N, D), (), ()
    """What rounding may do to each element of [loss, dX, dY, dt, db], in float64: see above.

    ``g_dtype`` is the dtype in which dL/dz enters the products, by default the features' own.
    ``kept`` names the negatives that take part (None: all), ``unsure`` those that rounding alone
    may have kept or dropped. ``upstream`` is what the images' losses are multiplied by, with the
    reduction "none". Rounding the results themselves is left to :func:`excess`.
    """
    dtype = image_features.dtype
    accumulate = accumulate_dtype(dtype)
    u = UNIT_ROUNDOFF[accumulate] + UNIT_ROUNDOFF[torch.float64]
    u_sum = 2 * u if image_features.is_cuda else u
    x = without_padding(image_features.detach().double(), image_ids)
    y = without_padding(text_features.detach().double(), text_ids)
    t, b = (value.detach().double().reshape(()) for value in (logit_scale, logit_bias))
    masks = masks_of_pairs(x, y, image_ids, text_ids, negative_only)
    rows = without_padding(_or_ones(image_weights, x), image_ids)
    cols = without_padding(_or_ones(text_weights, y), text_ids)
    given = any(v is not None for v in (image_weights, text_weights, positives, upstream))
    weighted = given or label_smoothing > 0 or reduction == "none"
    s, ds = x @ y.T, y.shape[1] * u_sum * (x.abs() @ y.abs().T)
    z = t * s + b
    dz = t.abs() * ds + u * (t.abs() * s.abs() + 3 * z.abs())
    terms = pair_terms(z, masks, (rows, cols), positives, label_smoothing, kept is not None)
    taking_part = _taking_part(masks, kept, unsure)
    found = _pair_errors(terms, dz, unsure, u, accumulate, weighted)
    losses, d_losses, g, d_g = (torch.where(taking_part, v * cols, 0) for v in found)
    linear = _linear_errors((x, y), (t, b), terms, (u, u_sum))
    d_losses = rows * (d_losses.sum(1) + min(y.shape[0], 128) * u * losses.sum(1)) + linear[0]
    if reduction != "none":
        d_losses = d_losses.sum() + min(losses.numel(), 128) * u * (rows @ losses).sum()
    if upstream is not None:
        rows = rows * without_padding(upstream.double().abs(), image_ids)
        linear = _linear_errors((x, y), (t, b), terms._replace(rows=rows), (u, u_sum))
    g, d_g = g * rows[:, None], d_g * rows[:, None]
    stored = d_g  # in the dtype of the products
    if (g_dtype or dtype) != accumulate:
        unit = _unit(dtype, rows, cols, positives) if weighted else 1.0
        stored = d_g + _stored_errors(g + d_g, g_dtype or dtype, unit) * taking_part
    errors = [d_losses, *_gradient_errors((x, y), (s, ds), (g, d_g, stored), t, (u, u_sum))]
    errors[1:] = [e + more for e, more in zip(errors[1:], linear[1:], strict=True)]
    return [e / (max(masks.images, 1) if reduction == "mean" else 1) for e in errors]


def _taking_part(masks: PairMasks, kept: Tensor | None, unsure: Tensor | None) -> Tensor:  # (M, N)
    """The pairs whose terms may be in the sums."""
    if kept is None:
        return masks.valid
    chosen = kept | masks.positive
    return masks.valid & (chosen if unsure is None else chosen | unsure)


def _or_ones(weights: Tensor | None, features: Tensor) -> Tensor:  # (M,)
    return features.new_ones(len(features)) if weights is None else weights.detach().double()


def _pair_errors(
    terms: PairTerms,
    dz: Tensor,  # (M, N)
    unsure: Tensor | None,
    u: float,
    accumulate: torch.dtype,
    weighted: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # (M, N) each
    """The absolute losses of the pairs, what may be wrong with them, and likewise of dL/dz: before
    the weights of rows and columns."""
    v, alpha, beta, parts, *_ = terms
    p, softplus, d_term, d_g = log_sigmoid_errors(v, dz, u, torch.finfo(accumulate).tiny)
    losses = alpha * softplus + beta.abs() * v.abs()
    g = (alpha * p - beta).abs()
    d_losses, d_g = alpha * d_term + beta.abs() * dz, alpha * d_g
    if weighted:
        rounding = WEIGHT_ROUNDINGS * u
        d_losses = d_losses + rounding * (alpha * softplus + parts * v.abs())
        d_g = d_g + rounding * (alpha * p + parts)
    if unsure is not None:
        d_losses, d_g = d_losses + unsure * losses, d_g + unsure * g
    return losses, d_losses, g, d_g


def _gradient_errors(
    features: tuple[Tensor, Tensor],  # (M, D), (N, D)
    similarities: tuple[Tensor, Tensor],  # (M, N) each: the values and what they err by
    dlogits: tuple[Tensor, Tensor, Tensor],  # likewise, and as they are stored
    t: Tensor,
    units: tuple[float, float],
) -> list[Tensor]:  # (M, D), (N, D), (), ()
    (x, y), (s, ds), (g, d_g, stored), (u, u_sum) = features, similarities, dlogits, units
    m, n = g.shape
    pairs = min(m * n, 128)
    # dt may be taken from the products, which sum M or N terms where a similarity sums D
    from_products = 1 + max(m, n) / max(x.shape[1], 1)
    return [
        t.abs() * (stored @ y.abs() + (n + 3) * u_sum * (g @ y.abs())),
        t.abs() * (stored.T @ x.abs() + (m + 3) * u_sum * (g.T @ x.abs())),
        (s.abs() * d_g + from_products * g * ds).sum() + (pairs + 2) * u * (g * s.abs()).sum(),
        d_g.sum() + pairs * u * g.sum(),
    ]


def _linear_errors(
    features: tuple[Tensor, Tensor],  # (M, D), (N, D)
    affine: tuple[Tensor, Tensor],
    terms: PairTerms,
    units: tuple[float, float],
) -> list[Tensor]:  # (M,), (M, D), (N, D), (), ()
    """Of uniform * sum_j c_j z_ij for each image, in closed form, and of its gradients: the sums of
    the features over M and N rows, of D products, and of those with the rest."""
    (x, y), (t, b), (u, u_sum) = (v.abs() for v in features), (v.abs() for v in affine), units
    a, c, each = terms.rows, terms.cols, terms.uniform
    (m, d), n = x.shape, len(y)
    sum_x, sum_y, roundings = a @ x, c @ y, m + n + d + WEIGHT_ROUNDINGS
    return [
        each * roundings * (a * (u_sum * t * (x @ sum_y) + u * b * c.sum())),
        each * t * (n + WEIGHT_ROUNDINGS) * u_sum * torch.outer(a, sum_y),
        each * t * (m + WEIGHT_ROUNDINGS) * u_sum * torch.outer(c, sum_x),
        each * roundings * u_sum * (sum_x @ sum_y),
        each * roundings * u * a.sum() * c.sum(),
    ]


def _unit(
    dtype: torch.dtype, rows: Tensor, cols: Tensor, positives: Positives | None
) -> float | Tensor:
    """At least what the weights are divided by, so that float16 holds dL/dz."""
    if dtype != torch.float16:
        return 1.0
    largest = 1.0 if positives is None else max(positives.largest, positives.aligned or 0.0, 1.0)
    of_rows = [2 * torch.cat([w, w.new_zeros(1)]).max() for w in (rows, cols)]
    return 2 * largest * of_rows[0] * of_rows[1]


def _stored_errors(largest: Tensor, dtype: torch.dtype, unit: float | Tensor) -> Tensor:
    """What writing dL/dz of at most this size in ``dtype`` may do to it."""
    return UNIT_ROUNDOFF[dtype] * largest + unit * smallest(dtype) / GRAD_SCALE.get(dtype, 1.0)


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
