"""Tables and other pieces of text, for pages in Markdown and for the terminal."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable

MISSING = "-"


def table(header: Iterable[str], lines: Iterable[Iterable[str]], left: int = 1) -> str:
    """Markdown; the first ``left`` columns flush left, the others right."""
    header = list(header)
    rule = ["---"] * left + ["--:"] * (len(header) - left)
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (header, rule, *lines))


def bullet(text: str) -> str:
    return textwrap.fill(f"- {text}", 100, subsequent_indent="  ", break_on_hyphens=False)


def number(value: float | None, spec: str = ".2f", factor: float = 1.0) -> str:
    return MISSING if value is None else format(value * factor, spec)


def aligned(header: Iterable[str], lines: Iterable[Iterable[str]]) -> str:
    """A table for the terminal: the first column flush left, the others right."""
    rows = [list(header), *map(list, lines)]
    first, *widths = (max(map(len, column)) for column in zip(*rows, strict=True))
    line = "  ".join([f"{{:<{first}}}", *(f"{{:>{width}}}" for width in widths)])
    return "\n".join(line.format(*row) for row in rows)
