"""Corrupted pairs: how well the sigmoid and the softmax loss stand them (section 4.10)."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from examples.emoji.ngrams import Bags
from examples.emoji.training import Model, ValueOf, train
from fused_siglip import LearnableSigLipLoss

from ..common.markdown import table
from . import pictures
from .losses import SoftmaxLoss
from .plots import COLORS, percent, plt, save, seeds
from .study import Study, above, claim, interval


def noisy_images(images: Tensor, p: float, random: np.random.Generator) -> Tensor:
    """With probability p an image is uniform noise."""
    hit = torch.from_numpy(random.random(len(images)) < p)
    noise = torch.from_numpy(random.integers(0, 256, images.shape, dtype=np.uint8))
    return torch.where(hit[:, None, None, None], noise, images)


def noisy_texts(texts: Bags, p: float, buckets: int, random: np.random.Generator) -> Bags:
    """With probability p a text is random runs, of a random number up to the largest here."""
    hit = random.random(len(texts.sizes)) < p
    drawn = random.integers(1, texts.sizes.max() + 1, len(texts.sizes))
    sizes = np.where(hit, drawn, texts.sizes)
    ids = random.integers(0, buckets, sizes.sum())
    ids[~hit.repeat(sizes)] = texts.ids[~hit.repeat(texts.sizes)]
    return Bags(ids, sizes)


def shuffled(texts: Bags, p: float, random: np.random.Generator) -> Bags:
    """A share p of the batch, chosen at random, has its texts in a random order."""
    order = np.arange(len(texts.sizes))
    hit = random.permutation(order)[: round(p * len(order))]
    order[hit] = random.permutation(hit)
    return texts.take(order)


# the paper's five: which of image, text and alignment are corrupted, each with probability p
KINDS = {
    "image": (True, False, False),
    "text": (False, True, False),
    "batch alignment": (False, False, True),
    "image & text": (True, True, False),
    "image, text & batch": (True, True, True),
}


def corrupting(kind: str, p: float, seed: int) -> ValueOf:
    """The loss of a batch of different emoji, corrupted."""
    image, text, batch = KINDS[kind]
    random = np.random.default_rng(seed)

    def value(model: Model, images: Tensor, shown: Tensor, texts: Bags, meant: Tensor) -> Tensor:
        images = images[torch.searchsorted(shown, meant)]
        if image:
            images = noisy_images(images, p, random)
        if text:
            texts = noisy_texts(texts, p, model.buckets, random)
        if batch:
            texts = shuffled(texts, p, random)
        return model.loss(model.image(images), model.text(texts))

    return value


BATCH_SIZE = 256
STEPS = 300
SEEDS = (0, 1, 2, 3)
RATE = 6e-3  # good for either loss on clean pairs: see picture_losses
CHANCES = (0.5,)
CLEAN = "none"


def cells(quick: bool) -> list[dict]:
    noise = [(CLEAN, 0.0), *((kind, p) for kind in KINDS for p in CHANCES)]
    return [
        {
            "loss": loss,
            "kind": kind,
            "p": p,
            "batch_size": BATCH_SIZE,
            "steps": 2 if quick else STEPS,
            "rate": RATE,
            "seed": seed,
        }
        for seed in (SEEDS[:2] if quick else SEEDS)
        for kind, p in noise
        for loss in COLORS
    ]


def run(cell: dict) -> dict:
    emoji, parts = pictures.load()
    size, steps, seed = cell["batch_size"], cell["steps"], cell["seed"]
    loss = SoftmaxLoss()
    if cell["loss"] == "sigmoid":
        loss = LearnableSigLipLoss(init_logit_bias=-math.log(size))
    model = pictures.new_model(loss, seed)
    batches = pictures.distinct_batches(emoji, parts.train, size, steps, seed)
    value_of = corrupting(cell["kind"], cell["p"], seed) if cell["p"] else pictures.value_by_row
    train(model, emoji, batches, rate=cell["rate"], seed=seed, value_of=value_of, progress=False)
    return {**pictures.quality(model, emoji, parts.test), "pairs": pictures.counts()}


def _lead(rows: list[dict], kind: str, p: float) -> dict[int, float]:
    """Mean reciprocal rank with the sigmoid loss minus that with the softmax loss, by seed."""
    of = {(r["loss"], r["seed"]): r["mrr"] for r in rows if (r["kind"], r["p"]) == (kind, p)}
    seeds = sorted({seed for _, seed in of})
    return {seed: of["sigmoid", seed] - of["softmax", seed] for seed in seeds}


def _mean_lead(rows: list[dict], kinds: list[str], chances: list[float]) -> list[float]:
    """The same, averaged over kinds and chances; one value a seed."""
    leads = [_lead(rows, kind, p) for kind in kinds for p in chances]
    return [sum(lead[seed] for lead in leads) / len(leads) for seed in leads[0]]


def _claims(rows: list[dict]) -> list[str]:
    chances = sorted({row["p"] for row in rows} - {0.0})
    lines = []
    for kind in KINDS:
        lead = _mean_lead(rows, [kind], chances)
        lines.append(
            claim(
                above(lead),
                f"with corrupted {kind}, the sigmoid loss stays ahead of the softmax loss",
                "section 4.10",
                f"Lead: {interval(lead).points()}.",
            )
        )
    clean = _mean_lead(rows, [CLEAN], [0.0])
    noisy = _mean_lead(rows, list(KINDS), chances[-1:])
    growth = [b - a for a, b in zip(clean, noisy, strict=True)]
    return [
        *lines,
        claim(
            above(growth),
            "the lead of the sigmoid loss grows with the corruption",
            "section 4.10",
            f"Lead at p = {chances[-1]}, mean of the five kinds, minus lead on clean pairs: "
            f"{interval(growth).points()}.",
        ),
    ]


def _plot(rows: list[dict], path: Path) -> None:
    figure, axis = plt.subplots(figsize=(9, 4), layout="constrained")
    for x, kind in enumerate((CLEAN, *KINDS)):
        for (loss, color), shift in zip(COLORS.items(), (-0.12, 0.12), strict=True):
            values = [r["mrr"] for r in rows if (r["kind"], r["loss"]) == (kind, loss)]
            seeds(axis, x + shift, values, color)
    axis.set_xticks(range(len(KINDS) + 1), [CLEAN, *KINDS])
    axis.set_ylabel("mean reciprocal rank")
    for x, (loss, color) in zip((0.7, 0.85), COLORS.items(), strict=True):
        axis.text(x, 0.92, loss, color=color, transform=axis.transAxes)
    percent(axis)
    save(figure, path)


def _lines(rows: list[dict]) -> list[tuple[str, ...]]:
    """The table: a line for each kind and probability of corruption."""

    def cell(kind: str, p: float, loss: str) -> str:
        found = [r["mrr"] for r in rows if (r["kind"], r["p"], r["loss"]) == (kind, p, loss)]
        return f"{sum(found) / len(found):.1%} ({min(found):.1%} to {max(found):.1%})"

    order = [CLEAN, *KINDS]
    return [
        (
            kind,
            f"{p:g}",
            cell(kind, p, "sigmoid"),
            cell(kind, p, "softmax"),
            interval(_lead(rows, kind, p).values()).points(),
        )
        for kind, p in sorted({(r["kind"], r["p"]) for r in rows}, key=lambda k: order.index(k[0]))
    ]


def section(rows: list[dict], folder: Path) -> str:
    _plot(rows, folder / "paper_noise.png")
    first = rows[0]
    return f"""## Noise: corrupted pairs

