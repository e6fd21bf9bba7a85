"""What the demo shows: tables for the terminal, and plots."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # files only: no display needed

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, NullFormatter

from .training import Run

# Okabe and Ito's palette, which the colour-blind can tell apart.
BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#777777"
STYLES = {
    "fused": {"label": "fused", "color": BLUE, "marker": "o"},
    "row_chunked": {"label": "row-chunked", "color": GREEN, "marker": "^"},
    "eager": {"label": "eager", "color": ORANGE, "marker": "s"},
}
plt.rcParams.update(
    {
        "font.size": 11,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.titlesize": 12,
        "axes.titlelocation": "left",
        "savefig.dpi": 150,
    }
)


def differences(run: Run, reference: Run) -> list[float]:
    """Relative difference of the loss at every step."""
    return [abs(a - b) / abs(b) for a, b in zip(run.losses, reference.losses, strict=True)]


def mean_accuracy(run: Run) -> float:
    return sum(run.accuracy.values()) / len(run.accuracy)


def training_table(runs: list[Run]) -> str:
    fused, eager, exact = runs
    languages = list(fused.accuracy)
    lines = [
        "zero-shot accuracy on the test images, by language of the prompts",
        f"{'loss':<14} {'first':>8} {'last':>8} " + "".join(f"{name:>10}" for name in languages),
    ]
    for run in runs:
        cells = "".join(f"{run.accuracy[name]:>10.1%}" for name in languages)
        name = f"{run.loss} {run.dtype.replace('float', 'fp')}"
        lines.append(f"{name:<14} {run.losses[0]:>8.3f} {run.losses[-1]:>8.3f} {cells}")
    lines += [
        f"\nlargest relative difference of the loss over {len(fused.losses)} steps",
        f"fused fp32 from eager fp32  {max(differences(fused, eager)):.1e}",
        f"fused fp32 from eager fp64  {max(differences(fused, exact)):.1e}",
        f"eager fp32 from eager fp64  {max(differences(eager, exact)):.1e}",
    ]
    return "\n".join(lines)


def plot_training(runs: list[Run], path: Path) -> None:
    fused, eager, exact = runs
    steps = range(1, len(fused.losses) + 1)
    figure, (top, bottom) = plt.subplots(
        2, 1, figsize=(7.5, 6), sharex=True, height_ratios=(3, 1.3), layout="constrained"
    )
    top.plot(steps, eager.losses, color=ORANGE, linewidth=5, alpha=0.55)
    top.plot(steps, fused.losses, color=BLUE, linewidth=1.5)
    top.set(yscale="log", ylabel="loss per image")
    top.set_title("The same training run with the fused and with the eager loss (fp32)")
    # Direct labels, above the curve, in its colours.
    for run, color, height in ((eager, ORANGE, 0.86), (fused, BLUE, 0.76)):
        text = f"{run.loss}: {mean_accuracy(run):.1%} zero-shot accuracy"
        top.text(0.98, height, text, color=color, ha="right", transform=top.transAxes)
    top.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))

    for run, color in ((eager, ORANGE), (fused, BLUE)):
        bottom.plot(steps, differences(run, exact), color=color, linewidth=1)
    bottom.set(yscale="log", xlabel="step", ylabel="rel. difference")
    bottom.set_title("Difference of each from the eager loss in fp64: rounding")
    figure.savefig(path)
    plt.close(figure)


def _by_size(rows: list[dict]) -> dict[int, dict[str, dict]]:
    """{batch size: {fused, eager, row_chunked: row}}"""
    sizes: dict[int, dict[str, dict]] = {}
    for row in rows:
        name = "fused" if row["loss"].startswith("fused") else row["loss"]
        sizes.setdefault(row["batch_size"], {})[name] = row
    return sizes


def cost_table(rows: list[dict]) -> str:
    labels = [style["label"] for style in STYLES.values()]
    line = "{:>6} {:>9} {:>12} {:>9} {:>9} {:>13} {:>9} {:>12} {:>9}".format
    lines = [
        f"loss and gradients, D = {rows[0]['dim']}, {rows[0]['dtype']} "
        "(floor: the three plain matmuls that any exact loss needs)",
        f"{'':6} {'time, ms':^56} {'peak extra memory, MiB':>32}",
        line("batch", *labels, "floor", "fused/floor", *labels),
    ]
    notes = []
    for size, row_of in _by_size(rows).items():
        shown = [row_of[name] for name in STYLES]
        fused = row_of["fused"]
        lines.append(
            line(
                size,
                *(_scaled(row["seconds"], 1e3) for row in shown),
                _scaled(fused["floor_seconds"], 1e3),
                "-" if fused["ratio_to_floor"] is None else f"{fused['ratio_to_floor']:.2f}",
                *(_scaled(row["peak_extra_bytes"], 2.0**-20) for row in shown),
            )
        )
        notes += [
            f"batch {size}, {label} skipped: {row['skipped']}"
            for label, row in zip(labels, shown, strict=True)
            if row["skipped"]
        ]
    return "\n".join(lines + notes)


def _scaled(value: float | None, factor: float) -> str:
    return "-" if value is None else f"{value * factor:.1f}"


def plot_costs(rows: list[dict], environment: dict, path: Path) -> None:
    sizes = _by_size(rows)
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4.6), layout="constrained")
    floor = {"label": "3 matmuls", "color": GREY, "linestyle": "--"}
    left.set_title("time of loss and gradients (s)")
    left.plot(*_points(sizes, "fused", "floor_seconds"), **floor)
    right.set_title("peak extra memory (MiB)")
    for name, style in STYLES.items():
        left.plot(*_points(sizes, name, "seconds"), **style)
        right.plot(*_points(sizes, name, "peak_extra_bytes", 2.0**-20), **style)
    for axis in (left, right):
        axis.set(xscale="log", yscale="log", xlabel="batch size")
        axis.set_xticks(list(sizes), [str(size) for size in sizes])
        axis.xaxis.set_minor_formatter(NullFormatter())
        axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.grid(axis="y", color="#DDDDDD", linewidth=0.6)
        label_ends(axis)
    figure.suptitle(
        f"D = {rows[0]['dim']}, {rows[0]['dtype']}; {environment['device']}, "
        f"{environment['threads']} threads, torch {environment['torch']}",
        fontsize=9,
        color=GREY,
    )
    figure.savefig(path)
    plt.close(figure)


def _points(
    sizes: dict[int, dict[str, dict]], name: str, column: str, factor: float = 1.0
) -> tuple[list[int], list[float]]:
    """Batch sizes and values of what was measured."""
    measured = [size for size, row_of in sizes.items() if row_of[name][column] is not None]
    return measured, [sizes[size][name][column] * factor for size in measured]


def label_ends(axis: Axes) -> None:
    """Name each line at its right end, lowest first, with room between the names."""
    points_per_pixel = 72 / axis.figure.dpi
    lines = [line for line in axis.lines if len(line.get_xdata())]
    ends = {line: (line.get_xdata()[-1], line.get_ydata()[-1]) for line in lines}
    lowest = -float("inf")
    for line in sorted(lines, key=lambda line: ends[line][1]):
        height = axis.transData.transform(ends[line])[1] * points_per_pixel
        lowest = max(height, lowest + 14)
        axis.annotate(
            line.get_label(),
            ends[line],
            xytext=(8, lowest - height),
            textcoords="offset points",
            color=line.get_color(),
            va="center",
            annotation_clip=False,
        )
