"""Functions and their docstrings, from the sources of the standard library, numpy and torch.

Text-text pairs by the thousands without a download: a function's source without its docstring, and
the first paragraph of that docstring. Which functions there are depends on the installed versions
and on nothing else.
"""

from __future__ import annotations

import ast
import importlib.util
import re
import sysconfig
import warnings
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy.sparse import csr_array

PACKAGES = ("stdlib", "numpy", "torch")
# Folders of tests, of copies of other packages, and of what is installed beside the library.
SKIPPED = {"test", "tests", "testing", "idle_test", "idlelib", "lib2to3", "turtledemo"}
SKIPPED |= {"site-packages", "dist-packages", "ensurepip", "third_party"}
SKIPPED |= {"vendor", "vendored", "vendored_templates", "_vendor", "_vendored"}
MIN_WORDS, MAX_WORDS = 4, 60  # of a docstring's first paragraph
MIN_CODE_WORDS = 8  # of a body
COMMON = 3  # a docstring that more functions than this have says nothing about any of them
NEAR = 0.8  # Jaccard index of two sets of words, from which one is a near copy of the other
SHARES = {"test": 15, "tune": 10}  # percent of the modules; the others are to train with

SIGNATURE = re.compile(r"[\w.]+\(.*\)(\s*->.*)?$", re.S)
BOILERPLATE = re.compile(
    r"(see |refer to |deprecated|overrides? |override |implements? |alias |same as |inherited"
    r"|todo|note:|args?:|arguments:|parameters|returns:|\.\. |>>>|@)",
    re.I,
)
WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+")


@dataclass(frozen=True)
class Pair:
    module: str  # "torch.nn.functional"
    signature: str  # from def to the colon
    body: str  # without the docstring
    text: str  # first paragraph of the docstring

    @property
    def code(self) -> str:
        return f"{self.signature}\n{self.body}"


def words(text: str) -> list[str]:
    """Words in lower case: identifiers are taken apart, digits and signs dropped."""
    return [word.lower() for word in WORD.findall(text)]


def normalised(text: str) -> tuple[str, ...]:
    """What two texts share when one is the other with other numbers, signs or word order."""
    return tuple(sorted(set(words(text))))


def sources(package: str) -> Iterator[tuple[str, Path]]:
    """(module, file), sorted."""
    if package == "stdlib":
        root, prefix = Path(sysconfig.get_paths()["stdlib"]), ()
    else:
        root, prefix = Path(importlib.util.find_spec(package).origin).parent, (package,)
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        if not SKIPPED.intersection(parts):
            yield ".".join(prefix + parts).removesuffix(".__init__"), path


def functions(module: str, source: str) -> Iterator[Pair]:
    """Those of one file that one can learn from: methods too, but no function inside another."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the source's own, such as an invalid escape
            tree = ast.parse(source)
    except SyntaxError:  # a template of Python
        return
    lines = source.split("\n")  # as ast counts them: a form feed ends no line
    waiting: list[ast.AST] = [tree]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            pair = _pair(module, node, lines)
            if pair is not None:
                yield pair
        else:
            waiting += [
                child for child in ast.iter_child_nodes(node) if isinstance(child, ast.stmt)
            ]


def _pair(
    module: str, node: ast.FunctionDef | ast.AsyncFunctionDef, lines: list[str]
) -> Pair | None:
    docstring = ast.get_docstring(node)
    first = node.body[0]
    if docstring is None or first.lineno == node.lineno:
        return None
    text = " ".join(docstring.split("\n\n")[0].split())
    if SIGNATURE.match(text) or BOILERPLATE.match(text):
        return None
    signature = "\n".join(lines[node.lineno - 1 : first.lineno - 1])
    body = "\n".join(lines[first.end_lineno : node.end_lineno])
    if not MIN_WORDS <= len(words(text)) <= MAX_WORDS or len(words(body)) < MIN_CODE_WORDS:
        return None
    return Pair(module, signature, body, text)


def harvest(packages: tuple[str, ...] = PACKAGES) -> list[Pair]:
    """All pairs, no two with the same text or the same body (:func:`normalised`)."""
    found = [
        pair
        for package in packages
        for module, path in sources(package)
        for pair in functions(module, path.read_text(encoding="utf-8", errors="ignore"))
    ]
    texts = [normalised(pair.text) for pair in found]
    count = Counter(texts)
    kept, seen = [], set()
    for pair, text in zip(found, texts, strict=True):
        body = normalised(pair.body)
        if count[text] <= COMMON and ("text", text) not in seen and ("body", body) not in seen:
            kept.append(pair)
            seen |= {("text", text), ("body", body)}
    return kept


def side(module: str) -> str:
    """Which part a module belongs to: "train", "tune" or "test"."""
    place = zlib.crc32(module.encode()) % 100
    for name, share in SHARES.items():
        if place < share:
            return name
        place -= share
    return "train"


def split(pairs: list[Pair]) -> dict[str, list[Pair]]:
    """Split by whole modules; no pair of "train" is a near copy of one to test or tune with."""
    parts: dict[str, list[Pair]] = {name: [] for name in ("train", *SHARES)}
    for pair in pairs:
        parts[side(pair.module)].append(pair)
    held_out = [pair for name in SHARES for pair in parts[name]]
    copies = near_copies(parts["train"], held_out)
    parts["train"] = [p for p, copy in zip(parts["train"], copies, strict=True) if not copy]
    return parts


def near_copies(pairs: list[Pair], others: list[Pair]) -> np.ndarray:  # (pairs,) bool
    """Which of ``pairs`` share nearly all words of the text, or of the body, with an other."""
    copies = np.zeros(len(pairs), dtype=bool)
    for field in ("text", "body"):
        a, b = ([normalised(getattr(p, field)) for p in group] for group in (pairs, others))
        columns = {word: i for i, word in enumerate(sorted({w for key in a + b for w in key}))}
        left, right = (_indicators(keys, columns) for keys in (a, b))
        shared = (left @ right.T).tocoo()
        sizes = left.sum(axis=1)[shared.row] + right.sum(axis=1)[shared.col]
        copies[shared.row[shared.data >= NEAR * (sizes - shared.data)]] = True
    return copies


def _indicators(keys: list[tuple[str, ...]], columns: dict[str, int]) -> csr_array:
    """(keys, words): 1 where the key has the word."""
    ends = np.cumsum([0] + [len(key) for key in keys])
    indices = np.array([columns[word] for key in keys for word in key], dtype=np.int64)
    ones = np.ones(len(indices), dtype=np.int32)
    return csr_array((ones, indices, ends), shape=(len(keys), len(columns)))
