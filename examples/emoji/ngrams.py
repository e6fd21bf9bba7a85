"""Texts as bags of hashed character n-grams, without a vocabulary: any script, any language."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from .data import plain

BUCKETS = 1 << 16
LONGEST = 4  # letters of an n-gram
MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)  # 2^64 / golden ratio, as in splitmix64
# of murmur3's finaliser
MIX = (np.uint64(0xFF51AFD7ED558CCD), np.uint64(0xC4CEB9FE1A85EC53))


class Bags(NamedTuple):
    """T bags, one after another."""

    ids: np.ndarray  # int64, below the number of buckets
    sizes: np.ndarray  # (T,) int64

    def take(self, rows: np.ndarray) -> Bags:
        """The bags of ``rows``, in that order."""
        sizes = self.sizes[rows]
        starts = (self.sizes.cumsum() - self.sizes)[rows]
        within = np.arange(sizes.sum()) - (sizes.cumsum() - sizes).repeat(sizes)
        return Bags(self.ids[starts.repeat(sizes) + within], sizes)


def readings(text: str) -> list[str]:
    """How a text is read: without accents, and where that is not ASCII yet, also in Latin letters.

    Names of countries and many other words sound alike in scripts that share no letter.
    """
    from anyascii import anyascii

    bare = plain(text)
    return [bare] if bare.isascii() else [bare, anyascii(bare).lower()]


def bags(texts: Sequence[str], buckets: int = BUCKETS) -> Bags:
    """Every n-gram of 1 to LONGEST letters of each text's readings, spaces around it included.

    The longest count once more with the half of the text that they are in: "light, dark" is not
    "dark, light".
    """
    read = [(row, f" {reading} ") for row, text in enumerate(texts) for reading in readings(text)]
    letters = np.frombuffer("".join(r for _, r in read).encode("utf-32-le"), np.uint32)
    sizes = np.array([len(reading) for _, reading in read], dtype=np.int64)
    reading_of = np.arange(len(read)).repeat(sizes)
    row_of = np.array([row for row, _ in read], dtype=np.int64)
    second_half = np.arange(len(letters)) >= (sizes.cumsum() - (sizes + 1) // 2).repeat(sizes)

    hashes, rows = [], []
    running = np.zeros(len(letters), dtype=np.uint64)
    for length in range(1, LONGEST + 1):
        ends = letters[length - 1 :].astype(np.uint64)
        running = running[: len(ends)] * MULTIPLIER + ends + np.uint64(1)
        whole = reading_of[: len(ends)] == reading_of[length - 1 :]
        found = [running]
        if length == LONGEST:
            found.append(running + (second_half[: len(ends)] + MIX[0]) * MIX[1])
        for hashed in found:
            hashes.append(_mixed(hashed[whole]) % np.uint64(buckets))
            rows.append(row_of[reading_of[: len(ends)][whole]])
    row = np.concatenate(rows)
    order = row.argsort(kind="stable")
    ids = np.concatenate(hashes)[order].astype(np.int64)
    return Bags(ids, np.bincount(row, minlength=len(texts)))


def _mixed(hashed: np.ndarray) -> np.ndarray:
    """Every bit of a uint64 spread over all of it."""
    for factor in MIX:
        hashed = (hashed ^ (hashed >> np.uint64(33))) * factor
    return hashed ^ (hashed >> np.uint64(33))
