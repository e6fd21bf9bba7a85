"""The list of mutations fits the code, and a run of it says which test caught one."""

import ast
import json
import os
import subprocess
import sys

import pytest

from soak import anchors, mutations

pytest.importorskip("tqdm")  # of benchmarks.common.timing


def test_every_mutation_finds_its_place():
    lost = []
    for mutation in mutations.MUTATIONS:
        assert mutation.tests in mutations.QUICK
        try:
            mutations.check(mutations.ROOT, mutation)
        except ValueError as error:
            lost.append(str(error))
    assert not lost, "\n".join(lost)


# In a process of its own: the forkserver of this one has the package already.
PROGRAM = """
import sys
from soak import mutations
sign = next(m for m in mutations.MUTATIONS if m.what == "positives keep the sign of negatives")
harmless = sign._replace(what="harmless", new=sign.old + ".view(-1)")
mutations.MUTATIONS = (sign, harmless)
mutations.QUICK["torch"] = ["tests/core/test_loss.py", "-k", "test_diagonal and torch and float32"]
sys.exit(mutations.main(["--output", sys.argv[1]]))
"""


def test_a_caught_and_a_missed_mutation(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path / "rows.json")],
        cwd=mutations.ROOT,
        env=os.environ | {"PYTHONPATH": "tests", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1, done.stderr
    caught, missed = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert caught["caught_by"].startswith(
        "test_loss.py::test_diagonal[torch-(1, 1, 1)-torch.float32"
    )
    assert missed["caught_by"] is None
    assert "1 of 2 caught" in done.stdout


def test_a_mutation_that_fits_nothing_is_an_error():
    for function, old, said in (
        ("sweep", "no_such_name", "'no_such_name' occurs 0 times in sweep: expected once"),
        ("no_such_function", "ANY", "occurs 0 times in no_such_function"),
        ("", "NO_SUCH = 1", "occurs 0 times at the top of a module"),
    ):
        lost = mutations.Mutation("lost", "torch", function, old, "")
        with pytest.raises(ValueError, match=said):
            mutations.check(mutations.ROOT, lost)


SOURCE = """
LIMIT = 3  # of what

def scale(x, y):
    total = add(x,  # the first
                y, out=x)
    return -total if total < LIMIT else (total)[0] + \u00e9

class Box:
    def scale(self, x):
        x = where(x, -x, x)
        return add(x, 1)
"""


@pytest.mark.parametrize(
    "function,old,new,line",
    [
        ("", "LIMIT = ANY", "LIMIT = 4", "LIMIT = 4  # of what"),
        ("scale", "add(ANY1, *ANY, out=ANY2)", "ANY2.add_(ANY1)", "    total = x.add_(x)"),
        ("scale", "add(ANY1, ANY2, out=ANY)", "ANY1 - ANY2", "    total = x - y"),
        ("Box.scale", "where(ANY1, -ANY1, ANY1)", "ANY1", "        x = x"),
        ("Box.scale", "x = where(*ANY)", "pass", "        pass"),
        ("scale", "total < LIMIT", "True", "    return -total if True else (total)[0] + é"),
    ],
)
def test_places_by_pattern(tmp_path, function, old, new, line):
    for folder in anchors.FOLDERS:
        (tmp_path / folder).mkdir()
    (tmp_path / "kernels/shapes.py").write_text(SOURCE)
    text = anchors.replaced(anchors.find(tmp_path, function, old), new)
    assert line in text.splitlines() and ast.parse(text)
    unchanged = set(text.splitlines()) - {line}
    assert unchanged < set(SOURCE.splitlines())


def test_places_that_are_not_one(tmp_path):
    for folder in anchors.FOLDERS:
        (tmp_path / folder).mkdir()
    (tmp_path / "kernels/shapes.py").write_text(SOURCE)
    with pytest.raises(ValueError, match="'ANY1' occurs"):
        anchors.find(tmp_path, "scale", "ANY1")
    assert anchors.places(tmp_path, "Box.scale", "where(ANY1, -ANY1, -ANY1)") == []
