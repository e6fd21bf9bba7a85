"""Emoji and their names: what the studies on these pictures share. The data are the demo's."""

from __future__ import annotations

import functools
from typing import NamedTuple

import numpy as np
import torch
from sklearn.feature_extraction.text import TfidfVectorizer
from torch import Tensor, nn

from examples.emoji.data import (
    Emoji,
    load_emoji,
    names_of,
    seen_elsewhere,
    split,
    without_tones,
)
from examples.emoji.ngrams import LONGEST, Bags, readings
from examples.emoji.training import Model, ranks

BUCKETS = 1 << 14
WIDTH = 64  # of an entry of the table
DIM = 128
HELD_OUT = 0.1  # of the names
SPLIT_SEED = 3  # not the one on which the demo was designed
TUNE = 5  # every fifth of those held out is to tune with


class Parts(NamedTuple):
    """Indices of names, as in the demo's Split."""

    train: np.ndarray
    tune: np.ndarray  # held out, to choose rates by; their emoji have names to train with
    test: np.ndarray  # likewise, for everything else
    unseen_emoji: np.ndarray  # all names of some emoji


@functools.cache
def load() -> tuple[Emoji, Parts]:
    """Emoji without tones of skin, and which of their names are held out."""
    emoji = without_tones(load_emoji())
    parts = split(emoji, HELD_OUT, SPLIT_SEED)
    tune = np.arange(len(parts.held_out)) % TUNE == 0
    return emoji, Parts(
        parts.train, parts.held_out[tune], parts.held_out[~tune], parts.unseen_emoji
    )


def new_model(loss: nn.Module, seed: int, buckets: int = BUCKETS) -> Model:
    torch.manual_seed(seed)
    model = Model(DIM, WIDTH, buckets)
    model.loss = loss
    return model


def distinct_batches(
    emoji: Emoji, names: np.ndarray, size: int, steps: int, seed: int
) -> list[np.ndarray]:
    """Batches of ``size`` names of as many different emoji, drawn at random."""
    random = np.random.default_rng([seed, 0])
    owner = names // len(emoji.languages)
    starts = np.flatnonzero(np.diff(owner, prepend=-1))
    counts = np.diff(starts, append=len(owner))
    found = []
    for _ in range(steps):
        chosen = random.permutation(len(starts))[:size]
        found.append(names[starts[chosen] + random.integers(0, counts[chosen])])
    return found


def beside_texts(images: Tensor, image_ids: Tensor, text_ids: Tensor) -> Tensor:
    """The row of ``images`` (M, ...) of each text, (N, ...): ``image_ids`` (M,) are sorted."""
    return images[torch.searchsorted(image_ids, text_ids)]


def value_by_row(
    model: Model, pictures: Tensor, image_ids: Tensor, texts: Bags, text_ids: Tensor
) -> Tensor:
    """The loss of a batch of different emoji: each picture has one positive."""
    images = beside_texts(model.image(pictures), image_ids, text_ids)
    return model.loss(images, model.text(texts))


def quality(model: Model, emoji: Emoji, names: np.ndarray) -> dict[str, float]:
    """Of the right picture among all, by these names: mean reciprocal rank, and recall."""
    rank = ranks(model, emoji, names).double()
    return {
        "mrr": (1 / rank).mean().item(),
        "recall_at_1": (rank == 1).double().mean().item(),
    }


def recall_by_language(model: Model, emoji: Emoji, names: np.ndarray) -> dict[str, float]:
    """How often the right picture is first, by the language of the names."""
    first = (ranks(model, emoji, names) == 1).numpy()
    language = names % len(emoji.languages)
    return {code: first[language == i].mean().item() for i, code in enumerate(emoji.languages)}


def nothing_learned(ranks: list[float], emoji: int) -> bool:
    """Whether mean reciprocal ranks lie within three times chance, on average."""
    return sum(ranks) / len(ranks) < 3 * sum(1 / rank for rank in range(1, emoji + 1)) / emoji


@functools.cache
def counts() -> dict[str, float]:
    """What a section says of the data; runs on different data are told apart by it."""
    emoji, parts = load()
    return {
        "emoji": len(emoji),
        **{name: len(part) for name, part in parts._asdict().items()},
        "alike": seen_elsewhere(emoji, parts.test, parts.train).mean().item(),
    }


def recall_by_spelling() -> float:
    """How often the known name with the most similar spelling, of any language, is of the same
    emoji: cosine of the tf-idf of runs of letters."""
    emoji, parts = load()
    known, asked = (
        [" ".join(readings(name)) for name in names_of(emoji, captions)]
        for captions in (parts.train, parts.test)
    )
    vectors = TfidfVectorizer(analyzer="char_wb", ngram_range=(1, LONGEST), sublinear_tf=True)
    known_vectors = vectors.fit_transform(known).T.tocsc()
    asked_vectors = vectors.transform(asked)
    nearest = np.concatenate([
        (asked_vectors[at : at + 256] @ known_vectors).toarray().argmax(axis=1)
        for at in range(0, len(asked), 256)
    ])  # fmt: skip
    count = len(emoji.languages)
    return float((parts.train[nearest] // count == parts.test // count).mean())
