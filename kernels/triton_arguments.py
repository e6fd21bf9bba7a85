"""The arguments that pairs, their weights and selections are to the Triton kernels."""

from __future__ import annotations

from torch import Tensor

from .interface import Pairs, RandomMask, ScoreThreshold
from .pair_weights import PairWeights


def diagonal_arg(pairs: Pairs, n: int) -> int:
    # no pair is (i, i + n): without a diagonal, the same kernel never meets it
    return n if pairs.diagonal is None else pairs.diagonal


def ids_args(pairs: Pairs) -> tuple[Tensor | None, Tensor | None]:
    """The kernels' tensors of the ids."""
    return (None, None) if pairs.ids is None else pairs.ids


def selection_args(selection: RandomMask | ScoreThreshold | None) -> tuple[Tensor | None, ...]:
    """The panel kernel's tensors of a selection: two of a mask, three of a threshold."""
    if isinstance(selection, RandomMask):
        return selection.image_keys, selection.text_keys, None, None, None
    if isinstance(selection, ScoreThreshold):
        return None, None, *selection.normalizer, selection.threshold
    return (None,) * 5


def weight_args(weights: PairWeights | None) -> tuple[Tensor | int | float | None, ...]:
    """The panel kernel's arguments from image_weights_ptr to aligned_share."""
    if weights is None:
        return (None,) * 7
    shares, aligned = weights.shares, None if weights.shares is None else weights.shares.aligned
    of_positives = (None, None) if shares is None else (shares.image, shares.text)
    vectors = weights.images, weights.texts, *of_positives, weights.targets
    return *vectors, *((None, None) if aligned is None else aligned)
