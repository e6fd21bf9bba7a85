"""Writes docs/performance.md, and the blocks of other pages, from the newest results files.

``python -m benchmarks.report.render`` writes them, and ``--check`` fails where they are not what it
would write: no number on these pages is typed by hand.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from ..common.plots import plot_costs, plot_distributed, plot_negatives
from ..common.results import ROOT, Results, load, select
from . import trust_report
from .compiled_report import compiled_section
from .distributed_report import distributed_block
from .gpu_report import gpu_sections
from .integrations_report import integrations_block
from .negatives_report import negatives_block
from .performance import INTRODUCTION, cpu_section, demo_section
from .readme_report import readme_block
from .retrieval_report import retrieval_block
from .weights_report import weights_block

BLOCK = re.compile(r"(<!-- results:begin -->\n).*(<!-- results:end -->)", re.DOTALL)
PERFORMANCE = "docs/performance.md"
# Pages that are written by hand but for one block.
FILLED = (
    "README.md",
    "docs/integrations.md",
    "docs/negatives.md",
    "docs/weights.md",
    "docs/distributed.md",
    "docs/retrieval.md",
)


class Pages:
    """What is to be written, as a function of the results."""

    def __init__(self, found: dict[str, list[Results]]):
        def first(name: str, on_gpu: bool = False) -> Results | None:
            return next((r for r in found.get(name, []) if _ran_on_gpu(r) == on_gpu), None)

        self.found = found
        self.gpu = [results for results in found.get("device", []) if _ran_on_gpu(results)]
        self.cpu, self.demo = first("loss"), first("demo")
        self.compiled, self.gluon = first("compiled"), first("gluon")
        self.integrations, self.negatives = first("integrations"), first("negatives")
        self.distributed, self.weights = first("distributed"), first("weights")
        self.retrieval = first("retrieval")

    def plots(self) -> dict[str, tuple[Callable, Results]]:
        """File under docs/, what draws it, and of which results."""
        costs = {_plot_name(results): results for results in self.gpu}
        if self.cpu is not None:
            costs["performance_cpu.png"] = self.cpu
        shown = {n: (plot_costs, r) for n, r in costs.items() if select(r.rows, kind="cost")}
        if self.negatives is not None:
            shown["negatives.png"] = plot_negatives, self.negatives
        if self.distributed is not None:
            shown["distributed_memory.png"] = plot_distributed, self.distributed
        return shown

    def performance(self) -> str:
        parts = [
            INTRODUCTION,
            gpu_sections(self.gpu, _plot_name, self.found.get("tune", [])),
            cpu_section(self.cpu, "performance_cpu.png"),
            demo_section(self.demo),
            compiled_section(self.compiled, self.gluon),
        ]
        return "\n\n".join(parts) + "\n"

    def block(self, name: str) -> list[str]:
        """The paragraphs of a page's block."""
        if name == "README.md":
            return readme_block(self.gpu, self.cpu)
        make, results = {
            "docs/integrations.md": (integrations_block, self.integrations),
            "docs/negatives.md": (negatives_block, self.negatives),
            "docs/weights.md": (weights_block, self.weights),
            "docs/distributed.md": (distributed_block, self.distributed),
            "docs/retrieval.md": (retrieval_block, self.retrieval),
        }[name]
        return [] if results is None else make(results)

    def filled(self, name: str, before: str) -> str:
        """A page of :data:`FILLED` with its block replaced."""
        parts = list(filter(None, self.block(name))) or ["No results file exists yet."]
        block = "\n\n".join(parts)
        after, count = BLOCK.subn(lambda match: f"{match[1]}{block}\n{match[2]}", before)
        if count != 1:
            raise ValueError(f"{name} has {count} blocks of results: expected one")
        return after


def _ran_on_gpu(results: Results) -> bool:
    return any(str(row.get("device", "")).startswith("cuda") for row in results.rows)


def _plot_name(results: Results) -> str:
    device = re.sub(r"[^a-z0-9]+", "_", results.environment["device"].lower()).strip("_")
    return f"performance_{device}.png"


def stale(pages: Pages, root: Path = ROOT) -> list[str]:
    """The files that are not what would be written. Plots need only exist."""
    page = root / PERFORMANCE
    names = []
    if not page.exists() or page.read_text() != pages.performance():
        names.append(PERFORMANCE)
    for name in FILLED:
        before = (root / name).read_text()
        if before != pages.filled(name, before):
            names.append(name)
    plots = (f"docs/{name}" for name in pages.plots())
    return names + [name for name in plots if not (root / name).exists()]


def write(pages: Pages, root: Path = ROOT) -> None:
    (root / "docs").mkdir(exist_ok=True)
    (root / PERFORMANCE).write_text(pages.performance())
    for name in FILLED:
        (root / name).write_text(pages.filled(name, (root / name).read_text()))
    for name, (plot, results) in pages.plots().items():
        plot(results.rows, results.environment, root / "docs" / name)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.report.render", description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing, fail if out of date")
    args = parser.parse_args(arguments)
    found = load()
    pages, trust = Pages(found), ROOT / trust_report.PAGE
    before = trust.read_text()
    after = trust_report.filled(before, found)
    if not args.check:
        write(pages)
        trust.write_text(after)
        return 0
    names = stale(pages) + [trust_report.PAGE] * (before != after)
    for name in names:
        print(f"{name} is out of date: run python -m benchmarks.report.render")
    return int(bool(names))


if __name__ == "__main__":
    sys.exit(main())
