"""Batch size, sigmoid against softmax, after as many examples (sections 4.1 and 4.2)."""

from __future__ import annotations

from pathlib import Path

from examples.report import label_ends

from ..common.markdown import table
from . import retrieval
from .functions import NEAR, PACKAGES
from .losses import LOSSES
from .plots import COLORS, percent, plt, save, spread
from .study import NOT_SEEN, SEEN, Study, above, claim, interval, mean_and_range, minus, within

BATCH_SIZES = (64, 256, 1024, 4096, 8192)
EXAMPLES = 48 * 8192  # seen by every run: 39 times all pairs
SEEDS = (0, 1, 2)
# Tried for either loss at three batch sizes, and what was best there on the modules to tune on.
# Larger ones take that of the last, times the root of the ratio of the sizes, as suits Adam.
RATES = (3.75e-4, 7.5e-4, 1.5e-3, 3e-3, 6e-3, 1.2e-2)
RATE = {
    "sigmoid": {64: 7.5e-4, 256: 6e-3, 1024: 3e-3},
    "softmax": {64: 3e-3, 256: 3e-3, 1024: 1.5e-3},
}
SWEEP_SEED = 100  # not among the study's
MARGIN = 0.02  # of the mean reciprocal rank: as good as equal


def rate_of(loss: str, batch_size: int) -> float:
    tried = min(batch_size, max(RATE[loss]))
    return RATE[loss][tried] * (batch_size / tried) ** 0.5


def _cell(role: str, loss: str, batch_size: int, rate: float, seed: int) -> dict:
    return {
        "role": role,
        "loss": loss,
        "batch_size": batch_size,
        "steps": EXAMPLES // batch_size,
        "rate": rate,
        "seed": seed,
        "packages": list(PACKAGES),
    }


def cells(quick: bool) -> list[dict]:
    found = [  # the long ones first: no core is idle while the other ends
        _cell("study", loss, batch, rate_of(loss, batch), seed)
        for batch in sorted(BATCH_SIZES, reverse=True)
        for loss in ("softmax", "sigmoid")
        for seed in SEEDS
    ]
    found += [
        _cell("sweep", loss, batch, rate, SWEEP_SEED)
        for loss, taken in RATE.items()
        for batch in taken
        for rate in RATES
    ]
    if quick:
        small = {"steps": 12, "packages": list(retrieval.QUICK_PACKAGES)}
        found = [{**c, **small} for c in found if c["batch_size"] <= 256 and c["seed"] != 2]
    return found


def run(cell: dict) -> dict:
    parts = retrieval.load(tuple(cell["packages"]))
    loss = LOSSES[cell["loss"]]()
    sizes = {name: cell[name] for name in ("batch_size", "steps", "rate", "seed")}
    trained = retrieval.train(loss, parts["train"], **sizes)
    return {
        **retrieval.evaluate(trained, parts),
        "pairs": {name: len(part) for name, part in parts.items()},
        "factor": loss.factor().item(),
        "last_loss": trained.losses[-1],
    }


def _values(rows: list[dict], loss: str, batch_size: int, metric: str = "mrr") -> list[float]:
    """A metric on the modules of the test, one value a seed."""
    found = [row for row in rows if (row["loss"], row["batch_size"]) == (loss, batch_size)]
    return [row["test"][metric] for row in sorted(found, key=lambda row: row["seed"])]


