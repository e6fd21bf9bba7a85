"""The torch backend: a panel as a library product and in-place passes, on any device."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .interface import (
    GRAD_SCALE,
    Affine,
    Pairs,
    PanelSpec,
    RandomMask,
    ScoreThreshold,
    accumulate_dtype,
)
from .registry import float32_products
from .torch_products import add_product
from .torch_scores import TorchScores
from .torch_selection import TorchSelection
from .torch_totals import TorchTotals, numbers
from .torch_weights import WeightedStrip, softplus
from .torch_workspace import Workspace, workspace_bytes

GROUPED = 1 << 16  # from this many pairs on, one logarithm for four of them is faster

# On a CPU, the share of pairs that take part below which sparse products are the faster ones.
# Elsewhere the host would have to wait for their number.
_SPARSE_SHARE = 1 / 16


class TorchPanel(TorchTotals, TorchScores, TorchSelection):
    """A :class:`fused_siglip.kernels.Panel` of plain torch operations.

    Everything is written in place or into the workspace. After the product a panel is taken a strip
    of rows at a time, so that its elementwise passes find the strip in the cache.
    """

    tile = (64, 64)
    align = 1

    @staticmethod
    def workspace_bytes(spec: PanelSpec) -> int:
        return workspace_bytes(spec)

    def __init__(self, spec: PanelSpec, device: torch.device):
        self.store_dlogits, self.scalar_grads = spec.store_dlogits, spec.scalar_grads
        self.losses = spec.losses
        device = torch.device(device)
        self.acc = accumulate_dtype(spec.dtype)
        self.workspace = Workspace(spec, device)
        self.strip_rows = self.workspace.strip_rows
        self._view = self.workspace.view
        self.on_cpu = device.type == "cpu"
        self.totals: list[float] = []
        self.dscale_from_products = (
            spec.wide and spec.store_dlogits and spec.dtype == self.acc and self.on_cpu
        )
        if self.dscale_from_products and spec.dtype == torch.float32:
            # products may be rounded further; their sum must not be
            self.dscale_from_products = float32_products("cpu") == "ieee"

    def __call__(
        self,
        x: Tensor,  # (m, D)
        y: Tensor,  # (n, D)
        affine: Affine,
        pairs: Pairs,
        sums: Tensor | None,  # (3,)
        selection: RandomMask | ScoreThreshold | None = None,
        image_losses: Tensor | None = None,  # (m,)
    ) -> Tensor | None:  # (m, n)
        m, step = x.shape[0], self.strip_rows
        values = self._similarities(x, y)  # which become dlogits in place
        stores_half = self.store_dlogits and x.dtype != self.acc
        dlogits = self._view("dlogits", *values.shape) if stores_half else values
        parts, dropped = [], 0  # sums of each strip, and the number of pairs that take no part
        for start in range(0, m, step):
            s, in_strip, selected, rows = values, pairs, selection, slice(start, start + step)
            if m > step:
                s, in_strip = values[rows], pairs.block(rows)
                selected = None if selection is None else selection.block(rows)
            positive = self._positive(s, in_strip)
            if selected is not None:
                dropped += self._drop(s, positive, selected)
            z = self._logits(s, affine, in_strip)
            out = None if image_losses is None else image_losses[rows]
            loss = self._loss(z, positive, in_strip, selected, out)
            strip_dlogits = z  # its memory holds them now
            parts.append(self._sums(loss, s, strip_dlogits))
            if stores_half:
                torch.mul(strip_dlogits, GRAD_SCALE.get(x.dtype, 1.0), out=dlogits[rows])
            elif m <= step:
                dlogits = strip_dlogits
            elif self.store_dlogits and strip_dlogits is not s:
                s.copy_(strip_dlogits)
        self._add_up(parts, sums)
        if not self.store_dlogits:
            return None
        if selection is not None and self.on_cpu and not stores_half:
            share = 1 - dropped / dlogits.numel()
            return dlogits.to_sparse() if share < _SPARSE_SHARE else dlogits
        return dlogits

    def _sums(self, loss: Tensor, s: Tensor, dlogits: Tensor) -> list[Tensor]:
        """A strip's sums of the loss and, where they are needed, of dlogits * s and dlogits."""
        if not self.scalar_grads:
            return [loss]
        if self.dscale_from_products:
            return [loss, dlogits.sum()]
        terms = torch.mul(s, dlogits, out=self._view("terms", *s.shape))
        # not torch.dot: BLAS adds a million terms one after the other, this pairwise
        return [loss, terms.sum(), dlogits.sum()]

    def _add_up(self, parts: list[list[Tensor]], sums: Tensor | None) -> None:
        """The strips' sums, to ``sums`` or to be asked for."""
        if self.on_cpu:  # the host may look at them
            totals = [total.item() for total in parts[0]]
            for of_strip in parts[1:]:
                totals = [a + b.item() for a, b in zip(totals, of_strip, strict=True)]
            if self.scalar_grads and self.dscale_from_products:
                totals.insert(1, 0.0)
            self.totals = totals
            if sums is not None:
                sums.copy_(self.partials[:, 0])
            return
        self._partials = torch.stack([torch.stack(of_strip) for of_strip in parts], 1)
        if sums is not None:
            torch.sum(self._partials, 1, out=sums)

    @property
    def partials(self) -> Tensor:  # (3 or 1, k)
        if not self.on_cpu:
            return self._partials
        return numbers(self.totals, self.acc)[:, None]

    def _logits(self, s: Tensor, affine: Affine, pairs: Pairs) -> Tensor:  # (m, n)
        needs_s = self.scalar_grads and not self.dscale_from_products
        z = self._view("z", *s.shape) if needs_s else s
        ids, scale, bias = pairs.ids, affine.scale, affine.bias
        if ids is None or pairs.weights is not None:  # padding has weight 0
            if self.on_cpu:
                return torch.add(bias, s, alpha=scale.item(), out=z)
            return torch.mul(s, scale, out=z).add_(bias)
        # -inf (loss 0, gradient 0) in padded rows and columns
        torch.mul(s, scale, out=z).add_(torch.where(ids.texts < 0, -torch.inf, bias))
        return z.add_(torch.where(ids.images < 0, -torch.inf, 0.0).to(z.dtype)[:, None])

    def _strip(self, z: Tensor, positive: Tensor | int | None, drops: bool) -> Tensor:  # ()
        """The loss of some rows. Their logits become u, then sigmoid(u), then dlogits."""
        self._negate_positives(z, positive)
        u = z
        if drops:  # loss 0, gradient 0
            torch.where(self._view("dropped", *u.shape), u.new_full((), -torch.inf), u, out=u)
        loss = self._grouped(u)
        if loss is None:
            loss = softplus(u, self._view("terms", *u.shape)).sum()
        if self.store_dlogits or self.scalar_grads:
            self._negate_positives(u.sigmoid_(), positive)
        return loss

    def _loss(
        self,
        z: Tensor,  # (m, n), becomes dlogits
        positive: Tensor | int | None,
        pairs: Pairs,
        selection: RandomMask | ScoreThreshold | None,
        image_losses: Tensor | None,  # (m,), added to
    ) -> Tensor:  # ()
        """The loss of some rows, whose logits become dlogits."""
        if pairs.weights is None:
            return self._strip(z, positive, selection is not None)
        dropped = None if selection is None else self._view("dropped", *z.shape)
        needs = self.losses, self.store_dlogits or self.scalar_grads
        strip = WeightedStrip(z, pairs.weights, self.workspace, dropped, needs)
        if isinstance(positive, Tensor):
            losses = strip.by_mask(positive)
        else:
            losses = strip.on_diagonal(positive)
        if image_losses is not None:
            image_losses += losses
        return losses.sum()

    def _grouped(self, u: Tensor) -> Tensor | None:  # ()
        """The sum of softplus(u) with one logarithm for four pairs, where that is right and faster.

        softplus(u) = log(1 + e^u), and (1 + a) (1 + b) - 1 = a + b + ab, where nothing cancels.
        None where such a product does not fit the dtype, or something is NaN.
        """
        if not self.on_cpu or u.numel() < GROUPED or u.numel() % 4:
            return None
        exp = torch.exp(u, out=self._view("terms", *u.shape))
        a, b = exp.view(2, 2, -1)
        groups = torch.addcmul(a, a, b, out=self._view("groups", *a.shape)).add_(b)
        a, b = groups
        loss = a.add_(b.addcmul_(a, b)).log1p_().sum()
        return loss if math.isfinite(loss.item()) else None

    def add_product(
        self,
        out: Tensor,  # (m, D) or, transposed, (n, D)
        dlogits: Tensor,  # (m, n)
        rhs: Tensor,  # (n, D) or, transposed, (m, D)
        alpha: float,
        accumulate: bool,
        transposed: bool,
    ) -> None:
        add_product(out, dlogits.T if transposed else dlogits, rhs, alpha, accumulate)

    def _negate_positives(self, values: Tensor, positive: Tensor | int | None) -> None:
        """Turn the sign of positives: logits become u, sigmoids dlogits."""
        if isinstance(positive, Tensor):
            negated = torch.neg(values, out=self._view("terms", *values.shape))
            torch.where(positive, negated, values, out=values)
        elif positive is not None:
            values.diagonal(positive).neg_()
