"""The loss in other people's training stacks: one file a stack, imported only when used."""

from __future__ import annotations

import importlib.metadata


def require(package: str, versions: str) -> None:
    """Refuse a training stack that is missing, or whose version was not tried.

    package: its name on PyPI. versions: the releases that work, as pip writes them (">=5.0,<6").
    Raises ImportError naming the package, the version found and the versions that work.
    """
    try:
        found = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        raise ImportError(
            f"{package} is not installed: expected {package}{versions} "
            f"(pip install '{package}{versions}')"
        ) from None
    from packaging.specifiers import SpecifierSet  # every stack brings it

    if not SpecifierSet(versions).contains(found, prereleases=True):
        raise ImportError(
            f"{package} {found} is installed: this integration is known to work with "
            f"{package}{versions}"
        )
