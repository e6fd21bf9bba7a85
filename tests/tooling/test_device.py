"""benchmarks/gpu/device.py on a CPU: alive, whole, and no failing part takes another with it."""

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

from benchmarks.common.baselines import LOSSES
from benchmarks.gpu import device
from benchmarks.gpu.acceptance import targets
from benchmarks.gpu.part_process import PartProcess
from benchmarks.gpu.parts import PARTS, Part
from benchmarks.gpu.parts.breakdown import counter_table
from benchmarks.gpu.parts.checks import findings, pytest_summary
from benchmarks.gpu.parts.run import FULL, QUICK, Run, trial, usable

ROOT = Path(__file__).resolve().parents[2]


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


def starts_a_process(run):
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    yield {"kind": "child", "pid": child.pid}
    time.sleep(600)


@pytest.fixture(scope="module")
def quick(tmp_path_factory) -> tuple[dict, str]:
    """Results and terminal output of a quick run."""
    folder = tmp_path_factory.mktemp("device")
    command = [sys.executable, "-m", "benchmarks.gpu.device", "--device", "cpu", "--quick"]
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
    monkeypatch.setattr(PartProcess, "GRACE", 0)
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


def test_what_a_part_started_ends_with_it(monkeypatch):
    monkeypatch.setattr(PartProcess, "GRACE", 0)
    run = Run("cpu", QUICK, time.monotonic() + 120)
    with closing(device.Isolated()) as execute:
        execute(Part(good, 1), run)  # it has started
        (_, child), _ = execute(Part(starts_a_process, 1), run.until(time.monotonic() + 5))
    status = Path(f"/proc/{child['pid']}/status")
    for _ in range(100):  # nobody may have reaped it yet
        if not status.exists() or "zombie" in status.read_text():
            return
        time.sleep(0.1)
    raise AssertionError("it is still running")


def test_all_parts_fit_one_command_of_ten_minutes():
    total = sum(part.seconds for part in PARTS.values())
    assert total + PartProcess.GRACE <= 9.5 * 60
    now = time.monotonic()
    run = Run("cuda", FULL, now + 9 * 60)
    ends = list(device._deadlines(PARTS, run).values())
    assert ends == sorted(ends) and ends[-1] <= run.deadline
    # one part alone may have all of it
    (alone,) = device._deadlines({"speed": PARTS["speed"]}, run).values()
    assert alone == pytest.approx(run.deadline)
    # what a part does not take, the next one has
    assert ends[1] - now >= PARTS["tests"].seconds + PARTS["correctness"].seconds


def test_the_most_valuable_parts_come_first():
    assert list(PARTS)[:3] == ["speed", "tests", "correctness"]
    at = [(point.batch_size, point.dim) for point in FULL.speed[:4]]
    assert sorted(at) == [(32768, 768), (32768, 1152), (65536, 768), (65536, 1152)]
    measured = [(p.batch_size, p.dim, p.dtype, p.precision, tuple(p.only)) for p in FULL.speed]
    assert len(set(measured)) == len(measured)  # a table has one cell for each


def test_calls_share_a_file(monkeypatch, tmp_path, capsys):
    parts = {"bad": Part(bad, 1), "good": Part(good, 1)}
    monkeypatch.setattr(device, "PARTS", parts)
    here = ["--device", "cpu", "--output-dir", str(tmp_path), "--commit", "0" * 40]
    assert device.main([*here, "--only", "bad"]) == 1
    (path,) = tmp_path.glob("*.json")
    assert device.main([*here, "--only", "good", "--into", str(path)]) == 1  # bad is still bad
    # bad is mended: its rows are replaced
    monkeypatch.setitem(parts, "bad", Part(good, 1))
    assert device.main([*here, "--only", "bad", "--into", str(path)]) == 0
    assert json.loads(path.read_text())["environment"]["commit"] == "0" * 40  # not git's
    rows = json.loads(path.read_text())["rows"]
    ended = {row["part"]: row["status"] for row in rows if row["kind"] == "part"}
    assert ended == {"start": "ok", "good": "ok", "bad": "ok"}
    assert [row["kind"] for row in rows if row["kind"] != "part"] == ["good", "good"]

    content = json.loads(path.read_text())
    content["environment"]["torch"] = "1.0"
    path.write_text(json.dumps(content))
    with pytest.raises(SystemExit):
        device.main([*here, "--only", "good", "--into", str(path)])
    assert "its torch is '1.0'" in capsys.readouterr().err


def test_no_time_left_skips_what_is_left():
    run = Run("cpu", QUICK, time.monotonic() - 1)
    *_, (status, why) = device.in_process(PARTS["correctness"], run)
    assert status == "skipped" and "no time left for bfloat16" in why
    *_, (status, why) = device.in_process(PARTS["tests"], run)
    assert status == "skipped" and "no time left to end python" in why


def test_a_peer_that_fails_costs_only_itself(monkeypatch):
    def broken(*inputs):
        raise RuntimeError("no kernel image")

    monkeypatch.setitem(LOSSES, "eager", LOSSES["eager"]._replace(loss=broken))
    trial.cache_clear()
    names = ["fused_torch", "eager", "row_chunked"]
    (row,) = usable(names, Run("cpu", QUICK))
    trial.cache_clear()
    assert names == ["fused_torch", "row_chunked"]
    assert (row["loss"], row["reason"]) == ("eager", "RuntimeError: no kernel image")


