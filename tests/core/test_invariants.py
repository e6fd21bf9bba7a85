"""Every law on cases that hypothesis draws, and shrinks where one does not hold.

A short slice of what `make fuzz` runs: docs/trust.md has the long run.
"""

import random
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from support.calls import Call
from support.invariants import INVARIANTS, check
from support.strategies import DEVICE, inputs_of, random_case

# Of those of the profile (conftest.py): in the interpreter a case takes far longer.
SHARE = {"torch": 1, "triton": 13}


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, in the interpreter
@pytest.mark.parametrize("law", INVARIANTS)
def test_law(backend, law):
    @settings(max_examples=max(settings().max_examples // SHARE[backend], 1))
    @given(st.randoms(use_true_random=False).map(lambda r: random_case(r, (backend,))))
    def holds(case):
        for what, share in check(case, law).items():
            assert share <= 1, f"{what}: {share:.2f} times what rounding may cause"

    holds()


def test_one_row_and_column_short_of_a_tile(backend):
    """Edges are one off where a tile is taken for whole, away from the diagonal."""
    case = random_case(random.Random(0), (backend,))
    case = replace(case, m=255, n=255, d=3, dtype="float32", t=10.0, b=-5.0, features="matched")
    case = replace(case, ids=None, negative_only=False, tiles=4, requires_grad=(True,) * 4)
    assert all(share <= 1 for share in check(case, "upstream").values())


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_more_tile_rows_than_a_band(backend):
    """The Triton kernel walks tiles in bands of 8 tile rows: here the second band is cut off."""
    case = random_case(random.Random(0), (backend,))
    case = replace(case, m=1100, n=5, d=3, dtype="float32", t=10.0, b=-5.0, features="matched")
    case = replace(case, ids="repeated", negative_only=False, tiles=100, requires_grad=(True,) * 4)
    assert all(share <= 1 for share in check(case, "repeated").values())


def test_ids_that_agree_in_their_lower_32_bits(backend):
    """They differ all the same: the result is that of small ids to the bit."""
    case = random_case(random.Random(0), (backend,))
    case = replace(case, m=70, n=50, d=8, ids="repeated", negative_only=False, t=10.0, b=-5.0)
    inputs = inputs_of(case)
    small = {name: torch.arange(len(ids), device=DEVICE) % 7 for name, ids in inputs.ids.items()}
    large = {name: ids * 2**32 for name, ids in small.items()}
    values = [Call(case, replace(inputs, ids=ids)).values for ids in (small, large)]
    assert all(a is b or torch.equal(a, b) for a, b in zip(*values, strict=True))


def test_float64_where_softplus_is_nearly_its_argument():
    """softplus(25) - 25 is 1e-11: lost where torch's softplus returns its argument from 20 on."""
    case = random_case(random.Random(0), ("torch",))
    case = replace(case, dtype="float64", m=5, n=5, d=8, t=0.0, b=25.0, ids=None)
    assert all(share <= 1 for share in check(case, "repeated").values())
