"""Where bias and temperature start (section 4.9)."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from matplotlib.ticker import FuncFormatter
from torch import Tensor, nn

from examples.report import label_ends
from fused_siglip import LearnableSigLipLoss, siglip_loss

from ..common.markdown import table
from . import retrieval
from .functions import PACKAGES
from .plots import BLUE, GREEN, GREY, ORANGE, mean, percent, plt, save, seeds
from .study import Study, above_unless, claim, interval, mean_and_range

RATE = 3e-3  # at a batch of 1024; it grows with the root of the batch
SCHEDULES = {1024: 384, 256: 1536}  # batch size: steps, few or many for as many examples
SEEDS = (0, 1, 2)
PAPERS = (-10.0, 10.0)
# (b, t) to start from; b None: the loss has no bias
STARTS = (PAPERS, (-10.0, 1.0), (0.0, 10.0), (0.0, 1.0), (None, 10.0))
POINTS = 40  # of a run's loss that are kept, closer together at the beginning


class UnbiasedLoss(nn.Module):
    """The sigmoid loss with a learned temperature alone."""

    def __init__(self, init_logit_scale: float):
        super().__init__()
        self.logit_scale = nn.Parameter(torch.tensor(init_logit_scale))

    def forward(self, image_features: Tensor, text_features: Tensor) -> Tensor:
        return siglip_loss(image_features, text_features, self.factor())

    def factor(self) -> Tensor:  # ()
        return self.logit_scale.exp()


def cells(quick: bool) -> list[dict]:
    return [
        {
            "bias": bias,
            "factor": factor,
            "batch_size": batch,
            "steps": 12 if quick else steps,
            "rate": RATE * (batch / 1024) ** 0.5,
            "seed": seed,
            "packages": list(retrieval.QUICK_PACKAGES if quick else PACKAGES),
        }
        for batch, steps in SCHEDULES.items()
        for seed in SEEDS[: 2 if quick else None]
        for bias, factor in STARTS
    ]


def run(cell: dict) -> dict:
    parts = retrieval.load(tuple(cell["packages"]))
    start = math.log(cell["factor"])
    bias = cell["bias"]
    loss = UnbiasedLoss(start) if bias is None else LearnableSigLipLoss(start, bias)
    sizes = {name: cell[name] for name in ("batch_size", "steps", "rate", "seed")}
    trained = retrieval.train(loss, parts["train"], **sizes)
    last = len(trained.losses) - 1
    kept = sorted({round((last + 1) ** (i / (POINTS - 1))) - 1 for i in range(POINTS)})
    return {
        **retrieval.evaluate(trained, parts),
        "pairs": {name: len(part) for name, part in parts.items()},
        "last_factor": loss.factor().item(),
        "last_bias": None if bias is None else loss.logit_bias.item(),
        "curve": {"step": [i + 1 for i in kept], "loss": [trained.losses[i] for i in kept]},
    }


Start = tuple[float | None, float]


def _of(rows: list[dict], start: Start) -> list[dict]:
    """One row a seed."""
    found = [row for row in rows if (row["bias"], row["factor"]) == start]
    return sorted(found, key=lambda row: row["seed"])


def _values(rows: list[dict], start: Start, metric: str = "mrr") -> list[float]:
    return [row["test"][metric] for row in _of(rows, start)]


def _gains(rows: list[dict], better: Start, worse: Start) -> list[float]:
    """Mean reciprocal rank of one start minus that of another, one value a seed."""
    return [a - b for a, b in zip(_values(rows, better), _values(rows, worse), strict=True)]


def _claims(rows: list[dict]) -> list[str]:
    """The claims about one schedule."""
    large, small = (_gains(rows, (-10.0, t), (0.0, t)) for t in (10.0, 1.0))
    more = [a - b for a, b in zip(small, large, strict=True)]
    none, factor = _gains(rows, PAPERS, (None, 10.0)), _gains(rows, PAPERS, (-10.0, 1.0))
    steps = rows[0]["steps"]
    # where from t = 1 little is learned, there is little that b = 0 could cost
    reached = _values(rows, (-10.0, 1.0))
    idle = retrieval.nothing_learned(reached, rows[0]["pairs"]["test"])
    capped = mean(reached) < 0.5 * mean(_values(rows, PAPERS))
    tests = (
        (large, "b = -10 is a better start than b = 0, at t = 10", "-10 minus 0"),
        (small, "b = -10 is a better start than b = 0, at t = 1", "-10 minus 0"),
        (more, "b = 0 costs more at t = 1 than at t = 10", "Cost at t = 1 minus that at t = 10"),
        (none, "a bias that starts at -10 is better than none, at t = 10", "Bias minus none"),
        (factor, "t = 10 is a better start than t = 1, at b = -10", "10 minus 1"),
    )
    found = []
    for gains, text, why in tests:
        undecided = (gains is small and idle) or (gains is more and capped)
        verdict, rule = above_unless(undecided, gains)
        why = f"{why}: {interval(gains).points()}; {rule}"
        found.append(claim(verdict, f"{text} ({steps} steps)", "section 4.9", why))
    return found


def _name(start: Start) -> str:
    bias, factor = start
    return f"{'no bias' if bias is None else f'b = {bias:g}'}, t = {factor:g}"


def _schedules(rows: list[dict]) -> list[list[dict]]:
    """The rows by batch size, the largest (fewest steps) first."""
    sizes = sorted({row["batch_size"] for row in rows}, reverse=True)
    return [[row for row in rows if row["batch_size"] == size] for size in sizes]


def _plot(rows: list[dict], path: Path) -> None:
    schedules = _schedules(rows)
    figure, axes = plt.subplots(
        len(schedules), 2, figsize=(11, 4 * len(schedules)), layout="constrained", squeeze=False
    )
    for (left, right), group in zip(axes, schedules, strict=True):
        for x, start in enumerate(STARTS):
            bias, factor = start
            color = {-10.0: BLUE, 0.0: ORANGE, None: GREEN}[bias]
            found = _of(group, start)
            curves = [row["curve"]["loss"] for row in found]
            means = [mean(several) for several in zip(*curves, strict=True)]
            line = "-" if factor == 10 else "--"
            left.plot(found[0]["curve"]["step"], means, line, color=color, label=_name(start))
            seeds(right, x, _values(group, start), color)
        batch, steps = group[0]["batch_size"], group[0]["steps"]
        left.set(xscale="log", yscale="log", xlabel="step")
        left.set_xticks([1, 10, 100], ["1", "10", "100"])
        left.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        left.set_title(f"Batch {batch}: loss while training, mean over seeds")
        label_ends(left)
        right.set_title(f"Mean reciprocal rank after {steps} steps. Dots: seeds")
        right.set_xticks(range(len(STARTS)), [_name(start).replace(", ", "\n") for start in STARTS])
        right.spines["bottom"].set_color(GREY)
        percent(right)
    save(figure, path)


def _lines(rows: list[dict]) -> list[tuple[str, ...]]:
    """The lines of a table about one schedule."""

    def share(start: Start, metric: str) -> str:
        values = _values(rows, start, metric)
        return mean_and_range(values)

    lines = []
    for start in STARTS:
        found = _of(rows, start)
        bias = "-" if start[0] is None else f"{mean([row['last_bias'] for row in found]):.1f}"
        lines.append(
            (
                _name(start),
                str(found[0]["batch_size"]),
                str(found[0]["steps"]),
                f"{mean([row['curve']['loss'][0] for row in found]):.1f}",
                share(start, "mrr"),
                share(start, "recall_at_1"),
                bias,
                f"{mean([row['last_factor'] for row in found]):.1f}",
            )
        )
    return lines


def section(rows: list[dict], folder: Path) -> str:
    _plot(rows, folder / "paper_starts.png")
    schedules = _schedules(rows)
    lines = [line for group in schedules for line in _lines(group)]
    verdicts = [line for group in schedules for line in _claims(group)]
    quality = "mean reciprocal rank"
    header = ("start", "batch", "steps", "first loss", quality, "first", "b at the end", "t")
    level = retrieval.chance(rows[0]["pairs"]["test"])
    return f"""## Starts of bias and temperature