PYTEST_OUTPUT = """\
tests/test_loss.py::test_ids[cpu]
[gw1] [  9%] PASSED tests/test_loss.py::test_ids[cpu]
[gw0] [ 18%] FAILED tests/test_loss.py::test_ids[cuda]
[gw0] [ 27%] SKIPPED tests/test_loss.py::test_two (needs two GPUs)
tests/test_autograd.py::test_grads PASSED                                [ 36%]
tests/test_autograd.py::test_ddp ERROR                                   [ 45%]
=================================== FAILURES ===================================
/tests/test_loss.py:12: AssertionError: 3 failed
=========================== short test summary info ============================
SKIPPED [1] tests/test_loss.py:5: needs two GPUs
FAILED tests/test_loss.py::test_ids[cuda] - AssertionError: assert 1 == 2
ERROR tests/test_autograd.py::test_ddp - RuntimeError: no port
1 failed, 2 passed, 1 skipped, 1 error in 12.34s
"""
MEMCHECK_OUTPUT = """\
========= COMPUTE-SANITIZER
========= Invalid __global__ read of size 16 bytes
=========     at panel_kernel+0x1f0
=========     by thread (0,0,0) in block (1,0,0)
small cases done
========= ERROR SUMMARY: 12 errors
"""
RACECHECK_OUTPUT = """\
========= COMPUTE-SANITIZER
small cases done
========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)
"""
NCU_OUTPUT = """\
==PROF== Connected to process 311 (/usr/bin/python3.12)
==PROF== Profiling "panel_kernel" - 0: 0%....50%....100% - 9 passes
==PROF== Disconnected from process 311
"ID","Process ID","Process Name","Host Name","Kernel Name","Context","Stream","Block Size",\
"Grid Size","Device","CC","Section Name","Metric Name","Metric Unit","Metric Value","Rule Name",\
"Rule Type","Rule Description","Estimated Speedup Type","Estimated Speedup"
"0","311","python3.12","127.0.0.1","panel_kernel","1","7","(256, 1, 1)","(4096, 1, 1)","0","9.0",\
"GPU Speed Of Light Throughput","SM Frequency","Ghz","1.62","","","","",""
"0","311","python3.12","127.0.0.1","panel_kernel","1","7","(256, 1, 1)","(4096, 1, 1)","0","9.0",\
"SpeedOfLight","","","","SOLBottleneck","OPT","Compute is used more, ""a lot"".","global","12.0"
"0","311","python3.12","127.0.0.1","panel_kernel","1","7","(256, 1, 1)","(4096, 1, 1)","0","9.0",\
"Occupancy","Achieved Active Warps Per SM","warp","15,9","","","","",""
"""


def test_what_the_tools_print_is_understood():
    found = pytest_summary(PYTEST_OUTPUT)
    counted = {word: found[word] for word in ("passed", "failed", "skipped", "error")}
    assert counted == {"passed": 2, "failed": 1, "skipped": 1, "error": 1}
    assert found["failures"] == [
        "tests/test_loss.py::test_ids[cuda] - AssertionError: assert 1 == 2",
        "tests/test_autograd.py::test_ddp - RuntimeError: no port",
    ]
    assert pytest_summary("")["passed"] == 0
    assert findings("memcheck", MEMCHECK_OUTPUT) == 12
    assert findings("racecheck", RACECHECK_OUTPUT) == 0
    # the program never got to its end: nothing was found out
    assert findings("memcheck", MEMCHECK_OUTPUT.replace("small cases done", "")) is None
    assert findings("racecheck", "========= Error: No supported device\n") is None
    counters = counter_table(NCU_OUTPUT.replace("\\\n", ""))
    assert [(row["Metric Name"], row["Metric Value"]) for row in counters] == [
        ("SM Frequency", "1.62"),
        ("Achieved Active Warps Per SM", "15,9"),
    ]
    assert counter_table("==ERROR== The user does not have permission\n") == []
    card = device.card_values("1980 MHz, 2619 MHz, 310.55 W, 41\n", 0)
    assert card["clocks.sm"] == "1980 MHz" and card["temperature.gpu"] == "41"


def test_targets_by_hand():
    at = {"kind": "cost", "batch_size": 32768, "dim": 768, "dtype": "bfloat16", "mode": "full"}
    at |= {
        "device": "cuda",
        "logit_scale": 10.0,
        "peak_extra_bytes": 300 << 20,
        "ratio_to_floor": 1.2,
    }
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
    assert found["x floor, B = 32768, D = 768, t = 10"] == ("1.20", "NO")
    assert found["x floor, B = 65536, D = 768, t = 10"] == ("-", "-")
    assert found["faster than siglip_kernel, B = 32768"] == ("1.50x", "yes")
    assert found["memory / siglip_kernel's, B = 32768"] == ("0.43", "yes")
    assert found["frozen tower / full, B = 32768"] == ("0.70", "yes")
    assert found["extra memory, any B"] == ("204 MiB", "yes")  # beyond 2 accumulators of 96 MiB
    assert found["gradient error / eager's, t = 100, bf16"] == ("0.50", "NO")
    assert found["compute-sanitizer memcheck"] == ("3 found", "NO")
