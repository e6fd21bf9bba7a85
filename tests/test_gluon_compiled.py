"""The Gluon panel kernel, compiled for Hopper ahead of time: no GPU is needed."""

from __future__ import annotations

import pytest
from conftest import INTERPRETED

triton = pytest.importorskip("triton")
if INTERPRETED:
    pytest.skip(
        "the interpreter replaces the compiler: run this file without TRITON_INTERPRET",
        allow_module_level=True,
    )
if not triton.__version__.startswith("3.6."):
    pytest.skip(
        f"Gluon is experimental: the kernel is written for triton 3.6, not {triton.__version__}",
        allow_module_level=True,
    )

from benchmarks.candidates import CANDIDATES, Gluon  # noqa: E402
from benchmarks.compiled import SHARED  # noqa: E402
from benchmarks.compiled_gluon import compile_gluon  # noqa: E402

# Of both consumers, a few once a tile: what a reduction over warps loads is kept from tile to tile
# (only some threads load it), and where registers are short it waits on the stack.
MOST_SPILLS = 16
# of the parts of a tile, by the form of the epilogue
MOST_INSTRUCTIONS_A_PAIR = {"joined": 16.0, "plain": 24.0, "masked": 34.0}


def differing() -> dict[str, Gluon]:
    """The order of tiles is a number in the code, no other code."""
    gluon = {name: config for name, config in CANDIDATES.items() if isinstance(config, Gluon)}
    return {name: config for name, config in gluon.items() if config.group_m == 8}


@pytest.mark.parametrize("name", differing())
def test_compiles_as_meant(name):
    config = CANDIDATES[name]
    compiled = compile_gluon(config)
    print(compiled)
    assert compiled.spills_a_step == 0 and compiled.spills <= MOST_SPILLS
    assert (compiled.stack_bytes == 0) == (compiled.spills == 0)
    assert compiled.shared_bytes <= SHARED["sm_90"][1]
    assert compiled.product == f"64x{config.tile[1]}x16"
    assert compiled.copies_in == 2
    assert (compiled.copies_out > 0) == (config.store_buffers > 0)
    assert compiled.unsynchronised == ()
    # what the kernel starts with is shared out anew: consumers, and 4 warps with the producer
    pool = compiled.registers * compiled.threads
    assert pool <= 65536 and {24, config.registers} <= set(compiled.pools)
    assert pool >= 2 * 32 * config.num_warps * config.registers + 128 * 24
    costs = compiled.instructions_a_pair
    assert "joined" in costs
    assert all(costs[form] <= MOST_INSTRUCTIONS_A_PAIR[form] for form in costs)
