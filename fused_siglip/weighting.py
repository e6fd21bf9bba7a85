"""What pairs count, from what the caller says of rows, of positives and of targets.

The loss of a pair is v * (softplus(z) - y * z), with v = a * c * p and y = 1 for a positive, and
v = a * c and y = 0 for a negative: a and c are the weights of the image and the text. With a
``PositiveTarget``, v is a * c and y is p. Label smoothing makes y = (1 - e) * y + e / N, where N is
the number of texts in the global batch.

That moves every y by e / N. Summed over all pairs it is a linear term, which the sums of the
features give (:func:`add_linear_term`); a sweep is told of the positives' rest alone. Where
negatives are selected, those that take part are told e / N.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from .kernels import Affine, PairWeights, PositiveShares
from .rows import RowData
from .spec import ALL_ALIKE, LossSpec, PositiveChoice
from .sweep import GradBuffers

if TYPE_CHECKING:
    from .distributed.exchange import TextExchange, Texts

_ROWS_AT_ONCE = 4096  # features that are converted at one time


class Weighting:
    """What the pairs of this rank's images count."""

    def __init__(
        self, x: Tensor, rows: RowData, spec: LossSpec, acc: torch.dtype, exchange: TextExchange
    ):
        self.rows, self.choice, self.acc = rows, spec.positives, acc
        weights = (None, None) if exchange.all_ones else (rows.image_weights, rows.text_weights)
        self.images = without_padding(weights[0], rows.image_ids, acc)  # (M,)
        texts = None if weights[1] is None else weights[1].to(acc)
        self.shares: PositiveShares | None = None
        if spec.positives != ALL_ALIKE:
            self.shares = _shares(x, rows, spec.positives, acc, exchange)
        # What the weights are divided by, and the loss and its gradients must be multiplied by.
        self.unit: float | Tensor = 1.0
        if x.dtype == torch.float16:
            texts = self._scale_down(x, texts, exchange)
        self.has_texts = texts is not None
        of_texts = None if self.shares is None else self.shares.text
        # what travels with the texts: (N,) each
        self.extras = tuple(extra for extra in (texts, of_texts) if extra is not None)
        self.targets: Tensor | None = None  # (5,)
        self.uniform: Tensor | None = None  # (), e / N
        if spec.positives.kind == "target" or spec.label_smoothing:
            # a number over a tensor of integers would be float32
            smoothing = torch.full((), spec.label_smoothing, dtype=acc, device=x.device)
            self.uniform = smoothing / exchange.real_texts()
            self.targets = pair_targets(spec, self.uniform)
        self.has_linear_term = spec.label_smoothing > 0 and spec.negatives.kind is None

    def _scale_down(
        self, x: Tensor, texts: Tensor | None, exchange: TextExchange
    ) -> Tensor | None:  # (N,)
        """Divide the weights by powers of two: float16 holds dlogits of at most 2 (GRAD_SCALE).

        All ranks divide by the same ones, since they add to the same gradients of texts.
        """
        if self.images is None:
            self.images = x.new_ones(x.shape[0], dtype=self.acc)
        units = torch.stack([
            _power_of_two(self.images),
            self.images.new_ones(()) if texts is None else _power_of_two(texts),
        ])  # fmt: skip
        exchange.all_reduce(units, "MAX")
        of_positives = 2.0 ** max(math.ceil(math.log2(max(self.choice.largest, 1.0))), 0)
        self.images = self.images / (units[0] * of_positives)
        self.unit = units.prod() * of_positives
        return None if texts is None else texts / units[1]

    def _of_texts(self, texts: Texts) -> tuple[Tensor | None, Tensor | None]:  # (n,) each
        """Their weights, and their part of the shares."""
        extras = list(texts.extras)
        weights = extras.pop(0) if self.has_texts else None
        return without_padding(weights, texts.ids, self.acc), extras.pop() if extras else None

    def of(self, texts: Texts) -> PairWeights:
        """What this rank's images and these texts count."""
        weights, of_texts = self._of_texts(texts)
        shares = self.shares
        if shares is not None:
            aligned = None
            share = self.choice.aligned if self.rows.ids is not None else None
            if texts.diagonal is not None and share is not None:
                aligned = texts.diagonal, share
            shares = PositiveShares(shares.image, of_texts, aligned)
        return PairWeights(self.images, weights, shares, self.targets)

    def add_linear_term(self, x: Tensor, texts: Texts, affine: Affine, out: GradBuffers) -> Tensor:
        """See :func:`add_linear_term`."""
        assert self.uniform is not None
        images, texts_side = (
            _Side(
                features,
                features.new_ones(features.shape[0], dtype=self.acc) if w is None else w,
                texts.ids is not None,
            )
            for features, w in ((x, self.images), (texts.features, self._of_texts(texts)[0]))
        )
        return add_linear_term(images, texts_side, affine, self.uniform, out)


