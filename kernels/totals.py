"""The sums over all pairs, as the loss and the factors of its gradients."""

from __future__ import annotations

import torch
from torch import Tensor


def finish(
    partials: Tensor, logit_scale: Tensor, divisor: float | Tensor
) -> tuple[Tensor, Tensor]:  # (), (3,)
    """See :meth:`fused_siglip.kernels.Panel.finish`."""
    total = partials[:, 0] if partials.shape[1] == 1 else partials.sum(1)
    loss, *scalars = total.unbind()
    if not scalars:
        scalars = [torch.zeros_like(loss)] * 2
    return loss / divisor, torch.stack((*scalars, logit_scale)).div_(divisor)