def _claims(rows: list[dict], sizes: list[int]) -> list[str]:
    gaps = {b: minus(_values(rows, "sigmoid", b), _values(rows, "softmax", b)) for b in sizes}
    small, large, last = sizes[0], sizes[len(sizes) // 2], sizes[-1]
    sigmoid = {b: _values(rows, "sigmoid", b) for b in sizes}
    growth = minus(sigmoid[large], sigmoid[small])
    end = minus(sigmoid[sizes[-2]], sigmoid[last])
    grows = above(growth)
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
            grows,
            "a larger batch is better after as many examples",
            "section 4.1",
            f"Sigmoid, batch {large} minus batch {small}: {interval(growth).points()}; seen "
            "above 0.",
        ),
        claim(
            above(end, -MARGIN) if grows == SEEN else NOT_SEEN,
            "the gain from a larger batch ends: beyond some size the next adds next to nothing "
            "(the paper: beyond 32 k)",
            "sections 4.1 and 4.2",
            f"Sigmoid, batch {sizes[-2]} minus batch {last}: {interval(end).points()}; seen above "
            f"-{MARGIN * 100:.0f} points where there is a gain at all (the claim before).",
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


def _sweep(rows: list[dict]) -> list[tuple[str, ...]]:
    """Lines of the table of rates: quality on the modules to tune on."""
    lines = []
    for loss, taken in RATE.items():
        for batch, rate in taken.items():
            tried = {
                row["rate"]: row["tune"]["mrr"]
                for row in rows
                if (row["role"], row["loss"], row["batch_size"]) == ("sweep", loss, batch)
            }
            if tried:
                found = (f"{tried[tested]:.1%}" for tested in RATES)
                lines.append((loss, str(batch), *found, f"{rate:g}"))
    return lines


def _tables(rows: list[dict], sizes: list[int]) -> tuple[list[tuple], list[tuple]]:
    """Mean reciprocal ranks by batch size, and how often the right one is among the first."""

    def share(loss: str, batch: int, metric: str) -> str:
        values = _values(rows, loss, batch, metric)
        return mean_and_range(values)

    steps = {row["batch_size"]: row["steps"] for row in rows}
    ranks = [
        (
            str(batch),
            str(steps[batch]),
            *(share(loss, batch, "mrr") for loss in LOSSES),
            interval(
                minus(_values(rows, "sigmoid", batch), _values(rows, "softmax", batch))
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
    return ranks, recalls


def section(everything: list[dict], folder: Path) -> str:
    rows = [row for row in everything if row["role"] == "study"]
    sizes = sorted({row["batch_size"] for row in rows})
    _plot(rows, sizes, folder / "paper_batch_size.png")
    ranks, recalls = _tables(rows, sizes)
    first, steps = rows[0], {row["batch_size"]: row["steps"] for row in rows}
    pairs = first["pairs"]
    level = retrieval.chance(pairs["test"])
    return f"""## Batch size: sigmoid against softmax

**The paper** (sections 4.1 and 4.2, figure 2) trains at batch sizes from 512 to one million for as
many examples each. Below 16 k (SigLiT) or 32 k (SigLIP) the sigmoid loss is better than softmax;
the gap closes as the batch grows; SigLIP is best at 32 k (softmax at 98 k), and a far larger batch
hurts both.

**Here** the data are functions and the first paragraphs of their docstrings, from the sources of
the standard library, numpy and torch: {pairs["train"]} pairs to train with, and {pairs["test"]} of
other modules to test on. There are no near copies in both: no text or body of one has words with a
Jaccard index of {NEAR:g} or more with one of the other (similar modules, such as optimizers, do
share many words). Each of the two towers is a bag of hashed tokens and a small MLP, with
D = {retrieval.DIM}. Every run sees {first["steps"] * first["batch_size"]} examples, and there are
{len({row["seed"] for row in rows})} seeds. Softmax is CLIP's loss with its own temperature. Quality
is the mean reciprocal rank of the right docstring among all {pairs["test"]} for each function, and
of the right function for each docstring, averaged. Chance is {level["mrr"]:.1%}; that the right one
is first has a chance of {level["recall_at_1"]:.2%}, and that it is among the first ten
{level["recall_at_10"]:.2%}.

{table(("batch", "steps", "sigmoid", "softmax", "sigmoid minus softmax"), ranks)}

![Mean reciprocal rank by batch size, sigmoid and softmax](paper_batch_size.png)

The table shows means over seeds (and ranges). Differences are paired by seed and have 95% intervals
(Student's t). The next table shows, for the same runs, how often the right one is first, and how
often it is among the first ten:

{table(("batch", "first: sigmoid", "softmax", "in ten: sigmoid", "softmax"), recalls)}

{chr(10).join(f"- {line}" for line in _claims(rows, sizes))}

The rule of the verdicts: a claim is seen where the whole interval lies where the claim says,
opposite where it lies outside altogether, and otherwise not seen.

For either loss {len(RATES)} rates were tried at three batch sizes, on a seed of their own. The best
one, by the mean reciprocal rank on the {pairs["tune"]} pairs of modules that are neither trained
nor tested with, is taken for that batch size. Larger batches take it times the root of the ratio of
the sizes:

{table(("loss", "batch", *(f"{rate:g}" for rate in RATES), "taken"), _sweep(everything), left=2)}

Limits: no rate was tried beyond batch {max(RATE["sigmoid"])}. All runs of the sigmoid loss start
from the paper's b = -10, which costs where updates are many and small: from b = 0 the same loss,
data and examples end higher at batch 256 than here ([starts](#starts-of-bias-and-temperature)).
{pairs["train"]} pairs are few: the largest batch holds most of them and is one of only
{steps[sizes[-1]]} steps, so what a larger batch may gain by more negatives it may lose by fewer
steps (the paper's figure 3 shows that for short schedules); and every pair is seen
{first["steps"] * first["batch_size"] / pairs["train"]:.0f} times over, where the paper's are seen
once or a few times."""


STUDY = Study("batch_size", cells, run, section)
