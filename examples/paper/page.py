"""Builds docs/paper.md and its plots from the files of results, and nothing else."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from benchmarks.markdown import table
from benchmarks.memory import ROOT

from .study import ResultsFile, Study, claims


@dataclass(frozen=True)
class Folders:
    results: Path
    docs: Path

    def file(self, study: Study) -> ResultsFile:
        return ResultsFile(self.results / f"{study.name}.json")

    @property
    def page(self) -> Path:
        return self.docs / "paper.md"


FULL = Folders(Path(__file__).resolve().parent / "results", ROOT / "docs")
INTRODUCTION = "# The paper's claims, small\n"


def build(studies: list[Study], folders: Folders, plots: Path) -> str:
    """The page. Plots are written into ``plots``."""
    sections, lines = [], []
    for study in studies:
        results = folders.file(study)
        if not results.rows:
            sections.append(f"## {study.name}\n\nNot run yet: no results file.")
            continue
        section = study.section(results.rows, plots).strip()
        title = re.match(r"## (.+)", section)
        if title is None:
            raise ValueError(f"the section of {study.name} does not begin with a title")
        anchor = re.sub(r"[^\w\- ]", "", title[1].lower()).replace(" ", "-")
        lines += [
            (text, source, f"[{verdict}](#{anchor})") for verdict, text, source in claims(section)
        ]
        sections.append(f"{section}\n\n{_source(results, folders)}")
    verdicts = table(("claim", "where in the paper", "verdict here"), lines, left=3)
    return "\n\n".join([INTRODUCTION.strip(), verdicts, *sections]) + "\n"


def _source(results: ResultsFile, folders: Folders) -> str:
    where = results.environment
    commits = dict.fromkeys((row["commit"] or "unknown")[:8] for row in results.rows)
    link = Path(os.path.relpath(results.path, folders.docs)).as_posix()
    seconds = sum(row["seconds"] for row in results.rows)
    return (
        f"Results: [{results.path.name}]({link}), {len(results.rows)} runs, {seconds:.0f} s of one "
        f"core in all; {where['device']}, torch {where['torch']}, {where['date'][:10]}, "
        f"commit {', '.join(commits)}."
    )


def write(studies: list[Study], folders: Folders) -> None:
    folders.docs.mkdir(parents=True, exist_ok=True)
    folders.page.write_text(build(studies, folders, folders.docs))
