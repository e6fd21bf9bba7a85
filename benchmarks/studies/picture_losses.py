"""Sigmoid and softmax at a small and a larger batch, on pictures and their names (4.1, 4.2)."""

from __future__ import annotations

import math
from pathlib import Path

from examples.emoji.training import train
from fused_siglip import LearnableSigLipLoss

from ..common.markdown import table
from . import pictures
from .losses import SoftmaxLoss
from .plots import BLUE, GREEN, ORANGE, percent, plt, save, seeds
from .study import Study, above, claim, interval, mean_and_range, minus

BATCH_SIZES = (128, 1024)
EXAMPLES = 144 * 1024  # seen by every run
SEEDS = (0, 1, 2, 3, 4, 5)
RATES = (3e-3, 6e-3, 1.2e-2, 2.4e-2)
SWEEP_SEED = 100  # not among the study's
PAPER, PRIOR, SOFTMAX = "sigmoid", "sigmoid, b = -log B", "softmax"
COLORS = {PAPER: BLUE, PRIOR: GREEN, SOFTMAX: ORANGE}
RATE = {  # the best of RATES: the section shows it
    PAPER: {128: 6e-3, 1024: 1.2e-2},
    PRIOR: {128: 6e-3, 1024: 1.2e-2},
    SOFTMAX: {128: 6e-3, 1024: 1.2e-2},
}


def _cell(role: str, loss: str, batch_size: int, rate: float, seed: int) -> dict:
    return {
        "role": role,
        "loss": loss,
        "batch_size": batch_size,
        "steps": EXAMPLES // batch_size,
        "rate": rate,
        "seed": seed,
    }


def cells(quick: bool) -> list[dict]:
    found = [
        _cell("study", loss, batch, RATE[loss][batch], seed)
        for seed in SEEDS
        for loss in RATE
        for batch in BATCH_SIZES
    ]
    found += [
        _cell("sweep", loss, batch, rate, SWEEP_SEED)
        for loss in RATE
        for batch in BATCH_SIZES
        for rate in RATES
    ]
    if quick:
        few = [cell for cell in found if cell["seed"] in SEEDS[:2]]
        found = [{**cell, "steps": 2} for cell in few if cell["batch_size"] == BATCH_SIZES[0]]
    return found


def run(cell: dict) -> dict:
    emoji, parts = pictures.load()
    size, steps, seed = cell["batch_size"], cell["steps"], cell["seed"]
    losses = {
        PAPER: LearnableSigLipLoss,
        PRIOR: lambda: LearnableSigLipLoss(init_logit_bias=-math.log(size)),
        SOFTMAX: SoftmaxLoss,
    }
    model = pictures.new_model(losses[cell["loss"]](), seed)
    batches = pictures.distinct_batches(emoji, parts.train, size, steps, seed)
    by_row = pictures.value_by_row
    train(model, emoji, batches, rate=cell["rate"], seed=seed, value_of=by_row, progress=False)
    held_out = parts.tune if cell["role"] == "sweep" else parts.test
    return {**pictures.quality(model, emoji, held_out), "pairs": pictures.counts()}


def _values(rows: list[dict], loss: str, batch_size: int) -> list[float]:
    """Mean reciprocal rank, one value a seed."""
    found = [row for row in rows if (row["loss"], row["batch_size"]) == (loss, batch_size)]
    return [row["mrr"] for row in sorted(found, key=lambda row: row["seed"])]


def _lead(rows: list[dict], loss: str, other: str, batch_size: int) -> list[float]:
    return minus(*(_values(rows, name, batch_size) for name in (loss, other)))


def _claims(rows: list[dict]) -> list[str]:
    source = "sections 4.1 and 4.2"
    lines = []
    for size in sorted({row["batch_size"] for row in rows}):
        for loss, start in ((PAPER, "the paper's start, b = -10"), (PRIOR, "b = -log B")):
            lead = _lead(rows, loss, SOFTMAX, size)
            lines.append(
                claim(
                    above(lead),
                    f"on pictures, the sigmoid loss from {start} is better than softmax at batch "
                    f"{size}",
                    source,
                    f"Sigmoid minus softmax: {interval(lead).points()}; seen above 0.",
                )
            )
        gain = _lead(rows, PRIOR, PAPER, size)
        lines.append(
            claim(
                above(gain),
                f"at batch {size} a short run is better from b = -log B than from b = -10",
                "this page's own, after section 4.2",
                f"Difference: {interval(gain).points()}; seen above 0.",
            )
        )
    return lines