def _shares(
    x: Tensor, rows: RowData, choice: PositiveChoice, acc: torch.dtype, exchange: TextExchange
) -> PositiveShares:
    """The positives' share p = image[i] + text[j], those that are aligned aside."""
    if rows.ids is None or not choice.counts:
        value = choice.alone if rows.ids is None else choice.pair
        return PositiveShares(torch.full((x.shape[0],), value, dtype=acc, device=x.device))
    images, texts = torch.zeros_like(rows.ids.images), torch.zeros_like(rows.ids.texts)
    for block in exchange.blocks_of_ids():
        images += count_equal(rows.ids.images, block.texts)
        texts += count_equal(rows.ids.texts, block.images)
    if choice.aligned is not None:
        of_aligned = (rows.ids.images == rows.ids.texts).long()
        images, texts = images - of_aligned, texts - of_aligned
    # a row without positives has no share to give
    image = choice.pair + choice.per_image / images.clamp(min=1).to(acc)
    return PositiveShares(image, choice.per_text / texts.clamp(min=1).to(acc))


def count_equal(ids: Tensor, others: Tensor) -> Tensor:  # (m,), (n,) -> (m,) int64
    """How many of ``others`` each id equals."""
    ordered = others.sort().values
    after = torch.searchsorted(ordered, ids, right=True)
    return after - torch.searchsorted(ordered, ids)


def pair_targets(spec: LossSpec, uniform: Tensor) -> Tensor:  # () -> (5,)
    """``targets`` of :class:`PairWeights`. ``uniform`` is e / N."""
    in_sweep = spec.negatives.kind is not None
    none, rest = torch.zeros_like(uniform), 1 - spec.label_smoothing
    elsewhere = none if in_sweep else uniform  # what the linear term says of every pair
    of_negatives = uniform if in_sweep else none
    if spec.positives.kind == "target":
        values = (none + 1, none, uniform - elsewhere, none + rest, of_negatives)
    else:
        values = (none, none + 1, -elsewhere, uniform + rest, of_negatives)
    return torch.stack(values)


def without_padding(
    weights: Tensor | None,  # (M,)
    ids: Tensor | None,  # (M,)
    dtype: torch.dtype,
) -> Tensor | None:  # (M,)
    """Weights in ``dtype``, 0 for padding; None where all are 1."""
    if ids is None:
        return weights if weights is None or weights.dtype == dtype else weights.to(dtype)
    if weights is None:
        return (ids >= 0).to(dtype)
    return torch.where(ids < 0, 0.0, weights.to(dtype))


def _power_of_two(weights: Tensor) -> Tensor:  # (k,) -> ()
    """The least one that is above all of them; 1 of zeros and of none."""
    largest = torch.cat([weights.abs(), weights.new_zeros(1)]).amax()
    return torch.ldexp(torch.ones_like(largest), torch.frexp(largest).exponent)


class _Side(NamedTuple):
    """Images or texts with what they count."""

    features: Tensor  # (m, D)
    weights: Tensor  # (m,) accumulation dtype
    padded: bool  # rows of weight 0 may be padding, and hold anything

    def blocks(self) -> Iterator[tuple[Tensor, Tensor]]:  # (k, D), (k,)
        """A few rows at a time; padding is 0."""
        for start in range(0, self.features.shape[0], _ROWS_AT_ONCE):
            rows = slice(start, start + _ROWS_AT_ONCE)
            block, weights = self.features[rows].to(self.weights.dtype), self.weights[rows]
            yield torch.where(weights[:, None] == 0, 0.0, block) if self.padded else block, weights

    def sum(self) -> Tensor:  # (D,)
        total = self.features.new_zeros(self.features.shape[1], dtype=self.weights.dtype)
        for block, weights in self.blocks():
            total += weights @ block
        return total

    def products(self, vector: Tensor) -> Tensor:  # (D,) -> (m,)
        return torch.cat([self.weights[:0], *(block @ vector for block, _ in self.blocks())])


def add_linear_term(
    images: _Side,  # M rows
    texts: _Side,  # n rows
    affine: Affine,
    uniform: Tensor,  # ()
    out: GradBuffers,  # of which x and y hold something already
) -> Tensor:  # (3 or 1, 1)
    """Subtract ``uniform`` times the weighted sum of all logits from the loss.

    sum_ij a_i c_j z_ij = t (sum_i a_i x_i) . (sum_j c_j y_j) + b (sum a) (sum c): no pair is looked
    at. Writes the gradients and returns the sums as :func:`fused_siglip.sweep.sweep` does.
    """
    a, c, sum_x, sum_y = images.weights, texts.weights, images.sum(), texts.sum()
    if out.x is not None:
        out.x.addr_(a, -uniform * sum_y, alpha=out.factor)
    if out.y is not None:
        out.y.addr_(c, -uniform * sum_x, alpha=out.factor)
    if out.image_losses is not None:
        of_images = affine.scale * images.products(sum_y) + affine.bias * c.sum()
        out.image_losses.sub_(uniform * a * of_images)
    of_similarities, pairs = sum_x @ sum_y, a.sum() * c.sum()
    loss = affine.scale * of_similarities + affine.bias * pairs
    sums = [loss, of_similarities, pairs] if out.scalars else [loss]
    return -uniform * torch.stack(sums)[:, None]
