"""Random negatives: a hash of the pair decides, so that no mask is stored or sent."""

from __future__ import annotations

import torch
from torch import Tensor

# The hash: two rounds of multiplication and shift, lowbias32 of Chris Wellons' hash prospector. It
# makes a row's key of its index and the seed's words; a pair's hash is that of image key ^ text key
# without the last shift, as an int32, and the pair takes part where it is below a cutoff.
_MASK = 0xFFFFFFFF


def _mix(h: Tensor) -> Tensor:
    """One round of mixing, of uint32 numbers that are held in int64."""
    h = ((h ^ (h >> 16)) * 0x7FEB352D) & _MASK
    h = ((h ^ (h >> 15)) * 0x846CA68B) & _MASK
    return h ^ (h >> 16)


def _words(seed: int, step: int) -> tuple[int, int]:
    """Two 32-bit words of a seed: output ``step`` of SplitMix64 (Steele, Lea and Flood, 2014)."""
    z = (seed + step * 0x9E3779B97F4A7C15) % 2**64
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
    z ^= z >> 31
    return z & _MASK, z >> 32


def _keys(first: int, count: int, words: tuple[int, int], device: torch.device) -> Tensor:
    """(count,) int32: a permutation of 32 bits, so that no two rows share a key."""
    word, other = words
    index = torch.arange(first, first + count, device=device) & _MASK
    keys = _mix((_mix(index ^ word) + other) & _MASK)
    return torch.where(keys < 2**31, keys, keys - 2**32).int()


def image_keys(seed: int, first: int, count: int, device: torch.device) -> Tensor:
    """(count,) int32 keys of images ``first`` to ``first + count`` of the global batch."""
    return _keys(first, count, _words(seed, 1), device)


def text_keys(seed: int, first: int, count: int, device: torch.device) -> Tensor:
    """(count,) int32 keys of texts ``first`` to ``first + count`` of the global batch."""
    return _keys(first, count, _words(seed, 2), device)


def hash_cutoff(keep: float) -> int:
    """The number that a pair's hash is below with probability ``keep``."""
    return min(max(round(keep * 2**32), 1), 2**32 - 1) - 2**31
