"""What an operator computes: the loss of one process, or of a group, and its gradients."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .distributed.exchange import Local, TextExchange, TextResult, Texts, open_exchange
from .kernels import (
    Affine,
    Ids,
    Pairs,
    RandomMask,
    ScoreNormalizer,
    ScoreThreshold,
    accumulate_dtype,
    default_backend,
    panel_class,
)
from .selection.hashing import hash_cutoff, image_keys, text_keys
from .selection.thresholds import score_normalizer, search_thresholds, text_center_radius
from .spec import Execution, LossSpec
from .sweep import GradBuffers, count_negatives, sweep


def loss_and_grads(
    x: Tensor,  # (M, D)
    y: Tensor,  # (N, D)
    affine: Affine,  # () or (1,), of any floating dtype
    pairs: Pairs,  # with ids, or the diagonal of a rank's own pairs, or none
    spec: LossSpec,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:  # (), (3,), (M, D), (N, D)
    """The loss, and what backward multiplies by the upstream scalar.

    That is the factors of :meth:`fused_siglip.kernels.Panel.finish` and the gradients of
    :func:`fused_siglip.sweep.sweep`; one that ``spec.grads`` does not name is None. In a group the
    columns are the texts of all ranks, and the gradient of this rank's texts holds the
    contributions of all ranks.
    """
    dtype = spec.dtype or x.dtype
    acc = accumulate_dtype(dtype)
    run = Execution(spec.backend or default_backend(x.device, dtype), spec.workspace_bytes)
    # the dtypes are settled: autocast must not round the products inside once more
    without_autocast: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()
    if torch.is_autocast_enabled(x.device.type):
        without_autocast = torch.autocast(x.device.type, enabled=False)
    with without_autocast:
        # every torch call less counts where the batch is small
        x = x if x.dtype == dtype else x.to(dtype)
        y = y if y.dtype == dtype else y.to(dtype)
        affine = Affine(_scalar(affine.scale, acc), _scalar(affine.bias, acc))
        exchange = open_exchange(x, y, affine, pairs, spec, run)
        batch = _Batch(x, affine, pairs, spec, run, exchange)
        sums, grad_x, grad_y = batch.sweep(y)
        divisor = exchange.divisor(spec.reduction)
        finish = panel_class(run.backend).finish
        loss, factors = finish(sums, affine.scale, divisor, batch.factor)
    return loss, factors, grad_x, grad_y


class _Batch:
    """This rank's images against all texts, however these come."""

    def __init__(
        self,
        x: Tensor,
        affine: Affine,
        pairs: Pairs,
        spec: LossSpec,
        run: Execution,
        exchange: TextExchange,
    ):
        self.x, self.affine, self.pairs, self.spec, self.run = x, affine, pairs, spec, run
        self.exchange = exchange
        self.alone = isinstance(exchange, Local)
        self.factor = 1.0
        if self.alone and x.is_cpu and run.backend == "torch":
            self.factor = _known_factor(affine.scale, exchange.divisor(spec.reduction))

    def sweep(
        self,
        y: Tensor,  # (N, D)
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:  # (3 or 1, k), (M, D), (N, D)
        """The sums over all pairs of this rank's images, and the gradients of the features."""
        grads, acc = self.spec.grads, self.affine.scale.dtype
        x = self.x
        # not new_empty, which takes twice as long
        grad_x = torch.empty(x.shape, dtype=acc, device=x.device) if grads.image else None
        selection_of = self._selection(y)
        sums: list[Tensor] = []  # one tensor: the parts of a single visit, or the sum of all so far
        if not self.alone:
            sums.append(x.new_zeros(3 if grads.scalars else 1, 1, dtype=acc))

        def visit(texts: Texts, grad_texts: Tensor | None) -> None:
            out = GradBuffers(grad_x, grad_texts, grads.scalars, texts.step > 0, self.factor)
            parts = sweep(
                x, texts.features, self.affine, self._pairs_with(texts), out, self.run,
                selection_of(texts),
            )  # fmt: skip
            if self.alone:
                sums.append(parts)
            else:
                sums[0].add_(parts.sum(1, keepdim=True))

        result = TextResult((x.shape[1],), acc) if self.exchange.text_grad else None
        grad_y = self.exchange.for_each(visit, result, last=True)
        return sums[0], grad_x, grad_y if grads.text else None

    def _pairs_with(self, texts: Texts) -> Pairs:
        """Which pairs of this rank's images and these texts are positive."""
        if self.pairs.ids is not None and texts.ids is not None:
            return Pairs(None, Ids(self.pairs.ids.images, texts.ids))
        return Pairs(None if self.pairs.diagonal is None else texts.diagonal)

    def _selection(self, y: Tensor) -> Callable[[Texts], RandomMask | ScoreThreshold | None]:
        """A function of texts: which negatives among them take part; None for all."""
        kind, keep, seed = self.spec.negatives
        if kind is None:
            return lambda texts: None
        if kind == "random":
            device = self.x.device
            images = image_keys(seed, self.exchange.first_image, len(self.x), device)

            def mask(texts: Texts) -> RandomMask:
                keys = text_keys(seed, texts.first, len(texts.features), device)
                return RandomMask(images, keys, hash_cutoff(keep))

            return mask
        thresholds = self._find_thresholds(y, kind, keep)
        return lambda texts: thresholds

    def _find_thresholds(self, y: Tensor, kind: str, keep: float) -> ScoreThreshold:
        """Each image's threshold for its share of negatives, in a few light sweeps."""
        acc, steps = self.affine.scale.dtype, panel_class(self.run.backend).count_bits
        exchange, x = self.exchange, self.x
        text_ids = None if self.pairs.ids is None else self.pairs.ids.texts
        center, radius = text_center_radius(y, text_ids, acc, exchange.all_reduce)
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


def _scalar(value: Tensor, dtype: torch.dtype) -> Tensor:  # ()
    if value.dim() == 0 and value.dtype == dtype:
        return value
    return value.to(dtype).reshape(())


def _known_factor(logit_scale: Tensor, divisor: float | Tensor) -> float:
    """t / R, to go into the products where the host need not wait for it: then a backward from the
    loss itself has nothing to multiply. 1 where products may over- or underflow."""
    factor = logit_scale.item() / float(divisor)
    return factor if 1e-9 < abs(factor) < 1e9 else 1.0
