"""What the site shows besides docs/: README.md as its first page, and files that pages link to.

Pages are written for the repository, where a link to a file outside of docs/ works. On the site
such a file is a page of its own under repository/, and so are the files that these link to.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[2]
HOME, OUTSIDE = "index.md", "repository/"
PLACES = {"README.md": HOME}  # where a file of the repository is on the site, if not in OUTSIDE
LANGUAGES = {".py": "python", ".md": "markdown", ".toml": "toml", ".yml": "yaml"}
# Those that are pages as they are; of others the text is shown.
PROSE = ("benchmarks/README.md", "CHANGELOG.md")

_LINK = re.compile(r"\[([^][]*)\]\(([^)\s#]+)(#[^)]*)?\)")


def _place(path: str) -> str:
    """Where a file of the repository is on the site, before it becomes HTML."""
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    page = path if path.endswith((".md", ".json")) else f"{path}.md"
    return PLACES.get(path, OUTSIDE + page)


def _target(link: str, origin: str) -> str | None:
    """The file or folder of the repository that a link in a file of it leads to."""
    path = posixpath.normpath(posixpath.join(posixpath.dirname(origin), link))
    if ":" in link or path.startswith("..") or not (ROOT / path).exists():
        return None
    return path


def _origin(src_uri: str) -> str:
    """The file of the repository that a page of the site is made of."""
    if src_uri == HOME:
        return "README.md"
    if src_uri.startswith(OUTSIDE):
        return src_uri.removeprefix(OUTSIDE)
    return f"docs/{src_uri}"


def _content(path: str) -> str:
    text = (ROOT / path).read_text()
    if path in PROSE or path in PLACES:
        return text
    language = LANGUAGES.get(Path(path).suffix, "text")
    return f"---\nsearch: {{exclude: true}}\n---\n\n# {path}\n\n````{language}\n{text}\n````\n"


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add README.md and every file outside of docs/ that a page leads to."""
    waiting = ["README.md", *PROSE]
    waiting += [f"docs/{file.src_uri}" for file in files.documentation_pages()]
    seen = set(waiting)
    while waiting:
        path = waiting.pop()
        if not path.startswith("docs/"):
            make = {"content": _content(path)}
            if path.endswith(".json"):
                make = {"abs_src_path": str(ROOT / path)}
            level = InclusionLevel.NOT_IN_NAV  # a warning less where it is not
            files.append(File.generated(config, _place(path), inclusion=level, **make))
        if not (path.startswith("docs/") or path in PROSE or path in PLACES):
            continue
        for match in _LINK.finditer((ROOT / path).read_text()):
            target = _target(match[2], path)
            inside = target is None or target.startswith("docs/") or (ROOT / target).is_dir()
            if not inside and target not in seen:
                seen.add(target)
                waiting.append(target)
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn links between files of the repository into links between pages of the site."""
    here = posixpath.dirname(page.file.src_uri)
    origin = _origin(page.file.src_uri)
    if not (origin.startswith("docs/") or origin in PROSE or origin in PLACES):
        return markdown  # the text of a file, in which nothing is a link

    def moved(match: re.Match) -> str:
        target = _target(match[2], origin)
        if target is None:
            return match[0]
        if (ROOT / target).is_dir():  # the site has no page of it
            return match[1]
        there = posixpath.relpath(_place(target), here or ".")
        return f"[{match[1]}]({there}{match[3] or ''})"

    return _LINK.sub(moved, markdown)
