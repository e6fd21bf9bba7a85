"""Best positives, and how many negatives are as similar: the torch backend's part for ranks."""

from __future__ import annotations

import torch
from torch import Tensor

from .interface import Pairs, RowValues
from .torch_similarities import TorchSimilarities

_ADDRESS = 64  # bytes: where torch's own memory starts; libraries may round otherwise elsewhere


class TorchScores(TorchSimilarities):
    """The part of a panel that compares similarities with each other, to the bit.

    A library's product of the same two vectors has other bits in another shape: on a CPU with few
    rows, with a number of rows that is no multiple of 64, or off an aligned address. So every
    product here has the whole panel's shape, which the caller makes of whole tiles.
    """

    def best_positives(
        self,
        x: Tensor,  # (m, D)
        y: Tensor,  # (n, D)
        pairs: Pairs,
        best: RowValues,
    ) -> None:
        """See :meth:`fused_siglip.kernels.Panel.best_positives`."""
        s = self._whole_product(x, y)
        lowest = torch.finfo(s.dtype).min
        if pairs.ids is None:
            if pairs.diagonal is not None:
                positives = s.diagonal(pairs.diagonal).clamp(min=lowest)
                _raise_to(best.images, max(-pairs.diagonal, 0), positives)
                _raise_to(best.texts, max(pairs.diagonal, 0), positives)
            return
        none = s.new_full((), -torch.inf)
        for start in range(0, len(s), self.strip_rows):
            rows = slice(start, start + self.strip_rows)
            strip = s[rows].clamp_(min=lowest)
            positive = self._positive(strip, pairs.block(rows))
            assert isinstance(positive, Tensor)  # ids are given
            terms = self.workspace.view("terms", *strip.shape)
            torch.where(positive, strip, none, out=terms)
            _raise_to(best.images, start, terms.amax(1))
            _raise_to(best.texts, 0, terms.amax(0))

    def count_not_below(
        self,
        x: Tensor,  # (m, D)
        y: Tensor,  # (n, D)
        pairs: Pairs,
        best: RowValues,
        counts: RowValues,
        same_panel: bool = False,
    ) -> None:
        """See :meth:`fused_siglip.kernels.Panel.count_not_below`."""
        m, n = x.shape[0], y.shape[0]
        kept = same_panel and pairs.ids is None  # with ids the product was overwritten
        s = self._whole(m, n) if kept else self._whole_product(x, y)
        images, texts = s.new_ones(m), s.new_ones(n)  # 0 for padding
        if pairs.ids is not None:
            images, texts = ((ids >= 0).to(s.dtype) for ids in pairs.ids)
        for start in range(0, m, self.strip_rows):
            rows = slice(start, start + self.strip_rows)
            strip = s[rows]
            positive = self._positive(strip, pairs.block(rows))
            below = self.workspace.view("terms", *strip.shape)
            # 1 where a pair does not count and 0 where it does: products with these are exact up to
            # 2^24 rows, and faster than sums of bools
            if best.images is not None and counts.images is not None:
                torch.lt(strip, best.images[rows, None], out=below)
                _fill(below, positive)
                counted = (texts.sum() - torch.mv(below, texts)) * images[rows]
                counts.images[rows] += counted.to(counts.images.dtype)
            if best.texts is not None and counts.texts is not None:
                torch.lt(strip, best.texts, out=below)
                _fill(below, positive)
                counted = (images[rows].sum() - torch.mv(below.T, images[rows])) * texts
                counts.texts.add_(counted.to(counts.texts.dtype))

    def _whole_product(self, x: Tensor, y: Tensor) -> Tensor:  # (m, n)
        rows, cols = self.workspace.shape
        self._similarities(_filled_up(x, rows), _filled_up(y, cols))
        return self._whole(x.shape[0], y.shape[0])

    def _whole(self, m: int, n: int) -> Tensor:  # (m, n)
        """The part of the last product that is of pairs."""
        return self.workspace.view("s", *self.workspace.shape)[:m, :n]


def _filled_up(features: Tensor, rows: int) -> Tensor:  # (rows, D)
    """Features as every product reads them: dense, from an aligned address, zeros at the end."""
    m, d = features.shape
    aligned = features.data_ptr() % _ADDRESS == 0
    if m == rows and aligned and features.is_contiguous():
        return features
    whole = features.new_zeros(rows, d)
    whole[:m] = features
    return whole


def _raise_to(best: Tensor | None, first: int, values: Tensor) -> None:
    """best = the larger of best and values, from row ``first`` on; NaN is larger."""
    if best is not None:
        part = best[first : first + len(values)]
        torch.maximum(part, values, out=part)


def _fill(below: Tensor, positive: Tensor | int | None) -> None:
    """Positives do not count."""
    if isinstance(positive, Tensor):
        below.masked_fill_(positive, 1)
    elif positive is not None:
        below.diagonal(positive).fill_(1)
