"""The list of mutations fits the code, and a run of it says which test caught one."""

import json
import os
import subprocess
import sys

import pytest

from soak import mutations

pytest.importorskip("tqdm")  # of benchmarks.common.timing


@pytest.mark.parametrize("mutation", mutations.MUTATIONS, ids=lambda m: f"{m.tests}: {m.what}")
def test_names_one_place_in_the_code(mutation):
    mutations.check(mutations.ROOT, mutation)
    assert mutation.old != mutation.new and mutation.tests in mutations.QUICK


# In a process of its own: the forkserver of this one has the package already.
PROGRAM = """
import sys
from soak import mutations
sign = next(m for m in mutations.MUTATIONS if m.what == "positives keep the sign of negatives")
harmless = sign._replace(what="harmless", new=sign.old + "  # still")
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
    with pytest.raises(ValueError, match=r"engine\.py holds 'no such text' 0 times"):
        lost = mutations.Mutation("lost", "torch", mutations.ENGINE, "no such text", "")
        mutations.check(mutations.ROOT, lost)
