"""Fewer negatives: drawn at random, the hardest, the easiest (section 4.8)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from examples.report import label_ends
from fused_siglip import Easiest, Hardest, LearnableSigLipLoss, Random

from ..common.markdown import table
from . import retrieval
from .functions import PACKAGES
from .plots import BLUE, GREEN, GREY, ORANGE, mean, percent, plt, save, spread
from .study import Study, above, above_unless, claim, interval, mean_and_range, minus

BATCH_SIZE = 512
STEPS = 128
RATE = 4e-3
SEEDS = (0, 1, 2)
KINDS = {"random": Random, "hardest": Hardest, "easiest": Easiest}
COLORS = {"random": GREEN, "hardest": BLUE, "easiest": ORANGE}
KEEPS = (1 / 4, 1 / 16, 1 / 64, 1 / 256)  # the last leaves 2 negatives a positive
MATCHED = (1 / 4, 1 / 16)  # also with so many steps that as many pairs are seen
MARGIN = 0.02  # of the mean reciprocal rank: almost as good


def _cell(kind: str, keep: float, steps: int, seed: int, matched: bool) -> dict:
    return {
        "negatives": kind,
        "keep": keep,
        "matched": matched,  # sees as many pairs as all negatives do in STEPS
        "batch_size": BATCH_SIZE,
        "steps": steps,
        "rate": RATE,
        "seed": seed,
        "packages": list(PACKAGES),
    }


def cells(quick: bool) -> list[dict]:
    found = []
    for seed in SEEDS:
        for keep in sorted(MATCHED):  # the long ones first
            steps = round(STEPS / keep)
            found += [_cell(kind, keep, steps, seed, True) for kind in KINDS]
            found.append(_cell("all", 1.0, steps, seed, False))
        found.append(_cell("all", 1.0, STEPS, seed, True))
        found += [_cell(kind, keep, STEPS, seed, False) for kind in KINDS for keep in KEEPS]
    if quick:
        small = {"batch_size": 64, "packages": list(retrieval.QUICK_PACKAGES)}
        found = [
            {**cell, **small, "steps": cell["steps"] * 4 // STEPS}
            for cell in found
            if cell["seed"] in SEEDS[:2]
        ]
    return found


def chooser(cell: dict) -> Callable[[int], Random | Hardest | Easiest | None]:
    """A function of the step: which negatives take part."""
    kind, keep = cell["negatives"], cell["keep"]
    if kind == "all":
        return lambda step: None
    if kind == "random":  # others at every step
        return lambda step: Random(keep, seed=(cell["seed"] << 32) + step)
    return lambda step: KINDS[kind](keep)


def run(cell: dict) -> dict:
    parts = retrieval.load(tuple(cell["packages"]))
    loss = LearnableSigLipLoss()
    sizes = {name: cell[name] for name in ("batch_size", "steps", "rate", "seed")}
    trained = retrieval.train(loss, parts["train"], **sizes, negatives=chooser(cell))
    similarity = retrieval.similarities(trained.code, trained.text, parts["test"])
    with torch.no_grad():
        logits = loss.factor() * similarity + loss.logit_bias
    right = torch.eye(len(logits), dtype=torch.bool)
    return {
        **retrieval.evaluate(trained, parts),
        "pairs": {name: len(part) for name, part in parts.items()},
        "bias": loss.logit_bias.item(),
        "factor": loss.factor().item(),
        "positive_logit": logits[right].mean().item(),
        "negative_logit": logits[~right].mean().item(),
    }


def _of(rows: list[dict], kind: str, keep: float, steps: int) -> list[dict]:
    """One row a seed."""
    found = [
        row for row in rows if (row["negatives"], row["keep"], row["steps"]) == (kind, keep, steps)
    ]
    return sorted(found, key=lambda row: row["seed"])


def _values(rows: list[dict], kind: str, keep: float, steps: int) -> list[float]:
    return [row["test"]["mrr"] for row in _of(rows, kind, keep, steps)]


def _base(rows: list[dict]) -> int:
    """Steps of the runs that were not lengthened."""
    return min(row["steps"] for row in rows)


def _claims(rows: list[dict]) -> list[str]:
    base = _base(rows)
    everything = _values(rows, "all", 1.0, base)
    few = min(MATCHED)
    lost = minus(everything, _values(rows, "random", few, base))
    poor = [-x for x in minus(_values(rows, "easiest", few, base), everything, 0.5)]
    return [
        claim(
            above(lost),
            "fewer negatives, drawn at random, are worse than all",
            "section 4.8",
            f"All minus random at {_ratio(few, rows)}: {interval(lost).points()}; seen above 0.",
        ),
        claim(
            above(poor),
            "the easiest negatives alone do not work",
            "section 4.8",
            f"Half of all's quality minus easiest at {_ratio(few, rows)}: "
            f"{interval(poor).points()}; seen above 0.",
        ),
        *_claims_of_hardest(rows, base, everything),
        _claim_of_bias(rows, base),
    ]


def _claims_of_hardest(rows: list[dict], base: int, everything: list[float]) -> list[str]:
    found = []
    for keep in (*MATCHED, min(KEEPS)):
        hardest, ratio = _values(rows, "hardest", keep, base), _ratio(keep, rows)
        kept = minus(hardest, everything)
        ahead = minus(hardest, _values(rows, "random", keep, base))
        idle = retrieval.nothing_learned(hardest, rows[0]["pairs"]["test"])
        verdict, rule = above_unless(idle, ahead)
        found += [
            claim(
                above(kept, -MARGIN),
                f"the hardest negatives alone are almost as good as all, at {ratio}",
                "section 4.8",
                f"Hardest minus all: {interval(kept).points()}; seen above "
                f"-{MARGIN * 100:.0f} points.",
            ),
            claim(
                verdict,
                f"the hardest negatives are better than as many at random, at {ratio}",
                "section 4.8",
                f"Hardest minus random: {interval(ahead).points()}; {rule}",
            ),
        ]
        if keep not in MATCHED:
            continue
        longer = round(base / keep)
        long = _values(rows, "hardest", keep, longer)
        more, control = minus(long, hardest), minus(long, _values(rows, "all", 1.0, longer))
        found.append(
            claim(
                above(more),
                "training longer on the hardest, until as many pairs are seen, is better still, "
                f"at {ratio}",
                "section 4.8",
                f"Hardest after {longer} steps minus after {base}: {interval(more).points()}; seen "
                "above 0. The paper has no run of all negatives for as many steps; here hardest "
                f"minus all, both after {longer}: {interval(control).points()}.",
            )
        )
    return found


def _claim_of_bias(rows: list[dict], base: int) -> str:
    biases = minus(
        [row["bias"] for row in _of(rows, "random", min(KEEPS), base)],
        [row["bias"] for row in _of(rows, "all", 1.0, base)],
    )
    risen = interval(biases)
    return claim(
        above(biases),
        "with fewer negatives the bias ends higher",
        "section 4.8",
        f"b of random at {_ratio(min(KEEPS), rows)} minus b of all: {risen.mean:+.2f} ± "
        f"{risen.half:.2f}; seen above 0.",
    )


def _ratio(keep: float, rows: list[dict]) -> str:
    """Pairs to negatives, as in the paper's figure 6."""
    negatives = keep * (rows[0]["batch_size"] - 1)
    return f"1 : {negatives:.0f}"


