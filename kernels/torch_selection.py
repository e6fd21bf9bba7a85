"""Which negatives take part, and how many have which score: a part of the torch backend."""

from __future__ import annotations

import torch
from torch import Tensor

from .float_keys import FORMATS, HALF, KEY_BITS, key_format
from .interface import Pairs, RandomMask, ScoreNormalizer, ScoreThreshold
from .torch_similarities import TorchSimilarities


class TorchSelection(TorchSimilarities):
    """The part of a panel that drops negatives, and counts them by score."""

    count_bits: tuple[int, ...] = (10, 10)
    on_cpu: bool

    def count(
        self,
        x: Tensor,  # (m, D)
        y: Tensor,  # (n, D)
        pairs: Pairs,
        normalizer: ScoreNormalizer,
        prefix: Tensor | None,  # (m,) int32
        step: int,
        counts: Tensor,  # (m, 2**bits) int32
    ) -> None:
        s = self._similarities(x, y)
        for start in range(0, x.shape[0], self.strip_rows):
            rows = slice(start, start + self.strip_rows)
            in_strip = None if prefix is None else prefix[rows]
            self._count_strip(
                s[rows], pairs.block(rows), normalizer.block(rows), in_strip, step, counts[rows]
            )

    def _count_strip(
        self,
        s: Tensor,  # (m, n)
        pairs: Pairs,
        normalizer: ScoreNormalizer,
        prefix: Tensor | None,  # (m,) int32
        step: int,
        counts: Tensor,  # (m, 2**bits) int32
    ) -> None:
        m, n = s.shape
        bits, later = self.count_bits[step], KEY_BITS - sum(self.count_bits[: step + 1])
        counted = self.workspace.view("dropped", m, n)
        bins = self._keys(self._normalized(s, normalizer, s), counted)
        bins.bitwise_right_shift_(later)
        if prefix is None:
            counted.fill_(True)
        else:
            first = torch.bitwise_right_shift(bins, bits, out=self.workspace.scratch(m, n))
            torch.eq(first, prefix[:, None], out=counted)
            bins.bitwise_and_(2**bits - 1)
        _except_positives(counted, self._positive(s, pairs))
        if pairs.ids is not None:
            counted.logical_and_(pairs.ids.images[:, None] >= 0)
            counted.logical_and_(pairs.ids.texts >= 0)
        rows = torch.arange(m, dtype=torch.int32, device=s.device) << bits
        bins.add_(rows[:, None])
        ones = self.workspace.scratch(m, n).copy_(counted)
        counts.view(-1).index_add_(0, bins.view(-1), ones.view(-1))

    def _keys(self, value: Tensor, scratch: Tensor) -> Tensor:  # (m, n) int32
        """Keys (float_keys.py) of values, which are overwritten; ``scratch`` is (m, n) bool."""
        m, n = value.shape
        below_zero = self.workspace.scratch(m, n).copy_(torch.lt(value, 0, out=scratch)).neg_()
        shift, offset = key_format(value.dtype)
        magnitude = value.abs_().view(FORMATS[value.dtype][0])
        magnitude.bitwise_right_shift_(shift).sub_(offset).clamp_(0, HALF - 1)
        keys = self.workspace.view("bits", m, n).copy_(magnitude)
        return keys.bitwise_xor_(below_zero).add_(HALF)  # -1 turns every bit

    def _normalized(self, s: Tensor, normalizer: ScoreNormalizer, out: Tensor) -> Tensor:  # (m, n)
        """What thresholds are compared with: the same bits whenever they are found or applied."""
        value = torch.sub(s, normalizer.center[:, None], out=out)
        return value.mul_(normalizer.inv_radius[:, None])

    def _drop(
        self, s: Tensor, positive: Tensor | int | None, selection: RandomMask | ScoreThreshold
    ) -> int:
        """Mark the pairs that take no part; their number, where the host need not wait for it."""
        m, n = s.shape
        dropped = self.workspace.view("dropped", m, n)
        if isinstance(selection, ScoreThreshold):
            value = self._normalized(s, selection.normalizer, self.workspace.view("terms", m, n))
            torch.lt(value, selection.threshold[:, None], out=dropped)
        else:
            h, part = self.workspace.view("bits", m, n), self.workspace.scratch(m, n)
            torch.bitwise_xor(selection.image_keys[:, None], selection.text_keys, out=h)
            for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B - 2**32)):
                # a logical shift: torch's repeats the sign
                torch.bitwise_right_shift(h, shift, out=part).bitwise_and_((1 << 32 - shift) - 1)
                h.bitwise_xor_(part).mul_(factor)
            torch.ge(h, selection.hash_cutoff, out=dropped)
        _except_positives(dropped, positive)
        return int(torch.count_nonzero(dropped)) if self.on_cpu else 0


def _except_positives(pairs: Tensor, positive: Tensor | int | None) -> None:
    """pairs = False where a pair is positive."""
    if isinstance(positive, Tensor):
        torch.gt(pairs, positive, out=pairs)
    elif positive is not None:
        pairs.diagonal(positive).fill_(False)
