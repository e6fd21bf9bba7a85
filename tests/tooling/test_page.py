"""Numbers on the pages are those of the results files."""

import json
from pathlib import Path

import pytest

pytest.importorskip("tqdm")
pytest.importorskip("matplotlib")

from test_device import quick  # noqa: F401  (a fixture)

from benchmarks.common.results import Results, load
from benchmarks.common.timing import measure
from benchmarks.common.workloads import WEIGHTS
from benchmarks.report.render import FILLED, Pages, stale, write
from benchmarks.report.weights_report import weights_block
from benchmarks.suites.weights import cases

ROOT = Path(__file__).resolve().parents[2]
PAGE = "before\n<!-- results:begin -->\nold\n<!-- results:end -->\nafter\n"


def skeleton(root: Path) -> None:
    (root / "docs").mkdir()
    for name in FILLED:
        (root / name).write_text(PAGE)


def test_pages_are_what_the_results_say():
    assert stale(Pages(load())) == [], "run python -m benchmarks.report.render"


def test_without_any_results(tmp_path):
    skeleton(tmp_path)
    pages = Pages(load(tmp_path))
    assert stale(pages, tmp_path) == ["docs/performance.md", *FILLED]
    write(pages, tmp_path)
    assert stale(pages, tmp_path) == []
    assert "No GPU result exists yet" in (tmp_path / "docs/performance.md").read_text()
    readme = (tmp_path / "README.md").read_text()
    assert readme.startswith("before\n") and readme.endswith("after\n") and "old" not in readme


def test_with_results_of_a_gpu(quick, tmp_path):  # noqa: F811
    results, _ = quick
    results["environment"]["device"] = "Some GPU"
    results["rows"] = json.loads(json.dumps(results["rows"]).replace('"cpu"', '"cuda"'))
    (tmp_path / "2026-01-02-some-gpu-device.json").write_text(json.dumps(results))
    older = {**results, "environment": {**results["environment"], "date": "2000-01-01"}}
    (tmp_path / "2000-01-01-some-gpu-device.json").write_text(json.dumps(older))
    skeleton(tmp_path)
    pages = Pages(load(tmp_path))
    write(pages, tmp_path)
    text = (tmp_path / "docs/performance.md").read_text()
    for expected in (
        "## On one Some GPU", "2026-01-02-some-gpu-device.json", "Small batches:",
        "Time against the workspace:", "panel kernel", "| x floor, B = 32768",
    ):  # fmt: skip
        assert expected in text
    assert "2000-01-01" not in text and "No GPU result" not in text
    assert (tmp_path / "docs/performance_some_gpu.png").read_bytes().startswith(b"\x89PNG")
    assert "2026-01-02-some-gpu-device.json" in (tmp_path / "README.md").read_text()


def test_what_weights_cost_is_a_line_for_each_case():
    rows = measure(cases(32, 8, "cpu"), 3, memory=False, progress=False)
    environment = {"device": "some CPU", "torch": "2", "date": "2026-01-02", "commit": "0" * 40}
    _, table, targets = weights_block(Results(Path("some-weights.json"), environment, rows))
    _, _, *lines = table.splitlines()
    assert len(lines) == len(rows) == len(WEIGHTS) + 2
    assert lines[0].startswith("| all pairs alike, on the diagonal | alike | 1.00 (")
    ids, target = (
        next(row["seconds"] for row in rows if row["weights"] == name)
        for name in ("ids", "ids, PositiveTarget")
    )
    assert targets.count("The target for ") == 2 and "is 1.35 at most: " in targets
    assert f"`PositiveTarget` | by id | {target / ids:.2f} (" in table


def test_a_readme_without_its_block_is_an_error():
    with pytest.raises(ValueError, match="0 blocks"):
        Pages({}).filled("README.md", "nothing here")
