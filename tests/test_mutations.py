"""The list of mutations fits the code, and a run of it says which test caught one."""

import json

import mutations
import pytest

pytest.importorskip("tqdm")  # of benchmarks.harness


@pytest.mark.parametrize("mutation", mutations.MUTATIONS, ids=lambda m: f"{m.tests}: {m.what}")
def test_names_one_place_in_the_code(mutation):
    mutations.check(mutations.ROOT, mutation)
    assert mutation.old != mutation.new and mutation.tests in mutations.QUICK


def test_a_caught_and_a_missed_mutation(monkeypatch, tmp_path, capsys):
    harmless = mutations.Mutation(
        "harmless", "torch", mutations.ENGINE, "alpha = 1.0 / ", "alpha = 1 / "
    )
    sign = next(m for m in mutations.MUTATIONS if m.what == "positives keep the sign of negatives")
    monkeypatch.setattr(mutations, "MUTATIONS", (sign, harmless))
    quick = ["tests/test_loss.py", "-k", "test_diagonal and torch and float32"]
    monkeypatch.setattr(mutations, "QUICK", {"torch": quick})
    assert mutations.main(["--output", str(tmp_path / "rows.json")]) == 1
    caught, missed = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert caught["caught_by"].startswith(
        "test_loss.py::test_diagonal[torch-(1, 1, 1)-torch.float32"
    )
    assert missed["caught_by"] is None
    assert "1 of 2 caught" in capsys.readouterr().out


def test_a_mutation_that_fits_nothing_is_an_error():
    with pytest.raises(ValueError, match=r"engine\.py holds 'no such text' 0 times"):
        lost = mutations.Mutation("lost", "torch", mutations.ENGINE, "no such text", "")
        mutations.check(mutations.ROOT, lost)
