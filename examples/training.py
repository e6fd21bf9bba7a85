"""A small image tower and a small text tower for digits, and how good they are."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from fused_siglip import LearnableSigLipLoss

from .captions import LANGUAGES, Split, Tokenizer, test_prompts

EMBED_DIM = 64  # D, shared by both towers
HIDDEN = 512  # of the image tower
LEARNING_RATE = 2e-3


class TwoTowers(nn.Module):
    """The towers and their loss: all that learns, in one module, so that DDP averages all of it."""

    def __init__(self, vocabulary: int, loss: LearnableSigLipLoss):
        super().__init__()
        self.image = nn.Sequential(
            nn.Flatten(), nn.Linear(8 * 8, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, EMBED_DIM)
        )
        self.text = nn.Sequential(
            nn.EmbeddingBag(vocabulary, EMBED_DIM, mode="mean", padding_idx=0),
            nn.Linear(EMBED_DIM, EMBED_DIM),
        )
        self.loss = loss

    def forward(self, images: Tensor, tokens: Tensor, digits: Tensor) -> Tensor:  # ()
        """The loss of images and captions of ``digits`` (B,).

        Many captions of a batch mean the same digit: each is a positive of every such image.
        """
        features = self.encode_images(images), self.encode_texts(tokens)
        return self.loss(*features, image_ids=digits, text_ids=digits)

    def encode_images(self, images: Tensor) -> Tensor:  # (B, 1, 8, 8) -> (B, D)
        return normalize(self.image(images), dim=-1)

    def encode_texts(self, tokens: Tensor) -> Tensor:  # (B, words) -> (B, D)
        return normalize(self.text(tokens), dim=-1)


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
