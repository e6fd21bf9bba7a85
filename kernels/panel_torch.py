"""The torch backend: a panel as a library product and in-place passes, on any device."""

from __future__ import annotations

import torch
from torch import Tensor

from . import GRAD_SCALE, Positives

# torch's softplus returns u itself beyond its threshold; at 40 that is exact in float64 too
# (the default, 20, drops 2e-9).
_SOFTPLUS_THRESHOLD = 40.0


class TorchPanel:
    """A :class:`fused_siglip.kernels.Panel` of plain torch operations.

    Everything is written in place or into the workspace. With panels that stay in the last-level
    cache the elementwise passes are nearly free beside the products.
    """

    tile = (64, 64)
    align = 1

    @staticmethod
    def _buffers(dtype: torch.dtype, write_g: bool, scalar_grads: bool) -> dict[str, torch.dtype]:
        acc = torch.promote_types(dtype, torch.float32)
        buffers = {"u": acc, "terms": acc, "positive": torch.bool}
        if scalar_grads:
            buffers["s"] = acc  # kept beside u for the sum of g*s
        if write_g and dtype != acc:
            buffers["g"] = dtype
        return buffers

    @staticmethod
    def workspace_bytes(
        rows: int, cols: int, dtype: torch.dtype, write_g: bool, scalar_grads: bool
    ) -> int:
        buffers = TorchPanel._buffers(dtype, write_g, scalar_grads)
        return rows * cols * sum(d.itemsize for d in buffers.values())

    def __init__(
        self,
        rows: int,
        cols: int,
        dtype: torch.dtype,
        device: torch.device,
        write_g: bool,
        scalar_grads: bool,
    ):
        self.write_g, self.scalar_grads = write_g, scalar_grads
        self.buffers = {
            name: torch.empty(rows * cols, dtype=d, device=device)
            for name, d in self._buffers(dtype, write_g, scalar_grads).items()
        }

    def _view(self, name: str, m: int, n: int) -> Tensor:  # (m, n)
        # flat buffers, so that the smaller panels at the edge are contiguous too
        return self.buffers[name][: m * n].view(m, n)

    def __call__(
        self,
        x: Tensor,  # (m, D)
        y: Tensor,  # (n, D)
        logit_scale: Tensor,  # ()
        logit_bias: Tensor,  # ()
        positives: Positives,
        sums: Tensor,  # (3,)
    ) -> Tensor | None:  # (m, n)
        m, n = x.shape[0], y.shape[0]
        u = self._view("u", m, n)
        s = self._view("s", m, n) if self.scalar_grads else u
        if x.dtype == s.dtype:
            torch.mm(x, y.T, out=s)
        else:  # half precision on a GPU: fp32 logits from half operands
            torch.mm(x, y.T, out_dtype=s.dtype, out=s)
        torch.mul(s, logit_scale, out=u)
        self._add_bias(u, logit_bias, positives)
        self._negate_positives(u, positives)

        terms = self._view("terms", m, n)
        torch.ops.aten.softplus.out(u, 1.0, _SOFTPLUS_THRESHOLD, out=terms)
        torch.sum(terms, (0, 1), out=sums[0])
        if not (self.write_g or self.scalar_grads):
            return None

        g = u.sigmoid_()
        self._negate_positives(g, positives)
        if self.scalar_grads:
            # not torch.dot: BLAS adds a million terms one after the other, torch.sum pairwise
            torch.sum(torch.mul(s, g, out=terms), (0, 1), out=sums[1])
            torch.sum(g, (0, 1), out=sums[2])
        if not self.write_g:
            return None
        if x.dtype == g.dtype:
            return g
        return torch.mul(g, GRAD_SCALE.get(x.dtype, 1.0), out=self._view("g", m, n))

    def _add_bias(self, u: Tensor, logit_bias: Tensor, positives: Positives) -> None:
        """u += b; -inf (loss 0, gradient 0) in padded rows and columns."""
        if positives.image_ids is None:
            u.add_(logit_bias)
            return
        u.add_(torch.where(positives.text_ids < 0, -torch.inf, logit_bias))
        u.add_(torch.where(positives.image_ids < 0, -torch.inf, 0.0).to(u.dtype)[:, None])

    def _negate_positives(self, values: Tensor, positives: Positives) -> None:
        """values = -l * values, l = +1 for a positive pair and -1 otherwise."""
        m, n = values.shape
        if positives.image_ids is not None:
            positive = self._view("positive", m, n)
            # padding is -1 among images and -2 among texts: never a positive pair
            images = positives.image_ids.clamp(min=-1)
            texts = torch.where(positives.text_ids < 0, -2, positives.text_ids)
            torch.eq(images[:, None], texts, out=positive)
            negated = torch.neg(values, out=self._view("terms", m, n))
            torch.where(positive, negated, values, out=values)
        elif positives.diagonal is not None and -m < positives.diagonal < n:
            values.diagonal(positives.diagonal).neg_()
