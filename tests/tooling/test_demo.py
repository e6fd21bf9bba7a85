"""The demo runs from end to end, learns, and the two losses learn alike."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

for package in ("sklearn", "matplotlib", "tqdm"):
    pytest.importorskip(package, reason="the demo needs the [demo] extra")

ROOT = Path(__file__).resolve().parents[2]
CHANCE = 0.1  # ten digits


@pytest.fixture(scope="module")
def demo(tmp_path_factory) -> tuple[Path, str]:
    """Folder and terminal output of one quick run."""
    folder = tmp_path_factory.mktemp("demo")
    command = [sys.executable, "-m", "examples.digits", "--quick", "--output-dir", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return folder, done.stdout


@pytest.fixture(scope="module")
def rows(demo) -> list[dict]:
    return json.loads((demo[0] / "demo.json").read_text())["rows"]


def test_both_losses_train_alike(rows):
    fused, eager, exact = (row for row in rows if row["kind"] == "training")
    assert (fused["dtype"], eager["dtype"], exact["dtype"]) == ("float32", "float32", "float64")
    assert fused["losses"] == pytest.approx(eager["losses"], rel=1e-3)
    assert fused["losses"] == pytest.approx(exact["losses"], rel=1e-3)
    for language, accuracy in fused["accuracy"].items():
        assert accuracy > 7 * CHANCE, language
        assert accuracy == pytest.approx(eager["accuracy"][language], abs=0.02), language


def test_every_loss_is_measured_at_every_size(rows):
    measured = [row for row in rows if row["kind"] == "cost"]
    assert len(measured) == 3 * len({row["batch_size"] for row in measured})
    for row in measured:
        assert row["skipped"] is None
        assert row["seconds"] > 0


def test_output_is_a_table_and_two_plots(demo):
    folder, output = demo
    assert max(map(len, output.split("written:")[0].splitlines())) <= 100
    assert all(name in output for name in ("fused", "eager", "row-chunked"))
    for name in ("demo_training.png", "demo_scaling.png"):
        assert (folder / name).read_bytes().startswith(b"\x89PNG")


def test_only_the_full_run_is_recorded(capsys):
    from examples.digits import main

    with pytest.raises(SystemExit):
        main(["--record"])
    assert "expected --full" in capsys.readouterr().err


def test_outputs_go_to_an_ignored_folder_by_default(capsys):
    """A demo that is run in a clone leaves `git status` clean."""
    from examples.digits import main

    with pytest.raises(SystemExit):
        main(["--help"])
    assert "(default: build/demo)" in " ".join(capsys.readouterr().out.split())
    assert "build/" in (ROOT / ".gitignore").read_text().splitlines()
