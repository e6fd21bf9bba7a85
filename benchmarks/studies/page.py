"""Builds docs/paper.md and its plots from the files of results, and nothing else."""

from __future__ import annotations

import json
import os
import re
import textwrap
from dataclasses import dataclass
from pathlib import Path

from ..common.markdown import table
from ..common.results import ROOT
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


HERE = Path(__file__).resolve().parent
FULL = Folders(HERE / "results", ROOT / "docs")
WIDTH = 100
INTRODUCTION = """\
# The paper's claims, on one machine

This page goes through the claims of the paper (Zhai et al., Sigmoid Loss for Language Image
Pre-Training, [arXiv 2303.15343](https://arxiv.org/abs/2303.15343)) one by one: what the paper says,
what came out here, and why. Section numbers are those of the paper unless another is named.

**Read the scale first.** The paper trains on billions of image-text pairs for days on TPUs. Here
two CPU cores train small towers for seconds, on data that ships with packages or the interpreter:
OpenMoji's pictures of emoji with their names in fourteen languages, scikit-learn's 8 x 8
handwritten digits with captions written for this page, and the functions and docstrings of
installed packages. (One study, of more than a hundred languages, needs names from npm.) Anyone can
look into what is seen here and run it again. What is not seen here says little about the paper. No
result is left out: each verdict comes from all seeds, by the rule that its section states.

    python -m benchmarks.studies --all    # runs what is missing, writes this page: about 40 minutes
    python -m benchmarks.studies --page   # only writes this page, from benchmarks/studies/results/

An interrupted run goes on where it stopped. To run a study anew, delete its file of results."""


def build(studies: list[Study], folders: Folders, plots: Path) -> str:
    """The page, from the files of results alone. Plots are written into ``plots``."""
    sections, lines = [], []
    for study in studies:
        results = folders.file(study)
        if not results.rows:
            sections.append(
                f"## {study.name}\n\nNot run yet: there is no {study.name}.json. "
                f"`python -m benchmarks.studies --study {study.name}` makes it."
            )
            continue
        if len({json.dumps(row.get("pairs")) for row in results.rows}) > 1:
            raise ValueError(
                f"{results.path.name} holds runs on different data, of other versions of the "
                "packages: delete it and run the study anew"
            )
        section = study.section(results.rows, plots).strip()
        title = re.match(r"## (.+)", section)
        found = claims(section)
        if title is None or not found:
            raise ValueError(f"the section of {study.name} needs a title and a verdict")
        anchor = re.sub(r"[^\w\- ]", "", title[1].lower()).replace(" ", "-")
        lines += [(text, source, f"[{verdict}](#{anchor})") for verdict, text, source in found]
        sections.append(f"{section}\n\n{_source(study, results, folders)}")
    verdicts = table(("claim", "where in the paper", "verdict here"), lines, left=3)
    siglip2 = (HERE / "siglip2.md.in").read_text().strip()
    parts = [INTRODUCTION, "## Verdicts", verdicts, *map(_wrapped, sections), siglip2]
    return "\n\n".join(parts) + "\n"


def _wrapped(text: str) -> str:
    """Paragraphs and items filled to the width; numbers that were put in make them ragged."""
    return "\n\n".join(_filled(block) for block in text.split("\n\n"))


def _filled(block: str) -> str:
    if block.startswith(("#", "|", "!", "    ", "```")):
        return block
    items = re.split(r"\n(?=- )", block)
    return "\n".join(
        textwrap.fill(
            " ".join(item.split()),
            WIDTH,
            subsequent_indent="  " if item.startswith("- ") else "",
            break_long_words=False,
            break_on_hyphens=False,
        )
        for item in items
    )


def _source(study: Study, results: ResultsFile, folders: Folders) -> str:
    where = results.environment
    commits = dict.fromkeys((run["commit"] or "unknown")[:8] for run in results)
    link = Path(os.path.relpath(results.path, folders.docs)).as_posix()
    seconds = sum(row["seconds"] for row in results.rows)
    cores = "all cores" if study.alone else "one core"
    return (
        f"Results: [{results.path.name}]({link}), {len(results.rows)} runs, {seconds:.0f} s of "
        f"{cores} in all; {where['device']}, torch {where['torch']}, {where['date'][:10]}, "
        f"commit {', '.join(commits)}."
    )


def write(studies: list[Study], folders: Folders) -> None:
    folders.docs.mkdir(parents=True, exist_ok=True)
    folders.page.write_text(build(studies, folders, folders.docs))
