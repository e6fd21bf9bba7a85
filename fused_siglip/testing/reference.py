"""The eager loss, in plain torch: the oracle of the tests and a peer in the benchmarks."""

from __future__ import annotations

import torch
from torch import Tensor


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
    reduction: str = "mean",
) -> Tensor:
    """The same loss as :func:`fused_siglip.siglip_loss`, differentiated by autograd.

    Builds the (M, N) logits and labels in the dtype of the features, operation for operation as
    ``open_clip.loss.SigLipLoss`` does (and without ids returns what it returns). Called with
    float64 features it is the oracle. ``kept`` names the negatives that take part; None: all.
    """
    logits = logit_scale * image_features @ text_features.T
    if logit_bias is not None:
        logits += logit_bias
    labels = -torch.ones_like(logits, requires_grad=False)
    count: int | Tensor
    if image_ids is not None and text_ids is not None:
        if not negative_only:
            labels[image_ids[:, None] == text_ids] = 1
        real = (image_ids[:, None] >= 0) & (text_ids >= 0)
        losses = torch.where(real, -torch.nn.functional.logsigmoid(labels * logits), 0)
        count = (image_ids >= 0).sum().clamp(min=1)
    else:
        if not negative_only:
            labels.fill_diagonal_(1)
        losses = -torch.nn.functional.logsigmoid(labels * logits)
        count = max(image_features.shape[0], 1)
    if kept is not None:
        losses = torch.where(kept | (labels == 1), losses, 0)
    return losses.sum() if reduction == "sum" else losses.sum() / count
