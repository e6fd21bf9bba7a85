"""What an operator computes: the loss of one process, or of a group, and its gradients."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from .distributed.agreement import report_bad_arguments
from .distributed.collectives import resolve_group
from .distributed.exchange import Local, TextExchange, TextResult, Texts, open_exchange
from .kernels import (
    Ids,
    Pairs,
    RandomMask,
    ScoreNormalizer,
    ScoreThreshold,
    panel_class,
)
from .ranks import best_of_images
from .rows import RowData, check_values, is_weighted
from .selection.hashing import hash_cutoff, image_keys, text_keys
from .selection.thresholds import (
    margin_threshold,
    score_normalizer,
    search_thresholds,
    text_center_radius,
)
from .settled import Inputs, Settled, known_factor, settle, without_autocast
from .single_panel import single_panel
from .spec import NO_GRADS, LossSpec
from .sweep import GradBuffers, count_negatives, sweep
from .weighting import Weighting


def loss_and_grads(
    inputs: Inputs, rows: RowData, spec: LossSpec
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # (), (3,), (M, D), (N, D)
    """The loss, and what backward multiplies by the upstream scalar.

    That is the factors of :meth:`fused_siglip.kernels.Panel.finish` and the gradients of
    :func:`fused_siglip.sweep.sweep`; one that ``spec.grads`` does not name has no elements. In a
    group the columns are the texts of all ranks, and the gradient of this rank's texts holds the
    contributions of all ranks. With the reduction "none" these are of the sum of the images'
    losses, whose weights may then be of either sign.
    """
    with without_autocast(inputs.x.device.type):
        call = settle(inputs, spec)
        outputs = single_panel(call, rows, spec)
        if outputs is not None:
            return outputs
        batch = _open(call, rows, spec, spec.reduction != "none")
        sums, grad_x, grad_y = batch.sweep()
        finish = panel_class(call.run.backend).finish
        loss, factors = finish(sums, call.affine.scale, batch.divisor, batch.factor)
    if grad_x is None:
        grad_x = loss.new_empty(0)
    if grad_y is None:
        grad_y = loss.new_empty(0)
    return loss, factors, grad_x, grad_y


def image_losses(inputs: Inputs, rows: RowData, spec: LossSpec) -> Tensor:  # (M,)
    """The loss of each image: one product, no gradients. Arguments as of loss_and_grads."""
    x = inputs.x
    with without_autocast(x.device.type):
        call = settle(inputs, spec)
        batch = _open(call, rows, spec.with_grads(NO_GRADS), True)
        losses = torch.zeros(len(x), dtype=call.affine.scale.dtype, device=x.device)
        batch.sweep(losses)
        return losses if isinstance(batch.divisor, float) else losses.div_(batch.divisor)


def _open(call: Settled, rows: RowData, spec: LossSpec, checks: bool) -> _Batch:
    """This rank's images, with an exchange that all ranks have agreed on."""
    if checks and (rows.image_weights is not None or rows.text_weights is not None):
        try:
            check_values(rows)
        except ValueError:
            if spec.group_name is not None:
                report_bad_arguments(resolve_group(spec.group_name), call.x.device)
            raise
    return _Batch(call, rows, spec, open_exchange(*call[:3], rows, spec, call.run))


