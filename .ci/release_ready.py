"""`make release-ready TAG=v1.2.3`: whether a tag may be published.

The tag is the version, CHANGELOG.md has a section of it with a date, and no placeholder is left.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path


def obstacles(root: Path, tag: str) -> list[str]:
    """What keeps ``tag`` from being published, a sentence each."""
    package = (root / "fused_siglip/__init__.py").read_text()
    version = re.search(r'^__version__ = "(.+)"$', package, re.MULTILINE)[1]
    found = []
    if tag != f"v{version}":
        found.append(f"the tag is {tag} and the version is {version}: expected v{version}")
    heading = rf"^## \[{re.escape(version)}\] - \d{{4}}-\d{{2}}-\d{{2}}$"
    if not re.search(heading, (root / "CHANGELOG.md").read_text(), re.MULTILINE):
        found.append(f"CHANGELOG.md has no dated section: expected ## [{version}] - YYYY-MM-DD")
    if "OWNER" in re.sub(r"^#.*$", "", (root / "pyproject.toml").read_text(), flags=re.MULTILINE):
        found.append("pyproject.toml names OWNER: expected the repository's owner")
    return found


if __name__ == "__main__":
    problems = obstacles(Path(__file__).resolve().parents[1], sys.argv[1])
    print("\n".join(problems) or f"{sys.argv[1]} may be published")
    sys.exit(bool(problems))
