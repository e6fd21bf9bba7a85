"""The files of ``python -m fused_siglip --report``: one for programs, one to paste."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

JSON_FILE = "fused_siglip_report.json"
TEXT_FILE = "fused_siglip_report.txt"
FORMAT = 1  # grows when a field changes its meaning


def write(folder: Path, content: dict[str, Any], said: Sequence[str]) -> tuple[Path, Path]:
    """Write the results and the text that was printed into ``folder``, which is made if needed.

    The user's home folder, which tracebacks name, is written as ``~`` in both.
    """
    folder.mkdir(parents=True, exist_ok=True)
    files = folder / JSON_FILE, folder / TEXT_FILE
    # allow_nan: what is not finite has no number in JSON, and is a word
    structured = json.dumps(_finite({"format": FORMAT} | content), indent=1, allow_nan=False)
    home = str(Path.home())
    for file, text in zip(files, (structured, "\n".join(said)), strict=True):
        file.write_text(text.replace(home, "~") + "\n")
    return files


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(v) for key, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value
