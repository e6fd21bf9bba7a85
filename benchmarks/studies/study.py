"""A study: its runs, one file of results that a run resumes from, and its section of the page."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from scipy.stats import t as student

SEEN, NOT_SEEN, OPPOSITE = "Seen", "Not seen at this scale", "Opposite"
CLAIM = re.compile(rf"^(?:- )?\*\*({SEEN}|{NOT_SEEN}|{OPPOSITE})\*\*: (.+?) \[(.+?)\]\.", re.M)


@dataclass(frozen=True)
class Study:
    name: str  # results/<name>.json, docs/paper_<name>.png
    cells: Callable[[bool], list[dict]]  # quick -> parameters of each run: JSON-able, all different
    run: Callable[[dict], dict]  # one cell -> result, JSON-able; seeded: nothing else decides it
    # rows {**cell, **result, "seconds"}, folder for the PNG -> Markdown, from "## Title" on
    section: Callable[[list[dict], Path], str]
    alone: bool = False  # it measures time: runs by itself with all threads, not beside other cells
    obstacle: Callable[[], str | None] = lambda: None  # why it cannot run here, if so


class ResultsFile:
    """One study's runs. Written after every cell, whole or not at all: a kill loses no other."""

    def __init__(self, path: Path):
        self.path = path
        content = json.loads(path.read_text()) if path.exists() else {"runs": []}
        self.environment: dict | None = content.get("environment")  # of the latest run
        self.runs = {_key(run["cell"]): run for run in content["runs"]}

    @property
    def rows(self) -> list[dict]:
        return [{**run["cell"], **run["result"], "seconds": run["seconds"]} for run in self]

    def __iter__(self) -> Iterator[dict]:
        return iter(self.runs.values())

    def missing(self, cells: list[dict]) -> list[dict]:
        """The cells that were not run yet; runs of cells nobody asks for any more are dropped."""
        self.order = [_key(cell) for cell in cells]
        if len(set(self.order)) != len(cells):
            raise ValueError(f"{self.path.stem} has two cells of the same parameters")
        self._arrange()
        return [cell for cell, key in zip(cells, self.order, strict=True) if key not in self.runs]

    def _arrange(self) -> None:
        """Put runs in the order of the cells, whichever ended first."""
        self.runs = {key: self.runs[key] for key in self.order if key in self.runs}

    def add(self, cell: dict, result: dict, seconds: float, environment: dict) -> None:
        """Every run knows the commit it is of: several may have filled a file."""
        if taken := set(cell) & set(result):
            raise ValueError(f"{self.path.stem}: a result must not rename {taken} of its cell")
        self.environment = environment
        self.runs[_key(cell)] = {
            "cell": cell,
            "result": result,
            "seconds": round(seconds, 2),
            "commit": environment["commit"],
        }
        self._arrange()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        part = self.path.with_suffix(".part")
        lines = ",\n".join(map(json.dumps, self))  # a run is a line
        part.write_text(f'{{"environment": {json.dumps(environment)}, "runs": [\n{lines}\n]}}\n')
        os.replace(part, self.path)


def _key(cell: dict) -> str:
    return json.dumps(cell, sort_keys=True)


@dataclass(frozen=True)
class Interval:
    """95% interval of a mean over seeds (Student's t)."""

    mean: float
    half: float  # width on either side; infinite for a single value

    @property
    def low(self) -> float:
        return self.mean - self.half

    @property
    def high(self) -> float:
        return self.mean + self.half

    def points(self) -> str:
        """A difference of shares, in percentage points."""
        return f"{self.mean * 100:+.1f} ± {self.half * 100:.1f} points"


def minus(a: Iterable[float], b: Iterable[float], factor: float = 1.0) -> list[float]:
    """a - factor * b, seed by seed."""
    return [x - factor * y for x, y in zip(a, b, strict=True)]


def mean_and_range(values: Sequence[float]) -> str:
    """Of shares, one a seed."""
    mean = sum(values) / len(values)
    return f"{mean:.1%} ({min(values):.1%} to {max(values):.1%})"


def interval(values: Iterable[float]) -> Interval:
    values = list(values)
    n = len(values)
    mean = sum(values) / n
    if n == 1:
        return Interval(mean, float("inf"))
    variance = sum((value - mean) ** 2 for value in values) / (n - 1)
    return Interval(mean, float(student.ppf(0.975, n - 1)) * (variance / n) ** 0.5)


def above(differences: Iterable[float], bound: float = 0.0) -> str:
    """Verdict on "more than ``bound``", of differences that are paired by seed.

    Seen where the 95% interval of their mean lies above the bound, opposite where it lies below,
    otherwise not seen.
    """
    found = interval(differences)
    if found.low > bound:
        return SEEN
    return OPPOSITE if found.high < bound else NOT_SEEN


def above_unless(undecided: bool, differences: Iterable[float]) -> tuple[str, str]:
    """Verdict on "above 0" and its words; not seen where chance or a cap decides instead."""
    if undecided:
        return NOT_SEEN, "undecided by the rule below."
    return above(differences), "seen above 0."


def within(differences: Iterable[float], margin: float) -> str:
    """Verdict on "no more than ``margin`` apart": seen where the whole 95% interval lies within,
    opposite where all of it lies outside, otherwise not seen.
    """
    found = interval(differences)
    if -margin < found.low and found.high < margin:
        return SEEN
    return OPPOSITE if found.low > margin or found.high < -margin else NOT_SEEN


def claim(verdict: str, text: str, source: str, why: str) -> str:
    """The line that states a verdict; the page's first table is collected from these.

    ``text``: the claim in our words, without brackets or a full stop; ``source``: "section 4.2",
    of the paper unless it names another; ``why``: the rule with the numbers it was applied to.
    """
    return f"**{verdict}**: {text} [{source}]. {why}"


def claims(section: str) -> list[tuple[str, str, str]]:
    """(verdict, text, source) of every claim of a section."""
    return CLAIM.findall(section)
