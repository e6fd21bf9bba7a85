"""Batch size, sigmoid against softmax, after as many examples (sections 4.1 and 4.2)."""

from __future__ import annotations

from pathlib import Path

from benchmarks.markdown import table
from examples.report import _label_ends as label_ends

from . import retrieval
from .functions import PACKAGES
from .losses import LOSSES
from .plots import COLORS, mean, percent, plt, save, spread
from .study import Study, above, claim, interval, within

BATCH_SIZES = (64, 256, 1024, 4096, 8192)
EXAMPLES = 32 * 8192  # seen by every run: 26 times all pairs
SEEDS = (0, 1, 2)
SWEEP_SEED = 100  # not among the study's
RATES = (1.5e-3, 3e-3, 6e-3)  # tried at a batch of 1024; elsewhere times sqrt(batch / 1024)
MARGIN = 0.02  # of the mean reciprocal rank: as good as equal


def cells(quick: bool) -> list[dict]:
    """The long ones first: no core is idle while the other ends."""
    sizes = (256, 64) if quick else sorted(BATCH_SIZES, reverse=True)
    return [
        {
            "loss": loss,
            "batch_size": batch,
            "steps": 12 if quick else EXAMPLES // batch,
            "rates": [rate * (batch / 1024) ** 0.5 for rate in RATES],
            "seeds": list(SEEDS[: 2 if quick else None]),
            "packages": list(retrieval.QUICK_PACKAGES if quick else PACKAGES),
        }
        for batch in sizes
        for loss in ("softmax", "sigmoid")
    ]


def run(cell: dict) -> dict:
    """Every rate with a seed apart; then the best of them, on the modules to tune on, with each."""
    parts = retrieval.load(tuple(cell["packages"]))
    tried = [_train(cell, parts, rate, SWEEP_SEED) for rate in cell["rates"]]
    best = max(tried, key=lambda result: result["tune"]["mrr"])
    return {
        "pairs": {name: len(part) for name, part in parts.items()},
        "tried": tried,
        "rate": best["rate"],
        "runs": [_train(cell, parts, best["rate"], seed) for seed in cell["seeds"]],
    }


def _train(cell: dict, parts: dict[str, retrieval.Part], rate: float, seed: int) -> dict:
    loss = LOSSES[cell["loss"]]()
    sizes = {"batch_size": cell["batch_size"], "steps": cell["steps"]}
    trained = retrieval.train(loss, parts["train"], **sizes, rate=rate, seed=seed)
    return {
        "rate": rate,
        "seed": seed,
        **retrieval.evaluate(trained, parts),
        "factor": loss.factor().item(),
        "last_loss": trained.losses[-1],
    }


def _values(rows: list[dict], loss: str, batch_size: int, metric: str = "mrr") -> list[float]:
    """On the test's modules, one value a seed."""
    (row,) = (row for row in rows if (row["loss"], row["batch_size"]) == (loss, batch_size))
    return [one["test"][metric] for one in row["runs"]]


def _minus(a: list[float], b: list[float]) -> list[float]:
    return [x - y for x, y in zip(a, b, strict=True)]


