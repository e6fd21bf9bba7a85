"""What pairs count, where they do not all count the same, and which targets they have.

The loss of a pair is alpha * softplus(z) - beta * z, and its derivative alpha * sigmoid(z) - beta.
With all pairs alike alpha is 1, and beta is 1 for a positive and 0 for a negative. Nothing here
has a row or column that is a matrix: alpha and beta are made of vectors, pair by pair, in registers
or in a strip of the panel.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from .alignment import aligned_vector


class PositiveShares(NamedTuple):
    """The share p of positives: image[i] + text[j], and another one on a diagonal."""

    image: Tensor  # (m,) accumulation dtype
    text: Tensor | None = None  # (n,) likewise; None: 0
    # pair (i, i + its first number) has its second for p; None: no pair
    aligned: tuple[int, float] | None = None

    def aligned_at(self, align: int) -> PositiveShares:
        image = aligned_vector(self.image, align)
        text = None if self.text is None else aligned_vector(self.text, align)
        return PositiveShares(image, text, self.aligned)

    def block(self, rows: slice, cols: slice) -> PositiveShares:
        aligned = self.aligned
        if aligned is not None:
            aligned = aligned[0] + rows.start - cols.start, aligned[1]
        return PositiveShares(
            self.image[rows], None if self.text is None else self.text[cols], aligned
        )


class PairWeights(NamedTuple):
    """What alpha and beta are made of. A row of padding has weight 0.

    Both are multiplied by w = images[i] * texts[j]. Without ``targets`` alpha is p for a positive
    (1 without ``shares``) and 1 for a negative, beta alpha for a positive and 0 for a negative.
    With them, alpha is targets[0] + targets[1] * p for a positive, and beta targets[2] +
    targets[3] * p, and targets[4] for a negative.
    """

    images: Tensor | None = None  # (m,) accumulation dtype, of either sign; None: 1
    texts: Tensor | None = None  # (n,) likewise
    shares: PositiveShares | None = None
    targets: Tensor | None = None  # (5,) accumulation dtype

    def block(self, rows: slice, cols: slice = slice(0, None)) -> PairWeights:
        """The weights of some rows and columns, slices whose starts are numbers."""
        return PairWeights(
            None if self.images is None else self.images[rows],
            None if self.texts is None else self.texts[cols],
            None if self.shares is None else self.shares.block(rows, cols),
            self.targets,
        )

    def aligned(self, align: int) -> PairWeights:
        """The weights as a panel with this ``align`` reads them."""
        return PairWeights(
            None if self.images is None else aligned_vector(self.images, align),
            None if self.texts is None else aligned_vector(self.texts, align),
            None if self.shares is None else self.shares.aligned_at(align),
            self.targets,
        )
