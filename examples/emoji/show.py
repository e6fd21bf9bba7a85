"""What queries found: lines for a terminal, and a picture."""

from __future__ import annotations

import base64
import os
import sys
import unicodedata
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import NamedTuple, TextIO
from unicodedata import east_asian_width

from .data import ATTRIBUTION, drawing, png
from .search import Index

WITHOUT_EMOJI = {"linux", "dumb"}  # terminals: the console of Linux, and one that knows nothing
# of the picture, in pixels before ZOOM
COLUMN, ROW, MARGIN, FOOT = 620, 72, 20, 36
LABEL, PICTURE = 230, 72
ZOOM = 2
GREY = "#666"
# DejaVu comes with matplotlib. Where a machine has no font for Chinese, Japanese or Korean, the
# line below the query still says in English what it means.
FONTS = "DejaVu Sans, Noto Sans CJK SC, Noto Sans JP, Noto Sans KR, sans-serif"


class Query(NamedTuple):
    text: str
    says: str  # its language, and what it means in English


# One a language. The demo says which are spelled like a name to train with.
QUERIES = (
    Query("red apple", "English"),
    Query("un gato durmiendo", "Spanish: a sleeping cat"),
    Query("夜の月", "Japanese: the moon at night"),
    Query("노란 별", "Korean: yellow star"),
    Query("sol e chuva", "Portuguese: sun and rain"),
    Query("bandiera spagnola", "Italian: Spanish flag"),
    Query("automobile rouge", "French: red car"),
    Query("rote Erdbeere", "German: red strawberry"),
    Query("ماهی", "Persian: fish"),
    Query("burung hitam", "Indonesian: black bird"),
    Query("大飞机", "Chinese: big airplane"),
    Query("зелёное дерево", "Russian: green tree"),
    Query("mutlu kedi", "Turkish: happy cat"),
    Query("قطار سريع", "Arabic: fast train"),
)


def shows_emoji(stream: TextIO) -> bool:
    """Whether a terminal or file can take emoji, as far as its encoding and TERM tell."""
    try:
        "\U0001f408".encode(stream.encoding or "ascii")
    except UnicodeEncodeError:
        return False
    return os.environ.get("TERM") not in WITHOUT_EMOJI


def lines(index: Index, texts: Sequence[str], notes: Sequence[str]) -> str:
    """A line a query: five emoji and the name of the first, or five names."""
    emoji = shows_emoji(sys.stdout)
    width = max(map(columns, texts))
    out = []
    for text, note, best in zip(texts, notes, index.search(texts), strict=True):
        answer = ", ".join(index.names[best])
        if emoji:
            answer = f"{' '.join(index.characters[best])}  {index.names[best[0]]}"
        out.append(f"{text}{' ' * (width - columns(text))}  {answer}{note}")
    return "\n".join(out)


def columns(text: str) -> int:
    """How many a terminal takes: letters of Chinese, Japanese and Korean take two."""
    return sum(
        0 if unicodedata.combining(letter) else 2 if east_asian_width(letter) in "WF" else 1
        for letter in text
    )


def contact_sheet(index: Index, queries: Sequence[Query], path: Path) -> None:
    """A PNG of each query and the five pictures it found, most similar first."""
    import matplotlib
    import resvg_py

    fonts = Path(matplotlib.get_data_path()) / "fonts/ttf"  # DejaVu, where a machine has no font
    rows = (len(queries) + 1) // 2
    height = MARGIN + rows * ROW + FOOT
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{2 * COLUMN}" height="{height}">',
        '<rect width="100%" height="100%" fill="#fff"/>',
    ]
    found = index.search([query.text for query in queries])
    for place, (query, best) in enumerate(zip(queries, found, strict=True)):
        column, row = divmod(place, rows)
        parts += _row(query, index.characters[best], MARGIN + column * COLUMN, MARGIN + row * ROW)
    parts += [_text(ATTRIBUTION, MARGIN, height - 14, 12, GREY), "</svg>"]
    sheet = resvg_py.svg_to_bytes(svg_string="".join(parts), zoom=ZOOM, font_dirs=[str(fonts)])
    path.write_bytes(bytes(sheet))


def _row(query: Query, characters: Sequence[str], x: int, y: int) -> list[str]:
    parts = [
        _text(query.text, x, y + 30, 22, "#222"),
        _text(query.says, x, y + 52, 13, GREY),
    ]
    for rank, character in enumerate(characters):
        picture = base64.b64encode(png(drawing(character), ZOOM * PICTURE)).decode()
        parts.append(
            f'<image x="{x + LABEL + rank * PICTURE}" y="{y}" width="{PICTURE}" '
            f'height="{PICTURE}" href="data:image/png;base64,{picture}"/>'
        )
    return parts


def _text(text: str, x: int, y: int, size: int, color: str) -> str:
    return (
        f'<text x="{x}" y="{y}" font-size="{size}" fill="{color}" '
        f'font-family="{FONTS}">{escape(text)}</text>'
    )
