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

from benchmarks.candidates import CANDIDATES  # noqa: E402
from benchmarks.compiled import SHARED  # noqa: E402
from benchmarks.compiled_gluon import compile_gluon  # noqa: E402

# Loads and stores of the stack, of all consumers; none else. Where a thread has 112 registers, what
# a tile needs once waits on the stack while its rounds run.
MOST_SPILLS = {}
# of the parts of a tile, by the form of the epilogue
MOST_INSTRUCTIONS_A_PAIR = {"joined": 14.0, "masked": 34.0}


@pytest.mark.parametrize("name", CANDIDATES)
def test_compiles_as_meant(name):
    config = CANDIDATES[name]
    compiled = compile_gluon(config)
    print(compiled)
    assert compiled.spills <= MOST_SPILLS.get(name, 0)
    assert compiled.spills_in_loops <= MOST_SPILLS_IN_LOOPS.get(name, 0)
    assert (compiled.stack_bytes == 0) == (compiled.spills == 0)
    assert compiled.shared_bytes <= SHARED["sm_90"][1]
    assert compiled.product == f"64x{config.tile[1]}x16"
    assert compiled.copies_in == 2
    assert (compiled.copies_out > 0) == (config.store_buffers > 0)
    assert compiled.unsynchronised == ()
    # what the kernel starts with is shared out anew: consumers, and 4 warps with the producer
    pool = compiled.registers * compiled.threads
    assert pool <= 65536 and {24, config.registers} <= set(compiled.pools)
    assert pool >= config.consumers * 32 * config.num_warps * config.registers + 128 * 24
    costs = compiled.instructions_a_pair
    assert "joined" in costs
    assert all(costs[form] <= MOST_INSTRUCTIONS_A_PAIR[form] for form in costs)