def _plot(rows: list[dict], path: Path) -> None:
    base = _base(rows)
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.4), layout="constrained", sharey=True)
    for axis, keeps, matched in ((left, KEEPS, False), (right, MATCHED, True)):
        ratios = [1.0, *keeps]
        for kind, color in COLORS.items():
            values = [_values(rows, "all", 1.0, base)] + [
                _values(rows, kind, keep, round(base / keep) if matched else base) for keep in keeps
            ]
            spread(axis, ratios, values, kind, color)
        if matched:
            values = [_values(rows, "all", 1.0, round(base / keep)) for keep in ratios]
            spread(axis, ratios, values, "all, as many steps", GREY)
        axis.set(xscale="log", xlabel="positives to negatives")
        axis.set_xticks(ratios, [_ratio(keep, rows) for keep in ratios])
        axis.minorticks_off()
        axis.invert_xaxis()
        percent(axis)
        label_ends(axis)
    left.set_title(f"All for {base} steps: mean reciprocal rank")
    right.set_title("As many pairs seen: fewer negatives, more steps")
    save(figure, path)


def _lines(rows: list[dict], base: int) -> list[tuple]:
    """The table: each choice of negatives in as many steps, and for as many pairs seen."""

    def line(kind: str, keep: float, steps: int) -> tuple:
        found = _of(rows, kind, keep, steps)
        values = [row["test"]["mrr"] for row in found]
        averages = [
            mean([row[name] for row in found])
            for name in ("bias", "positive_logit", "negative_logit")
        ]
        return (
            kind,
            _ratio(keep, rows),
            str(steps),
            mean_and_range(values),
            *(f"{value:.1f}" for value in averages),
        )

    lines = [line("all", 1.0, base)]
    lines += [line(kind, keep, base) for kind in KINDS for keep in KEEPS]
    for keep in MATCHED:
        steps = round(base / keep)
        lines += [line(kind, keep, steps) for kind in KINDS] + [line("all", 1.0, steps)]
    return lines


