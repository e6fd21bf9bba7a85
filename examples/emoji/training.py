"""Two small towers for pictures of emoji and their names, and their training."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import normalize
from torch.optim.lr_scheduler import OneCycleLR
from tqdm import tqdm

from fused_siglip import LearnableSigLipLoss, retrieval_ranks

from .data import Emoji, names_of
from .ngrams import BUCKETS, Bags, bags

DIM = 256  # D, shared by both towers
TEXT_WIDTH = 128
HIDDEN = 512
RATE = 1.2e-2
WEIGHT_DECAY = 1e-2
STATISTICS = 4096  # names that the statistics of the batch norm are of in the end
DROPOUT = 0.2  # share of the n-grams that a batch does without
Plan = Sequence[tuple[int, int]]  # (steps, batch size): as the rate falls the batch grows
PLAN = ((550, 2048), (8, 16384))
ValueOf = Callable[..., Tensor]
TINY = ((20, 256), (2, 512))


def standardized(dim: int) -> nn.Module:
    """Features around 0. Without it all of them are alike at first, and dozens of steps go by until
    the sigmoid loss at b = -10 has told them apart."""
    return nn.BatchNorm1d(dim, affine=False)


class ImageTower(nn.Module):
    """(B, 3, 32, 32) uint8 -> (B, D) of length 1."""

    def __init__(self, dim: int):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, 32, 4, stride=4),
            nn.GELU(),
            nn.Conv2d(32, 64, 3, stride=2, padding=1),
            nn.GELU(),
            nn.Flatten(),
            nn.Linear(64 * 4 * 4, HIDDEN),
            nn.GELU(),
            nn.Linear(HIDDEN, dim),
            standardized(dim),
        )

    def forward(self, pictures: Tensor) -> Tensor:
        return normalize(self.layers(pictures.float() / 127.5 - 1), dim=-1)


class TextTower(nn.Module):
    """Bags of hashed n-grams -> (B, D) of length 1."""

    def __init__(self, dim: int, width: int, buckets: int):
        super().__init__()
        self.table = nn.EmbeddingBag(buckets, width, mode="sum")
        nn.init.normal_(self.table.weight, std=0.05)
        self.layers = nn.Sequential(
            nn.LayerNorm(width, elementwise_affine=False),
            nn.Linear(width, HIDDEN),
            nn.ReLU(),
            nn.Linear(HIDDEN, dim),
            standardized(dim),
        )

    def forward(self, texts: Bags) -> Tensor:
        ids, sizes = (torch.from_numpy(part) for part in texts)
        return normalize(self.layers(self.table(ids, sizes.cumsum(0) - sizes)), dim=-1)


class Model(nn.Module):
    """Both towers and the scale and bias of their loss."""

    def __init__(self, dim: int = DIM, width: int = TEXT_WIDTH, buckets: int = BUCKETS):
        super().__init__()
        self.buckets = buckets
        self.image = ImageTower(dim)
        self.text = TextTower(dim, width, buckets)
        self.loss = LearnableSigLipLoss()

    def forward(
        self, pictures: Tensor, image_ids: Tensor, texts: Bags, text_ids: Tensor
    ) -> Tensor:  # ()
        """The loss of pictures of the emoji ``image_ids`` (M,) with names of ``text_ids`` (N,).

        Each text is a positive of the picture of its emoji, in whatever language it is.
        """
        features = self.image(pictures), self.text(texts)
        return self.loss(*features, image_ids=image_ids, text_ids=text_ids)


def train(
    model: Model,
    emoji: Emoji,
    batches: Sequence[np.ndarray],  # indices of names, as Split has them
    *,
    rate: float = RATE,
    seed: int = 0,
    value_of: ValueOf | None = None,
    progress: bool = True,
) -> Model:
    """Train on these batches; ``seed`` decides which n-grams each does without.

    ``value_of`` takes the model and what :meth:`Model.forward` takes, and gives the loss.
    """
    random = np.random.default_rng([seed, 1])
    optimizer = make_optimizer(model, rate)
    schedule = OneCycleLR(optimizer, rate, len(batches), pct_start=0.1, cycle_momentum=False)
    texts = _bags_of_all(tuple(name for names in emoji.names for name in names), model.buckets)
    pictures = torch.from_numpy(emoji.pictures)
    bar = tqdm(batches, desc="training", unit="step", leave=False, disable=not progress)
    for batch in bar:
        text_ids = torch.from_numpy(batch // len(emoji.languages))
        image_ids = text_ids.unique()
        names = dropped(texts.take(batch), DROPOUT, random)
        inputs = pictures[image_ids], image_ids, names, text_ids
        value = model(*inputs) if value_of is None else value_of(model, *inputs)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        schedule.step()
        bar.set_postfix_str(f"batch {len(batch)}, loss {value.item():.2f}", refresh=False)
    last = np.concatenate(batches)[-STATISTICS:]
    settle_batch_norm(model, pictures[last // len(emoji.languages)], texts.take(last))
    return model.eval()


@functools.lru_cache(maxsize=2)  # a study trains many models on the same names
def _bags_of_all(names: tuple[str, ...], buckets: int) -> Bags:
    return bags(names, buckets)


@torch.no_grad()
def settle_batch_norm(model: Model, pictures: Tensor, texts: Bags) -> None:
    """Statistics of the finished towers, on whole names; those of training lag behind."""
    for norm in (model.image.layers[-1], model.text.layers[-1]):
        norm.reset_running_stats()
        norm.momentum = None  # an average, of one batch
    model.image(pictures)
    model.text(texts)


def make_optimizer(model: Model, rate: float) -> torch.optim.AdamW:
    """AdamW, without weight decay for scale and bias."""
    towers = [*model.image.parameters(), *model.text.parameters()]
    groups = [
        {"params": towers, "weight_decay": WEIGHT_DECAY},
        {"params": list(model.loss.parameters()), "weight_decay": 0},
    ]
    return torch.optim.AdamW(groups, rate, fused=True)


def draw_batches(names: np.ndarray, plan: Plan, seed: int) -> list[np.ndarray]:
    """Names in random order, all of them before any comes again."""
    random = np.random.default_rng([seed, 0])
    sizes = [size for steps, size in plan for _ in range(steps)]
    epochs = -(-sum(sizes) // len(names))
    order = np.concatenate([random.permutation(names) for _ in range(epochs)])
    return np.split(order[: sum(sizes)], np.cumsum(sizes)[:-1])


def dropped(texts: Bags, share: float, random: np.random.Generator) -> Bags:
    """The bags without a random share of what is in them."""
    kept = random.random(len(texts.ids), dtype=np.float32) >= share
    row = np.arange(len(texts.sizes)).repeat(texts.sizes)
    return Bags(texts.ids[kept], np.bincount(row[kept], minlength=len(texts.sizes)))


@torch.no_grad()
def ranks(model: Model, emoji: Emoji, names: np.ndarray) -> Tensor:  # (names,) int64
    """The rank of each name's own picture among those of all emoji: 1 is first."""
    _, found = retrieval_ranks(
        model.image(torch.from_numpy(emoji.pictures)),
        model.text(bags(names_of(emoji, names), model.buckets)),
        image_ids=torch.arange(len(emoji)),
        text_ids=torch.from_numpy(names // len(emoji.languages)),
    )
    return found
