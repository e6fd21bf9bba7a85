"""The strip of a panel whose pairs have weights and targets, in torch: see pair_weights.py."""

from __future__ import annotations

import torch
from torch import Tensor

from .pair_weights import PairWeights, PositiveShares
from .torch_workspace import Workspace

# torch's softplus returns u itself beyond its threshold; at 40 that is exact in float64 too
# (the default, 20, drops 2e-9).
SOFTPLUS_THRESHOLD = 40.0

# Up to this logit softplus(z) is -log(1 - sigmoid(z)), with nothing lost where 1 - sigmoid(z) is
# rounded.
LOW_LOGIT = -1.0


class WeightedStrip:
    """Some rows of a panel: their logits, which become dlogits, and their losses.

    Positives on a diagonal are few: all pairs are taken for negatives first. Where ids say which
    pairs are positive, alpha and beta are matrices of the strip.
    """

    def __init__(
        self,
        z: Tensor,  # (m, n) logits, overwritten
        weights: PairWeights,
        workspace: Workspace,
        dropped: Tensor | None,  # (m, n) bool: pairs that take no part
        store_dlogits: bool,
    ):
        self.z, self.weights, self.dropped = z, weights, dropped
        self.workspace, self.store_dlogits = workspace, store_dlogits
        self.terms = self.view("terms")

    def view(self, name: str) -> Tensor:  # (m, n)
        """A buffer for the strip."""
        return self.workspace.view(name, *self.z.shape)

    def on_diagonal(self, diagonal: int | None) -> Tensor:  # (m,)
        """The losses of the rows; pair (i, i + diagonal) is positive, or none is."""
        z, weights = self.z, self.weights
        positives = None if diagonal is None else z.diagonal(diagonal)
        logits = None if positives is None else positives.clone()
        self._negatives(None if weights.targets is None else weights.targets[4])
        if logits is not None and positives is not None and diagonal is not None:
            rows, cols = _where(diagonal, positives.shape[0])
            alpha, beta, flipped = self._of_positives(weights.block(rows, cols))
            losses = torch.empty_like(logits)
            _losses(logits, losses, flipped, alpha, beta)
            self.terms.diagonal(diagonal).copy_(losses)
            _derivatives(logits, losses, flipped, alpha, beta)
            positives.copy_(logits)
        losses = self._weighted_losses()
        self._weight_dlogits()
        return losses

    def by_mask(self, positive: Tensor) -> Tensor:  # (m, n) bool, overwritten -> (m,)
        """The losses of the rows."""
        weights, alpha, beta = self.weights, None, None
        if weights.shares is not None:
            alpha = _shares(weights.shares, self.view("alpha"))
        if weights.targets is not None:
            alpha, beta = self._targets(positive, alpha)
        elif alpha is not None:
            torch.where(positive, alpha, alpha.new_ones(()), out=alpha)
        _losses(self.z, self.terms, positive, alpha, beta)
        if self.dropped is not None:
            self.terms.masked_fill_(self.dropped, 0)
        losses = self._weighted_losses()
        if self.store_dlogits:
            _derivatives(self.z, self.terms, positive, alpha, beta)
            if self.dropped is not None:
                self.z.masked_fill_(self.dropped, 0)
            self._weight_dlogits()
        return losses

    def _targets(self, positive: Tensor, shares: Tensor | None) -> tuple[Tensor, Tensor]:
        """alpha and beta by pair, (m, n); positive becomes where the loss is one of -z."""
        assert self.weights.targets is not None
        a0, a1, b0, b1, of_negatives = self.weights.targets.unbind()
        alpha, beta = self.view("alpha"), self.view("beta")
        if shares is None:
            torch.where(positive, b0 + b1, of_negatives, out=beta)
            torch.where(positive, a0 + a1, alpha.new_ones(()), out=alpha)
        else:
            torch.mul(shares, b1, out=beta).add_(b0)
            torch.where(positive, beta, of_negatives, out=beta)
            alpha.mul_(a1).add_(a0)
            torch.where(positive, alpha, alpha.new_ones(()), out=alpha)
        torch.gt(beta, torch.mul(alpha, 0.5, out=self.terms), out=positive)
        torch.where(positive, torch.sub(alpha, beta, out=self.terms), beta, out=beta)
        return alpha, beta

    def _of_positives(self, few: PairWeights) -> tuple[Tensor | None, Tensor | None, Tensor]:
        """alpha, beta and whether the loss is one of -z, for positives on a diagonal: (k,) each."""
        k = self.z.new_ones(())
        alpha = k
        if few.shares is not None:
            alpha = few.shares.image
            alpha = alpha if few.shares.text is None else alpha + few.shares.text
        if few.targets is None:
            return (None if few.shares is None else alpha), None, k.bool()
        a0, a1, b0, b1, _ = few.targets.unbind()
        alpha, beta = a0 + a1 * alpha, b0 + b1 * alpha
        flipped = beta > alpha / 2
        return alpha, torch.where(flipped, alpha - beta, beta), flipped

    def _negatives(self, beta: Tensor | None) -> None:
        """All pairs as negatives: ``terms`` are their losses, z becomes dlogits."""
        z, terms = self.z, self.terms
        low = self.dropped is None and beta is None and z.is_cpu and z.numel() > 0
        if low and z.amax().item() <= LOW_LOGIT:  # which NaN is not
            torch.neg(z.sigmoid_(), out=terms).log1p_().neg_()
            return
        _losses(z, terms, None, None, beta)
        if self.store_dlogits:
            _derivatives(z, None, None, None, beta)
        if self.dropped is not None:
            terms.masked_fill_(self.dropped, 0)
            z.masked_fill_(self.dropped, 0)

    def _weighted_losses(self) -> Tensor:  # (m,)
        """The losses of the rows, from those of the pairs."""
        if self.weights.texts is not None:
            self.terms.mul_(self.weights.texts)
        losses = self.terms.sum(1)
        return losses if self.weights.images is None else losses.mul_(self.weights.images)

    def _weight_dlogits(self) -> None:
        if self.store_dlogits and self.weights.texts is not None:
            self.z.mul_(self.weights.texts)
        if self.store_dlogits and self.weights.images is not None:
            self.z.mul_(self.weights.images[:, None])