def section(rows: list[dict], folder: Path) -> str:
    _plot(rows, folder / "paper_negatives.png")
    base, first = _base(rows), rows[0]
    header = ("negatives", "ratio", "steps", "mean reciprocal rank", "b", "positives", "negatives")
    lines = _lines(rows, base)
    level = retrieval.chance(first["pairs"]["test"])
    return f"""## Negatives: which, and how many

**The paper** (section 4.8, figure 6) leaves out negatives of a batch of 16 k until 1.6 are left for
each positive. In as many steps, keeping random ones deteriorates the result, keeping the easiest
does not work at all, and keeping the hardest almost maintains it; trained longer, by the share that
was left out, the hardest gain slightly. With fewer negatives the bias ends higher.

**Here** functions and docstrings, towers and measure are those under
[batch size](#batch-size-sigmoid-against-softmax), with batches of {first["batch_size"]}, a rate of
{first["rate"]:g} and {len({row["seed"] for row in rows})} seeds. `negatives=` of the loss keeps a
share of each batch's negatives: `Random` (others at every step), `Hardest` and `Easiest` (of each
function's, by logit). Each is run twice: for {base} steps, and for as many more as negatives are
fewer, so that as many pairs are seen (the paper does so with the hardest only), beside all
negatives for as many steps. Chance is {level["mrr"]:.1%}.

{table(header, lines)}

![Mean reciprocal rank by the ratio of positives to negatives](paper_negatives.png)

The table shows means over seeds (and ranges), also of the bias at the end and of the logits of
right and wrong pairs of the test. Differences are paired by seed and have 95% intervals (Student's
t).

{chr(10).join(f"- {line}" for line in _claims(rows))}

The rule of the verdicts: a claim is seen where the whole interval lies above the bound given,
opposite where it lies below, and otherwise not seen. It is undecided, and counts as not seen, where
what should be better ends within three times chance.

Limits: the paper's image tower is trained already and locked (SigLiT). Here both towers start
from scratch, where the hardest negatives of towers that know nothing yet can hold all features
together. In {base} steps the bias moves little, and one rate serves all, between those
that were best at batches of 256 and 1024. Longer runs, for as many pairs seen, end at
{_ratio(min(MATCHED), rows)}: at {_ratio(min(KEEPS), rows)} they would take {1 / min(KEEPS):.0f}
times as long. A batch of
{first["batch_size"]} has fewer hard negatives than the paper's."""


STUDY = Study("negatives", cells, run, section)
