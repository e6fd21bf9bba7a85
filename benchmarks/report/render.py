"""Builds docs/performance.md, and the tables of README and of other pages, from the newest results
files.

``python -m benchmarks.report.render`` rewrites them, and ``--check`` fails where they are not what it
would write: no number on these pages is typed by hand.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from ..common.markdown import Results
from ..common.memory import ROOT
from ..common.plots import plot_costs, plot_negatives
from ..common.timing import RESULTS
from ..gpu.acceptance import select
from .compiled_report import compiled_section
from .distributed_report import ranks_block
from .performance import (
    cpu_section,
    cpu_sentence,
    demo_section,
    gpu_sections,
    negatives_table,
    readme_table,
    stacks_table,
    tested,
)

BLOCK = re.compile(r"(<!-- results:begin -->\n).*(<!-- results:end -->)", re.DOTALL)
README_SIZES = {"cpu": (1024, 4096, 8192), "gpu": (4096, 32768, 65536)}
INTRODUCTION = """\
# Performance

`python -m benchmarks.report.render` writes this page from the newest files in
[benchmarks/results](../benchmarks/results); [benchmarks/README.md](../benchmarks/README.md) says
how each number is measured. x floor (x GEMM floor) is a loss's time over that of the plain matrix
products that no exact method can avoid, in the same run: 1.00 would be free. MiB is peak memory
beyond inputs and gradients. The logit scale is t, and t = 10 where a table does not say."""


def load(folder: Path = RESULTS) -> dict[str, list[Results]]:
    """By name (loss, demo, device, compiled) the newest file of each device, newest first."""
    newest: dict[tuple[str, str], Results] = {}
    for path in sorted(folder.glob("*.json")):
        content = json.loads(path.read_text())
        relative = path.relative_to(ROOT) if path.is_relative_to(ROOT) else path
        results = Results(relative, content["environment"], content["rows"])
        key = (path.stem.rsplit("-", 1)[-1], results.environment["device"])
        if key not in newest or results.environment["date"] > newest[key].environment["date"]:
            newest[key] = results
    found: dict[str, list[Results]] = {}
    for (name, _), results in newest.items():
        found.setdefault(name, []).append(results)
    for several in found.values():
        several.sort(key=lambda results: results.environment["date"], reverse=True)
    return found


class Pages:
    """What is to be written, as a function of the results."""

    def __init__(self, found: dict[str, list[Results]]):
        def on(name: str, gpu: bool) -> list[Results]:
            return [results for results in found.get(name, []) if _ran_on_gpu(results) == gpu]

        def first(several: list[Results]) -> Results | None:
            return several[0] if several else None

        self.gpu = on("device", gpu=True)
        self.cpu = first(on("loss", gpu=False))
        self.demo = first(found.get("demo", []))
        self.compiled = first(found.get("compiled", []))
        self.gluon = first(found.get("gluon", []))
        self.tuned = found.get("tune", [])
        self.stacks = first(found.get("integrations", []))
        self.negatives = first(found.get("negatives", []))
        self.ranks = first(found.get("distributed", []))

    def plots(self) -> dict[str, tuple[Callable, Results]]:
        """File under docs/, what draws it, and of which results."""
        costs = {_plot_name(results): results for results in self.gpu}
        if self.cpu is not None:
            costs["performance_cpu.png"] = self.cpu
        shown = {n: (plot_costs, r) for n, r in costs.items() if select(r.rows, kind="cost")}
        if self.negatives is not None:
            shown["negatives.png"] = plot_negatives, self.negatives
        return shown

    def performance(self) -> str:
        parts = [
            INTRODUCTION,
            gpu_sections(self.gpu, _plot_name, self.tuned),
            cpu_section(self.cpu, "performance_cpu.png"),
            demo_section(self.demo),
            compiled_section(self.compiled, self.gluon),
        ]
        return "\n\n".join(parts) + "\n"

    def filled(self, name: str, before: str) -> str:
        """A page of :data:`FILLED` with its block replaced."""
        block = "\n\n".join(
            list(filter(None, FILLED[name](self))) or ["No results file exists yet."]
        )
        after, count = BLOCK.subn(lambda match: f"{match[1]}{block}\n{match[2]}", before)
        if count != 1:
            raise ValueError(f"{name} has {count} blocks of results: expected one")
        return after

    def stacks_parts(self) -> list[str]:
        return [] if self.stacks is None else [stacks_table(self.stacks)]

    def negatives_parts(self) -> list[str]:
        return [] if self.negatives is None else [negatives_table(self.negatives)]

    def ranks_parts(self) -> list[str]:
        return [] if self.ranks is None else ranks_block(self.ranks)

    def readme_parts(self) -> list[str]:
        """A table for each GPU and a line on the CPU, or else the CPU's table."""
        shown = [results for results in self.gpu if select(results.rows, kind="cost")]
        parts = []
        for results in shown:
            parts += [readme_table(results, README_SIZES["gpu"]), tested(results)]
        if self.cpu is not None and shown:
            parts.append(cpu_sentence(self.cpu))
        elif self.cpu is not None:
            parts.append(readme_table(self.cpu, README_SIZES["cpu"]))
        return parts


# Pages that are written by hand but for their block, and what it holds.
FILLED = {
    "README.md": Pages.readme_parts,
    "docs/integrations.md": Pages.stacks_parts,
    "docs/negatives.md": Pages.negatives_parts,
    "docs/distributed.md": Pages.ranks_parts,
}


def _ran_on_gpu(results: Results) -> bool:
    return any(str(row.get("device", "")).startswith("cuda") for row in results.rows)


def _plot_name(results: Results) -> str:
    device = re.sub(r"[^a-z0-9]+", "_", results.environment["device"].lower()).strip("_")
    return f"performance_{device}.png"


def stale(pages: Pages, root: Path = ROOT) -> list[str]:
    """The files that are not what would be written. Of plots only whether they exist."""
    page = root / "docs/performance.md"
    names = []
    if not page.exists() or page.read_text() != pages.performance():
        names.append("docs/performance.md")
    for name in FILLED:
        before = (root / name).read_text()
        if before != pages.filled(name, before):
            names.append(name)
    plots = (f"docs/{name}" for name in pages.plots())
    return names + [name for name in plots if not (root / name).exists()]


def write(pages: Pages, root: Path = ROOT) -> None:
    (root / "docs").mkdir(exist_ok=True)
    (root / "docs/performance.md").write_text(pages.performance())
    for name in FILLED:
        (root / name).write_text(pages.filled(name, (root / name).read_text()))
    for name, (plot, results) in pages.plots().items():
        plot(results.rows, results.environment, root / "docs" / name)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.report.render", description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing, fail if out of date")
    args = parser.parse_args(arguments)
    pages = Pages(load())
    if not args.check:
        write(pages)
        return 0
    names = stale(pages)
    for name in names:
        print(f"{name} is out of date: run python -m benchmarks.report.render")
    return int(bool(names))


if __name__ == "__main__":
    sys.exit(main())
