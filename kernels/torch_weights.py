"""The strip of a panel whose pairs have weights and targets, in torch: see pair_weights.py."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .pair_weights import PairWeights, PositiveShares
from .torch_workspace import Workspace

# torch's softplus returns u itself beyond its threshold; at 40 that is exact in float64 too
# (the default, 20, drops 2e-9).
SOFTPLUS_THRESHOLD = 40.0

# Up to this logit log1p(exp(z)) is exact too, and half the work of torch's softplus on a CPU.
_MODERATE_LOGIT = 40.0


def softplus(u: Tensor, out: Tensor) -> Tensor:
    return F.softplus(u, 1.0, SOFTPLUS_THRESHOLD, out=out)  # type: ignore[call-arg]


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
        needs: tuple[bool, bool],  # the losses, and dlogits
    ):
        self.z, self.weights, self.dropped = z, weights, dropped
        self.workspace, (self.needs_losses, self.needs_dlogits) = workspace, needs
        self.terms = self.view("terms")

    def view(self, name: str) -> Tensor:  # (m, n)
        """A buffer for the strip."""
        return self.workspace.view(name, *self.z.shape)

    def on_diagonal(self, diagonal: int | None) -> Tensor:  # (m,)
        """The losses of the rows; pair (i, i + diagonal) is positive, or none is."""
        z, terms = self.z, self.terms
        logits = None if diagonal is None else z.diagonal(diagonal).clone()
        beta = None if self.weights.targets is None else self.weights.targets[4]
        if beta is not None and beta.is_cpu and beta.item() == 0:
            beta = None
        if self.needs_losses:
            self._without_dropped(_losses(z, terms, None, beta))
        if self.needs_dlogits:
            self._without_dropped(_derivatives(z, None, beta))
        if logits is not None and diagonal is not None:
            alpha, beta, flipped = self._on_diagonal(diagonal, logits.shape[0])
            losses = _turn(logits, flipped, torch.empty_like(logits))
            terms.diagonal(diagonal).copy_(_losses(logits, losses, alpha, beta))
            _turn(_derivatives(logits, alpha, beta), flipped, losses)
            z.diagonal(diagonal).copy_(logits)
        losses = self._row_losses()
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
        _turn(self.z, positive, self.terms)
        if self.needs_losses:
            self._without_dropped(_losses(self.z, self.terms, alpha, beta))
        losses = self._row_losses()
        if self.needs_dlogits:
            _turn(_derivatives(self.z, alpha, beta), positive, self.terms)
            self._without_dropped(self.z)
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

    def _on_diagonal(
        self, diagonal: int, length: int
    ) -> tuple[Tensor | None, Tensor | None, Tensor]:
        """alpha and beta of positives on a diagonal, and where their losses are those of -z."""
        row, col = max(-diagonal, 0), max(diagonal, 0)
        few = self.weights.block(slice(row, row + length), slice(col, col + length))
        share = self.z.new_ones(())
        if few.shares is not None:
            share = few.shares.image
            share = share if few.shares.text is None else share + few.shares.text
        if few.targets is None:
            return (None if few.shares is None else share), None, share.new_ones(()).bool()
        a0, a1, b0, b1, _ = few.targets.unbind()
        alpha, beta = a0 + a1 * share, b0 + b1 * share
        flipped = beta > alpha / 2
        return alpha, torch.where(flipped, alpha - beta, beta), flipped

    def _without_dropped(self, values: Tensor) -> None:
        if self.dropped is not None:
            values.masked_fill_(self.dropped, 0)

    def _row_losses(self) -> Tensor:  # (m,)
        """The losses of the rows, from those of the pairs."""
        if not self.needs_losses:
            return self.z.new_zeros(self.z.shape[0])
        if self.weights.texts is not None:
            self.terms.mul_(self.weights.texts)
        losses = self.terms.sum(1)
        return losses if self.weights.images is None else losses.mul_(self.weights.images)

    def _weight_dlogits(self) -> None:
        if self.needs_dlogits and self.weights.texts is not None:
            self.z.mul_(self.weights.texts)
        if self.needs_dlogits and self.weights.images is not None:
            self.z.mul_(self.weights.images[:, None])


def _losses(
    z: Tensor,  # logits, of any shape
    out: Tensor,  # likewise, overwritten
    alpha: Tensor | None,  # None: 1
    beta: Tensor | None,  # None: 0
) -> Tensor:
    """alpha * softplus(z) - beta * z, in ``out``.

    Where beta is nearer to alpha than to 0 z is that of the other sign (``_turn``), and beta
    alpha - beta: the same loss, of which nothing cancels.
    """
    if z.is_cpu and z.numel() > 0 and z.amax().item() <= _MODERATE_LOGIT:  # which NaN is not
        torch.exp(z, out=out).log1p_()
    else:
        softplus(z, out)
    if alpha is not None:
        out.mul_(alpha)
    return out if beta is None else out.addcmul_(z, beta, value=-1)


def _derivatives(z: Tensor, alpha: Tensor | None, beta: Tensor | None) -> Tensor:
    """z becomes the derivative of what _losses gives, in z."""
    z.sigmoid_()
    if alpha is not None:
        z.mul_(alpha)
    return z if beta is None else z.sub_(beta)


def _turn(values: Tensor, where: Tensor, scratch: Tensor) -> Tensor:
    """Turn the sign of ``values`` where ``where`` says so; returns the scratch."""
    torch.where(where, torch.neg(values, out=scratch), values, out=values)
    return scratch


def _shares(shares: PositiveShares, out: Tensor) -> Tensor:  # (m, n)
    """p of all pairs, in ``out``."""
    if shares.text is None:
        out.copy_(shares.image[:, None].expand(out.shape))
    else:
        torch.add(shares.image[:, None], shares.text, out=out)
    if shares.aligned is not None:
        out.diagonal(shares.aligned[0]).fill_(shares.aligned[1])
    return out
