"""What `python -m fused_siglip --bench` compares with is what the results files say."""

import pytest

pytest.importorskip("tqdm")
pytest.importorskip("matplotlib")

from benchmarks.common.results import fused_name, load, main_shape, select
from fused_siglip.testing.timing import DIM, EXPECTED


@pytest.mark.parametrize(
    "device, kind, size, dtype",
    [("cuda", "device", 32768, "bfloat16"), ("cpu", "loss", 8192, "float32")],
)
def test_expected_ratios_are_measured(device, kind, size, dtype):
    expected = EXPECTED[device]
    assert f"{dtype}, B = {size}" in expected.where
    found = []
    for results in load()[kind]:
        rows = select(results.rows, kind="cost", mode="full")
        rows = select(rows, **main_shape(rows), batch_size=size)
        shape = {(row["dtype"], row["dim"]) for row in rows}
        if shape != {(dtype, DIM)}:
            continue
        (fused,) = select(rows, loss=fused_name(rows))
        (eager,) = select(rows, loss="eager")
        found.append(tuple(round(row["ratio_to_floor"], 2) for row in (fused, eager)))
    assert (expected.loss, expected.eager) in found
