"""What belongs to the rows of a batch beside their features: ids and weights."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from .kernels import Ids
from .spec import ALL_ALIKE, LossSpec


class RowData(NamedTuple):
    """What belongs to rows, apart from their features."""

    image_ids: Tensor | None = None  # (M,)
    text_ids: Tensor | None = None  # (N,)
    image_weights: Tensor | None = None  # (M,)
    text_weights: Tensor | None = None  # (N,)

    @property
    def ids(self) -> Ids | None:
        if self.image_ids is None or self.text_ids is None:
            return None
        return Ids(self.image_ids, self.text_ids)


def check_values(rows: RowData) -> None:
    """Refuse weights that are negative or not finite, where the host may look at them: on a CPU.

    Raises:
        ValueError: a weight that is not a finite number of at least 0, padding aside.
    """
    for name, weights, ids in (
        ("image_weights", rows.image_weights, rows.image_ids),
        ("text_weights", rows.text_weights, rows.text_ids),
    ):
        if weights is None or not weights.is_cpu:
            continue
        bad = ~(weights >= 0) | weights.isinf()
        if ids is not None:
            bad &= ids >= 0
        if bad.any():
            row = int(bad.nonzero()[0])
            raise ValueError(
                f"{name} has {weights[row].item()} in row {row}: expected finite numbers of at "
                "least 0"
            )


def all_ones(rows: RowData) -> bool:
    """Whether weights say nothing, as far as the host may know."""
    if rows.image_weights is None and rows.text_weights is None:
        return True
    given = [w for w in (rows.image_weights, rows.text_weights) if w is not None]
    return all(w.is_cpu and bool((w == 1).all()) for w in given)


def is_weighted(rows: RowData, spec: LossSpec, ones: bool = False) -> bool:
    """Whether pairs may count differently, or the images' losses are wanted one by one.

    ones: whether the weights, where they are given, are known to be 1.
    """
    given = rows.image_weights is not None or rows.text_weights is not None
    plain = spec.positives == ALL_ALIKE and not spec.label_smoothing
    return (given and not ones) or not plain or spec.reduction == "none"
