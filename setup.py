"""The long description is README.md, with links into the repository. The rest: pyproject.toml."""

import re
from pathlib import Path

from setuptools import setup

HERE = Path(__file__).parent
REPOSITORY = re.search(r'^Repository = "(.+)"$', (HERE / "pyproject.toml").read_text(), re.M)[1]


def absolute(link: re.Match) -> str:
    """A link to a file of the repository, for a page that is shown elsewhere."""
    kind = "raw" if link[1].startswith("!") else "blob"
    return f"{link[1]}({REPOSITORY}/{kind}/main/{link[2]})"


README = (HERE / "README.md").read_text()
setup(
    long_description=re.sub(r"(!?\[[^][]*\])\(((?!https?:|#)[^)\s]+)\)", absolute, README),
    long_description_content_type="text/markdown",
)
