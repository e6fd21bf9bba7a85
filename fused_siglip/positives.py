"""The public classes that say how much positive pairs count, and which target they have."""

from __future__ import annotations

import math
import numbers
from dataclasses import dataclass, fields

from .spec import ALL_ALIKE, PositiveChoice

_ROUNDING = 1e-12  # of a sum such as 1/3 + 1/3 + 1/3


@dataclass(frozen=True)
class _Share:
    """Of pair (i, j), pair + per_image / k_i + per_text / k_j."""

    pair: float = 1.0
    per_image: float = 0.0
    per_text: float = 0.0
    aligned: float | None = None

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if value is None and field.name == "aligned":
                continue
            expected = "a number" if field.name != "aligned" else "a number or None"
            if not isinstance(value, numbers.Real) or isinstance(value, bool):
                kind = type(value).__qualname__
                raise TypeError(f"{field.name} is a {kind}: expected {expected}")
            if not 0 <= float(value) < math.inf:
                raise ValueError(f"{field.name} is {value}: expected a finite number of at least 0")

    @property
    def largest(self) -> float:
        """What a pair comes to at most: where it is the only positive of its image and text."""
        return self.pair + self.per_image + self.per_text


@dataclass(frozen=True)
class PositiveWeight(_Share):
    """How much a positive pair counts: its loss is multiplied by p. Negatives count 1.

    Of image i and text j, p = pair + per_image / k_i + per_text / k_j, where k_i is the number of
    positives that image i has, and k_j the number that text j has: in the global batch, without
    padding. With ``per_image=1, pair=0`` the positives of an image together count 1.

    Args:
        pair: what every positive counts.
        per_image: what the positives of an image share among them.
        per_text: what the positives of a text share among them.
        aligned: what pair (i, i) of a rank's own batch counts where it is positive; k_i and k_j
            are then the numbers of the others. None: it counts as the others do.

    Raises:
        TypeError, ValueError: a field that is not a finite number of at least 0.
    """


@dataclass(frozen=True)
class PositiveTarget(_Share):
    """Which target a positive pair has in place of 1: its loss is softplus(z) - p * z.

    p is that of :class:`fused_siglip.PositiveWeight`, and at most 1.

    Raises:
        TypeError, ValueError: a field that is not a finite number of at least 0, fields that add up
            to more than 1, an ``aligned`` above 1.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.largest > 1 + _ROUNDING:
            raise ValueError(
                f"pair, per_image and per_text add up to {self.largest}: expected at most 1, the "
                "target of a pair without other positives"
            )
        if self.aligned is not None and self.aligned > 1:
            raise ValueError(f"aligned is {self.aligned}: expected a target of at most 1")


Positives = PositiveWeight | PositiveTarget
POSITIVE_KINDS = {"weight": PositiveWeight, "target": PositiveTarget}  # as the operator names them


def choice_of_positives(positives: Positives | None) -> PositiveChoice:
    """What the operator is told: a subclass is what it derives from; 1 for every pair is None."""
    if positives is None:
        return ALL_ALIKE
    kind = next(name for name, cls in POSITIVE_KINDS.items() if isinstance(positives, cls))
    pair, per_image, per_text = (
        float(v) for v in (positives.pair, positives.per_image, positives.per_text)
    )
    aligned = None if positives.aligned is None else float(positives.aligned)
    if per_image == per_text == 0 and pair == aligned:
        aligned = None
    choice = PositiveChoice(kind, pair, per_image, per_text, aligned)
    return ALL_ALIKE if choice[1:] == (1.0, 0.0, 0.0, None) else choice
