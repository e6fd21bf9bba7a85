"""A small image tower and a small text tower, trained with a sigmoid contrastive loss."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize
from tqdm import tqdm

from fused_siglip import siglip_loss
from fused_siglip.reference import eager_siglip_loss

from .captions import LANGUAGES, Split, Tokenizer, test_prompts, training_captions

LOSSES = {"fused": siglip_loss, "eager": eager_siglip_loss}
EMBED_DIM = 64  # D, shared by both towers
HIDDEN = 512  # of the image tower
BATCH_SIZE = 512
LEARNING_RATE = 2e-3


class TwoTowers(nn.Module):
    def __init__(self, vocabulary: int):
        super().__init__()
        self.image = nn.Sequential(
            nn.Flatten(), nn.Linear(8 * 8, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, EMBED_DIM)
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
    loss: str
    dtype: str
    losses: list[float]  # one a step
    accuracy: dict[str, float]  # zero-shot on the test images, by language of the prompts


def train(
    loss: str,
    dtype: torch.dtype,
    splits: tuple[Split, Split],
    steps: int,
    seed: int,
    device: str,
) -> Run:
    """Train from ``seed``: first weights, batches and captions depend on nothing else."""
    torch.manual_seed(seed)
    train_split, test_split = (split.to(device, dtype) for split in splits)
    captions = training_captions()
    tokenizer = Tokenizer([caption for group in captions for caption in group])
    tokens = tokenizer([caption for group in captions for caption in group])
    tokens = tokens.view(len(captions), -1, tokens.shape[1])  # (digit, caption, word)
    tokens = tokens.to(device)
    model = TwoTowers(len(tokenizer)).to(device, dtype)
    optimizer = torch.optim.Adam(model.parameters(), lr=LEARNING_RATE)

    losses = []
    dtype_name = str(dtype).removeprefix("torch.")
    for _ in tqdm(range(steps), desc=f"train, {loss} {dtype_name}", unit="step", leave=False):
        # drawn on the CPU: the same on every device
        batch = torch.randperm(len(train_split.digits))[:BATCH_SIZE].to(device)
        choice = torch.randint(tokens.shape[1], (BATCH_SIZE,)).to(device)
        digits = train_split.digits[batch]
        # Many captions of a batch mean the same digit: each is a positive of every such image.
        value = LOSSES[loss](
            model.encode_images(train_split.images[batch]),
            model.encode_texts(tokens[digits, choice]),
            model.log_scale.exp(),
            model.bias,
            image_ids=digits,
            text_ids=digits,
        )
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        losses.append(value.item())

    return Run(loss, dtype_name, losses, zero_shot_accuracy(model, tokenizer, test_split))


@torch.no_grad()
def zero_shot_accuracy(model: TwoTowers, tokenizer: Tokenizer, split: Split) -> dict[str, float]:
    """Share of images whose most similar prompt, of the ten in a language, names their digit."""
    images = model.encode_images(split.images)  # (N, D)
    accuracy = {}
    for language in LANGUAGES:
        prompts = model.encode_texts(tokenizer(test_prompts(language)).to(images.device))
        predicted = (images @ prompts.T).argmax(dim=1)
        accuracy[language] = (predicted == split.digits).float().mean().item()
    return accuracy
