"""Pieces of Markdown, and the results file they are made from."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

MISSING = "-"


class Results(NamedTuple):
    path: Path  # relative to the repository root
    environment: dict
    rows: list[dict]

    def source(self, up: str = "") -> str:
        where = self.environment
        on_gpu = where.get("capability", "")[:1].isdigit()
        triton = f", triton {where['triton']}" if on_gpu else ""
        changed = " with changes" if where.get("dirty") else ""
        return (
            f"{where['device']}, torch {where['torch']}{triton}, {where['date'][:10]}, commit "
            f"{(where['commit'] or 'unknown')[:8]}{changed}: "
            f"[{self.path.name}]({up}{self.path.as_posix()})."
        )


def table(header: Iterable[str], lines: Iterable[Iterable[str]], left: int = 1) -> str:
    """Markdown; the first ``left`` columns flush left, the others right."""
    header = list(header)
    rule = ["---"] * left + ["--:"] * (len(header) - left)
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (header, rule, *lines))


def bullet(text: str) -> str:
    return textwrap.fill(f"- {text}", 100, subsequent_indent="  ", break_on_hyphens=False)


def number(value: float | None, spec: str = ".2f", factor: float = 1.0) -> str:
    return MISSING if value is None else format(value * factor, spec)
