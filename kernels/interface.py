"""What a backend implements, and what the sweep hands to it.

Notation, here and in the kernels: s = x . y is a pair's similarity, z = scale * s + bias its logit,
u = -l z with l = +1 for a positive pair and -1 for a negative one; the loss of a pair is
softplus(u), and ``dlogits`` is the derivative of the loss in z: sigmoid(u), negated for a positive.
The accumulation dtype is float32, and float64 for float64 features.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from .alignment import at_aligned_address
from .pair_weights import PairWeights

# fp16 holds dlogits of a negative early in training (4.5e-5 at b = -10) only as a subnormal. Panels
# in fp16 are written times this power of two, and the two products divide by it: exact, and
# |dlogits| <= 1 cannot overflow.
GRAD_SCALE = {torch.float16: 2.0**15}


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """What sums and products of features of this dtype accumulate in."""
    return torch.promote_types(dtype, torch.float32)


class Affine(NamedTuple):
    """What turns similarities into logits. Both are () in the accumulation dtype."""

    scale: Tensor
    bias: Tensor


class Ids(NamedTuple):
    """What images and texts are called: a pair with equal ids is positive.

    A row with a negative id is padding, and its pairs take no part.
    """

    images: Tensor  # (m,) int64
    texts: Tensor  # (n,) int64


class Pairs(NamedTuple):
    """Which pairs are positive, which take part, and what they count.

    With neither ids nor a diagonal no pair is positive; ids win where both are given.
    """

    diagonal: int | None = None  # pair (i, i + diagonal) is positive
    ids: Ids | None = None
    weights: PairWeights | None = None  # None: all count the same

    def block(self, rows: slice, cols: slice = slice(0, None)) -> Pairs:
        """The pairs of some rows and columns, slices whose starts are numbers."""
        diagonal = self.diagonal
        if diagonal is not None:
            diagonal += rows.start - cols.start
        if self.ids is None and self.weights is None:
            return self if diagonal == self.diagonal else Pairs(diagonal)
        return Pairs(
            diagonal,
            None if self.ids is None else Ids(self.ids.images[rows], self.ids.texts[cols]),
            None if self.weights is None else self.weights.block(rows, cols),
        )


class RowValues(NamedTuple):
    """A number of each image and of each text; None on a side where nobody needs it."""

    images: Tensor | None  # (m,)
    texts: Tensor | None  # (n,)

    def block(self, rows: slice, cols: slice = slice(None)) -> RowValues:
        """The numbers of some rows and columns, which may be written into."""
        images, texts = self.images, self.texts
        return RowValues(
            None if images is None else images[rows], None if texts is None else texts[cols]
        )


class RandomMask(NamedTuple):
    """Negatives that take part by a hash of the pair: see fused_siglip/selection/hashing.py."""

    image_keys: Tensor  # (m,) int32
    text_keys: Tensor  # (n,) int32
    hash_cutoff: int  # a negative takes part where the pair's hash, an int32, is below it

    @property
    def share(self) -> float:
        """The share of the negatives that take part, on average."""
        return (self.hash_cutoff + 2**31) / 2**32

    def block(self, rows: slice, cols: slice = slice(None)) -> RandomMask:
        """The mask of some rows and columns."""
        return RandomMask(self.image_keys[rows], self.text_keys[cols], self.hash_cutoff)


class ScoreNormalizer(NamedTuple):
    """Maps similarities into [-1, 1] for each image: (s - center) * inv_radius.

    The negatives that are first to take part have the highest values. Both (m,) in the accumulation
    dtype.
    """

    center: Tensor
    inv_radius: Tensor

    def block(self, rows: slice) -> ScoreNormalizer:
        """The normalizer of some rows."""
        return ScoreNormalizer(self.center[rows], self.inv_radius[rows])


class ScoreThreshold(NamedTuple):
    """Negatives that take part by their logit: those whose normalized score is not below a
    threshold. A NaN takes part."""

    normalizer: ScoreNormalizer
    threshold: Tensor  # (m,) accumulation dtype

    def block(self, rows: slice, cols: slice = slice(None)) -> ScoreThreshold:
        """The thresholds of some rows; they hold for every column."""
        return ScoreThreshold(self.normalizer.block(rows), self.threshold[rows])


class PanelSpec(NamedTuple):
    """What a panel is made for."""

    rows: int  # at most
    cols: int  # at most
    dtype: torch.dtype  # of the operands x, y and dlogits
    store_dlogits: bool  # a gradient of features is needed
    scalar_grads: bool  # so are those of scale and bias
    filters_negatives: bool = False  # negatives are selected, or counted
    wide: bool = False  # more texts than D: a pass over features is shorter than one over pairs
    weighted: bool = False  # pairs have weights
    image_losses: bool = False  # calls ask for the images' losses, and for no gradient
    losses: bool = True  # False: the sum of the loss may be left out; of pairs with weights


class Panel(Protocol):
    """What a backend does with one panel: product, scale and bias, log-sigmoid, dlogits."""

    tile: tuple[int, int]  # panel sides are multiples of it (the last panel may be smaller)
    # A call leaves the sum of dlogits * s at 0. The caller takes it from dlogits Y or dlogits^T X,
    # and puts it into totals[1] where there is one panel.
    dscale_from_products: bool
    # D and the row stride are multiples of it, the last dimension is contiguous, and addresses are
    # multiples of 16 bytes: see aligned and aligned_vector
    align: int
    # The sums of the last call that was given None for ``sums``, as numbers; empty where the host
    # would have to wait for them
    totals: list[float]
    count_bits: tuple[int, ...]  # bits of a float key that each step of count() tells apart

    @staticmethod
    def workspace_bytes(spec: PanelSpec) -> int:
        """Bytes that a panel allocates at most."""
        ...

    def __init__(self, spec: PanelSpec, device: torch.device): ...

    def __call__(
        self,
        x: Tensor,  # (m, D) image features, m <= rows; right with any strides
        y: Tensor,  # (n, D) text features, n <= cols; likewise
        affine: Affine,
        pairs: Pairs,
        sums: Tensor | None,  # (3,) accumulation dtype, overwritten: sums of softplus(u),
        # dlogits * s and dlogits; without scalar_grads (1,), the first. None: they stay in
        # ``partials``
        selection: RandomMask | ScoreThreshold | None = None,  # None: all negatives take part
        image_losses: Tensor | None = None,  # (m,) likewise, added to; of pairs with weights
    ) -> Tensor | None:
        """dlogits times GRAD_SCALE: (m, n) in the operands' dtype, a view of the workspace.

        None without ``store_dlogits``.
        """
        ...

    @property
    def partials(self) -> Tensor:  # (3 or 1, k)
        """What adds up to the sums of the last call that was given None for them."""
        ...

    @staticmethod
    def finish(
        # Sums, as in a call: (3 or 1, k) accumulation dtype, over parts of pairs, or ``totals``
        sums: Tensor | list[float],
        logit_scale: Tensor,  # () accumulation dtype
        divisor: float | Tensor,  # ()
        factor: float = 1.0,
    ) -> tuple[Tensor, Tensor]:  # (), (3,) accumulation dtype
        """The loss, and [sum of dlogits * s, sum of dlogits, t / factor], all over ``divisor``.

        These are the gradients of scale and bias, and what those of the features, computed times
        ``factor``, must be multiplied by.
        """
        ...

    def add_product(
        self,
        out: Tensor,  # (m, D) or, transposed, (n, D), accumulation dtype
        dlogits: Tensor,  # (m, n) from the last call
        rhs: Tensor,  # (n, D) or, transposed, (m, D)
        alpha: float,
        accumulate: bool,
        transposed: bool,
    ) -> None:
        """out = alpha * dlogits @ rhs (dlogits^T @ rhs), plus what is there if ``accumulate``.

        Tiles in which no negative takes part need not be multiplied.
        """
        ...

    def count(
        self,
        x: Tensor,  # (m, D)
        y: Tensor,  # (n, D)
        pairs: Pairs,
        normalizer: ScoreNormalizer,
        prefix: Tensor | None,  # (m,) int32: the key's bits of earlier steps; None in the first one
        step: int,
        counts: Tensor,  # (m, 2**count_bits[step]) int32, added to; contiguous
    ) -> None:
        """Add every image's negatives to a histogram of the keys of their normalized scores.

        A key (float_keys.py) is told apart from its first bits to its last: the bins of a step are
        the bits that come after ``prefix``, and only negatives with that prefix are counted. NaN
        has the highest key.
        """
        ...

    def best_positives(
        self,
        x: Tensor,  # (m, D)
        y: Tensor,  # (n, D)
        pairs: Pairs,
        best: RowValues,  # accumulation dtype, raised in place
    ) -> None:
        """Raise every row's best similarity of a positive pair to the best of this panel.

        A NaN is better than any number. The lowest finite number stands for what is lower, so that
        rows without a positive keep the -inf that the caller starts from.
        """
        ...

    def count_not_below(
        self,
        x: Tensor,  # (m, D)
        y: Tensor,  # (n, D)
        pairs: Pairs,
        best: RowValues,  # accumulation dtype
        counts: RowValues,  # int32, added to
        same_panel: bool = False,  # the last call was best_positives of this panel
    ) -> None:
        """Count every row's negatives that are not below ``best``: with not (s < best).

        So ties count, and so does NaN on either side. A panel computes equal pairs to equal bits,
        here and in best_positives, however many rows it has.
        """
        ...


def ceil_div(a: int, b: int) -> int:
    """a / b, rounded up. triton.cdiv is made for kernels, and takes microseconds on the host."""
    return -(-a // b)


def aligned(features: Tensor, align: int) -> bool:
    """Whether (m, D) features suit a panel with this ``align``.

    Otherwise the sweep hands the panel a copy, padded with zeros, since every row would be read
    element by element: by a kernel that is compiled anew and spills its registers.
    """
    if align == 1:
        return True
    row_stride, col_stride = features.stride()
    dense = col_stride == 1 and row_stride % align == 0 and features.shape[1] % align == 0
    return dense and at_aligned_address(features)
