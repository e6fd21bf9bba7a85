"""The eager loss, in plain torch: the oracle of the tests and a peer in the benchmarks."""

from __future__ import annotations

import torch
from torch import Tensor

from ..positives import Positives, PositiveTarget


def eager_siglip_loss(  # noqa: PLR0913, the arguments of siglip_loss
    image_features: Tensor,  # (M, D)
    text_features: Tensor,  # (N, D)
    logit_scale: float | Tensor,
    logit_bias: float | Tensor | None = None,
    *,
    image_ids: Tensor | None = None,  # (M,)
    text_ids: Tensor | None = None,  # (N,)
    negative_only: bool = False,
    kept: Tensor | None = None,  # (M, N) bool
    image_weights: Tensor | None = None,  # (M,)
    text_weights: Tensor | None = None,  # (N,)
    positives: Positives | None = None,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
) -> Tensor:  # (), or (M,)
    """The same loss as :func:`fused_siglip.siglip_loss`, differentiated by autograd.

    Builds the (M, N) logits and labels in the dtype of the features, operation for operation as
    ``open_clip.loss.SigLipLoss`` does (and without ids returns what it returns); with weights or
    other targets, the cross entropy of each pair. Called with float64 features it is the oracle.
    ``kept`` names the negatives that take part; None: all.
    """
    logits = logit_scale * image_features @ text_features.T
    if logit_bias is not None:
        logits += logit_bias
    labels = -torch.ones_like(logits, requires_grad=False)
    real = torch.ones_like(labels, dtype=torch.bool)
    count: int | Tensor
    texts: int | Tensor
    if image_ids is not None and text_ids is not None:
        if not negative_only:
            labels[image_ids[:, None] == text_ids] = 1
        real = (image_ids[:, None] >= 0) & (text_ids >= 0)
        count, texts = (image_ids >= 0).sum().clamp(min=1), (text_ids >= 0).sum().clamp(min=1)
    else:
        if not negative_only:
            labels.fill_diagonal_(1)
        count, texts = (max(size, 1) for size in labels.shape)
    if positives is None and image_weights is None and text_weights is None and not label_smoothing:
        losses = -torch.nn.functional.logsigmoid(labels * logits)
    else:
        weights, targets = weights_and_targets((labels == 1) & real, positives)
        targets = (
            targets * (1 - label_smoothing) + torch.full_like(targets, label_smoothing) / texts
        )
        losses = weights * _cross_entropy(logits, targets)
        losses = losses if image_weights is None else losses * image_weights[:, None]
        losses = losses if text_weights is None else losses * text_weights
    losses = torch.where(real, losses, 0)
    if kept is not None:
        losses = torch.where(kept | (labels == 1), losses, 0)
    if reduction == "none":
        return losses.sum(1)
    return losses.sum() if reduction == "sum" else losses.sum() / count


def _cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:  # (M, N)
    # not binary_cross_entropy_with_logits: it takes log sigmoid(z) from z, which cancels
    log_sigmoid, targets = torch.nn.functional.logsigmoid, targets.to(logits.dtype)
    return -(targets * log_sigmoid(logits) + (1 - targets) * log_sigmoid(-logits))


def weights_and_targets(
    positive: Tensor,  # (M, N) bool
    positives: Positives | None,
) -> tuple[Tensor, Tensor]:  # (M, N) float64
    """The weight of every pair, but for those of its row and column; and its target."""
    weights = torch.ones(positive.shape, dtype=torch.float64, device=positive.device)
    targets = positive.double()
    if positives is None:
        return weights, targets
    counted = positive.clone()
    if positives.aligned is not None:
        counted.fill_diagonal_(False)
    per_row, per_col = (counted.sum(dim, keepdim=True).clamp(min=1).double() for dim in (1, 0))
    share = positives.pair + positives.per_image / per_row + positives.per_text / per_col
    if positives.aligned is not None:
        share.fill_diagonal_(positives.aligned)
    if isinstance(positives, PositiveTarget):
        return weights, torch.where(positive, share, targets)
    return torch.where(positive, share, weights), targets
