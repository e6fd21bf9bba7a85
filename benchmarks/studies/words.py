"""English captions of three digits, as hashed words and parts of words."""

from __future__ import annotations

import functools
import itertools
import re
import zlib

import torch
from torch import Tensor

NUMBERS = list(itertools.product(range(10), repeat=3))  # 0 0 0 to 9 9 9, as the captions spell them
DIGITS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
PLACES = ["left", "middle", "right"]
TRAINING = ("a photo of digits:", "handwritten:")  # what a caption begins with
VOCABULARY = 4096  # of hashed tokens, padding among them
TEST = "three numbers on paper:"  # what a test's prompt begins with: in no training caption


def caption(number: tuple[int, ...], start: str) -> str:
    parts = [f"{place} {DIGITS[digit]}" for place, digit in zip(PLACES, number, strict=True)]
    return f"{start} {', '.join(parts)}"


def features(text: str) -> list[str]:
    """Words, pairs of neighbouring words, and the runs of three letters of each word."""
    words = re.findall(r"[^\s,:]+", text.lower())
    pairs = [f"{a} {b}" for a, b in itertools.pairwise(words)]
    return [part for word in words for part in _parts(word)] + pairs


@functools.cache
def _parts(word: str) -> tuple[str, ...]:
    return (word, *(f"-{word[i : i + 3]}-" for i in range(len(word) - 2)))


@functools.cache
def _token(feature: str) -> int:
    """The same on every machine and in every process, unlike Python's hash; 0 is padding."""
    return 1 + zlib.crc32(feature.encode()) % (VOCABULARY - 1)


def tokenize(texts: list[str]) -> Tensor:  # (texts, longest) int64
    rows = [torch.tensor([_token(f) for f in features(text)]) for text in texts]
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)


@functools.cache
def training_tokens() -> Tensor:
    """(start, number, longest) int64: every caption to train with."""
    texts = [caption(number, start) for start in TRAINING for number in NUMBERS]
    return tokenize(texts).view(len(TRAINING), len(NUMBERS), -1)


def test_tokens() -> Tensor:
    """(number, longest) int64: a prompt for each number, worded as no training caption is."""
    return tokenize([caption(number, TEST) for number in NUMBERS])
