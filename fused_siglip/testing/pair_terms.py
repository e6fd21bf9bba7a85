"""What each pair adds to the loss, in float64, and what rounding may do to that."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..positives import Positives
from .reference import weights_and_targets

# Of what a pair counts: its shares and targets take this many operations, with the weights of its
# row and column and the upstream gradient.
WEIGHT_ROUNDINGS = 16


class PairMasks(NamedTuple):
    positive: Tensor  # (M, N) bool
    valid: Tensor  # (M, N) bool: no padding
    images: int  # that are no padding
    texts: int


class PairTerms(NamedTuple):
    """The loss of a pair is alpha * softplus(v) - beta * v, times the weights of row and column.

    v is z, or -z where the target is nearer to 1 than to 0, so that nothing cancels. Of smoothed
    targets that is what remains without ``uniform * z``, which all pairs have in common.
    """

    v: Tensor  # (M, N)
    alpha: Tensor  # (M, N)
    beta: Tensor  # (M, N)
    parts: Tensor  # (M, N), the absolute terms that beta is a sum of; 0 where beta is 0 for certain
    rows: Tensor  # (M,) 0 for padding
    cols: Tensor  # (N,) likewise
    uniform: float


def without_padding(features: Tensor, ids: Tensor | None) -> Tensor:
    """Features, or weights, with zeros in padded rows, which may hold anything."""
    if ids is None:
        return features
    return torch.where(ids.view(-1, *[1] * (features.dim() - 1)) < 0, 0, features)


def masks_of_pairs(
    x: Tensor, y: Tensor, image_ids: Tensor | None, text_ids: Tensor | None, negative_only: bool
) -> PairMasks:
    """Which pairs are positive, which take part, and how many rows are no padding."""
    positive = torch.zeros(len(x), len(y), dtype=torch.bool, device=x.device)
    valid, images, texts = ~positive, len(x), len(y)
    if image_ids is not None and text_ids is not None:
        valid = (image_ids >= 0)[:, None] & (text_ids >= 0)
        images, texts = (int((ids >= 0).sum()) for ids in (image_ids, text_ids))
        if not negative_only:
            positive = (image_ids[:, None] == text_ids) & valid
    elif not negative_only:
        positive.fill_diagonal_(True)
    return PairMasks(positive, valid, images, texts)


def pair_terms(
    z: Tensor,  # (M, N)
    masks: PairMasks,
    weights: tuple[Tensor, Tensor],  # (M,), (N,), 0 for padding
    positives: Positives | None,
    label_smoothing: float,
    selected: bool,
) -> PairTerms:
    """The terms of the loss; where negatives are selected no term is common to all pairs."""
    alpha, targets = weights_and_targets(masks.positive, positives)
    each = label_smoothing / max(masks.texts, 1)
    uniform = 0.0 if selected else each
    wanted = targets * (1 - label_smoothing) + each
    beta = alpha * wanted - uniform
    beta = torch.where(masks.positive, beta, each - uniform)
    turned = beta > alpha / 2
    parts = torch.where(turned, alpha, 0) + alpha * wanted + uniform
    parts = torch.where(masks.positive | (beta != 0), parts, 0)
    v = torch.where(turned, -z, z)
    # rounding may turn these or not
    v = torch.where((beta - alpha / 2).abs() <= 1e-5 * alpha, z.abs(), v)
    beta = torch.where(turned, alpha - beta, beta)
    return PairTerms(v, alpha, beta, parts, *weights, uniform)


def log_sigmoid_errors(
    v: Tensor, dz: Tensor, u: float, tiny: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # (M, N) each
    """sigmoid(v) and softplus(v), and what errors ``dz`` of v and rounding do to softplus and
    sigmoid. Exponentials may be flushed to 0 below ``tiny``."""
    p, q = v.sigmoid(), (-v).sigmoid()
    softplus = v.clamp(min=0) + torch.log1p(torch.exp(-v.abs()))
    grown = torch.expm1(dz.clamp(max=700))  # sigmoid'(v) is p q, and changes by exp(dz) at most
    d_term = torch.minimum(p * grown, dz) + 8 * u * softplus + tiny
    d_g = (p * q * grown).clamp(max=1) + 8 * u * p + tiny
    return p, softplus, d_term, d_g
