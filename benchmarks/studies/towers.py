"""Images of three handwritten digits with English captions, and two small towers."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize
from torch.optim.lr_scheduler import OneCycleLR

from examples.captions import Split, load_splits

from . import words

DIM = 64  # D, shared by both towers
HIDDEN = 512
WIDTH = 64  # of a token's embedding
TEST_IMAGES = 1000


class ImageTower(nn.Sequential):
    """(B, 8, 24) -> (B, D), not normalised."""

    def __init__(self):
        super().__init__(nn.Flatten(), nn.Linear(8 * 24, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, DIM))


class TextTower(nn.Module):
    """(B, tokens) -> (B, D), not normalised: a bag of tokens, each through a nonlinearity."""

    def __init__(self):
        super().__init__()
        self.tokens = nn.Sequential(nn.Embedding(words.VOCABULARY, WIDTH, padding_idx=0), nn.ReLU())
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


def draw_captions(numbers: Tensor, generator: torch.Generator) -> Tensor:  # (B,) -> (B, L)
    """A caption of each number, with one of the beginnings at random."""
    tokens = words.training_tokens()
    start = torch.randint(len(tokens), numbers.shape, generator=generator)
    return tokens[start, numbers]


def optimizer(groups: list[dict], steps: int) -> tuple[torch.optim.Optimizer, OneCycleLR]:
    """Adam with the paper's beta2, and a rate that rises for a tenth of the steps, then falls."""
    adam = torch.optim.Adam(groups, betas=(0.9, 0.95))
    rates = [group["lr"] for group in groups]
    schedule = OneCycleLR(adam, rates, steps, pct_start=0.1, cycle_momentum=False)
    return adam, schedule


@torch.no_grad()
def accuracy(image: nn.Module, text: nn.Module, seed: int) -> float:
    """Share of test images whose most similar prompt, of the 1000 numbers', names their digits."""
    _, pictures = load_pictures(seed)
    images, numbers = pictures.draw(TEST_IMAGES, torch.Generator().manual_seed(seed))
    prompts = normalize(text(words.test_tokens()))
    predicted = (normalize(image(images)) @ prompts.T).argmax(dim=1)
    return (predicted == numbers).float().mean().item()
