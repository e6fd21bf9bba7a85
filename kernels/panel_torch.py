"""The torch backend: a panel as a library product and in-place passes, on any device."""

from __future__ import annotations

import torch
from torch import Tensor

from . import GRAD_SCALE, AtLeast, Positives, RandomPairs
from .places import FORMATS, HALF, PLACE_BITS, cut
from .products import add_product

# torch's softplus returns u itself beyond its threshold; at 40 that is exact in float64 too
# (the default, 20, drops 2e-9).
_SOFTPLUS_THRESHOLD = 40.0

# On a CPU, the share of kept pairs below which sparse products are the faster ones. Elsewhere the
# host would have to wait for their number.
_SPARSE_SHARE = 1 / 16


class TorchPanel:
    """A :class:`fused_siglip.kernels.Panel` of plain torch operations.

    Everything is written in place or into the workspace. With panels that stay in the last-level
    cache the elementwise passes are nearly free beside the products.
    """

    tile = (64, 64)
    align = 1
    count_bits = (10, 10)

    @staticmethod
    def _buffers(
        dtype: torch.dtype, write_g: bool, scalar_grads: bool, selects: bool
    ) -> dict[str, torch.dtype]:
        acc = torch.promote_types(dtype, torch.float32)
        buffers = {"u": acc, "terms": acc, "positive": torch.bool}
        if scalar_grads:
            buffers["s"] = acc  # kept beside u for the sum of g*s
        if write_g and dtype != acc:
            buffers["g"] = dtype
        if selects:
            buffers |= {"bits": torch.int32, "dropped": torch.bool}
        return buffers

    @staticmethod
    def workspace_bytes(
        rows: int,
        cols: int,
        dtype: torch.dtype,
        write_g: bool,
        scalar_grads: bool,
        selects: bool = False,
    ) -> int:
        buffers = TorchPanel._buffers(dtype, write_g, scalar_grads, selects)
        return rows * cols * sum(d.itemsize for d in buffers.values())

    def __init__(
        self,
        rows: int,
        cols: int,
        dtype: torch.dtype,
        device: torch.device,
        write_g: bool,
        scalar_grads: bool,
        selects: bool = False,
    ):
        self.write_g, self.scalar_grads = write_g, scalar_grads
        self.buffers = {
            name: torch.empty(rows * cols, dtype=d, device=device)
            for name, d in self._buffers(dtype, write_g, scalar_grads, selects).items()
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
        kept: RandomPairs | AtLeast | None = None,
    ) -> Tensor | None:  # (m, n)
        m, n = x.shape[0], y.shape[0]
        u = self._view("u", m, n)
        positive = self._positive(m, n, positives)
        s = self._similarities(x, y, "s" if self.scalar_grads else "u")
        dropped = None if kept is None else self._dropped(s, positive, kept)
        torch.mul(s, logit_scale, out=u)
        self._add_bias(u, logit_bias, positives)
        self._negate_positives(u, positive)
        if dropped is not None:  # loss 0, gradient 0
            torch.where(dropped, u.new_full((), -torch.inf), u, out=u)

        terms = self._view("terms", m, n)
        torch.ops.aten.softplus.out(u, 1.0, _SOFTPLUS_THRESHOLD, out=terms)
        torch.sum(terms, (0, 1), out=sums[0])
        if not (self.write_g or self.scalar_grads):
            return None

        g = u.sigmoid_()
        self._negate_positives(g, positive)
        if self.scalar_grads:
            # not torch.dot: BLAS adds a million terms one after the other, torch.sum pairwise
            torch.sum(torch.mul(s, g, out=terms), (0, 1), out=sums[1])
            torch.sum(g, (0, 1), out=sums[2])
        if not self.write_g:
            return None
        if x.dtype == g.dtype:
            if dropped is not None and g.device.type == "cpu":
                share = 1 - torch.count_nonzero(dropped).item() / dropped.numel()
                return g.to_sparse() if share < _SPARSE_SHARE else g
            return g
        return torch.mul(g, GRAD_SCALE.get(x.dtype, 1.0), out=self._view("g", m, n))

    def add_product(
        self,
        out: Tensor,  # (m, D) or, transposed, (n, D)
        g: Tensor,  # (m, n)
        other: Tensor,  # (n, D) or, transposed, (m, D)
        alpha: float,
        fresh: bool,
        transposed: bool,
    ) -> None:
        add_product(out, g.T if transposed else g, other, alpha, fresh)

    def count(
        self,
        x: Tensor,  # (m, D)
        y: Tensor,  # (n, D)
        positives: Positives,
        centres: Tensor,  # (m,)
        factors: Tensor,  # (m,)
        known: Tensor | None,  # (m,) int32
        step: int,
        counts: Tensor,  # (m, 2**bits) int32
    ) -> None:
        m, n = x.shape[0], y.shape[0]
        value = self._placed(self._similarities(x, y, "u"), centres, factors, "u")
        counted = self._view("dropped", m, n)
        below_zero = self._scratch(m, n).copy_(torch.lt(value, 0, out=counted)).neg_()
        shift, lowest = cut(value.dtype)
        bits = value.abs_().view(FORMATS[value.dtype][0])
        bits.bitwise_right_shift_(shift).sub_(lowest).clamp_(0, HALF - 1)
        bins = self._view("bits", m, n).copy_(bits)
        bins.bitwise_xor_(below_zero).add_(HALF)  # -1 turns every bit
        bits, later = self.count_bits[step], PLACE_BITS - sum(self.count_bits[: step + 1])
        bins.bitwise_right_shift_(later)
        if known is None:
            counted.fill_(True)
        else:
            first = torch.bitwise_right_shift(bins, bits, out=self._scratch(m, n))
            torch.eq(first, known[:, None], out=counted)
            bins.bitwise_and_(2**bits - 1)
        _except_positives(counted, self._positive(m, n, positives))
        if positives.image_ids is not None:
            counted.logical_and_(positives.image_ids[:, None] >= 0)
            counted.logical_and_(positives.text_ids >= 0)
        rows = torch.arange(m, dtype=torch.int32, device=x.device) << bits
        bins.add_(rows[:, None])
        ones = self._scratch(m, n).copy_(counted)
        counts.view(-1).index_add_(0, bins.view(-1), ones.view(-1))

    def _similarities(self, x: Tensor, y: Tensor, buffer: str) -> Tensor:  # (m, n)
        s = self._view(buffer, x.shape[0], y.shape[0])
        if x.dtype == s.dtype:
            return torch.mm(x, y.T, out=s)
        # half precision on a GPU: fp32 logits from half operands
        return torch.mm(x, y.T, out_dtype=s.dtype, out=s)

    def _placed(self, s: Tensor, centres: Tensor, factors: Tensor, buffer: str) -> Tensor:  # (m, n)
        """What thresholds are compared with: the same bits whenever they are found or applied."""
        value = torch.sub(s, centres[:, None], out=self._view(buffer, *s.shape))
        return value.mul_(factors[:, None])

    def _scratch(self, m: int, n: int) -> Tensor:  # (m, n) int32, until "terms" is written
        return self.buffers["terms"].view(torch.int32)[: m * n].view(m, n)

    def _dropped(
        self, s: Tensor, positive: Tensor | int | None, kept: RandomPairs | AtLeast
    ) -> Tensor:  # (m, n) bool
        m, n = s.shape
        dropped = self._view("dropped", m, n)
        if isinstance(kept, AtLeast):
            value = self._placed(s, kept.centres, kept.factors, "terms")
            torch.lt(value, kept.least[:, None], out=dropped)
        else:
            h, part = self._view("bits", m, n), self._scratch(m, n)
            torch.bitwise_xor(kept.image_keys[:, None], kept.text_keys, out=h)
            for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B - 2**32)):
                # a logical shift: torch's repeats the sign
                torch.bitwise_right_shift(h, shift, out=part).bitwise_and_((1 << 32 - shift) - 1)
                h.bitwise_xor_(part).mul_(factor)
            torch.ge(h, kept.below, out=dropped)
        _except_positives(dropped, positive)
        return dropped

    def _positive(self, m: int, n: int, positives: Positives) -> Tensor | int | None:
        """Which pairs are positive: (m, n) bool, the number of a diagonal, or None."""
        if positives.image_ids is None:
            return positives.diagonal
        # padding is -1 among images and -2 among texts: never a positive pair
        images = positives.image_ids.clamp(min=-1)
        texts = torch.where(positives.text_ids < 0, -2, positives.text_ids)
        return torch.eq(images[:, None], texts, out=self._view("positive", m, n))

    def _add_bias(self, u: Tensor, logit_bias: Tensor, positives: Positives) -> None:
        """u += b; -inf (loss 0, gradient 0) in padded rows and columns."""
        if positives.image_ids is None:
            u.add_(logit_bias)
            return
        u.add_(torch.where(positives.text_ids < 0, -torch.inf, logit_bias))
        u.add_(torch.where(positives.image_ids < 0, -torch.inf, 0.0).to(u.dtype)[:, None])

    def _negate_positives(self, values: Tensor, positive: Tensor | int | None) -> None:
        """values = -l * values, l = +1 for a positive pair and -1 otherwise."""
        if isinstance(positive, Tensor):
            negated = torch.neg(values, out=self._view("terms", *values.shape))
            torch.where(positive, negated, values, out=values)
        elif positive is not None:
            values.diagonal(positive).neg_()


def _except_positives(pairs: Tensor, positive: Tensor | int | None) -> None:
    """pairs = False where a pair is positive."""
    if isinstance(positive, Tensor):
        torch.gt(pairs, positive, out=pairs)
    elif positive is not None:
        pairs.diagonal(positive).fill_(False)
