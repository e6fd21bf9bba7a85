"""Docstrings name functions and classes as Sphinx does: here they become links."""

from __future__ import annotations

import re

import griffe

_ROLE = re.compile(r":(?:class|data|func|meth|mod):`([\w.]+)`")


def _link(match: re.Match) -> str:
    """A full name is a link, which must lead somewhere; a short one is set as code."""
    name = match[1]
    if not name.startswith("fused_siglip."):
        return f"`{name}`"
    return f"[`{name.rpartition('.')[2]}`][{name}]"


class Roles(griffe.Extension):
    def on_instance(self, *, obj: griffe.Object, **_: object) -> None:
        if obj.docstring is not None:
            obj.docstring.value = _ROLE.sub(_link, obj.docstring.value)
