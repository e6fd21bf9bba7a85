"""Plots of the results: time over the floor, and memory, against the batch size."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # files only: no display needed

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

from .results import MIB, fused_name, main_shape, select

# Okabe and Ito's palette, which the colour-blind can tell apart.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#777777")
TARGET = 1.10  # x floor
RATIOS = (1, 1.25, 1.5, 2, 3, 5, 10, 20, 50, 100)


def plot_costs(rows: list[dict], environment: dict, path: Path) -> None:
    cost = select(rows, kind="cost", mode="full", skipped=None)
    if not cost:
        raise ValueError("no losses were timed: nothing to plot")
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.6), layout="constrained")

    fused = select(cost, loss=fused_name(cost))
    shape = main_shape(cost)
    for dim in sorted({row["dim"] for row in fused}):
        _line(left, select(fused, **{**shape, "dim": dim}), f"D = {dim}")
    left.axhline(TARGET, color="#777777", linestyle="--", linewidth=1)
    left.set_title("x GEMM floor: fused_siglip")

    at_shape = select(cost, **shape)
    for name in dict.fromkeys(row["loss"] for row in at_shape):
        _line(right, select(at_shape, loss=name), name)
    right.set_yscale("log")
    left.set_ylim(bottom=1.0)
    low, high = right.get_ylim()
    right.set_yticks([ratio for ratio in RATIOS if low <= ratio <= high])
    right.set_title(f"x GEMM floor, D = {shape['dim']}, {shape['dtype']}")

    for axis in (left, right):
        sizes = sorted({row["batch_size"] for row in cost if row["ratio_to_floor"]})
        axis.set(xscale="log", xlabel="batch size")
        axis.set_xticks(sizes, [str(size) for size in sizes])
        axis.xaxis.set_minor_formatter(NullFormatter())
        axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.yaxis.set_minor_formatter(NullFormatter())
        axis.grid(axis="y", color="#DDDDDD", linewidth=0.6)
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(frameon=False, fontsize=8)
    figure.suptitle(f"{environment['device']}, torch {environment['torch']}", fontsize=9)
    _save(figure, path)


def _line(axis: Axes, rows: list[dict], label: str) -> None:
    measured = sorted(
        (row["batch_size"], row["ratio_to_floor"]) for row in rows if row["ratio_to_floor"]
    )
    if measured:
        color = COLORS[len(axis.lines) % len(COLORS)]
        axis.plot(*zip(*measured, strict=True), label=label, color=color, marker="o", markersize=4)


def plot_negatives(rows: list[dict], environment: dict, path: Path) -> None:
    """Time over that with all negatives, against the share that is kept."""
    cost = select(rows, kind="cost")
    figure, axis = plt.subplots(figsize=(7.5, 4.6), layout="constrained")
    (everything,) = select(cost, loss=fused_name(cost), negatives=None)
    for kind, color in zip(("random", "hardest", "easiest"), COLORS, strict=False):
        points = sorted(
            (float(row["negatives"].split()[1]), row["seconds"] / everything["seconds"])
            for row in select(cost, loss=everything["loss"])
            if row["negatives"] and row["negatives"].startswith(kind)
        )
        axis.plot(*zip(*points, strict=True), label=kind, color=color, marker="o", markersize=4)
    axis.axhline(1, color="#777777", linestyle="--", linewidth=1)
    axis.text(1e-4, 1.02, "all negatives", color="#777777", va="bottom", fontsize=9)
    axis.set(xscale="log", xlabel="share of the negatives that is kept", ylim=(0, None))
    axis.set_title("time over that with all negatives", loc="left")
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(axis="y", color="#DDDDDD", linewidth=0.6)
    axis.legend(frameon=False, fontsize=9)
    figure.suptitle(
        f"B = {everything['batch_size']}, D = {everything['dim']}, {everything['dtype']}; "
        f"{environment['device']}, torch {environment['torch']}",
        fontsize=9,
    )
    _save(figure, path)


def plot_distributed(rows: list[dict], environment: dict, path: Path) -> None:
    """Peak memory of a rank against the number of ranks."""
    rows = select(rows, kind="distributed")
    figure, axis = plt.subplots(figsize=(7, 4.5), layout="constrained")
    modes = dict.fromkeys((row["loss"], row["dist_impl"]) for row in rows)
    colors = ("#0072B2", "#56B4E9", "#D55E00", "#E69F00", "#CC79A7", "#777777")
    for (loss, impl), color, marker in zip(modes, colors, "os^vDx", strict=True):
        mine = select(rows, loss=loss, dist_impl=impl)
        axis.plot(
            [row["world_size"] for row in mine],
            [row["peak_bytes"] / MIB for row in mine],
            color=color,
            marker=marker,
            linestyle="-" if loss == "fused" else "--",
            label=f"{loss} {impl}",
        )
    sizes = sorted({row["world_size"] for row in rows})
    axis.set_xscale("log", base=2)
    axis.set_xticks(sizes, sizes)
    axis.set(xlabel="world size", ylabel="peak memory per rank, MiB", ylim=(0, None))
    shape = f"{rows[0]['local_batch']} x {rows[0]['dim']} fp32 on every rank"
    axis.set_title(f"Memory beyond the features, {shape}", loc="left")
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False)
    _save(figure, path)


def _save(figure: Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150, metadata={"Software": None})  # the same bytes again
    plt.close(figure)
