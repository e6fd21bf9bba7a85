"""The programs in README.md and docs/."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
_BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)


def pages() -> list[str]:
    """Every page with a program, as paths from the repository's root."""
    files = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]
    return [file.relative_to(ROOT).as_posix() for file in files if blocks(file)]


def blocks(file: Path) -> list[str]:
    return _BLOCK.findall(file.read_text())


def run(page: str, **names: Any) -> dict[str, Any]:
    """Run the programs of a page one after the other; returns the names they leave."""
    namespace: dict[str, Any] = {"__name__": page, **names}
    for number, block in enumerate(blocks(ROOT / page)):
        exec(compile(block, f"{page}, block {number}", "exec"), namespace)
    return namespace
