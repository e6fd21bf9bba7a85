"""The loss and its gradients in float64, and how far others are from them."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK_BYTES = 64 << 20


class LossAndGrads(NamedTuple):
    loss: Tensor  # ()
    image_grad: Tensor  # (B, D)
    text_grad: Tensor  # (B, D)
    scale_grad: Tensor  # ()
    bias_grad: Tensor  # ()


@torch.no_grad()
def float64_reference(x: Tensor, y: Tensor, t: Tensor, b: Tensor) -> LossAndGrads:
    """The closed form (docs of fused_siglip.siglip_loss) by row chunks, in bounded memory."""
    x, y, t, b = (v.double() for v in (x, y, t, b))
    size = x.shape[0]
    rows = max(CHUNK_BYTES // (8 * size), 1)
    image_grad, text_grad = torch.empty_like(x), torch.zeros_like(y)
    loss, scale_grad, bias_grad = (torch.zeros_like(t) for _ in range(3))
    for start in range(0, size, rows):
        chunk = slice(start, start + rows)
        s = x[chunk] @ y.T
        z = (t * s).add_(b)
        # threshold: beyond it softplus(z) is z; the default, 20, drops 2e-9
        loss += F.softplus(z, threshold=40.0).sum() - z.diagonal(start).sum()
        g = z.sigmoid_()
        g.diagonal(start).sub_(1)
        image_grad[chunk] = g @ y
        text_grad += g.T @ x[chunk]
        scale_grad += (g * s).sum()
        bias_grad += g.sum()
    grads = (t * image_grad, t * text_grad, scale_grad, bias_grad)
    return LossAndGrads(*(v / size for v in (loss, *grads)))


def rounded_once(exact: LossAndGrads, dtype: torch.dtype) -> LossAndGrads:
    """The least error possible: exact values in the dtypes in which a loss returns them."""
    loss, image_grad, text_grad, scale_grad, bias_grad = exact
    return LossAndGrads(
        loss.float(),
        image_grad.to(dtype),
        text_grad.to(dtype),
        scale_grad.float(),
        bias_grad.float(),
    )


def relative_errors(actual: LossAndGrads, exact: LossAndGrads) -> dict[str, dict[str, float]]:
    """For each output, max|a - e| / max|e| and rms(a - e) / rms(e): neither sees a factor 1/B."""
    errors = {}
    for name, a, e in zip(LossAndGrads._fields, actual, exact, strict=True):
        difference = a.double() - e
        errors[name] = {
            "max": (difference.abs().max() / e.abs().max()).item(),
            "rms": (difference.square().mean() / e.square().mean()).sqrt().item(),
        }
    return errors
