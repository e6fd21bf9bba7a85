"""Sizes that keep the package readable. Ruff holds the numbers of arguments and branches."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# The public function is mostly its documentation.
LONG = {"siglip_loss"}


def files() -> list[Path]:
    package = (ROOT / "fused_siglip").rglob("*.py")
    kernels = (ROOT / "kernels").rglob("*.py")
    return sorted({path.resolve() for path in (*package, *kernels)})


def functions(path: Path) -> Iterator[ast.FunctionDef]:
    """Without those that Triton compiles, which cannot be divided freely."""
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.FunctionDef):
            continue
        if not any("jit" in ast.unparse(decorator) for decorator in node.decorator_list):
            yield node


@pytest.mark.parametrize("path", files(), ids=lambda path: path.relative_to(ROOT).as_posix())
def test_files_and_functions_are_short(path):
    assert len(path.read_text().splitlines()) <= 350
    lengths = {f.name: f.end_lineno - f.lineno + 1 for f in functions(path)}
    assert {name for name, lines in lengths.items() if lines > 60} <= LONG
