"""Fewer negatives, on pictures and their names: random, hardest, easiest (section 4.8)."""

from __future__ import annotations

import math
from pathlib import Path

from torch import Tensor

from examples.emoji.ngrams import Bags
from examples.emoji.training import Model, ValueOf, train
from fused_siglip import LearnableSigLipLoss

from ..common.markdown import table
from . import pictures
from .negatives import COLORS, KINDS, MARGIN, chooser
from .plots import mean, percent, plt, save, spread
from .study import Study, above, claim, interval, mean_and_range, minus

BATCH_SIZE = 512
STEPS = 250
RATE = 6e-3  # the best of the sigmoid loss from b = -log B: see picture_losses
SEEDS = (0, 1, 2, 3)
KEEPS = (1 / 4, 1 / 16)
ALL = "all"


def cells(quick: bool) -> list[dict]:
    kinds = [(ALL, 1.0), *((kind, keep) for keep in KEEPS for kind in KINDS)]
    return [
        {
            "negatives": kind,
            "keep": keep,
            "batch_size": BATCH_SIZE,
            "steps": 2 if quick else STEPS,
            "rate": RATE,
            "seed": seed,
        }
        for seed in (SEEDS[:2] if quick else SEEDS)
        for kind, keep in kinds
    ]


def choosing(cell: dict) -> ValueOf:
    """The loss of a batch of different emoji, with the negatives that the cell names."""
    choose, step = chooser(cell), iter(range(cell["steps"]))

    def value(
        model: Model, images: Tensor, image_ids: Tensor, texts: Bags, text_ids: Tensor
    ) -> Tensor:
        found = pictures.beside_texts(model.image(images), image_ids, text_ids)
        return model.loss(found, model.text(texts), negatives=choose(next(step)))

    return value


def run(cell: dict) -> dict:
    emoji, parts = pictures.load()
    size, steps, seed = cell["batch_size"], cell["steps"], cell["seed"]
    model = pictures.new_model(LearnableSigLipLoss(init_logit_bias=-math.log(size)), seed)
    batches = pictures.distinct_batches(emoji, parts.train, size, steps, seed)
    value_of = choosing(cell)
    train(model, emoji, batches, rate=cell["rate"], seed=seed, value_of=value_of, progress=False)
    return {
        **pictures.quality(model, emoji, parts.test),
        "bias": model.loss.logit_bias.item(),
        "pairs": pictures.counts(),
    }


def _of(rows: list[dict], kind: str, keep: float, field: str = "mrr") -> list[float]:
    """One value a seed."""
    found = [row for row in rows if (row["negatives"], row["keep"]) == (kind, keep)]
    return [row[field] for row in sorted(found, key=lambda row: row["seed"])]


def _ratio(keep: float, rows: list[dict]) -> str:
    return f"1 : {keep * (rows[0]['batch_size'] - 1):.0f}"


def _claims(rows: list[dict]) -> list[str]:
    everything, lines = _of(rows, ALL, 1.0), []
    for keep in KEEPS:
        ratio = _ratio(keep, rows)
        values = {kind: _of(rows, kind, keep) for kind in KINDS}
        lost = minus(everything, values["random"])
        kept = minus(values["hardest"], everything)
        ahead = minus(values["hardest"], values["random"])
        poor = [-gap for gap in minus(values["easiest"], everything, 0.5)]
        lines += [
            claim(
                above(lost),
                f"on pictures, fewer negatives, drawn at random, are worse than all, at {ratio}",
                "section 4.8",
                f"All minus random: {interval(lost).points()}; seen above 0.",
            ),
            claim(
                above(kept, -MARGIN),
                f"on pictures, the hardest negatives alone are almost as good as all, at {ratio}",
                "section 4.8",
                f"Hardest minus all: {interval(kept).points()}; seen above "
                f"-{MARGIN * 100:.0f} points.",
            ),
            claim(
                above(ahead),
                f"on pictures, the hardest negatives are better than as many at random, at {ratio}",
                "section 4.8",
                f"Hardest minus random: {interval(ahead).points()}; seen above 0.",
            ),
            claim(
                above(poor),
                f"on pictures, the easiest negatives alone do not work, at {ratio}",
                "section 4.8",
                f"Half of all's quality minus easiest: {interval(poor).points()}; seen above 0.",
            ),
        ]
    return lines


def _plot(rows: list[dict], path: Path) -> None:
    keeps = [1.0, *KEEPS]
    figure, axis = plt.subplots(figsize=(7.5, 4), layout="constrained")
    for kind, color in COLORS.items():
        values = [_of(rows, ALL, 1.0), *(_of(rows, kind, keep) for keep in KEEPS)]
        spread(axis, keeps, values, kind, color)
    axis.set(xscale="log", xlabel="positives to negatives", ylabel="mean reciprocal rank")
    axis.set_xticks(keeps, [_ratio(keep, rows) for keep in keeps])
    axis.minorticks_off()
    axis.invert_xaxis()
    axis.legend(frameon=False)
    percent(axis)
    save(figure, path)


def section(rows: list[dict], folder: Path) -> str:
    _plot(rows, folder / "paper_picture_negatives.png")
    first, pairs = rows[0], rows[0]["pairs"]

    def line(kind: str, keep: float) -> tuple[str, ...]:
        values = _of(rows, kind, keep)
        quality = mean_and_range(values)
        return kind, _ratio(keep, rows), quality, f"{mean(_of(rows, kind, keep, 'bias')):.2f}"

    lines = [line(ALL, 1.0), *(line(kind, keep) for keep in KEEPS for kind in KINDS)]
    return f"""## Pictures: which negatives

**The paper** (section 4.8, figure 6): see [above](#negatives-which-and-how-many).

**Here** pictures, names and towers are those under
[sigmoid against softmax](#pictures-sigmoid-against-softmax), with {first["steps"]} batches of
{first["batch_size"]} different emoji, a rate of {first["rate"]:g} and
{len({row["seed"] for row in rows})} seeds; b starts at -log {first["batch_size"]}. Quality is the
mean reciprocal rank of the right picture among all {pairs["emoji"]}, by {pairs["test"]} held-out
names.

{table(("negatives", "ratio", "mean reciprocal rank", "b at the end"), lines)}

![Mean reciprocal rank by the ratio of positives to negatives](paper_picture_negatives.png)

The table shows means over seeds (and ranges). Differences are paired by seed and have 95% intervals
(Student's t).

{chr(10).join(f"- {line}" for line in _claims(rows))}

The rule of the verdicts: a claim is seen where the whole interval lies above the bound given,
opposite where it lies below, and otherwise not seen.

Limits: both towers start from scratch, where the paper's image tower is trained already and locked;
all choices have the same rate and as many steps."""


STUDY = Study("picture_negatives", cells, run, section)
