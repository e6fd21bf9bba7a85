"""Mean and standard deviation of logits in closed form, without the matrix of logits.

With x = xbar + dx and y = ybar + dy, where dx and dy have the mean 0,

    x . y - xbar . ybar = dx . ybar + xbar . dy + dx . dy

and the sums of the mixed terms over all pairs vanish. So over M x N pairs

    sum of (s - mean)^2 = N sum (dx . ybar)^2 + M sum (xbar . dy)^2 + <DX^T DX, DY^T DY>

which are terms of one sign each: nothing cancels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .distributed.exchange import Local, Texts, open_exchange
from .kernels import accumulate_dtype
from .rows import RowData
from .settled import Inputs, settle
from .spec import LossSpec

_ROWS_AT_ONCE = 1024  # features that are converted at one time
# Images, and texts, whose positives are taken from one product. Fewer are multiplied in vain in
# smaller products, and these take longer to launch.
_ROWS_OF_POSITIVES = 512
_PARTS = 256  # moments in one tensor

AllReduce = Callable[[Tensor, str], None]


class Moments(NamedTuple):
    """The number of some pairs, the mean of their similarities, and the sum of squared deviations
    from it; () each."""

    pairs: Tensor
    mean: Tensor
    squares: Tensor


def logit_moments(inputs: Inputs, rows: RowData, spec: LossSpec) -> Tensor:  # (4,)
    """See :func:`fused_siglip.logit_statistics`."""
    x, y, affine, run = settle(inputs, spec)
    scale, bias = affine
    acc = scale.dtype
    exchange = open_exchange(x, y, affine, rows, spec, run)
    parts = _Parts(scale)
    ids = rows.ids
    if ids is None:
        parts.add(_diagonal(x, y, acc))
    else:

        def visit(texts: Texts, _: Tensor | None) -> None:
            assert texts.ids is not None
            for part in positives_by_id(x, ids.images, texts.features, texts.ids):
                parts.add(part)

        exchange.for_each(visit)
    image_ids, text_ids = ids or (None, None)
    images, texts = _Rows(x, acc, image_ids), _Rows(y, acc, text_ids)
    alone = isinstance(exchange, Local)
    return torch.stack(
        [
            *_statistics(_joined(parts, exchange.all_reduce), scale, bias),
            *_statistics(_all_pairs(images, texts, exchange.all_reduce, alone), scale, bias),
        ]
    )


def _statistics(moments: Moments, scale: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of logits."""
    deviation = (moments.squares / moments.pairs).clamp(min=0).sqrt()
    return scale * moments.mean + bias, scale.abs() * deviation


class _Parts:
    """Moments of some pairs, side by side.

    Tensors of their own, made between the products and kept, would break up the memory of a CPU, so
    that every product takes more of it.
    """

    def __init__(self, like: Tensor):
        self.tables, self.used = [like.new_zeros(3, _PARTS)], 0

    def add(self, part: Moments) -> None:
        if self.used == _PARTS:
            self.tables.append(torch.zeros_like(self.tables[0]))
            self.used = 0
        for row, value in zip(self.tables[-1], part, strict=True):
            row[self.used] = value
        self.used += 1

    def columns(self) -> Tensor:  # (3, k)
        """All parts, and some of no pairs."""
        return torch.cat(self.tables, 1)


def _joined(parts: _Parts, all_reduce: AllReduce) -> Moments:
    """The moments of all pairs from those of some, of all ranks; a mean of NaN where none is."""
    count, mean, squares = parts.columns()
    sums = torch.stack([count.sum(), (count * mean).sum()])
    all_reduce(sums, "SUM")
    total = sums[1] / sums[0]
    around_total = (squares + count * (mean - total) ** 2).sum()
    all_reduce(around_total, "SUM")
    return Moments(sums[0], total, around_total)


def _moments_of(similarities: Tensor, mask: Tensor | None = None) -> Moments:
    """Of some pairs; ``mask`` is 1 where one counts, and 0."""
    if mask is None:
        count = similarities.new_full((), similarities.numel())
        mean = similarities.sum() / count.clamp(min=1)
        return Moments(count, mean, (similarities - mean).square().sum())
    count = mask.sum()
    mean = (similarities * mask).sum() / count
    return Moments(count, mean, ((similarities - mean).square() * mask).sum())


def _diagonal(x: Tensor, y: Tensor, acc: torch.dtype) -> Moments:
    blocks = zip(_Rows(x, acc).blocks(), _Rows(y, acc).blocks(), strict=True)
    # written in place: see _Parts
    similarities = x.new_empty(len(x), dtype=acc)
    for out, (a, b) in zip(similarities.split(_ROWS_AT_ONCE), blocks, strict=False):
        torch.sum(a * b, 1, out=out)
    return _moments_of(similarities)


@dataclass(frozen=True)
class _Rows:
    """Some rows of features, taken a few at a time."""

    features: Tensor  # (M, D)
    acc: torch.dtype
    ids: Tensor | None = None  # (M,); negative ones are left out
    index: Tensor | None = None  # (m,) the rows that are meant; None: all

    def __len__(self) -> int:
        return len(self.features if self.index is None else self.index)

    def blocks(self, padding: Tensor | None = None) -> Iterator[Tensor]:  # () or (D,) -> (m, D)
        """Features in the accumulation dtype, ``padding`` (0) in rows that are left out."""
        for start in range(0, len(self), _ROWS_AT_ONCE):
            rows = slice(start, start + _ROWS_AT_ONCE)
            block = self.features[rows if self.index is None else self.index[rows]].to(self.acc)
            if self.ids is not None:
                fill = block.new_zeros(()) if padding is None else padding
                block = torch.where(self.ids[rows, None] >= 0, block, fill)
            yield block

    def sums(self) -> Tensor:  # (D + 1,)
        """The sum of the rows, and their number."""
        total = self.features.new_zeros(self.features.shape[1] + 1, dtype=self.acc)
        for block in self.blocks():
            total[:-1] += block.sum(0)
        total[-1] = len(self) if self.ids is None else (self.ids >= 0).sum()
        return total

    def centered(self, mean: Tensor) -> Iterator[Tensor]:  # (D,) -> (m, D)
        """The rows without their mean, 0 where they are left out."""
        return (block - mean for block in self.blocks(mean))