def _plot(rows: list[dict], path: Path) -> None:
    sizes = sorted({row["batch_size"] for row in rows})
    figure, axis = plt.subplots(figsize=(7.5, 4), layout="constrained")
    for x, size in enumerate(sizes):
        for (loss, color), shift in zip(COLORS.items(), (-0.27, 0, 0.27), strict=True):
            seeds(axis, x + shift, _values(rows, loss, size), color, half=0.12)
    axis.set_xticks(range(len(sizes)), [f"batch {size}" for size in sizes])
    axis.set_ylabel("mean reciprocal rank")
    axis.set_title("Dots: seeds; bars: means")
    for height, (loss, color) in zip((0.2, 0.13, 0.06), COLORS.items(), strict=True):
        axis.text(0.55, height, loss, color=color, transform=axis.transAxes)
    percent(axis)
    save(figure, path)


def _tables(everything: list[dict], rows: list[dict]) -> tuple[list[tuple], list[tuple]]:
    sizes = sorted({row["batch_size"] for row in rows})
    lines = [(str(s), *(mean_and_range(_values(rows, loss, s)) for loss in COLORS)) for s in sizes]
    tried = [
        (
            loss,
            str(size),
            *(
                f"{row['mrr']:.1%}"
                for row in sorted(everything, key=lambda row: row["rate"])
                if (row["role"], row["loss"], row["batch_size"]) == ("sweep", loss, size)
            ),
            f"{RATE[loss][size]:g}",
        )
        for loss in COLORS
        for size in sizes
    ]
    return lines, tried


def section(everything: list[dict], folder: Path) -> str:
    rows = [row for row in everything if row["role"] == "study"]
    _plot(rows, folder / "paper_picture_losses.png")
    lines, tried = _tables(everything, rows)
    first, pairs = rows[0], rows[0]["pairs"]
    names = first["batch_size"] * first["steps"]
    return f"""## Pictures: sigmoid against softmax

**The paper** (sections 4.1 and 4.2) finds the sigmoid loss better than softmax below a batch of
16 k, and as good from there on; it starts from t = 10 and b = -10.

**Here** the pairs are pictures of {pairs["emoji"]} emoji (OpenMoji 17, without variants by tone of
skin) with their names in fourteen languages; {pairs["train"]} names are to train with. A batch
of B has names of B different emoji, so every picture has one positive, as in
the paper. Every run sees {names} pairs, on {len(SEEDS)} seeds; there are far more pairs to test
with than functions and docstrings ([above](#batch-size-sigmoid-against-softmax)), which do not tell
the losses apart at a small batch. The
towers are the demo's, half as wide (D = {pictures.DIM}); both end in a batch norm. Softmax is
CLIP's loss with its own temperature. The sigmoid loss starts from b = -10, or from b = -log B,
where a pair is thought as likely to be positive as it is in the batch. Quality is the mean
reciprocal rank of the right picture among all {pairs["emoji"]}, by {pairs["test"]} held-out names
whose emoji have names in other languages to train with.

{table(("batch", *COLORS), lines)}

![Mean reciprocal rank by loss and batch size](paper_picture_losses.png)

The table shows means over seeds (and ranges). Differences are paired by seed and have 95% intervals
(Student's t).

{chr(10).join(f"- {line}" for line in _claims(rows))}

The rule of the verdicts: a claim is seen where the whole interval lies above 0, opposite where it
lies below, and otherwise not seen.

These rates were tried on a seed and {pairs["tune"]} held-out names of their own:

{table(("loss", "batch", *(f"{rate:g}" for rate in RATES), "taken"), tried, left=1)}

Limits: {names} pairs are {names / pairs["train"]:.0f} times all names, a short training, which
favours what gets going fast."""


STUDY = Study("picture_losses", cells, run, section)
