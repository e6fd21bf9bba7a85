"""The Gluon panel kernel, compiled for Hopper ahead of time: no GPU is needed."""

from __future__ import annotations

import pytest
import torch
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

from benchmarks.compiled import SHARED  # noqa: E402
from benchmarks.compiled_gluon import compile_gluon  # noqa: E402
from fused_siglip.kernels.hopper import HOPPER  # noqa: E402

VARIANTS = {
    "bf16": {},
    "fp16": {"dtype": torch.float16},
    "forward": {"write_g": False, "scalar_grads": False},
    "frozen scalars": {"scalar_grads": False},
    "D=720": {"d": 720},  # the last step of D is not whole
}
# Loads and stores of the stack, of both consumers. A thread has 112 registers: what a tile needs
# once waits on the stack while its rounds run.
MOST_SPILLS = 40
MOST_SPILLS_IN_LOOPS = 2
# of a round, by the form of the epilogue
MOST_INSTRUCTIONS_A_PAIR = {"joined": 14.0, "masked": 34.0}


@pytest.mark.parametrize("variant", VARIANTS)
def test_compiles_as_meant(variant):
    compiled = compile_gluon(HOPPER, **VARIANTS[variant])
    print(compiled)
    assert compiled.spills <= MOST_SPILLS and compiled.spills_in_loops <= MOST_SPILLS_IN_LOOPS
    assert compiled.shared_bytes <= SHARED["sm_90"][1]
    assert compiled.product == f"64x{HOPPER.tile[1]}x16"
    assert compiled.copies_in == 2
    assert (compiled.copies_out == 0) == (variant == "forward")
    assert compiled.unsynchronised == ()
    # what the kernel starts with is shared out anew: consumers, and 4 warps with the producer
    pool = compiled.registers * compiled.threads
    assert pool <= 65536 and {24, HOPPER.registers} <= set(compiled.pools)
    assert pool >= HOPPER.consumers * 32 * HOPPER.num_warps * HOPPER.registers + 128 * 24
    costs = compiled.instructions_a_pair
    assert costs.keys() == MOST_INSTRUCTIONS_A_PAIR.keys()
    assert all(cost <= MOST_INSTRUCTIONS_A_PAIR[form] for form, cost in costs.items())
