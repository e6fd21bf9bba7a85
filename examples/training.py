"""A small image tower and a small text tower, trained with a sigmoid contrastive loss."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize
from tqdm import tqdm

from .captions import LANGUAGES, Split, Tokenizer, test_prompts, training_captions

EMBED_DIM = 64  # D, shared by both towers
BATCH_SIZE = 512
LEARNING_RATE = 1e-3


class TwoTowers(nn.Module):
    def __init__(self, vocabulary: int):
        super().__init__()
        self.image = nn.Sequential(
            nn.Conv2d(1, 32, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(32, 64, 3, stride=2, padding=1),  # 8 x 8 to 4 x 4
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(64 * 4 * 4, EMBED_DIM),
        )
        self.text = nn.Sequential(
            nn.EmbeddingBag(vocabulary, EMBED_DIM, mode="mean", padding_idx=0),
            nn.Linear(EMBED_DIM, EMBED_DIM),
        )
        # where arXiv 2303.15343 starts: t = exp(t') = 10, b = -10
        self.log_scale = nn.Parameter(torch.tensor(math.log(10)))
        self.bias = nn.Parameter(torch.tensor(-10.0))

    def encode_images(self, images: Tensor) -> Tensor:  # (B, 1, 8, 8) -> (B, D)
        return normalize(self.image(images), dim=-1)

    def encode_texts(self, tokens: Tensor) -> Tensor:  # (B, words) -> (B, D)
        return normalize(self.text(tokens), dim=-1)


@dataclass(frozen=True)
class Run:
    losses: list[float]  # one a step
    accuracy: dict[str, float]  # zero-shot on the test images, by language of the prompts


def train(
    name: str,
    loss_function: Callable[..., Tensor],
    train_split: Split,
    test_split: Split,
    steps: int,
    seed: int,
) -> Run:
    """Train from ``seed``: weights, batches and captions depend on nothing else."""
    torch.manual_seed(seed)
    captions = training_captions()
    tokenizer = Tokenizer([caption for group in captions for caption in group])
    tokens = tokenizer([caption for group in captions for caption in group])
    tokens = tokens.view(len(captions), -1, tokens.shape[1])  # (digit, caption, word)
    model = TwoTowers(len(tokenizer))
    optimizer = torch.optim.Adam(model.parameters(), lr=LEARNING_RATE)

    losses = []
    for _ in tqdm(range(steps), desc=f"training with the {name} loss", unit="step"):
        batch = torch.randperm(len(train_split.digits))[:BATCH_SIZE]
        digits = train_split.digits[batch]
        which = torch.randint(tokens.shape[1], (BATCH_SIZE,))
        # Many captions of a batch mean the same digit: each is a positive of every such image.
        loss = loss_function(
            model.encode_images(train_split.images[batch]),
            model.encode_texts(tokens[digits, which]),
            model.log_scale.exp(),
            model.bias,
            image_ids=digits,
            text_ids=digits,
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())

    return Run(losses, zero_shot_accuracy(model, tokenizer, test_split))


@torch.no_grad()
def zero_shot_accuracy(model: TwoTowers, tokenizer: Tokenizer, split: Split) -> dict[str, float]:
    """Share of images whose most similar prompt, of the ten in a language, names their digit."""
    images = model.encode_images(split.images)  # (N, D)
    accuracy = {}
    for language in LANGUAGES:
        prompts = model.encode_texts(tokenizer(test_prompts(language)))  # (10, D)
        predicted = (images @ prompts.T).argmax(dim=1)
        accuracy[language] = (predicted == split.digits).float().mean().item()
    return accuracy
