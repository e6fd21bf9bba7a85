"""What a sentence-transformers loss asks of a batch: its columns, its labels, their embeddings."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn


def at_least_two(sentence_features: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    columns = list(sentence_features)
    if len(columns) < 2:
        raise ValueError(
            f"the dataset has {len(columns)} input column(s): expected an anchor, a positive and "
            "perhaps negatives"
        )
    return columns


def check_one_positive_each(anchors: Tensor, positives: Tensor) -> None:
    if len(positives) != len(anchors):
        raise ValueError(
            f"{len(anchors)} anchors have {len(positives)} positives: expected one each"
        )


def anchor_weights(labels: Tensor | None) -> Tensor:  # (B,)
    """Labels as the weights of anchors; siglip_loss checks their shape and values."""
    expected = "expected a column of floats (label, labels, score or scores), a weight an anchor"
    if labels is None:
        raise ValueError(f"weights_from_labels is True, and the dataset has no labels: {expected}")
    if not isinstance(labels, Tensor) or not labels.is_floating_point():
        kind = labels.dtype if isinstance(labels, Tensor) else type(labels).__qualname__
        raise TypeError(f"labels are {kind} and weights_from_labels is True: {expected}")
    return labels


def normalized(embeddings: Tensor) -> Tensor:  # (B, D), float32 or wider
    wide = embeddings.to(torch.promote_types(embeddings.dtype, torch.float32))
    return nn.functional.normalize(wide, dim=-1)
