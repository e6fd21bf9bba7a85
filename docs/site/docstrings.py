"""What the API reference takes from the code besides docstrings as they are.

Docstrings name functions and classes as Sphinx does; these names become links. The fields of a
class are described by a comment behind or above them, which becomes their docstring.
"""

from __future__ import annotations

import re

import griffe

_ROLE = re.compile(r":(?:class|data|func|meth|mod):`([\w.]+)`")
_BEHIND = re.compile(r"  # (.+)$")
_ABOVE = re.compile(r"^\s*# ?(.*)$")


def _link(match: re.Match) -> str:
    """A full name is a link, which must lead somewhere; a short one is set as code."""
    name = match[1]
    if not name.startswith("fused_siglip."):
        return f"`{name}`"
    return f"[`{name.rpartition('.')[2]}`][{name}]"


def _comment(field: griffe.Attribute) -> str:
    """The comment behind a field, or the lines of comment above it."""
    lines = field.lines_collection[field.filepath]
    behind = _BEHIND.search(lines[field.endlineno - 1])
    if behind:
        return behind[1]
    found: list[str] = []
    for line in reversed(lines[: field.lineno - 1]):
        above = _ABOVE.match(line)
        if above is None:
            break
        found.insert(0, above[1])
    return "\n".join(found)


class Docstrings(griffe.Extension):
    def on_instance(self, *, obj: griffe.Object, **_: object) -> None:
        if obj.docstring is not None:
            obj.docstring.value = _ROLE.sub(_link, obj.docstring.value)

    def on_attribute_instance(self, *, attr: griffe.Attribute, **_: object) -> None:
        of_class = attr.parent is not None and attr.parent.is_class
        if of_class and attr.docstring is None and attr.lineno is not None:
            comment = _comment(attr)
            if comment:
                attr.docstring = griffe.Docstring(comment, parent=attr)
