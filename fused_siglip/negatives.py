"""Which negatives take part in the loss: all, or a share that is chosen without a mask of pairs."""

from __future__ import annotations

import numbers
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .kernels.float_keys import PLACE_BITS, key_to_float


@dataclass(frozen=True)
class _Share:
    keep: float

    def __post_init__(self):
        if not isinstance(self.keep, numbers.Real) or isinstance(self.keep, bool):
            raise TypeError(f"keep is a {type(self.keep).__qualname__}: expected a number")
        if not 0 < self.keep <= 1:
            raise ValueError(f"keep is {self.keep}: expected a share above 0 and at most 1")


@dataclass(frozen=True)
class Random(_Share):
    """Keep each negative pair with probability ``keep``, whatever the others do.

    A hash of (seed, index of the image, index of the text) decides, in a group of the indices in
    the global batch: the same pairs on every device, backend, panel shape and number of ranks, and
    in forward and backward. Another ``seed`` (0 up to 2**63), such as the step, keeps others.

    Raises:
        TypeError, ValueError: a share that is not a number above 0 and at most 1; a seed that is
            not such an int.
    """

    seed: int = 0

    def __post_init__(self):
        super().__post_init__()
        if not isinstance(self.seed, numbers.Integral) or isinstance(self.seed, bool):
            raise TypeError(f"seed is a {type(self.seed).__qualname__}: expected an int")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed is {self.seed}: expected 0 up to 2**63")
        if not isinstance(self.seed, int):  # NumPy's
            object.__setattr__(self, "seed", int(self.seed))


@dataclass(frozen=True)
class Hardest(_Share):
    """Keep, of each image's negatives, the share ``keep`` with the largest logits.

    At least one, and the number rounded up; in a group out of the texts of all ranks. Logits are
    told apart to 2**-14 of their distance from the image's logit with the mean text: negatives
    closer than that to the last one kept may be kept with it, and equal logits always are.

    Raises:
        TypeError, ValueError: a share that is not a number above 0 and at most 1.
    """


@dataclass(frozen=True)
class Easiest(_Share):
    """Keep, of each image's negatives, those with the smallest logits; else as :class:`Hardest`."""


Negatives = Random | Hardest | Easiest
KINDS = {"random": Random, "hardest": Hardest, "easiest": Easiest}  # as the operator names them


def kind_of(negatives: Negatives | None) -> str | None:
    """The name in :data:`KINDS`; a subclass is what it derives from."""
    if negatives is None:
        return None
    return next((name for name, kind in KINDS.items() if isinstance(negatives, kind)), None)


# The hash: two rounds of multiplication and shift, lowbias32 of Chris Wellons' hash prospector. It
# makes a row's key of its index and the seed's words; a pair's hash is that of image key ^ text key
# without the last shift, as an int32, and the pair is kept where it is below a bound.
_MASK = 0xFFFFFFFF


def _mix(h: Tensor) -> Tensor:
    """Of uint32 numbers in int64."""
    h = ((h ^ (h >> 16)) * 0x7FEB352D) & _MASK
    h = ((h ^ (h >> 15)) * 0x846CA68B) & _MASK
    return h ^ (h >> 16)


def _words(seed: int) -> list[int]:
    """Four 32-bit words of a seed: two outputs of SplitMix64 (Steele, Lea and Flood, 2014)."""
    words = []
    for step in (1, 2):
        z = (seed + step * 0x9E3779B97F4A7C15) % 2**64
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
        z ^= z >> 31
        words += [z & _MASK, z >> 32]
    return words


def _keys(first: int, count: int, word: int, other: int, device: torch.device) -> Tensor:
    """(count,) int32: a permutation of 32 bits, so that no two rows share a key."""
    index = torch.arange(first, first + count, device=device) & _MASK
    keys = _mix((_mix(index ^ word) + other) & _MASK)
    return torch.where(keys < 2**31, keys, keys - 2**32).int()


def image_keys(seed: int, first: int, count: int, device: torch.device) -> Tensor:
    """Of images ``first`` to ``first + count`` of the global batch, for RandomMask."""
    return _keys(first, count, *_words(seed)[:2], device)


def text_keys(seed: int, first: int, count: int, device: torch.device) -> Tensor:
    return _keys(first, count, *_words(seed)[2:], device)


def hash_cutoff(keep: float) -> int:
    """What the hash of a kept pair is below: ``below`` of RandomMask."""
    return min(max(round(keep * 2**32), 1), 2**32 - 1) - 2**31


_SHARE_BITS = 38  # times a number of texts below 2^25: no overflow