**The paper** (section 4.9, table 4) starts b at -10 and t' at log 10, so that training begins close
to the prior: nearly all pairs are negatives. On ImageNet that gives 63.0%; without a bias 62.0%;
b = 0 61.7%; t = 1 with b = -10 61.0%; and b = 0 with t = 1 53.7%, for the first steps over-correct.

**Here** functions and docstrings, towers and measure are those under
[batch size](#batch-size-sigmoid-against-softmax). Every run sees as many examples, in one of two
ways: few steps of large batches, or many of small ones. There are
{len({row["seed"] for row in rows})} seeds. The rate is the same from every start, as in the paper,
and within a fraction of a point of the best of those tried for the paper's start under batch size.
Chance is {level["mrr"]:.1%}.

{table(header, lines)}

![Loss while training, and the mean reciprocal rank it leads to, by start](paper_starts.png)

The table shows means over seeds (and ranges). Differences are paired by seed and have 95% intervals
(Student's t).

{chr(10).join(f"- {line}" for line in verdicts)}

The rule of the verdicts: a claim is seen where the whole interval lies above 0, opposite where it
lies below, and otherwise not seen. It is undecided, and counts as not seen, where the start that
should be better ends within three times chance. So is a comparison of costs where, from b = -10,
t = 1 reaches less than half of what t = 10 does: there is little then that b = 0 could cost.

Limits: even the many steps are few. At these rates b cannot move by more than a unit or two, so a
start that is off stays off. The rate was tuned for the paper's start."""


STUDY = Study("starts", cells, run, section)
