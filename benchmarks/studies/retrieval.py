"""Which function is described here? Two small towers for code and its docstring, and their test."""

from __future__ import annotations

import functools
import zlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from fused_siglip import Easiest, Hardest, Random

from .functions import PACKAGES, harvest, split, words

VOCABULARY = 8192  # of hashed tokens, padding among them
WIDTH = 64  # of a token's embedding
HIDDEN = 256
DIM = 64  # D, shared by both towers
CODE_TOKENS, TEXT_TOKENS = 96, 40  # the first different ones of each
STOP = 0.1  # share of the pairs to train with; what is in more of them tells none apart
DROPOUT = 0.3  # share of the tokens that a batch does without: too few pairs to learn by heart
QUICK_PACKAGES = ("numpy",)


@dataclass(frozen=True)
class Part:
    code: Tensor  # (N, CODE_TOKENS) int64
    text: Tensor  # (N, TEXT_TOKENS) int64

    def __len__(self) -> int:
        return len(self.code)


def tokens(text: str, length: int) -> list[int]:
    """Hashed words, and of long ones also the beginning; each once, 0 where there are no more."""
    pieces = []
    for word in words(text):
        pieces += [word] if len(word) <= 4 else [word, f"{word[:4]}-"]
    hashed = [1 + zlib.crc32(p.encode()) % (VOCABULARY - 1) for p in dict.fromkeys(pieces)]
    return (hashed + [0] * length)[:length]


@functools.cache  # once a process: half a minute for all packages
def load(packages: tuple[str, ...] = PACKAGES) -> dict[str, Part]:
    """Tokens of the pairs to train, to tune and to test with."""
    parts = {
        name: Part(
            torch.tensor([tokens(pair.code, CODE_TOKENS) for pair in pairs]),
            torch.tensor([tokens(pair.text, TEXT_TOKENS) for pair in pairs]),
        )
        for name, pairs in split(harvest(packages)).items()
    }
    stop_code, stop_text = (_frequent(t) for t in (parts["train"].code, parts["train"].text))
    return {
        name: Part(
            part.code.masked_fill(stop_code[part.code], 0),
            part.text.masked_fill(stop_text[part.text], 0),
        )
        for name, part in parts.items()
    }


def _frequent(tokens: Tensor) -> Tensor:  # (N, tokens) -> (VOCABULARY,) bool
    """Stop words. With them all codes are alike at first, and so are all texts: hundreds of steps
    would go by until a large batch of the sigmoid loss has told them apart."""
    return tokens.flatten().bincount(minlength=VOCABULARY) > STOP * len(tokens)


class Tower(nn.Module):
    """(B, tokens) -> (B, D) of length 1: the mean of the tokens' embeddings, and a small MLP."""

    def __init__(self):
        super().__init__()
        self.tokens = nn.EmbeddingBag(VOCABULARY, WIDTH, mode="mean", padding_idx=0)
        nn.init.normal_(self.tokens.weight, std=0.02)  # small, so that few steps move them far
        self.norm = nn.LayerNorm(WIDTH, eps=1e-8, elementwise_affine=False)
        self.straight = nn.Linear(WIDTH, DIM, bias=False)
        self.bent = nn.Sequential(
            nn.Linear(WIDTH, HIDDEN), nn.GELU(), nn.Linear(HIDDEN, DIM, bias=False)
        )

    def forward(self, tokens: Tensor) -> Tensor:
        mean = self.norm(self.tokens(tokens))
        return normalize(self.straight(mean) + self.bent(mean), dim=-1)


@dataclass(frozen=True)
class Trained:
    code: Tower
    text: Tower
    losses: list[float]  # one a step


def train(
    loss: nn.Module,
    part: Part,
    *,
    batch_size: int,
    steps: int,
    rate: float,
    seed: int,
    negatives: Callable[[int], Random | Hardest | Easiest | None] | None = None,  # by step
) -> Trained:
    """Both towers and the scalars of ``loss`` from scratch; no pair is in a batch twice."""
    torch.manual_seed(seed)  # first weights, batches, dropped tokens
    code, text = Tower(), Tower()
    parameters = [p for module in (code, text, loss) for p in module.parameters()]
    # the paper's beta2; a rate that rises for a tenth of the steps, then falls; all rows of the
    # tables move at every step, which fused does in one pass
    adam = torch.optim.Adam(parameters, rate, betas=(0.9, 0.95), fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        adam, rate, steps, pct_start=0.1, cycle_momentum=False
    )
    losses = []
    for step in range(steps):
        batch = torch.randperm(len(part))[:batch_size]
        features = code(_drop(part.code[batch])), text(_drop(part.text[batch]))
        value = loss(*features) if negatives is None else loss(*features, negatives=negatives(step))
        adam.zero_grad()
        value.backward()
        adam.step()
        schedule.step()
        losses.append(value.item())
    return Trained(code, text, losses)


def _drop(tokens: Tensor) -> Tensor:
    return tokens * (torch.rand(tokens.shape) >= DROPOUT)


@torch.no_grad()
def similarities(code: Tower, text: Tower, part: Part) -> Tensor:  # (N, N)
    return code(part.code) @ text(part.text).T


def retrieval(similarity: Tensor) -> dict[str, float]:
    """Reciprocal rank of the right one of N, and how often it is among the first; of both ways.

    A tie counts as a miss: features that are all the same find nothing.
    """
    right = similarity.diagonal()[:, None]
    ranks = torch.cat([(s >= right).sum(dim=1) for s in (similarity, similarity.T)]).double()
    return {
        "mrr": (1 / ranks).mean().item(),
        "recall_at_1": (ranks <= 1).double().mean().item(),
        "recall_at_10": (ranks <= 10).double().mean().item(),
    }


def evaluate(trained: Trained, parts: dict[str, Part]) -> dict[str, dict[str, float]]:
    return {
        name: retrieval(similarities(trained.code, trained.text, parts[name]))
        for name in ("tune", "test")
    }


def nothing_learned(ranks: list[float], candidates: int) -> bool:
    """Whether mean reciprocal ranks lie within three times chance, on average."""
    return sum(ranks) / len(ranks) < 3 * chance(candidates)["mrr"]


def chance(candidates: int) -> dict[str, float]:
    """What :func:`retrieval` gives on average when the order is random."""
    return {
        "mrr": sum(1 / rank for rank in range(1, candidates + 1)) / candidates,
        "recall_at_1": 1 / candidates,
        "recall_at_10": min(10 / candidates, 1.0),
    }
