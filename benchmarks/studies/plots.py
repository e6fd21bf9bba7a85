"""What the studies' plots share: a line through the means, and every seed's value around it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from examples.report import BLUE, GREEN, GREY, ORANGE, plt

COLORS = {"sigmoid": BLUE, "softmax": ORANGE}
__all__ = ["BLUE", "COLORS", "GREEN", "GREY", "ORANGE", "percent", "plt", "save", "seeds", "spread"]


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def spread(
    axis: Axes, x: Sequence[float], values: Sequence[Sequence[float]], label: str, color: str
) -> None:
    """``values[i]`` holds the seeds' values at ``x[i]``: their mean, their range, their name."""
    means = [mean(several) for several in values]
    axis.plot(x, means, color=color, marker="o", markersize=4, linewidth=1.5, label=label)
    lows, highs = [min(several) for several in values], [max(several) for several in values]
    axis.fill_between(x, lows, highs, color=color, alpha=0.2, linewidth=0)


def seeds(axis: Axes, x: float, values: Sequence[float], color: str, half: float = 0.25) -> None:
    """A dot for every seed, and a bar of width 2 * ``half`` at their mean."""
    axis.plot([x] * len(values), values, "o", color=color, markersize=4, alpha=0.6)
    axis.plot([x - half, x + half], [mean(values)] * 2, color=color, linewidth=2)


def percent(axis: Axes) -> None:
    axis.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axis.grid(axis="y", color="#DDDDDD", linewidth=0.6)


def save(figure: Figure, path: Path) -> None:
    figure.savefig(path, metadata={"Software": None})
    plt.close(figure)
