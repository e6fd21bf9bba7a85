"""The benchmark harness measures what it says it does."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

pytest.importorskip("tqdm")

from benchmarks.common.baselines import LOSSES, obstacles
from benchmarks.common.memory import peak_bytes, peak_extra_bytes
from benchmarks.common.reference import (
    LossAndGrads,
    float64_reference,
    relative_errors,
    rounded_once,
)
from benchmarks.common.results import environment
from benchmarks.common.timing import floors, interleaved, measure, median, quantile
from benchmarks.common.workloads import MODES, Case, make_inputs
from benchmarks.suites import retrieval
from fused_siglip.testing import eager_siglip_loss

ROOT = Path(__file__).resolve().parents[2]
MIB = 1 << 20
ENVIRONMENT = {
    "device",
    "capability",
    "threads",
    "torch",
    "triton",
    "python",
    "commit",
    "dirty",
    "date",
}


def test_peak_of_a_known_allocation():
    def hold_64_after_touching_256():
        kept = torch.ones(64 * MIB, dtype=torch.uint8)
        torch.ones(192 * MIB, dtype=torch.uint8)
        return (kept,)

    for _ in range(2):  # the second measurement starts anew
        peak, (kept,) = peak_bytes(hold_64_after_touching_256)
        assert kept.nbytes == 64 * MIB
        assert peak == pytest.approx(256 * MIB, rel=0.03)


def test_peak_of_a_step_leaves_out_inputs_and_gradients():
    # a wide D: inputs and gradients are 64 MiB together, the pair matrix 1 MiB
    narrow = peak_extra_bytes(Case("fused_torch", 512, 8192))
    assert 1 * MIB <= narrow <= 16 * MIB
    # eager holds several pair matrices of 16 MiB; freed ones may stay in glibc's heap
    eager = peak_extra_bytes(Case("eager", 2048, 32))
    assert 3 * 16 * MIB <= eager <= 10 * 16 * MIB


def test_a_case_that_fails_in_its_process_says_why():
    with pytest.raises(RuntimeError, match="no_such_dtype"):
        peak_extra_bytes(Case("eager", 8, 8, dtype="no_such_dtype"))


def test_interleaved_takes_turns():
    calls = []
    functions = {name: lambda name=name: calls.append(name) for name in "abc"}
    rounds = []
    seconds = interleaved(functions, repeats=4, warmup=2, on_round=lambda: rounds.append(1))
    assert "".join(calls) == "abc" * 6
    assert len(rounds) == 6
    assert {name: len(values) for name, values in seconds.items()} == dict.fromkeys("abc", 4)
    assert all(v >= 0 for values in seconds.values() for v in values)


def test_median_and_quantile():
    assert median([3.0, 1.0, 2.0]) == 2.0
    assert quantile([0.0, 10.0], 0.9) == pytest.approx(9.0)


@pytest.mark.parametrize("products", [1, 2, 3])
def test_floor_is_that_many_products(products):
    run = floors(5, 7, 3, torch.float32, "cpu")[products]
    with FlopCounterMode(display=False) as counter:
        run()
    assert counter.get_total_flops() == products * 2 * 5 * 7 * 3


@pytest.mark.parametrize("t", [10.0, 100.0])
def test_float64_reference_is_autograds_result(monkeypatch, t):
    monkeypatch.setattr(
        "benchmarks.common.reference.CHUNK_BYTES", 8 * 50 * 7
    )  # chunks of 7 of 50 rows
    inputs = make_inputs(50, 12, "bfloat16", "cpu", t, -10.0)
    leaves = [v.double().requires_grad_() for v in inputs]
    loss = eager_siglip_loss(*leaves)
    expected = LossAndGrads(loss.detach(), *torch.autograd.grad(loss, leaves))
    errors = relative_errors(float64_reference(*inputs), expected)
    assert max(e["max"] for e in errors.values()) < 1e-11


def test_one_rounding_is_half_an_ulp():
    exact = float64_reference(*make_inputs(64, 16, "bfloat16", "cpu"))
    errors = relative_errors(rounded_once(exact, torch.bfloat16), exact)
    assert 0 < errors["image_grad"]["max"] <= 2.0**-8
    assert 0 < errors["text_grad"]["rms"] <= 2.0**-8
    assert errors["loss"]["max"] <= 2.0**-24


@pytest.mark.parametrize("name", [n for n, why in obstacles("cpu").items() if not why])
def test_contestants_compute_the_same_loss(name):
    if LOSSES[name].per_shape:
        pytest.skip("compiling takes longer than all the rest")
    case = Case(name, 600, 16)  # more than one row chunk
    inputs = case.inputs()
    actual = LossAndGrads(*case.step(inputs)())
    errors = relative_errors(actual, float64_reference(*inputs))
    assert max(e["max"] for e in errors.values()) < 1e-5


def test_modes_ask_for_their_gradients():
    returned = {
        mode: len(Case("eager", 4, 4, mode=mode).step(make_inputs(4, 4, "float32", "cpu"))())
        for mode in MODES
    }
    assert returned == {"full": 5, "frozen": 4, "no_grad": 1}


def test_what_does_not_fit_is_skipped():
    (row,) = measure([Case("eager", 1 << 24, 8)], repeats=1, progress=False)
    assert row["skipped"].startswith("would need about")
    assert row["seconds"] is None and row["peak_extra_bytes"] is None


def test_environment_names_no_machine():
    found = environment()
    assert found.keys() == ENVIRONMENT
    assert str(ROOT) not in json.dumps(found)


def test_quick_run_writes_its_rows(tmp_path):
    path = tmp_path / "loss.json"
    command = [sys.executable, "-m", "benchmarks.suites.loss", "--quick", "--device", "cpu"]
    done = subprocess.run(
        [*command, "--output", str(path)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert max(map(len, done.stdout.splitlines()[1:-1])) <= 100
    results = json.loads(path.read_text())
    assert results["environment"].keys() == ENVIRONMENT
    kinds = {
        kind: [r for r in results["rows"] if r["kind"] == kind]
        for kind in ("cost", "breakdown", "accuracy")
    }
    costs = [r for r in kinds["cost"] if r["loss"] == "fused_torch" and r["seconds"]]
    assert [r["mode"] for r in costs if r["logit_scale"] == 100] == ["full"]
    fused = {r["mode"]: r for r in costs if r["logit_scale"] == 10}
    assert fused.keys() == {"full", "frozen", "no_grad"}
    for row in fused.values():
        assert row["seconds_p10"] <= row["seconds"] <= row["seconds_p90"]
        assert row["ratio_to_floor"] == row["seconds"] / row["floor_seconds"]
        assert row["peak_extra_bytes"] > 0
    (parts,) = kinds["breakdown"]
    assert parts["products"] > 0 and parts["passes"] > 0 and parts["host"] < parts["ratio_to_floor"]
    names = {(r["loss"], r["dtype"]) for r in kinds["accuracy"]}
    assert {
        ("one_rounding", "bfloat16"),
        ("fused_torch", "bfloat16"),
        ("eager", "float32"),
    } <= names
    assert all(r["errors"]["image_grad"]["rms"] < 0.05 for r in kinds["accuracy"])


def test_retrieval_of_a_small_batch(tmp_path):
    """Ranks and sorted rows find the same recalls; a row for each method."""
    output = tmp_path / "retrieval.json"
    retrieval.main(["--size", "700", "--dim", "64", "--device", "cpu", "--output", str(output)])
    rows = {row["method"]: row for row in json.loads(output.read_text())["rows"]}
    assert set(rows) == set(retrieval.METHODS)
    recalls = rows["retrieval_ranks"]["recall"]
    assert recalls == rows["topk"]["recall"]
    assert all(0 < at_1 < at_5 < at_10 < 1 for at_1, at_5, at_10 in recalls)
    for row in rows.values():
        assert row["seconds"] > 0 and 0 <= row["peak_extra_bytes"] < 40 * MIB
