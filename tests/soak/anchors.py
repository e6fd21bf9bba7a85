"""Places in the package, named by a function and an expression or statement in it.

A reformatted line, a new comment, a function that moved to another file or that became private
changes nothing. In a pattern ``ANY`` stands for any expression, ``ANY1`` to ``ANY9`` likewise: such
a name stands for the same expression throughout, and in the replacement for its text. ``*ANY`` and
``**ANY`` stand for the other arguments of a call.
"""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

FOLDERS = ("fused_siglip", "kernels")
NEW_LINE = "\n"


class Place(NamedTuple):
    """Part of a file's text, and what the names of the pattern stand for there."""

    path: Path
    start: int
    end: int
    names: dict[str, str]


def pattern_of(text: str) -> ast.AST:
    """The node of an expression, or of a statement."""
    (statement,) = ast.parse(text).body
    return statement.value if isinstance(statement, ast.Expr) else statement


def _wildcard(node: object) -> str | None:
    found = isinstance(node, ast.Name) and re.fullmatch(r"ANY\d?", node.id)
    return node.id if found else None


def matches(pattern: object, node: object, names: dict[str, ast.AST]) -> bool:
    """Whether a node is one of the pattern's; ``names`` takes what its names stand for."""
    wildcard = _wildcard(pattern)
    if wildcard == "ANY":
        return isinstance(node, ast.expr)
    if wildcard:
        known = names.setdefault(wildcard, node)
        return isinstance(node, ast.expr) and ast.dump(_loaded(known)) == ast.dump(_loaded(node))
    if type(pattern) is not type(node):
        return False
    if isinstance(pattern, ast.Call):
        return _matches_call(pattern, node, names)
    if isinstance(pattern, list):
        pairs = zip(pattern, node, strict=False)
        return len(pattern) == len(node) and all(matches(p, n, names) for p, n in pairs)
    if isinstance(pattern, ast.AST):
        # whether a name is read or written shows in where it stands
        fields = [f for f in pattern._fields if f not in ("ctx", "type_comment", "kind")]
        return all(matches(getattr(pattern, f), getattr(node, f), names) for f in fields)
    return pattern == node


def _matches_call(pattern: ast.Call, node: ast.Call, names: dict[str, ast.AST]) -> bool:
    arguments, keywords = list(pattern.args), {k.arg: k.value for k in pattern.keywords}
    more = arguments and isinstance(arguments[-1], ast.Starred) and _wildcard(arguments[-1].value)
    if more:
        arguments.pop()
    others = None in keywords and _wildcard(keywords[None]) and keywords.pop(None)
    given = {k.arg: k.value for k in node.keywords}
    if len(node.args) < len(arguments) or (not more and len(node.args) > len(arguments)):
        return False
    if not keywords.keys() <= given.keys() or (not others and keywords.keys() != given.keys()):
        return False
    return (
        matches(pattern.func, node.func, names)
        and all(matches(p, n, names) for p, n in zip(arguments, node.args, strict=False))
        and all(matches(value, given[name], names) for name, value in keywords.items())
    )


def _loaded(node: ast.AST) -> ast.AST:
    """An expression as it is read, so that a target equals its value's name."""
    return ast.parse(ast.unparse(node), mode="eval").body


def functions(tree: ast.Module, name: str, strip: str) -> Iterator[ast.AST]:
    """The functions of that name, "Class.method" of a class; the whole module for "".

    ``strip`` is what may stand before or after the name.
    """
    if not name:
        yield tree
        return
    owner, _, method = name.rpartition(".")
    scopes = [tree]
    if owner:
        scopes = [n for n in ast.walk(tree) if isinstance(n, ast.ClassDef) and n.name == owner]
    for scope in scopes:
        for node in ast.walk(scope):
            if isinstance(node, ast.FunctionDef) and node.name.strip(strip) == method.strip(strip):
                yield node


def _statements(function: ast.AST, name: str) -> Iterator[ast.AST]:
    """What a pattern may be: of a module only its own statements, which define its constants."""
    if name:
        yield from ast.walk(function)
    else:
        yield from function.body


def _offset(text: str, line: int, column: int) -> int:
    """From ast's line and column, in bytes, to an index of the text."""
    lines = text.split(NEW_LINE)
    before = sum(len(row) + 1 for row in lines[: line - 1])
    return before + len(lines[line - 1].encode()[:column].decode())


_parsed = functools.lru_cache(maxsize=256)(ast.parse)  # every mutation looks through all files


def places(root: Path, function: str, pattern: str, strip: str = "") -> list[Place]:
    """Where in the package the pattern occurs, in functions of that name."""
    wanted, found = pattern_of(pattern), {}
    for path in sorted(p for folder in FOLDERS for p in (root / folder).rglob("*.py")):
        text = path.read_text()
        for scope in functions(_parsed(text), function, strip):
            for node in _statements(scope, function):
                names: dict[str, ast.AST] = {}
                if not matches(wanted, node, names):
                    continue
                start = _offset(text, node.lineno, node.col_offset)
                end = _offset(text, node.end_lineno, node.end_col_offset)
                meanings = {k: ast.get_source_segment(text, v) for k, v in names.items()}
                # one that a link leads to, or that lies in a function inside another, is one place
                found[path.resolve(), start, end] = Place(path.resolve(), start, end, meanings)
    return list(found.values())


def find(root: Path, function: str, pattern: str) -> Place:
    """The one place of a pattern; ValueError where there is none, or more than one."""
    found = places(root, function, pattern) or places(root, function, pattern, strip="_")
    if len(found) != 1:
        where = f"in {function}" if function else "at the top of a module"
        raise ValueError(f"{pattern!r} occurs {len(found)} times {where}: expected once")
    return found[0]


def replaced(place: Place, new: str) -> str:
    """The text of the file with the place changed."""
    text = place.path.read_text()
    new = re.sub(r"\bANY\d\b", lambda name: place.names[name[0]], new)
    return text[: place.start] + new + text[place.end :]
