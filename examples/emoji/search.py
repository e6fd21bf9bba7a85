"""A trained model as a file, and queries answered from it.

In NumPy: to import torch takes longer than to answer.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from .data import Emoji
from .ngrams import bags

if TYPE_CHECKING:
    from .training import Model

MODEL = "emoji.npz"  # in the demo's folder
EPSILON = 1e-5  # of torch's LayerNorm


@dataclass(frozen=True)
class Index:
    """The features of all pictures, and the text tower."""

    characters: np.ndarray  # (E,) str
    names: np.ndarray  # (E,) str, in English
    pictures: np.ndarray  # (E, D) of length 1
    table: np.ndarray  # (buckets, W)
    hidden_weight: np.ndarray  # (H, W)
    hidden_bias: np.ndarray  # (H,)
    weight: np.ndarray  # (D, H)
    bias: np.ndarray  # (D,)

    def features(self, texts: Sequence[str]) -> np.ndarray:  # (T, D) of length 1
        """What TextTower computes, in NumPy."""
        ids, sizes = bags(texts, len(self.table))
        hidden = np.add.reduceat(self.table[ids], sizes.cumsum() - sizes)
        hidden = hidden - hidden.mean(axis=1, keepdims=True)
        hidden /= np.sqrt((hidden**2).mean(axis=1, keepdims=True) + EPSILON)
        hidden = np.maximum(hidden @ self.hidden_weight.T + self.hidden_bias, 0)
        found = hidden @ self.weight.T + self.bias
        return found / np.linalg.norm(found, axis=1, keepdims=True)

    def search(self, texts: Sequence[str], count: int = 5) -> np.ndarray:  # (T, count)
        """Indices of the emoji whose pictures are most similar to each text, best first."""
        return np.argsort(-(self.features(texts) @ self.pictures.T), axis=1)[:, :count]

    def save(self, path: Path) -> None:
        part = path.with_suffix(".part")
        with part.open("wb") as file:
            np.savez(file, **vars(self))
        os.replace(part, path)


def load_index(path: Path) -> Index:
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist: `make demo` trains a model and saves it")
    with np.load(path) as arrays:
        return Index(**arrays)


def make_index(model: Model, emoji: Emoji) -> Index:
    import torch

    _, hidden, _, last, standardized = model.text.layers
    with torch.no_grad():
        spread = (standardized.running_var + standardized.eps).sqrt()
        tensors = {
            "pictures": model.image(torch.from_numpy(emoji.pictures)),
            "table": model.text.table.weight,
            "hidden_weight": hidden.weight,
            "hidden_bias": hidden.bias,
            "weight": last.weight / spread[:, None],
            "bias": (last.bias - standardized.running_mean) / spread,
        }
    return Index(
        characters=np.array(emoji.characters),
        names=np.array([names[0] for names in emoji.names]),
        **{name: tensor.detach().numpy() for name, tensor in tensors.items()},
    )