def _losses(
    z: Tensor,  # logits, of any shape; becomes -z where flipped
    out: Tensor,  # likewise, alpha * softplus(z) - beta * z
    flipped: Tensor | None,  # bool: where the loss is written as one of -z; None: nowhere
    alpha: Tensor | None,  # None: 1
    beta: Tensor | None,  # alpha - beta where flipped; None: 0
) -> None:
    """The losses of pairs. Where beta is nearer to alpha than to 0, nothing cancels in that of -z:
    it is alpha * softplus(-z) - (alpha - beta) * -z."""
    _turn(z, flipped, out)
    torch.ops.aten.softplus.out(z, 1.0, SOFTPLUS_THRESHOLD, out=out)
    if alpha is not None:
        out.mul_(alpha)
    if beta is not None:
        out.addcmul_(z, beta, value=-1)


def _derivatives(
    z: Tensor,  # what _losses leaves; becomes dlogits
    scratch: Tensor | None,  # of the same shape, where something is flipped
    flipped: Tensor | None,
    alpha: Tensor | None,
    beta: Tensor | None,
) -> None:
    z.sigmoid_()
    if alpha is not None:
        z.mul_(alpha)
    if beta is not None:
        z.sub_(beta)
    _turn(z, flipped, scratch)


def _turn(values: Tensor, where: Tensor | None, scratch: Tensor | None) -> None:
    if where is not None:
        torch.where(where, torch.neg(values, out=scratch), values, out=values)


def _where(diagonal: int, length: int) -> tuple[slice, slice]:
    """Rows and columns of a diagonal's pairs."""
    row, col = max(-diagonal, 0), max(diagonal, 0)
    return slice(row, row + length), slice(col, col + length)


def _shares(shares: PositiveShares, out: Tensor) -> Tensor:  # (m, n)
    """p of all pairs, in ``out``."""
    if shares.text is None:
        out.copy_(shares.image[:, None].expand(out.shape))
    else:
        torch.add(shares.image[:, None], shares.text, out=out)
    if shares.aligned is not None:
        out.diagonal(shares.aligned[0]).fill_(shares.aligned[1])
    return out
