"""A slice of `make longrun`: docs/trust.md has 10,000 steps."""

from soak.longrun import run


def test_steps_of_changing_size_neither_grow_nor_drift_nor_compile_again():
    early, *later = run(steps=80, checkpoints=4)
    assert [row["step"] for row in later] == [20, 40, 60, 80]
    for row in later:
        assert row["same_bits"] and row["share"] <= 1
        assert row["graphs"] == 4  # with and without ids: the first size, then every other
        assert row["objects"] <= 1.01 * later[0]["objects"]
    assert early["graphs"] <= 4