# Images whose histograms exist at one time (in a group: cumulated ones), 16 MiB at 1024 bins;
# and features that are converted at one time.
ROWS_AT_ONCE = 4096


def text_center_radius(
    y: Tensor,  # (N, D)
    text_ids: Tensor | None,  # (N,)
    dtype: torch.dtype,
    reduce: Callable[[Tensor, str], None] | None = None,
) -> tuple[Tensor, Tensor]:  # (D,), ()
    """The mean of the texts without padding, and how far the farthest lies from it; 0 of none.

    ``reduce`` puts in place of a tensor its "SUM" or "MAX" over the ranks of a group.
    """

    def blocks(padding: Tensor) -> Iterator[Tensor]:  # () or (D,) -> (n, D)
        for start in range(0, len(y), ROWS_AT_ONCE):
            rows = slice(start, start + ROWS_AT_ONCE)
            block = y[rows].to(dtype)
            yield block if text_ids is None else block.where(text_ids[rows, None] >= 0, padding)

    total = y.new_zeros(y.shape[1] + 1, dtype=dtype)  # and the number of texts
    for texts in blocks(total.new_zeros(())):
        total[:-1] += texts.sum(0)
    total[-1] = len(y) if text_ids is None else (text_ids >= 0).sum()
    if reduce is not None:
        reduce(total, "SUM")
    centre = total[:-1] / total[-1].clamp(min=1)
    radius = total.new_zeros(())
    for texts in blocks(centre):
        radius = torch.maximum(radius, torch.linalg.vector_norm(texts - centre, dim=1).max())
    if reduce is not None:
        reduce(radius, "MAX")
    return centre, radius


def score_normalizer(
    x: Tensor,  # (M, D)
    text_range: tuple[Tensor, Tensor],  # (D,), () of text_center_radius
    logit_scale: Tensor,  # () accumulation dtype
    kind: str,
) -> tuple[Tensor, Tensor]:  # (M,), (M,) accumulation dtype
    """Centres and factors, so that (s - centre) * factor lies within -1 and 1, hard pairs high.

    Around the mean text, since the cosines of untrained towers are often all alike.
    """
    acc = logit_scale.dtype
    centre, radius = text_range
    centres = torch.cat([rows.to(acc) @ centre for rows in x.split(ROWS_AT_ONCE)])
    norms = torch.linalg.vector_norm(x, dim=1, dtype=acc)
    sign = logit_scale.sign() if kind == "hardest" else -logit_scale.sign()
    # Cauchy-Schwarz, and room for the rounding of norms and (in tf32 too) of similarities
    farthest = norms * (1.01 * radius + torch.linalg.vector_norm(centre) / 16)
    return centres, sign / farthest.clamp(min=torch.finfo(acc).tiny)


def search_thresholds(
    keep: float,
    dtype: torch.dtype,
    steps: Sequence[int],
    count: Callable[[Tensor | None, int], Tensor],
) -> Tensor:  # (M,)
    """Each image's threshold: its place, bit by bit from the first.

    ``steps`` are the bits that are found together, PLACE_BITS in all. ``count`` gives the (M,
    2**bits) int32 numbers of negatives, as :meth:`Panel.count` does: called with the bits that are
    known, (M,) int32 (None: none are), and the number of the step.
    """
    known = wanted = None
    for step, bits in enumerate(steps):
        counts = count(None if known is None else known.int(), step)
        if known is None:
            # In whole numbers, which every device has. Rounded up, but 0.07 * 100 to 7: the share
            # is cut.
            share = int(keep * 2**_SHARE_BITS)
            wanted = -(-counts.sum(1) * share >> _SHARE_BITS)
            wanted.clamp_(min=1)
        found, above = _bin_of_kth(counts, wanted)
        del counts  # before the next come
        known = found if known is None else (known << bits) + found
        wanted = wanted - above
    assert sum(steps) == PLACE_BITS
    return key_to_float(known, dtype)


def _bin_of_kth(counts: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:  # (M,), (M,) int64
    """The highest bin that with those above it holds ``wanted``; and what those above it hold."""
    last, above = torch.empty_like(wanted), torch.empty_like(wanted)
    for start in range(0, len(counts), ROWS_AT_ONCE):
        rows = slice(start, start + ROWS_AT_ONCE)
        reached = counts[rows].flip(1).cumsum(1, dtype=torch.int32)  # from the highest bin down
        last_bin = counts.shape[1] - 1
        later = (reached < wanted[rows, None]).sum(1, keepdim=True).clamp(max=last_bin)
        highest = last_bin - later
        last[rows] = highest[:, 0]
        above[rows] = (reached.gather(1, later) - counts[rows].gather(1, highest))[:, 0]
    return last, above
