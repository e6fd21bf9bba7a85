"""python -m fused_siglip --report and --bench: what is written, and what is timed."""

import json
import math
from pathlib import Path

import pytest
import torch

from fused_siglip.testing import environment, report, selfcheck, timing


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """On the CPU, one small call, and batches that take no time."""
    monkeypatch.setattr(selfcheck, "CALLS", {"pairs": (40, 40, 16, 10.0, -10.0, False)})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(timing, "BATCHES", (32, 64))
    monkeypatch.setattr(timing, "PROBED", 32)


def test_files_hold_what_was_found(tmp_path, capsys):
    folder = tmp_path / "made/when/needed"
    assert selfcheck.main(["--report", str(folder), "--bench"]) == 0
    said = capsys.readouterr().out
    content = json.loads((folder / report.JSON_FILE).read_text())
    assert content["format"] == report.FORMAT and content["passed"] is True
    assert content["environment"]["torch"] == torch.__version__
    assert [panel["backend"] for panel in content["panels"]] == ["torch"] * 4
    dtypes = [comparison["dtype"] for comparison in content["comparisons"]]
    assert dtypes == ["float32", "bfloat16", "float16", "float64"]
    for comparison in content["comparisons"]:
        assert set(comparison["errors"]) == set(selfcheck.OUTPUTS)
        assert all(0 <= share <= 1 for share in comparison["errors"].values())
    assert set(content["times"]["seconds"]) == {"floor", "loss", "eager"}
    text = (folder / report.TEXT_FILE).read_text()
    assert said.startswith(text) and "PASS" in text and "x floor" in text
    assert str(folder / report.JSON_FILE) in said.removeprefix(text)


def test_nothing_is_written_or_timed_unless_asked(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert selfcheck.main() == 0
    assert list(tmp_path.iterdir()) == [] and "x floor" not in capsys.readouterr().out


def test_failures_are_in_both_files_without_the_users_home(tmp_path, monkeypatch):
    home = Path(torch.__file__).parent  # of frames in the traceback
    monkeypatch.setattr(Path, "home", lambda: home)

    def broken(*inputs, **options):
        return torch.linalg.vector_norm("no tensor")

    monkeypatch.setattr(selfcheck, "siglip_loss", broken)
    assert selfcheck.main(["--report", str(tmp_path)]) == 1
    content = json.loads((tmp_path / report.JSON_FILE).read_text())
    assert content["passed"] is False and content["times"] is None
    failures = [comparison["failure"] for comparison in content["comparisons"]]
    assert all("vector_norm" in failure for failure in failures)
    assert all(comparison["errors"] == {} for comparison in content["comparisons"])
    text = (tmp_path / report.TEXT_FILE).read_text()
    assert "FAIL" in text and "vector_norm" in text
    assert str(home) not in text + json.dumps(content)


def test_what_is_not_finite_is_a_word(tmp_path):
    file, _ = report.write(tmp_path, {"errors": {"loss": math.inf, "image": [math.nan, 0.5]}}, [])
    assert json.loads(file.read_text())["errors"] == {"loss": "inf", "image": ["nan", 0.5]}


NVIDIA = "NVRM version: NVIDIA UNIX {}  Tue Sep 17\nGCC version: gcc 12.3.0"


@pytest.mark.parametrize(
    "file, built, expected",
    [
        (NVIDIA.format("x86_64 Kernel Module  550.54.15"), "cuda", "550.54.15"),
        (NVIDIA.format("Open Kernel Module for x86_64  580.95.05"), "cuda", "580.95.05"),
        (None, "cuda", None),
        ("6.12.12\n", "hip", "6.12.12"),
    ],
)
def test_driver(tmp_path, monkeypatch, file, built, expected):
    path = tmp_path / "version"
    if file is not None:
        path.write_text(file)
    monkeypatch.setattr(environment, "_NVIDIA", path)
    monkeypatch.setattr(environment, "_AMD", path)
    monkeypatch.setattr(torch.version, "hip", "6.4" if built == "hip" else None)
    assert environment._driver("cpu") is None
    assert environment._driver("cuda") == expected


def test_functions_of_a_bench_do_the_same_work(monkeypatch):
    """The loss and eager agree, and the floor writes the three products."""
    functions = timing._functions(48, torch.float64, "cpu")
    for a, b in zip(functions["loss"](), functions["eager"](), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
    written = []
    mm = torch.mm
    monkeypatch.setattr(torch, "mm", lambda *a, out: written.append(out.shape) or mm(*a, out=out))
    functions["floor"]()
    assert written == [(48, 48), (48, timing.DIM), (48, timing.DIM)]


def test_rounds_take_turns():
    calls = []
    functions = {name: lambda name=name: calls.append(name) for name in "ab"}
    seconds = timing._interleaved(functions, 3, "cpu")
    assert calls == ["a", "b"] * 4 and {len(times) for times in seconds.values()} == {3}


@pytest.mark.parametrize(
    "probe, free, itemsize, expected",
    [
        (0.7, 1 << 40, 4, 256),  # slower than any batch allows
        (1e-3, 1 << 40, 4, 8192),  # 0.26 s * 48 is 12 s; 16384 would take 49 s
        (1e-6, 1 << 40, 2, 32768),
        (1e-6, 1 << 30, 4, 4096),  # half of 1 GiB holds 8 matrices of 4096 x 4096 fp32 exactly
        (1e-6, (1 << 30) - 1, 4, 2048),
    ],
)
def test_the_batch_fits_time_and_memory(monkeypatch, probe, free, itemsize, expected):
    monkeypatch.undo()
    assert timing.choose_batch(probe, free, itemsize, 30.0) == expected


def test_summary_scales_with_the_square_and_says_when_it_is_slow():
    times = {
        "device": "cpu", "dtype": "float32", "batch": 1024, "dim": 768, "rounds": 5,
        "seconds": {"floor": 1.0, "loss": 1.5, "eager": 2.5},
        "x_floor": {"loss": 1.5, "eager": 2.5},
    }  # fmt: skip
    text = timing.summary(times)
    assert "B = 2048: 6 s, B = 4096: 24 s, B = 8192: 96 s" in text
    assert "1.50 x floor" in text and "worth an issue" not in text
    assert "worth an issue" in timing.summary(times | {"x_floor": {"loss": 2.1, "eager": 2.5}})
