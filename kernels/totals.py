"""The sums over all pairs, as the loss and the factors of its gradients."""

from __future__ import annotations

import torch
from torch import Tensor


def finish(
    partials: Tensor, logit_scale: Tensor, divisor: float | Tensor, factor: float = 1.0
) -> tuple[Tensor, Tensor]:  # (), (3,)
    """See :meth:`fused_siglip.kernels.Panel.finish`."""
    if partials.is_cpu:  # fewer torch calls, and additions in float64
        like = {"dtype": partials.dtype, "device": partials.device}
        loss, *scalars = (sum(parts) for parts in partials.tolist())
        scalars = (*(scalars or (0.0, 0.0)), logit_scale.item() / factor)
        divisor = float(divisor)
        factors = torch.tensor([value / divisor for value in scalars], **like)
        return torch.tensor(loss / divisor, **like), factors
    loss, *scalars = partials.sum(1).unbind()
    if not scalars:
        scalars = [torch.zeros_like(loss)] * 2
    return loss / divisor, torch.stack((*scalars, logit_scale / factor)).div_(divisor)