class _Batch:
    """This rank's images against all texts, however these come."""

    def __init__(self, call: Settled, rows: RowData, spec: LossSpec, exchange: TextExchange):
        self.x, self.y, self.affine, self.run = call
        self.rows, self.spec, self.exchange = rows, spec, exchange
        self.alone = isinstance(exchange, Local)
        self.weighting: Weighting | None = None
        self.divisor = exchange.divisor(spec.reduction)
        if is_weighted(rows, spec, exchange.all_ones):
            self.weighting = Weighting(self.x, rows, spec, self.affine.scale.dtype, exchange)
            self.divisor = self.divisor / self.weighting.unit
        self.factor = known_factor(call, self.divisor) if self.alone else 1.0

    def sweep(
        self,
        losses: Tensor | None = None,  # (M,), added to: of each image
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:  # (3 or 1, k), (M, D), (N, D)
        """The sums over all pairs of this rank's images, and the gradients of the features."""
        grads, acc = self.spec.grads, self.affine.scale.dtype
        x, weighting = self.x, self.weighting
        # the shape as numbers, which torch reads in half the time it takes for a tuple
        grad_x = torch.empty(*x.shape, dtype=acc, device=x.device) if grads.image else None
        selection_of = self._selection(self.y)
        # a backward of the images' losses knows them already
        wanted = self.spec.reduction != "none" or losses is not None
        sums: list[Tensor] = []  # one tensor: the parts of a single visit, or the sum of all so far
        if not self.alone:
            sums.append(x.new_zeros(3 if grads.scalars else 1, 1, dtype=acc))

        def visit(texts: Texts, grad_texts: Tensor | None) -> None:
            out = GradBuffers(
                grad_x, grad_texts, grads.scalars, texts.step > 0, self.factor, losses, wanted
            )
            pairs = self._pairs_with(texts)
            if weighting is not None:
                pairs = pairs._replace(weights=weighting.of(texts))
            parts = sweep(x, texts.features, self.affine, pairs, out, self.run, selection_of(texts))
            if weighting is not None and weighting.has_linear_term:
                linear = weighting.add_linear_term(x, texts, self.affine, out)
                parts = torch.cat((parts, linear), 1)
            if self.alone:
                sums.append(parts)
            else:
                sums[0].add_(parts.sum(1, keepdim=True))

        result = TextResult((x.shape[1],), acc) if self.exchange.text_grad else None
        extras = () if weighting is None else weighting.extras
        grad_y = self.exchange.for_each(visit, result, extras, last=True)
        return sums[0], grad_x, grad_y if grads.text else None

    def _pairs_with(self, texts: Texts) -> Pairs:
        """Which pairs of this rank's images and these texts are positive."""
        if self.rows.image_ids is not None and texts.ids is not None:
            return Pairs(None, Ids(self.rows.image_ids, texts.ids))
        return Pairs(None if self.spec.negative_only else texts.diagonal)

    def _selection(self, y: Tensor) -> Callable[[Texts], RandomMask | ScoreThreshold | None]:
        """A function of texts: which negatives among them take part; None for all."""
        kind, amount, seed = self.spec.negatives
        if kind is None:
            return lambda texts: None
        if kind == "random":
            device = self.x.device
            images = image_keys(seed, self.exchange.first_image, len(self.x), device)

            def mask(texts: Texts) -> RandomMask:
                keys = text_keys(seed, texts.first, len(texts.features), device)
                return RandomMask(images, keys, hash_cutoff(amount))

            return mask
        if kind == "below":
            best = best_of_images(self.x, y, self.rows, self.run, self.exchange)
            thresholds = margin_threshold(best, amount)
        else:
            thresholds = self._find_thresholds(y, kind, amount)
        return lambda texts: thresholds

    def _find_thresholds(self, y: Tensor, kind: str, keep: float) -> ScoreThreshold:
        """Each image's threshold for its share of negatives, in a few light sweeps."""
        acc, steps = self.affine.scale.dtype, panel_class(self.run.backend).count_bits
        exchange, x = self.exchange, self.x
        center, radius = text_center_radius(y, self.rows.text_ids, acc, exchange.all_reduce)
        normalizer = score_normalizer(x, center, radius, self.affine.scale, kind)
        threshold = torch.empty_like(normalizer.inv_radius)
        # In a group every round moves all texts: all images take part in each. A rank without
        # images still takes its part.
        at_once = exchange.images_at_once or max(len(x), 1)
        for start in range(0, max(len(x), 1), at_once):
            rows = slice(start, start + at_once)
            count = functools.partial(self._count, rows, normalizer.block(rows))
            threshold[rows] = search_thresholds(keep, acc, steps, count)
        return ScoreThreshold(normalizer, threshold)

    def _count(
        self,
        rows: slice,
        normalizer: ScoreNormalizer,  # (m,) of these rows
        prefix: Tensor | None,  # (m,) int32
        step: int,
    ) -> Tensor:  # (m, 2**bits) int32
        """The negatives of some images among all texts, as search_thresholds asks for them."""
        images, bits = self.x[rows], panel_class(self.run.backend).count_bits[step]
        counts = self.x.new_zeros(len(images), 2**bits, dtype=torch.int32)

        def visit(texts: Texts, _: Tensor | None) -> None:
            pairs = self._pairs_with(texts).block(rows)
            count_negatives(
                images, texts.features, pairs, normalizer, prefix, step, counts, self.run
            )

        self.exchange.for_each(visit)
        return counts
