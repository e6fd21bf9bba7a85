"""docs/trust.md says what the results files say."""

import json
import re
from pathlib import Path

import pytest

pytest.importorskip("tqdm")
pytest.importorskip("matplotlib")

from benchmarks.common.results import load
from benchmarks.report.trust_report import BLOCKS, PAGE, filled
from benchmarks.suites import error_growth

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / PAGE).read_text()


def test_page_is_what_the_results_say():
    assert filled(TEXT, load()) == TEXT, "run python -m benchmarks.report.render"


def test_without_any_results():
    empty = filled(TEXT, {})
    assert empty.count("No results file exists yet.") == len(BLOCKS)
    assert filled(empty, load()) == TEXT


def test_a_page_without_a_block_is_an_error():
    with pytest.raises(ValueError, match=r"expected \['fuzz', 'error_growth'"):
        filled("nothing here", {})


def test_every_case_that_is_claimed_was_tried():
    """The figures add up: as many cases by dtype and by law as there were in all, none missed."""
    rows = load()["fuzz"][0].rows
    (run,) = [row for row in rows if row["kind"] == "run"]
    assert run["cases"] >= 20000 and run["misses"] == 0
    for kind in ("dtype", "law"):
        here = [row for row in rows if row["kind"] == kind]
        assert sum(row["cases"] for row in here) == run["cases"]
        assert all(row["share"] <= 1 for row in here)


def test_quick_error_growth(tmp_path):
    error_growth.main(
        ["--quick", "--device", "cpu", "--output", str(tmp_path / "some-cpu-error_growth.json")]
    )
    rows = json.loads((tmp_path / "some-cpu-error_growth.json").read_text())["rows"]
    assert {row["dtype"] for row in rows} == set(error_growth.DTYPES)
    block = re.search(
        "<!-- error_growth:begin -->(.*)<!-- error_growth:end -->",
        filled(TEXT, load(tmp_path)),
        re.S,
    )
    for dtype, share in (("float64", 30), ("float32", 30), ("float16", 3), ("bfloat16", 3)):
        table = block[1].split(f"### {dtype}, ")[1].split("###")[0].strip().splitlines()[2:]
        assert len(table) == 4  # header, rule and two points
        fused = [cell.split("/")[0].strip() for cell in table[-1].split("|")[4:-1]]
        cells = [float(f.removeprefix("<")) for f in fused]
        assert len(cells) == 5 and max(cells) <= share