def _all_pairs(images: _Rows, texts: _Rows, all_reduce: AllReduce, alone: bool = True) -> Moments:
    """The moments of all pairs of images and texts."""
    d = images.features.shape[1]
    sums = torch.stack([images.sums(), texts.sums()])
    all_reduce(sums, "SUM")
    (image_mean, text_mean), (m, n) = sums[:, :-1] / sums[:, -1:], sums[:, -1]
    # A few rows are multiplied with each other, since their covariances would cost more.
    few = alone and max(len(images), len(texts)) <= _ROWS_AT_ONCE
    if few and len(images) * len(texts) <= (len(images) + len(texts)) * d:
        (dx, dy) = (
            next(rows.centered(mean), mean.new_zeros(0, d))
            for rows, mean in ((images, image_mean), (texts, text_mean))
        )
        along = (dx @ text_mean).square().sum() / m + (dy @ image_mean).square().sum() / n
        across = (dx @ dy.T).square().sum() / m / n
    else:
        squares = sums.new_zeros(2, d * d + 1)  # a covariance matrix, and those along the mean
        for out, rows, mean, other in (
            (squares[0], images, image_mean, text_mean),
            (squares[1], texts, text_mean, image_mean),
        ):
            covariance = out[:-1].view(d, d)
            for block in rows.centered(mean):
                covariance.addmm_(block.T, block)
                out[-1] += (block @ other).square().sum()
        all_reduce(squares, "SUM")
        squares /= torch.stack([m, n])[:, None]
        along = squares[:, -1].sum()
        across = (squares[0, :-1] * squares[1, :-1]).sum()
    pairs = m * n
    mean = torch.where(pairs > 0, image_mean @ text_mean, torch.nan)  # also where D is 0
    return Moments(pairs, mean, (along + across) * pairs)


def positives_by_id(
    x: Tensor,  # (M, D)
    image_ids: Tensor,  # (M,)
    y: Tensor,  # (N, D)
    text_ids: Tensor,  # (N,)
) -> Iterator[Moments]:
    """The moments of pairs with equal ids, in parts.

    Images and texts are taken in the order of their ids. An id with more pairs than D times its
    rows goes by its covariances. The pairs of all others lie in a band round the diagonal, whose
    blocks are multiplied. Neither is more than O((M + N) D^2).
    """
    acc, d = accumulate_dtype(x.dtype), x.shape[1]
    image_order, text_order, groups = _groups_by_id(image_ids, text_ids)
    many = groups[2] * groups[3] > (groups[2] + groups[3]) * d
    for first_image, first_text, images, texts in groups[:, many].T.tolist():
        yield _all_pairs(
            _Rows(x, acc, index=image_order[first_image : first_image + images]),
            _Rows(y, acc, index=text_order[first_text : first_text + texts]),
            lambda tensor, op: None,
        )
    groups = groups[:, ~many]
    images, texts = (
        _rows_of_groups(order, first, sizes)
        for order, first, sizes in (
            (image_order, groups[0], groups[2]),
            (text_order, groups[1], groups[3]),
        )
    )
    ends = groups[3].cumsum(0)
    for start in range(0, len(images.group), _ROWS_OF_POSITIVES):
        rows = slice(start, start + _ROWS_OF_POSITIVES)
        in_rows = images.group[rows]
        first, last = int(in_rows[0]), int(in_rows[-1])
        features = x[images.rows[rows]].to(acc)
        stop = int(ends[last])
        for begin in range(int(ends[first] - groups[3, first]), stop, _ROWS_OF_POSITIVES):
            cols = slice(begin, min(begin + _ROWS_OF_POSITIVES, stop))
            mask = in_rows[:, None] == texts.group[cols]
            similarities = features @ y[texts.rows[cols]].to(acc).T
            yield _moments_of(similarities, mask.to(x.device, acc))


class _Grouped(NamedTuple):
    """Rows in the order of their ids, of ids that images and texts have."""

    rows: Tensor  # (m,)
    group: Tensor  # (m,) on the CPU: whose number the id is


def _groups_by_id(
    image_ids: Tensor, text_ids: Tensor
) -> tuple[Tensor, Tensor, Tensor]:  # (M,), (N,), (4, k) on the CPU
    """Orders of the rows by id; for each id that both have, the first image and text in these
    orders, and the numbers of both."""
    images, image_order = image_ids.sort(stable=True)
    texts, text_order = text_ids.sort(stable=True)
    found, sizes = images.unique_consecutive(return_counts=True)
    first_text = torch.searchsorted(texts, found)
    of_text = torch.searchsorted(texts, found, right=True) - first_text
    groups = torch.stack([sizes.cumsum(0) - sizes, first_text, sizes, of_text])
    groups = groups[:, (found >= 0) & (of_text > 0)].cpu()  # their number is not known before
    return image_order, text_order, groups


def _rows_of_groups(order: Tensor, first: Tensor, sizes: Tensor) -> _Grouped:
    group = torch.repeat_interleave(torch.arange(len(sizes)), sizes)
    before = sizes.cumsum(0) - sizes
    index = torch.arange(len(group)) + (first - before)[group]
    return _Grouped(order[index.to(order.device)], group)
