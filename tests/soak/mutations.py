"""``make mutations``: break the package on purpose, in one place at a time; some test must notice.

The table of breaks is in mutation_table.py. Every mutation is made in a scratch copy of the tree,
where the quick tests run until the first failure. What is printed says which test that was; a
mutation that none catches is a status of 1.
"""

from __future__ import annotations

import argparse
import ast
import multiprocessing
import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from soak import anchors
from soak.mutation_table import MUTATIONS, Mutation

ROOT = Path(__file__).resolve().parents[2]
# The tests that run for a mutation, the first to fail being the one that caught it.
QUICK = {
    "torch": [*(f"tests/core/test_{name}.py" for name in (
                  "weights", "weights_validation",
                  "invariants", "loss", "single_panel", "autograd", "negatives", "totals",
                  "torch_panel")),
              "-m", "not interpreter and not exhaustive"],
    "triton": [*(f"tests/triton_backend/test_triton_{name}.py" for name in (
                   "panel", "math", "selection", "products", "weights")),
               *(f"tests/core/test_{name}.py" for name in (
                   "invariants", "loss", "single_panel", "negatives", "totals")),
               "-m", "interpreter and not exhaustive"],
    "distributed": ["tests/distributed/test_distributed.py",
                    "tests/distributed/test_negatives_group.py",
                    "tests/distributed/test_weights_group.py",
                    "-k", "test_every_split and (2 or 3) or weights_of_1",
                    "-m", "not exhaustive"],
    "scores": ["tests/core/test_score_panels.py", "tests/core/test_scores.py",
               "-m", "not interpreter and not exhaustive"],
    "triton scores": ["tests/core/test_score_panels.py", "tests/core/test_scores.py",
                      "-m", "interpreter and not exhaustive"],
    "distributed scores": ["tests/distributed/test_scores_group.py",
                           "-k", "(test_every_split or alike) and not test_every_split[1]"],
}  # fmt: skip


def check(root: Path, mutation: Mutation) -> anchors.Place:
    """The place of a mutation; ValueError where it is not one place, or would change nothing."""
    try:
        place = anchors.find(root, mutation.function, mutation.old)
    except ValueError as error:
        raise ValueError(f"{mutation.what} ({mutation.tests}): {error}") from None
    changed = anchors.replaced(place, mutation.new)
    if ast.dump(ast.parse(changed)) == ast.dump(ast.parse(place.path.read_text())):
        raise ValueError(f"{mutation.what} ({mutation.tests}): {mutation.new!r} changes nothing")
    return place


@contextmanager
def scratch_copy() -> Iterator[Path]:
    """The tree as it is installed: kernels lies inside the package."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder, "tree")
        ignore = shutil.ignore_patterns("__pycache__", ".*", "results", "*.png", "*.egg-info")
        for name in ("fused_siglip", "tests", "benchmarks"):
            shutil.copytree(ROOT / name, root / name, ignore=ignore)
        (root / "kernels").symlink_to("fused_siglip/kernels")
        shutil.copy(ROOT / "pyproject.toml", root)
        yield root


def _run_pytest(root: str, arguments: list[str], interpret: bool, output: str) -> None:
    """In a process of its own, which has torch but nothing of the package yet."""
    os.chdir(root)
    sys.path[:0] = [root, f"{root}/tests"]
    sys.dont_write_bytecode = True  # .pyc files cannot tell edits within a second apart
    os.environ |= {"PYTHONPATH": root, "PYTHONDONTWRITEBYTECODE": "1"}
    os.environ["TRITON_INTERPRET"] = str(int(interpret))
    os.environ["HYPOTHESIS_PROFILE"] = "first failure"  # no time to make it smaller
    os.environ["COLUMNS"] = "250"  # pytest cuts what a test said to the width of the terminal
    with open(output, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    import torch

    import fused_siglip.kernels

    if not fused_siglip.kernels.__file__.startswith(root):
        raise RuntimeError(f"not the scratch copy is imported but {fused_siglip.kernels.__file__}")
    torch.set_num_threads(1)
    quiet = ["-q", "-p", "no:cacheprovider", "-W", "ignore:Module already imported"]
    sys.exit(pytest.main(["-x", *quiet, *arguments]))


def first_failure(root: Path, group: str, arguments: list[str]) -> tuple[str, str] | None:
    """The first of these tests that fails in ``root`` and what it says, or None."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "hypothesis", "pytest"])
    output = root.parent / "output"
    process = context.Process(
        target=_run_pytest, args=(str(root), arguments, group.startswith("triton"), str(output))
    )
    process.start()
    process.join()
    said = output.read_text()
    found = re.search(r"^(?:FAILED|ERROR) (\S+::.+?)(?: - (.*))?$", said, re.MULTILINE)
    if process.exitcode == pytest.ExitCode.TESTS_FAILED and found:
        return found[1], found[2] or ""
    if process.exitcode != pytest.ExitCode.OK:
        raise RuntimeError(f"pytest ended with {process.exitcode}:\n{said[-2000:]}")
    return None


def _as_installed(root: Path, path: Path) -> str:
    """The path in the repository: kernels/ lies outside the package there."""
    name = path.relative_to(root.resolve()).as_posix()
    return name.removeprefix("fused_siglip/") if "fused_siglip/kernels" in name else name


def run(mutations: Sequence[Mutation]) -> Iterator[dict]:
    """A row for each mutation. At the end, what caught one must pass without any."""
    caught: dict[str, set[str]] = {}
    with scratch_copy() as root:
        for mutation in mutations:
            place = check(root, mutation)
            text = place.path.read_text()
            place.path.write_text(anchors.replaced(place, mutation.new))
            start = time.monotonic()
            failed = first_failure(root, mutation.tests, QUICK[mutation.tests])
            place.path.write_text(text)
            if failed:
                caught.setdefault(mutation.tests, set()).add(failed[0])
            yield {
                "kind": "mutation",
                **mutation._asdict(),
                "file": _as_installed(root, place.path),
                "caught_by": failed and failed[0].rpartition("/")[2],
                "said": failed and failed[1],
                "seconds": time.monotonic() - start,
            }
        for group, tests in caught.items():
            failed = first_failure(root, group, sorted(tests))
            if failed:
                raise RuntimeError(f"{failed[0]} fails without a mutation")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="mutations", description=__doc__)
    parser.add_argument("--only", nargs="+", default=[""], help="words of their descriptions")
    parser.add_argument("--tests", nargs="+", choices=QUICK, default=list(QUICK), help="groups")
    parser.add_argument("--output", type=Path, help="write a results file")
    args = parser.parse_args(arguments)
    # only here: the processes that run the tests must not have the package already
    from benchmarks.common.results import environment, write_results

    chosen = [m for m in MUTATIONS if m.tests in args.tests and any(w in m.what for w in args.only)]
    found, rows = environment(), []
    for row in run(chosen):
        rows.append(row)
        print(f"{row['what']} ({row['tests']}): {row['caught_by'] or 'CAUGHT BY NONE'}", flush=True)
        if args.output is not None:
            write_results("mutations", found, rows, args.output)
    missed = [row["what"] for row in rows if row["caught_by"] is None]
    print(f"\n{len(rows) - len(missed)} of {len(rows)} caught")
    for what in missed:
        print(f"caught by none: {what}")
    return int(bool(missed))


if __name__ == "__main__":
    sys.exit(main())
