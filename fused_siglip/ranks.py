"""The ranks of positives among negatives: of one process, or of the global batch of a group."""

from __future__ import annotations

import torch
from torch import Tensor

from .distributed.exchange import TextExchange, TextResult, Texts, open_exchange
from .kernels import RowValues, accumulate_dtype
from .kernels.float_keys import FORMATS, exact_keys, exact_values
from .rows import RowData
from .score_sweep import ScoreSweep, new_best, restore_infinity
from .settled import Inputs, settle
from .spec import Execution, LossSpec


def ranks_of_positives(
    x: Tensor,  # (M, D)
    y: Tensor,  # (N, D)
    rows: RowData,
    spec: LossSpec,
) -> tuple[Tensor, Tensor]:  # (M,), (N,) int64
    """See :func:`fused_siglip.retrieval_ranks`."""
    one = torch.ones((), device=x.device)
    x, y, affine, run = settle(Inputs(x, y, one, one), spec)
    ids, acc = rows.ids, affine.scale.dtype
    exchange = open_exchange(x, y, affine, rows, spec, run)
    largest = exchange.largest
    sweep = ScoreSweep(
        x, None if ids is None else ids.images, largest.images, largest.texts,
        run._replace(workspace_bytes=largest.workspace_bytes),
    )  # fmt: skip
    best = RowValues(new_best(len(x), x, acc), new_best(len(y), x, acc))
    counts = RowValues(_zeros(x), _zeros(y))
    no_positive: list[Tensor] = []  # of images and texts
    if ids is None:
        sweep.diagonal(y, best, counts)
    else:
        best = _best_by_id(sweep, best, exchange)
        no_positive = [values == -torch.inf for values in _both(best)]
        restore_infinity(best)
    _count(sweep, best, counts, exchange, diagonal=ids is None)
    image_ranks, text_ranks = (count.long() + 1 for count in _both(counts))
    if no_positive:
        image_ranks.masked_fill_(no_positive[0], 0)
        text_ranks.masked_fill_(no_positive[1], 0)
    return image_ranks, text_ranks


def _best_by_id(sweep: ScoreSweep, best: RowValues, exchange: TextExchange) -> RowValues:
    """The best positives in the global batch, of this rank's images and texts."""
    images, _ = _both(best)
    acc = images.dtype

    def visit(texts: Texts, out: Tensor | None) -> None:
        assert texts.ids is not None and out is not None
        of_texts = new_best(len(texts.features), images, acc)
        sweep.best_positives(texts.features, texts.ids, RowValues(images, of_texts))
        out.copy_(exact_keys(of_texts))

    # as keys: what becomes of NaN in a maximum over ranks is the transport's choice
    result = TextResult((), FORMATS[acc][0], "MAX")
    keys = exchange.for_each(visit, result)
    assert keys is not None
    return RowValues(images, exact_values(keys, acc))


def best_of_images(
    x: Tensor,  # (M, D)
    y: Tensor,  # (N, D)
    rows: RowData,
    run: Execution,
    exchange: TextExchange,
) -> Tensor:  # (M,) accumulation dtype
    """The similarity of every image's best positive in the global batch; -inf where it has none.

    The diagonal's panels, or one product with ids.
    """
    best = RowValues(new_best(len(x), x, accumulate_dtype(x.dtype)), None)
    assert best.images is not None
    sweep = ScoreSweep(x, rows.image_ids, len(x), max(len(y), 1), run)
    if rows.ids is None:
        sweep.best_on_diagonal(y, best)
        return best.images

    def visit(texts: Texts, _: Tensor | None) -> None:
        assert texts.ids is not None
        sweep.best_positives(texts.features, texts.ids, best)

    exchange.for_each(visit)
    return best.images


def _count(
    sweep: ScoreSweep,
    best: RowValues,
    counts: RowValues,  # added to
    exchange: TextExchange,
    diagonal: bool,  # whose panels have been counted
) -> None:
    """Count the negatives in the global batch that are not below the best positives."""
    of_images, of_texts = _both(best)
    image_counts, text_counts = _both(counts)

    def visit(texts: Texts, out: Tensor | None) -> None:
        assert out is not None
        out.zero_()
        own = None
        if diagonal and texts.diagonal is not None:
            own = slice(texts.diagonal, texts.diagonal + len(of_images))
        sweep.count_not_below(
            texts.features, texts.ids, RowValues(of_images, texts.extras[0]),
            RowValues(image_counts, out), own,
        )  # fmt: skip

    result = TextResult((), torch.int32)
    others = exchange.for_each(visit, result, (of_texts,), last=True)
    assert others is not None
    text_counts.add_(others)


def _both(values: RowValues) -> tuple[Tensor, Tensor]:
    assert values.images is not None and values.texts is not None
    return values.images, values.texts


def _zeros(rows: Tensor) -> Tensor:
    return torch.zeros(len(rows), dtype=torch.int32, device=rows.device)