def _claims(rows: list[dict], sizes: list[int]) -> list[str]:
    gaps = {b: _minus(_values(rows, "sigmoid", b), _values(rows, "softmax", b)) for b in sizes}
    small, large, last = sizes[0], sizes[len(sizes) // 2], sizes[-1]
    sigmoid = {b: _values(rows, "sigmoid", b) for b in sizes}
    growth = _minus(sigmoid[large], sigmoid[small])
    end = _minus(sigmoid[sizes[-2]], sigmoid[last])
    return [
        claim(
            above(gaps[small]),
            "the sigmoid loss is better than softmax at a small batch",
            "sections 4.1 and 4.2",
            f"Sigmoid minus softmax at batch {small}: {interval(gaps[small]).points()}; seen "
            "above 0.",
        ),
        claim(
            within(gaps[last], MARGIN),
            "at a large batch the two losses meet",
            "sections 4.1 and 4.2",
            f"Sigmoid minus softmax at batch {last}: {interval(gaps[last]).points()}; seen within "
            f"{MARGIN * 100:.0f} points of 0.",
        ),
        claim(
            above(growth),
            "a larger batch is better after as many examples",
            "section 4.1",
            f"Sigmoid, batch {large} minus batch {small}: {interval(growth).points()}; seen "
            "above 0.",
        ),
        claim(
            above(end, -MARGIN),
            "the gain from a larger batch ends: beyond some size the next adds next to nothing "
            "(the paper: beyond 32 k)",
            "sections 4.1 and 4.2",
            f"Sigmoid, batch {sizes[-2]} minus batch {last}: {interval(end).points()}; seen above "
            f"-{MARGIN * 100:.0f} points.",
        ),
    ]


def _plot(rows: list[dict], sizes: list[int], path: Path) -> None:
    figure, axis = plt.subplots(figsize=(7.5, 4.2), layout="constrained")
    for loss, color in COLORS.items():
        values = [_values(rows, loss, batch) for batch in sizes]
        spread(axis, sizes, values, loss, color)
    axis.set(xscale="log", xlabel="batch size", ylabel="mean reciprocal rank")
    axis.set_xticks(sizes, [str(size) for size in sizes])
    axis.minorticks_off()
    axis.set_title("Lines: means; bands: all seeds")
    percent(axis)
    label_ends(axis)
    save(figure, path)


def section(rows: list[dict], folder: Path) -> str:
    sizes = sorted({row["batch_size"] for row in rows})
    _plot(rows, sizes, folder / "paper_batch_size.png")

    def share(loss: str, batch: int, metric: str) -> str:
        values = _values(rows, loss, batch, metric)
        return f"{mean(values):.1%} ({min(values):.1%} to {max(values):.1%})"

    steps = {row["batch_size"]: row["steps"] for row in rows}
    ranks = [
        (
            str(batch),
            str(steps[batch]),
            *(share(loss, batch, "mrr") for loss in LOSSES),
            interval(
                _minus(_values(rows, "sigmoid", batch), _values(rows, "softmax", batch))
            ).points(),
        )
        for batch in sizes
    ]
    recalls = [
        (
            str(batch),
            *(share(loss, batch, m) for m in ("recall_at_1", "recall_at_10") for loss in LOSSES),
        )
        for batch in sizes
    ]
    tried = [
        (
            str(row["batch_size"]),
            row["loss"],
            *(f"{one['rate']:.2g}: {one['tune']['mrr']:.1%}" for one in row["tried"]),
            f"{row['rate']:.2g}",
        )
        for row in sorted(rows, key=lambda row: (row["batch_size"], row["loss"]))
    ]
    first = rows[0]
    pairs = first["pairs"]
    level = retrieval.chance(pairs["test"])
    return f"""## Batch size: sigmoid against softmax

**The paper** (sections 4.1 and 4.2, figure 2) trains at batch sizes from 512 to one million for as
many examples each. Below 16 k (SigLiT) or 32 k (SigLIP) the sigmoid loss is better than softmax;
the gap closes as the batch grows; SigLIP is best at 32 k (softmax at 98 k), and a far larger batch
hurts both.

**Here.** Functions and the first paragraphs of their docstrings, from the sources of the standard
library, numpy and torch: {pairs["train"]} pairs to train with, {pairs["test"]} of other modules to
test on, no near copies in both. Two towers, each a bag of hashed tokens and a small MLP, D =
{retrieval.DIM}; {first["steps"] * first["batch_size"]} examples seen by every run,
{len(first["runs"])} seeds; softmax is CLIP's loss with its own temperature.
Quality: the mean reciprocal rank of the right docstring among all {pairs["test"]} for each
function, and of the right function for each docstring, averaged. Chance: {level["mrr"]:.1%};
of the right one being first {level["recall_at_1"]:.2%}, among ten {level["recall_at_10"]:.2%}.

{table(("batch", "steps", "sigmoid", "softmax", "sigmoid minus softmax"), ranks)}

![Mean reciprocal rank by batch size, sigmoid and softmax](paper_batch_size.png)

Means over seeds (and range); differences paired by seed, with 95% intervals (Student's t). The same
runs, how often the right one is first, and among the first ten:

{table(("batch", "first: sigmoid", "softmax", "in ten: sigmoid", "softmax"), recalls)}

{chr(10).join(f"- {line}" for line in _claims(rows, sizes))}

Rule: seen where the whole interval lies where the claim says, opposite where it lies outside
altogether, otherwise not seen.

The rate: three were tried for either loss at each batch size, on a seed of their own (they grow
with the root of the batch); the study takes the one with the best mean reciprocal rank on the
{pairs["tune"]} pairs of modules that are neither trained nor tested with:

{table(("batch", "loss", "lowest", "middle", "highest", "taken"), tried, left=2)}

Limits: {pairs["train"]} pairs are few: the largest batch holds most of them, and is one of only
{steps[sizes[-1]]} steps: what a larger batch gains by more negatives it loses here by
fewer steps, and the sigmoid loss, whose bias and temperature start far from where they end, loses
more. The paper sees the same at short schedules (figure 3)."""


STUDY = Study("batch_size", cells, run, section)
