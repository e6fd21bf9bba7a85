"""Hardest and easiest negatives: each image's threshold, found from histograms of its scores."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from ..kernels import ScoreNormalizer, ScoreThreshold
from ..kernels.float_keys import KEY_BITS, key_to_float

_TIE = 32  # units in the last place within which similarities of equal pairs lie

_SHARE_BITS = 38  # times a number of texts below 2^25: no overflow

# Images whose histograms exist at one time (in a group: cumulated ones), 16 MiB at 1024 bins;
# and features that are converted at one time.
ROWS_AT_ONCE = 4096


def text_center_radius(
    y: Tensor,  # (N, D)
    text_ids: Tensor | None,  # (N,)
    dtype: torch.dtype,
    all_reduce: Callable[[Tensor, str], None],
) -> tuple[Tensor, Tensor]:  # (D,), ()
    """The mean of the texts without padding, and how far the farthest lies from it; 0 of none.

    ``all_reduce`` replaces a tensor by its "SUM" or "MAX" over the ranks.
    """

    def blocks(padding: Tensor) -> Iterator[Tensor]:  # () or (D,) -> (n, D)
        for start in range(0, len(y), ROWS_AT_ONCE):
            rows = slice(start, start + ROWS_AT_ONCE)
            block = y[rows].to(dtype)
            yield block if text_ids is None else block.where(text_ids[rows, None] >= 0, padding)

    total = y.new_zeros(y.shape[1] + 1, dtype=dtype)  # and the number of texts
    for texts in blocks(total.new_zeros(())):
        total[:-1] += texts.sum(0)
    total[-1] = len(y) if text_ids is None else (text_ids >= 0).sum()
    all_reduce(total, "SUM")
    center = total[:-1] / total[-1].clamp(min=1)
    radius = total.new_zeros(())
    for texts in blocks(center):
        radius = torch.maximum(radius, torch.linalg.vector_norm(texts - center, dim=1).max())
    all_reduce(radius, "MAX")
    return center, radius


def score_normalizer(
    x: Tensor,  # (M, D)
    center: Tensor,  # (D,) of text_center_radius
    radius: Tensor,  # () likewise
    logit_scale: Tensor,  # () accumulation dtype
    kind: str,
) -> ScoreNormalizer:  # (M,)
    """What maps each image's similarities into [-1, 1], those that take part first at the top.

    Around the mean text, since the cosines of untrained towers are often all alike.
    """
    acc = logit_scale.dtype
    centers = torch.cat([rows.to(acc) @ center for rows in x.split(ROWS_AT_ONCE)])
    norms = torch.linalg.vector_norm(x, dim=1, dtype=acc)
    sign = logit_scale.sign() if kind == "hardest" else -logit_scale.sign()
    # Cauchy-Schwarz, and room for the rounding of norms and (in tf32 too) of similarities
    farthest = norms * (1.01 * radius + torch.linalg.vector_norm(center) / 16)
    return ScoreNormalizer(centers, sign / farthest.clamp(min=torch.finfo(acc).tiny))


def search_thresholds(
    keep: float,
    dtype: torch.dtype,
    steps: Sequence[int],
    count: Callable[[Tensor | None, int], Tensor],
) -> Tensor:  # (M,)
    """Each image's threshold: the key of a normalized score, found bit by bit from the first.

    ``steps`` are the bits that are found together, KEY_BITS in all. ``count`` gives the (M,
    2**bits) int32 numbers of negatives, as :meth:`Panel.count` does: called with the bits that are
    known, (M,) int32 (None: none are), and the number of the step.
    """
    assert sum(steps) == KEY_BITS
    counts = count(None, 0)
    # In whole numbers, which every device has. Rounded up, but 0.07 * 100 to 7: the share is cut.
    share = int(keep * 2**_SHARE_BITS)
    wanted = -(-counts.sum(1) * share >> _SHARE_BITS)
    wanted.clamp_(min=1)
    prefix, above = _bin_of_kth(counts, wanted)
    for step in range(1, len(steps)):
        del counts  # before the next come
        wanted = wanted - above
        counts = count(prefix.int(), step)
        found, above = _bin_of_kth(counts, wanted)
        prefix = (prefix << steps[step]) + found
    return key_to_float(prefix, dtype)


def _bin_of_kth(counts: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:  # (M,), (M,) int64
    """Each row's highest bin that, with those above, holds ``wanted``; what those above hold."""
    last, above = torch.empty_like(wanted), torch.empty_like(wanted)
    for start in range(0, len(counts), ROWS_AT_ONCE):
        rows = slice(start, start + ROWS_AT_ONCE)
        reached = counts[rows].flip(1).cumsum(1, dtype=torch.int32)  # from the highest bin down
        last_bin = counts.shape[1] - 1
        later = (reached < wanted[rows, None]).sum(1, keepdim=True).clamp(max=last_bin)
        highest = last_bin - later
        last[rows] = highest[:, 0]
        above[rows] = (reached.gather(1, later) - counts[rows].gather(1, highest))[:, 0]
    return last, above


def margin_threshold(
    best: Tensor,  # (M,) of each image's positives; -inf of none, which is no bound
    margin: float,
) -> ScoreThreshold:
    """Negatives take part up to ``best + margin``: by their similarity with the other sign."""
    # room for the rounding of similarities: a copy of the positive is no more similar
    bound = best + margin + _TIE * torch.finfo(best.dtype).eps * best.abs()
    threshold = torch.where(best == -torch.inf, -torch.inf, -bound)
    return ScoreThreshold(
        ScoreNormalizer(torch.zeros_like(best), torch.full_like(best, -1.0)), threshold
    )
