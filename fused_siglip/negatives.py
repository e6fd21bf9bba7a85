"""The public classes that say which negatives take part in the loss."""

from __future__ import annotations

import math
import numbers
from dataclasses import dataclass

from .spec import ALL_NEGATIVES, NegativeChoice


@dataclass(frozen=True)
class _Share:
    keep: float

    def __post_init__(self) -> None:
        if not isinstance(self.keep, numbers.Real) or isinstance(self.keep, bool):
            raise TypeError(f"keep is a {type(self.keep).__qualname__}: expected a number")
        if not 0 < self.keep <= 1:
            raise ValueError(f"keep is {self.keep}: expected a share above 0 and at most 1")


@dataclass(frozen=True)
class Random(_Share):
    """Each negative pair takes part with probability ``keep``, independently of the others.

    A hash of (seed, index of the image, index of the text) decides; in a group these are the
    indices in the global batch. It selects the same pairs on every device, backend, panel shape and
    number of ranks, and in forward and backward. Another ``seed`` (0 up to 2**63), such as the
    step, selects other pairs.

    Raises:
        TypeError, ValueError: a share that is not a number above 0 and at most 1; a seed that is
            not such an int.
    """

    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.seed, numbers.Integral) or isinstance(self.seed, bool):
            raise TypeError(f"seed is a {type(self.seed).__qualname__}: expected an int")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed is {self.seed}: expected 0 up to 2**63")
        if not isinstance(self.seed, int):  # NumPy's
            object.__setattr__(self, "seed", int(self.seed))


@dataclass(frozen=True)
class Hardest(_Share):
    """Of each image's negatives, the share ``keep`` with the largest logits takes part.

    The number is rounded up and at least one; in a group it is taken out of the texts of all ranks.
    Logits are told apart to 2**-14 of their distance from the image's logit with the mean text.
    Negatives closer than that to the last one may be selected with it, and equal logits always are.

    Raises:
        TypeError, ValueError: a share that is not a number above 0 and at most 1.
    """


@dataclass(frozen=True)
class Easiest(_Share):
    """Of each image's negatives, the share ``keep`` with the smallest logits takes part.

    Everything else is as for :class:`fused_siglip.Hardest`.
    """


@dataclass(frozen=True)
class Below:
    """Negatives up to ``margin`` more similar to the image than its best positive take part.

    A negative whose similarity s = <x_i, y_j> exceeds that of the image's most similar positive in
    the global batch by more than ``margin`` is presumed a false negative, and dropped. Similarities
    that rounding alone tells apart (32 units in the last place) count as equal. An image without
    positives keeps all its negatives. The margin is one of similarities, not of logits: 0.1 suits
    cosines. A negative one also drops negatives that are less similar than the positive.

    Raises:
        TypeError, ValueError: a margin that is not a finite number.
    """

    margin: float

    def __post_init__(self) -> None:
        if not isinstance(self.margin, numbers.Real) or isinstance(self.margin, bool):
            raise TypeError(f"margin is a {type(self.margin).__qualname__}: expected a number")
        if not math.isfinite(self.margin):
            raise ValueError(f"margin is {self.margin}: expected a finite number")


Negatives = Random | Hardest | Easiest | Below
# as the operator names them
KINDS = {"random": Random, "hardest": Hardest, "easiest": Easiest, "below": Below}


def choice_of(negatives: Negatives | None) -> NegativeChoice:
    """What the operator is told: a subclass is what it derives from, a share of 1 is all."""
    if negatives is None:
        return ALL_NEGATIVES
    kind = next(name for name, cls in KINDS.items() if isinstance(negatives, cls))
    if isinstance(negatives, Below):
        return NegativeChoice(kind, float(negatives.margin))
    if negatives.keep == 1:
        return ALL_NEGATIVES
    return NegativeChoice(kind, float(negatives.keep), getattr(negatives, "seed", 0))
