"""Every law on cases that hypothesis draws, and shrinks where one does not hold.

A short slice of what `make fuzz` runs: docs/trust.md has the long run.
"""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from support.calls import Call
from support.invariants import INVARIANTS, check
from support.strategies import DEVICE, Case, inputs_of, random_case

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


def plain_case(backend: str, m: int, n: int, **others: object) -> Case:
    """A call without options, of which all gradients are asked."""
    case = Case(
        backend, "float32", m, n, 3, 10.0, -5.0, "matched", ("contiguous", "contiguous"), None,
        False, None, "mean", None, (True,) * 4, (), 0,
    )  # fmt: skip
    return replace(case, **others)


def test_one_row_and_column_short_of_a_tile(backend):
    """Edges are one off where a tile is taken for whole, away from the diagonal."""
    case = plain_case(backend, 255, 255, tiles=4)
    assert all(share <= 1 for share in check(case, "upstream").values())


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_more_tile_rows_than_a_band(backend):
    """The Triton kernel walks tiles in bands of 8 tile rows: here the second band is cut off."""
    case = plain_case(backend, 1100, 5, ids="repeated", tiles=100)
    assert all(share <= 1 for share in check(case, "repeated").values())


def test_ids_that_agree_in_their_lower_32_bits(backend):
    """They differ all the same: the result is that of small ids to the bit."""
    case = plain_case(backend, 70, 50, ids="repeated")
    inputs = inputs_of(case)
    small = {name: torch.arange(len(ids), device=DEVICE) % 7 for name, ids in inputs.ids.items()}
    large = {name: ids * 2**32 for name, ids in small.items()}
    values = [Call(case, replace(inputs, ids=ids)).values for ids in (small, large)]
    assert all(a is b or torch.equal(a, b) for a, b in zip(*values, strict=True))


def test_float64_where_softplus_is_nearly_its_argument():
    """softplus(25) - 25 is 1e-11: lost where torch's softplus returns its argument from 20 on."""
    case = plain_case("torch", 5, 5, dtype="float64", t=0.0, b=25.0)
    assert all(share <= 1 for share in check(case, "repeated").values())
