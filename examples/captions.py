"""scikit-learn's handwritten digits, each with a caption in words."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor

# language: (words for the digits 0 to 9, templates to train with, template of the test's prompts)
LANGUAGES = {
    "numerals": (
        "0 1 2 3 4 5 6 7 8 9",
        ("the digit {}", "a photo of the number {}", "figure {} on paper"),
        "a photo of the handwritten digit {}",
    ),
    "English": (
        "zero one two three four five six seven eight nine",
        ("a handwritten {}", "the number {}", "a photo of a {} on paper"),
        "a photo of the handwritten number {}",
    ),
    "German": (
        "null eins zwei drei vier fünf sechs sieben acht neun",
        ("eine handgeschriebene {}", "die Ziffer {}", "ein Foto der Zahl {}"),
        "ein Foto der handgeschriebenen Ziffer {}",
    ),
    "French": (
        "zéro un deux trois quatre cinq six sept huit neuf",
        ("le chiffre {}", "une photo du nombre {}", "{} écrit à la main"),
        "une photo du chiffre {} écrit à la main",
    ),
    "Spanish": (
        "cero uno dos tres cuatro cinco seis siete ocho nueve",
        ("el dígito {}", "una foto del número {}", "{} escrito a mano"),
        "una foto del dígito {} escrito a mano",
    ),
}


def training_captions() -> list[list[str]]:
    """Every caption of each digit, in all languages; [7] holds those that mean seven."""
    return [
        [
            template.format(words.split()[digit])
            for words, templates, _ in LANGUAGES.values()
            for template in templates
        ]
        for digit in range(10)
    ]


def test_prompts(language: str) -> list[str]:
    """One prompt a digit, in wording that is not among the training captions."""
    words, _, template = LANGUAGES[language]
    return [template.format(word) for word in words.split()]


class Tokenizer:
    """Whole words as integers; 0 is padding, and what an unknown word becomes."""

    def __init__(self, captions: list[str]):
        words = sorted({word for caption in captions for word in caption.split()})
        self.index = {word: i for i, word in enumerate(words, start=1)}

    def __len__(self) -> int:
        return len(self.index) + 1

    def __call__(self, captions: list[str]) -> Tensor:  # (captions, longest) int64
        rows = [torch.tensor([self.index.get(w, 0) for w in c.split()]) for c in captions]
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)


def tokenize_captions() -> tuple[Tokenizer, Tensor]:  # (digit, caption, word) int64
    """A tokenizer of the training captions, and those captions in tokens."""
    captions = training_captions()
    flat = [caption for group in captions for caption in group]
    tokenizer = Tokenizer(flat)
    return tokenizer, tokenizer(flat).view(len(captions), len(captions[0]), -1)


@dataclass(frozen=True)
class Split:
    images: Tensor  # (N, 1, 8, 8) in [0, 1]
    digits: Tensor  # (N,) int64

    def to(self, device: str, dtype: torch.dtype) -> Split:
        return Split(self.images.to(device, dtype), self.digits.to(device))


def load_splits(seed: int) -> tuple[Split, Split]:
    """1437 images to train with and 360 to test on, the digits in equal proportion in both."""
    data = load_digits()
    images = torch.from_numpy(data.images).float()[:, None] / 16
    digits = torch.from_numpy(data.target).long()
    train, test = train_test_split(
        torch.arange(len(digits)).numpy(), test_size=0.2, stratify=data.target, random_state=seed
    )
    return Split(images[train], digits[train]), Split(images[test], digits[test])
