"""benchmarks/device.py on a CPU: alive, whole, and no failing part takes another with it."""

import json
import os
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import pytest

pytest.importorskip("tqdm")
pytest.importorskip("matplotlib")

from benchmarks import device
from benchmarks.parts import PARTS, Part
from benchmarks.parts.run import QUICK, Run
from benchmarks.targets import targets
from benchmarks.worker import Worker

ROOT = Path(__file__).resolve().parents[1]


def good(run):
    yield {"kind": "good"}


def bad(run):
    yield {"kind": "before"}
    raise RuntimeError("as it happens")


def crashes(run):
    yield {"kind": "before"}
    os._exit(7)


def hangs(run):
    yield {"kind": "before"}
    time.sleep(600)


@pytest.fixture(scope="module")
def quick(tmp_path_factory) -> tuple[dict, str]:
    """Results and terminal output of a quick run."""
    folder = tmp_path_factory.mktemp("device")
    command = [sys.executable, "-m", "benchmarks.device", "--device", "cpu", "--quick"]
    command += ["--output-dir", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    (png,) = folder.glob("*.png")
    assert png.read_bytes().startswith(b"\x89PNG")
    (path,) = folder.glob("*.json")
    return json.loads(path.read_text()), done.stdout


def test_quick_run_on_a_cpu(quick):
    results, output = quick
    parts = {row["part"]: row for row in results["rows"] if row["kind"] == "part"}
    assert list(parts) == ["start", *PARTS]
    skipped = {name: row["why"] for name, row in parts.items() if row["status"] == "skipped"}
    assert skipped == dict.fromkeys(("alternative", "sanitizer", "counters"), "needs a GPU")
    kinds = {row["kind"] for row in results["rows"]}
    expected = {"tests", "accuracy", "cost", "million", "breakdown", "panels", "latency"}
    assert expected | {"determinism"} <= kinds
    table = output[output.index("rows in") :].splitlines()[1:]
    assert len(table) <= 60 and max(map(len, table)) <= 100
    assert table[-1] == "failed: none; skipped: alternative, sanitizer, counters"


def test_a_failing_part_is_survived_and_named(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(device, "PARTS", {"bad": Part(bad, 1), "good": Part(good, 1)})
    arguments = ["--device", "cpu", "--output-dir", str(tmp_path)]
    assert device.main(arguments) == 1
    (path,) = tmp_path.glob("*.json")
    _, before, failed, row, fine = json.loads(path.read_text())["rows"]
    assert (before["kind"], row["kind"]) == ("before", "good")
    assert (failed["part"], failed["status"]) == ("bad", "failed")
    assert failed["why"].endswith("RuntimeError: as it happens")
    assert (fine["part"], fine["status"]) == ("good", "ok")
    assert "failed: bad;" in capsys.readouterr().out


def test_parts_in_a_process_of_their_own(monkeypatch):
    monkeypatch.setattr(Worker, "GRACE", 0)
    run = Run("cpu", QUICK, time.monotonic() + 120)
    with closing(device.Isolated()) as execute:
        assert execute(Part(good, 1), run) == [("row", {"kind": "good"}), ("ok", None)]
        first = execute.worker
        assert execute(Part(good, 1), run)[-1] == ("ok", None)
        assert execute.worker is first
        for broken, why in (
            (bad, "as it happens"),
            (crashes, "ended with code 7"),
        ):
            row, (status, said) = execute(Part(broken, 1), run)
            assert row == ("row", {"kind": "before"}) and status == "failed" and why in said
        execute(Part(good, 1), run)  # the new process has started
        row, (status, said) = execute(Part(hangs, 1), run.until(time.monotonic() + 2))
        assert status == "failed" and "past its deadline" in said
        assert execute(Part(good, 1), run)[-1] == ("ok", None)


def test_targets_by_hand():
    at = {"kind": "cost", "batch_size": 32768, "dim": 768, "dtype": "bfloat16", "mode": "full"}
    at |= {"device": "cuda", "peak_extra_bytes": 300 << 20, "ratio_to_floor": 1.2}
    accuracy = {"kind": "accuracy", "batch_size": 8, "dim": 8, "dtype": "bfloat16"}
    accuracy |= {"matmul_precision": "highest", "compared_rows": 8, "logit_scale": 100.0}

    def errors(image, text):
        return {"image_grad": {"rms": image}, "text_grad": {"rms": text}}

    rows = [
        {**at, "loss": "fused_triton", "seconds": 0.01},
        {**at, "loss": "siglip_kernel", "seconds": 0.015, "peak_extra_bytes": 700 << 20},
        {**at, "loss": "fused_triton", "mode": "frozen", "seconds": 0.007},
        {**accuracy, "loss": "fused_triton", "errors": errors(1e-3, 2e-3)},
        {**accuracy, "loss": "eager", "errors": errors(8e-3, 4e-3)},
        {"kind": "sanitizer", "tool": "memcheck", "findings": 3},
    ]
    found = {t.what: (t.measured, t.verdict) for t in targets(rows)}
    assert found["r, B = 32768, D = 768"] == ("1.20", "NO")
    assert found["r, B = 65536, D = 768"] == ("-", "-")
    assert found["faster than siglip_kernel, B = 32768"] == ("1.50x", "yes")
    assert found["memory / siglip_kernel's, B = 32768"] == ("0.43", "yes")
    assert found["frozen tower / full, B = 32768"] == ("0.70", "yes")
    assert found["extra memory, any B"] == ("108 MiB", "yes")  # without 2 accumulators of 96 MiB
    assert found["gradient error / eager's, t = 100, bf16"] == ("0.50", "NO")
    assert found["compute-sanitizer memcheck"] == ("3 found", "NO")
