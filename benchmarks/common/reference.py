"""The loss and its gradients in float64, and how far others are from them."""

from __future__ import annotations

from collections.abc import Iterator
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
    image_grad, text_grad = torch.empty_like(x), torch.zeros_like(y)
    sums = torch.zeros(3, dtype=torch.float64, device=x.device)
    for chunk, part, dlogits in _chunks(x, y, t, b):
        image_grad[chunk] = dlogits @ y
        text_grad += dlogits.T @ x[chunk]
        sums += part
    loss, scale_grad, bias_grad = sums
    grads = (t * image_grad, t * text_grad, scale_grad, bias_grad)
    return LossAndGrads(*(v / size for v in (loss, *grads)))


@torch.no_grad()
def sampled_reference(x: Tensor, y: Tensor, t: Tensor, b: Tensor, sample: Tensor) -> LossAndGrads:
    """:func:`float64_reference` with only the rows in ``sample`` of both feature gradients.

    Those rows need one product each over the whole batch, in memory of their own size; the loss and
    the gradients of t and b still take every pair into account.
    """
    x, y, t, b = (v.double() for v in (x, y, t, b))
    size = x.shape[0]
    image_grad = _sums_and_dlogits(x[sample] @ y.T, t, b, sample)[1] @ y
    text_grad = _sums_and_dlogits(y[sample] @ x.T, t, b, sample)[1] @ x
    loss, scale_grad, bias_grad = sum(part for _, part, _ in _chunks(x, y, t, b))
    grads = (t * image_grad, t * text_grad, scale_grad, bias_grad)
    return LossAndGrads(*(v / size for v in (loss, *grads)))


def _chunks(x: Tensor, y: Tensor, t: Tensor, b: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yields chunks of rows, each with its :func:`_sums_and_dlogits`."""
    size = x.shape[0]
    rows = max(CHUNK_BYTES // (8 * size), 1)
    for chunk in torch.arange(size, device=x.device).split(rows):
        yield chunk, *_sums_and_dlogits(x[chunk] @ y.T, t, b, chunk)


def _sums_and_dlogits(s: Tensor, t: Tensor, b: Tensor, positive: Tensor) -> tuple[Tensor, Tensor]:
    """(loss, dL/dt, dL/db) of these pairs, and dL/dz; ``positive``: each row's one column."""
    z = (t * s).add_(b)
    at = (torch.arange(len(positive), device=s.device), positive)
    # threshold: beyond it softplus(z) is z; the default, 20, drops 2e-9
    loss = F.softplus(z, threshold=40.0).sum() - z[at].sum()
    dlogits = z.sigmoid_()
    dlogits[at] -= 1
    return torch.stack([loss, (dlogits * s).sum(), dlogits.sum()]), dlogits


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