**The paper** (section 4.10) corrupts images, texts or their alignment with growing probability and
finds that models trained with the sigmoid loss keep their lead over the softmax loss, the more so
the stronger the corruption (figure 7: M/16 towers, batch 16384, 3.6 billion examples).

**Here** pictures, names and towers are those under
[sigmoid against softmax](#pictures-sigmoid-against-softmax). Every run takes {first["steps"]}
batches of {first["batch_size"]} different emoji, on {len({row["seed"] for row in rows})} seeds. The
sigmoid loss starts from b = -log {first["batch_size"]}, which that section finds best at a small
batch, and both losses take a rate of {first["rate"]:g}. There are the paper's five kinds of
corruption: an image becomes uniform noise; a text becomes random runs of letters, of a random
number; a share of the batch has its texts shuffled; image and text are each corrupted with
probability p; all three happen. Quality is the mean reciprocal rank of the right picture among all
{first["pairs"]["emoji"]}, by {first["pairs"]["test"]} held-out names.

{table(("corrupted", "p", "sigmoid", "softmax", "lead of sigmoid"), _lines(rows), left=1)}

![Mean reciprocal rank by kind of corruption, both losses](paper_noise.png)

The table shows means over seeds (and ranges), and the lead with its 95% interval. Every dot in the
plot is a seed.

{chr(10).join(f"- {line}" for line in _claims(rows))}

The rule of the verdicts: differences are paired by seed. A claim is seen where the 95% interval
(Student's t) lies above 0, opposite where it lies below, and otherwise not seen.

Limits: there are hundreds of steps where the paper takes hundreds of thousands, and the rate was
tuned on clean pairs only."""


STUDY = Study("noise", cells, run, section)
