"""What a backend implements, and what the sweep hands to it."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

# fp16 holds dL/dz of an easy negative (4.5e-5 at b = -10) only as a subnormal. Panels in fp16 are
# written times this power of two, and the two products divide by it: exact, and |g| <= 1 cannot
# overflow.
GRAD_SCALE = {torch.float16: 2.0**15}


class Pairs(NamedTuple):
    """Which pairs of one panel are positive. Without ids and without diagonal: none."""

    diagonal: int | None = None  # local pair (i, i + diagonal) is positive
    image_ids: Tensor | None = None  # (m,) int64; pair (i, j) is positive where the ids are equal
    text_ids: Tensor | None = None  # (n,) int64; and takes no part where either is negative

    def block(self, rows: slice) -> Pairs:
        """Of some rows of the panel."""
        diagonal = None if self.diagonal is None else self.diagonal + rows.start
        image_ids = None if self.image_ids is None else self.image_ids[rows]
        return Pairs(diagonal, image_ids, self.text_ids)


class RandomMask(NamedTuple):
    """Negatives kept by a hash of the pair (see fused_siglip/negatives.py)."""

    image_keys: Tensor  # (m,) int32
    text_keys: Tensor  # (n,) int32
    below: int  # kept where the pair's hash, an int32, is below it

    @property
    def share(self) -> float:
        """Of pairs that are kept, on average."""
        return (self.below + 2**31) / 2**32

    def block(self, rows: slice, cols: slice = slice(None)) -> RandomMask:
        """Of some rows and columns."""
        return RandomMask(self.image_keys[rows], self.text_keys[cols], self.below)


class ScoreThreshold(NamedTuple):
    """Negatives kept by their logit: dropped where (s - centre) * factor < least (NaN is kept)."""

    centres: Tensor  # (m,) accumulation dtype, as are the others
    factors: Tensor  # (m,) (s - centre) * factor lies within -1 and 1, the first to keep highest
    least: Tensor  # (m,)

    def block(self, rows: slice, cols: slice = slice(None)) -> ScoreThreshold:
        """Of some rows; thresholds hold for every column."""
        return ScoreThreshold(*(of_images[rows] for of_images in self))


class Panel(Protocol):
    """What a backend does with one panel: product, scale and bias, log-sigmoid, dL/dz."""

    tile: tuple[int, int]  # panel sides are multiples of it (the last panel may be smaller)
    # The sum of g*s is left 0, the caller takes it from g Y or g^T X; of a single panel, puts it
    # into totals[1].
    gs_from_products: bool
    # D and the rows' distance are multiples of it, features adjacent, addresses multiples of 16
    # bytes: see aligned and aligned_ids
    align: int
    count_bits: tuple[int, ...]  # of a place that count() tells apart in each step, 20 in all

    @staticmethod
    def workspace_bytes(
        rows: int,
        cols: int,
        dtype: torch.dtype,
        store_dlogits: bool,
        scalar_grads: bool,
        filters_negatives: bool = False,
    ) -> int:
        """Bytes the constructor allocates; the arguments are the constructor's."""

    def __init__(
        self,
        rows: int,
        cols: int,
        dtype: torch.dtype,  # of the operands x, y and g
        device: torch.device,
        store_dlogits: bool,
        scalar_grads: bool,
        filters_negatives: bool = False,  # negatives are chosen, or counted
    ): ...

    def __call__(
        self,
        x: Tensor,  # (m, D) image features, m <= rows; right with any strides
        y: Tensor,  # (n, D) text features, n <= cols; likewise
        logit_scale: Tensor,  # () in the accumulation dtype
        logit_bias: Tensor,  # () likewise
        positives: Pairs,
        sums: Tensor | None,  # (3,) accumulation dtype, overwritten: sums of softplus(u), g*s and
        # g; without scalar_grads (1,), the first. None: they stay in ``partials``
        kept: RandomMask | ScoreThreshold | None = None,  # None: all negatives
    ) -> Tensor | None:  # (m, n) g times GRAD_SCALE in dtype, a view of the workspace; or None
        ...

    partials: Tensor  # (3 or 1, k) what adds up to the sums of the last call, given None for them

    @staticmethod
    def finish(
        partials: Tensor,  # (3 or 1, k) accumulation dtype: sums, as in a call, over parts of pairs
        logit_scale: Tensor,  # () likewise
        divisor: float | Tensor,  # ()
        factor: float = 1.0,
    ) -> tuple[Tensor, Tensor]:  # (), (3,) accumulation dtype
        """The loss, and [sum of g*s, sum of g, t / factor], all over ``divisor``: the gradients of
        t and of b, and what those of the features, made times ``factor``, are to be multiplied by.
        """

    def add_product(
        self,
        out: Tensor,  # (m, D) or, transposed, (n, D), accumulation dtype
        g: Tensor,  # (m, n) from the last call
        other: Tensor,  # (n, D) or, transposed, (m, D)
        alpha: float,
        fresh: bool,
        transposed: bool,
    ) -> None:
        """out = alpha * g @ other (g^T @ other), added to what is there unless ``fresh``.

        Where nothing was kept nothing is multiplied: a tile at a time, or better.
        """

    def count(
        self,
        x: Tensor,  # (m, D)
        y: Tensor,  # (n, D)
        positives: Pairs,
        centres: Tensor,  # (m,) of ScoreThreshold
        factors: Tensor,  # (m,) likewise
        known: Tensor | None,  # (m,) int32: the bits of earlier steps; None in the first one
        step: int,
        counts: Tensor,  # (m, 2**count_bits[step]) int32, added to; contiguous
    ) -> None:
        """Count an image's negatives by the place (see float_keys.py) of (s - centre) * factor.

        Its bits are told apart from the first to the last: the bin is those that come after the
        ``known`` ones, and only negatives with these are counted. NaN has the highest place.
        """


_VECTOR_BYTES = 16  # the widest load; Triton's launcher tells such addresses from others


def at_aligned_address(tensor: Tensor) -> bool:
    """Whether a tensor starts where a load of full width may."""
    return tensor.data_ptr() % _VECTOR_BYTES == 0


def aligned(features: Tensor, align: int) -> bool:
    """Whether (m, D) features suit a panel with this ``align``.

    Otherwise the sweep hands the panel a copy, padded with zeros, since every row would be read
    element by element: by a kernel that is compiled anew and spills its registers.
    """
    if align == 1:
        return True
    rows, adjacent = features.stride()
    dense = adjacent == 1 and rows % align == 0 and features.shape[1] % align == 0
    return dense and at_aligned_address(features)


def aligned_ids(ids: Tensor | None, align: int) -> Tensor | None:  # (m,)
    """Ids as a panel with this ``align`` reads them: adjacent, and starting as features do."""
    if ids is None or align == 1 or (ids.is_contiguous() and at_aligned_address(ids)):
        return ids
    return ids.clone(memory_format=torch.contiguous_format)
