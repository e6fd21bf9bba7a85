"""Every law on cases that hypothesis draws, and shrinks where one does not hold.

A short slice of what `make fuzz` runs: docs/trust.md has the long run.
"""

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
