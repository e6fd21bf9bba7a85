"""Images of three handwritten digits, two small towers, and their training."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize
from torch.optim.lr_scheduler import OneCycleLR

from examples.captions import Split, load_splits

from . import words
from .losses import LOSSES

DIM = 64  # D, shared by both towers
HIDDEN = 512
WIDTH = 64  # of a token's embedding
VOCABULARY = 4096  # of hashed tokens, padding among them
TEST_IMAGES = 1000


class ImageTower(nn.Sequential):
    """(B, 8, 24) -> (B, D), not normalised."""

    def __init__(self):
        super().__init__(nn.Flatten(), nn.Linear(8 * 24, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, DIM))


class TextTower(nn.Module):
    """(B, tokens) -> (B, D), not normalised: a bag of tokens, each through a nonlinearity.

    ``bottleneck``: K of the N x K table and K x W projection that take the place of an N x W table.
    """

    def __init__(self, vocabulary: int = VOCABULARY, bottleneck: int | None = None):
        super().__init__()
        table = nn.Embedding(vocabulary, bottleneck or WIDTH, padding_idx=0)
        widen = [] if bottleneck is None else [nn.Linear(bottleneck, WIDTH, bias=False)]
        self.tokens = nn.Sequential(table, *widen, nn.ReLU())
        self.head = nn.Sequential(
            nn.LayerNorm(WIDTH), nn.Linear(WIDTH, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, DIM)
        )

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.tokens(tokens).sum(dim=1))  # padding adds 0


@dataclass(frozen=True)
class Pictures:
    """Draws three digits in a row from single handwritten ones."""

    digits: Split

    def first(self, count: int) -> Pictures:
        return Pictures(Split(self.digits.images[:count], self.digits.digits[:count]))

    def draw(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Images (count, 8, 24) in [0, 1], and which number of words.NUMBERS each shows."""
        chosen = torch.randint(len(self.digits.digits), (count, 3), generator=generator)
        images = self.digits.images[chosen, 0].transpose(1, 2).flatten(2)
        return images, self.digits.digits[chosen] @ torch.tensor([100, 10, 1])


def load_pictures(seed: int) -> tuple[Pictures, Pictures]:
    """Pictures to train with and pictures to test on; no digit image is in both."""
    train, test = load_splits(seed)
    return Pictures(train), Pictures(test)


class Captions:
    """Draws a caption of a number, in one of the languages."""

    def __init__(self, languages: list[str], vocabulary: int = VOCABULARY):
        # (language, start, number, L)
        self.tokens = words.training_tokens(tuple(languages), vocabulary)

    def draw(self, numbers: Tensor, generator: torch.Generator) -> Tensor:  # (B,) -> (B, L)
        languages, starts, *_ = self.tokens.shape
        language = torch.randint(languages, numbers.shape, generator=generator)
        start = torch.randint(starts, numbers.shape, generator=generator)
        return self.tokens[language, start, numbers]


def optimizer(groups: list[dict], steps: int) -> tuple[torch.optim.Optimizer, OneCycleLR]:
    """Adam with the paper's beta2, and a rate that rises for a tenth of the steps, then falls."""
    adam = torch.optim.Adam(groups, betas=(0.9, 0.95))
    rates = [group["lr"] for group in groups]
    schedule = OneCycleLR(adam, rates, steps, pct_start=0.1, cycle_momentum=False)
    return adam, schedule


def train(
    loss: str,
    rate: float,
    steps: int,
    batch_size: int,
    seed: int,
    captions: Captions,
    text: TextTower,
    corrupt: Callable[..., tuple[Tensor, Tensor]] | None = None,
) -> ImageTower:
    """Both towers from scratch, on pairs that are drawn anew at every step; trains ``text``.

    Each image has one positive, its own caption, as in the paper: that some other caption of the
    batch may mean the same number is not told to the loss.
    """
    generator = torch.Generator().manual_seed(seed)
    pictures, _ = load_pictures(seed)
    image, value_of = ImageTower(), LOSSES[loss]()
    parameters = [p for module in (image, text, value_of) for p in module.parameters()]
    adam, schedule = optimizer([{"params": parameters, "lr": rate}], steps)
    for _ in range(steps):
        images, numbers = pictures.draw(batch_size, generator)
        tokens = captions.draw(numbers, generator)
        if corrupt is not None:
            images, tokens = corrupt(images, tokens, generator)
        value = value_of(normalize(image(images)), normalize(text(tokens)))
        adam.zero_grad()
        value.backward()
        adam.step()
        schedule.step()
    return image


@torch.no_grad()
def accuracy(image: nn.Module, text: nn.Module, language: str, seed: int, vocabulary: int) -> float:
    """Share of test images whose most similar prompt, of the 1000 numbers', names their digits."""
    _, pictures = load_pictures(seed)
    images, numbers = pictures.draw(TEST_IMAGES, torch.Generator().manual_seed(seed))
    prompts = normalize(text(words.test_tokens(language, vocabulary)))
    predicted = (normalize(image(images)) @ prompts.T).argmax(dim=1)
    return (predicted == numbers).float().mean().item()
