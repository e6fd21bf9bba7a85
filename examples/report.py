"""What the demo shows: tables for the terminal, and plots."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # files only: no display needed

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, NullFormatter

# Okabe and Ito's palette, which the colour-blind can tell apart.
BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#777777"
STYLES = {
    "fused": {"label": "fused", "color": BLUE, "marker": "o"},
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


def by_size(rows: list[dict]) -> dict[int, dict[str, dict]]:
    """{batch size: {fused, eager: row}}"""
    sizes: dict[int, dict[str, dict]] = {}
    for row in rows:
        sizes.setdefault(row["batch_size"], {})[row["loss"].split("_")[0]] = row
    return sizes


def cost_table(rows: list[dict]) -> str:
    line = "{:>8} {:>8} {:>10} {:>10} {:>9} {:>9} {:>9} {:>9}".format
    lines = [
        f"the loss and its gradients, D = {rows[0]['dim']}, {rows[0]['dtype']}; x floor: times the "
        "three matrix products",
        line("", "", "time, ms", "", "x floor", "", "peak MiB", ""),
        line("pictures", "names", *("fused", "eager") * 3),
    ]
    for size, row_of in by_size(rows).items():
        shown = [row_of[name] for name in STYLES]
        lines.append(
            line(
                shown[0]["images"],
                size,
                *(f"{row['seconds'] * 1e3:.1f}" for row in shown),
                *(f"{row['ratio_to_floor']:.2f}" for row in shown),
                *(f"{row['peak_extra_bytes'] * 2**-20:.0f}" for row in shown),
            )
        )
    return "\n".join(lines)


def plot_costs(rows: list[dict], environment: dict, path: Path) -> None:
    sizes = by_size(rows)
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4.6), layout="constrained")
    floor = {"label": "3 matmuls", "color": GREY, "linestyle": "--"}
    left.set_title("time of loss and gradients (s)")
    left.plot(list(sizes), [row_of["fused"]["floor_seconds"] for row_of in sizes.values()], **floor)
    right.set_title("peak extra memory (MiB)")
    for name, style in STYLES.items():
        shown = [row_of[name] for row_of in sizes.values()]
        left.plot(list(sizes), [row["seconds"] for row in shown], **style)
        right.plot(list(sizes), [row["peak_extra_bytes"] * 2**-20 for row in shown], **style)
    for axis in (left, right):
        axis.set(xscale="log", yscale="log", xlabel="names in a batch")
        axis.set_xticks(list(sizes), [str(size) for size in sizes])
        axis.xaxis.set_minor_formatter(NullFormatter())
        axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.grid(axis="y", color="#DDDDDD", linewidth=0.6)
        label_ends(axis)
    figure.suptitle(
        f"Emoji and their names, D = {rows[0]['dim']}, {rows[0]['dtype']}; "
        f"{environment['device']}, {environment['threads']} threads, torch {environment['torch']}",
        fontsize=9,
        color=GREY,
    )
    figure.savefig(path)
    plt.close(figure)


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
