"""Every law on cases that hypothesis draws, and shrinks where one does not hold.

A short slice of what `make fuzz` runs: docs/trust.md has the long run.
"""

import random
from dataclasses import replace

import pytest
from draw import random_case
from hypothesis import HealthCheck, given, settings, strategies
from laws import LAWS, hold

# Drawn from the source of the test, not at random: a failure here is a failure everywhere.
SLICE = {
    "derandomize": True,
    "database": None,
    "deadline": None,
    "suppress_health_check": [HealthCheck.too_slow],
}
EXAMPLES = {"torch": 60, "triton": 4}


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, in the interpreter
@pytest.mark.parametrize("law", LAWS)
def test_law(backend, law):
    @settings(max_examples=EXAMPLES[backend], **SLICE)
    @given(strategies.randoms(use_true_random=False).map(lambda r: random_case(r, (backend,))))
    def holds(case):
        for what, share in hold(case, law).items():
            assert share <= 1, f"{what}: {share:.2f} times what rounding may cause"

    holds()


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_more_tile_rows_than_a_band(backend):
    """The Triton kernel walks tiles in bands of 8 tile rows: here the second band is cut off."""
    case = random_case(random.Random(0), (backend,))
    case = replace(case, m=1100, n=5, d=3, dtype="float32", t=10.0, b=-5.0, features="matched")
    case = replace(case, ids="repeated", negative_only=False, tiles=100, requires_grad=(True,) * 4)
    assert all(share <= 1 for share in hold(case, "repeated").values())
