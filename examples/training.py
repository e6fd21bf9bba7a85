"""A small image tower and a small text tower, trained with a sigmoid contrastive loss."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize
from tqdm import tqdm

from fused_siglip import LearnableSigLipLoss
from fused_siglip.testing import eager_siglip_loss

from .captions import LANGUAGES, Split, Tokenizer, test_prompts, tokenize_captions

EMBED_DIM = 64  # D, shared by both towers
HIDDEN = 512  # of the image tower
BATCH_SIZE = 512
LEARNING_RATE = 2e-3


class EagerSigLipLoss(LearnableSigLipLoss):
    """The same scale and bias in the eager loss, which knows no group: that of this process."""

    def __init__(self):
        super().__init__()

    def forward(
        self,
        image_features: Tensor,  # (M, D)
        text_features: Tensor,  # (N, D)
        *,
        image_ids: Tensor,  # (M,)
        text_ids: Tensor,  # (N,)
    ) -> Tensor:  # ()
        # without a dimension, as open_clip's parameters are: they do not widen half precision
        scalars = self.factor().squeeze(), self.logit_bias.squeeze()
        ids = {"image_ids": image_ids, "text_ids": text_ids}
        return eager_siglip_loss(image_features, text_features, *scalars, **ids)


LOSSES = {"fused": LearnableSigLipLoss, "eager": EagerSigLipLoss}


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
    tokenizer, tokens = tokenize_captions()
    tokens = tokens.to(device)
    model = TwoTowers(len(tokenizer), LOSSES[loss]()).to(device, dtype)
    optimizer = torch.optim.Adam(model.parameters(), lr=LEARNING_RATE)

    losses = []
    dtype_name = str(dtype).removeprefix("torch.")
    for _ in tqdm(range(steps), desc=f"train, {loss} {dtype_name}", unit="step", leave=False):
        # drawn on the CPU: the same on every device
        batch = torch.randperm(len(train_split.digits))[:BATCH_SIZE].to(device)
        choice = torch.randint(tokens.shape[1], (BATCH_SIZE,)).to(device)
        digits = train_split.digits[batch]
        value = model(train_split.images[batch], tokens[digits, choice], digits)
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
