"""The Gluon panel kernel, compiled for Hopper ahead of time: no GPU is needed."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch

from support.devices import INTERPRETED

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

from benchmarks.common.machine_code import SHARED
from benchmarks.suites.compiled_hopper import compile_gluon
from fused_siglip.kernels.hopper import HOPPER

pytestmark = pytest.mark.exhaustive


class Most(NamedTuple):
    """What was counted, and is no longer to grow."""

    spills: int  # of both consumers. What a tile needs once waits on the stack during its rounds
    spills_in_loops: int
    joined: float  # instructions a pair of a round, in each form of the epilogue
    masked: float


VARIANTS = {
    "bf16": ({}, Most(37, 1, 12.25, 30.25)),
    "fp16": ({"dtype": torch.float16}, Most(37, 1, 12.25, 30.25)),
    "forward": ({"store_dlogits": False, "scalar_grads": False}, Most(0, 0, 7.5, 22.0)),
    "frozen scalars": ({"scalar_grads": False}, Most(20, 0, 12.25, 30.5)),
    # the last step of D is not whole
    "D=720": ({"d": 720}, Most(37, 1, 12.25, 30.25)),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_compiles_as_meant(variant):
    options, most = VARIANTS[variant]
    compiled = compile_gluon(HOPPER, **options)
    print(compiled)
    assert compiled.spills <= most.spills and compiled.spills_in_loops <= most.spills_in_loops
    assert compiled.shared_bytes <= SHARED["sm_90"][1]
    assert compiled.product == f"64x{HOPPER.tile[1]}x16"
    assert compiled.copies_in == 2
    assert (compiled.copies_out == 0) == (variant == "forward")
    assert compiled.unsynchronised == ()
    # what the kernel starts with is shared out anew: consumers, and 4 warps with the producer
    pool = compiled.registers * compiled.threads
    assert pool <= 65536 and {24, HOPPER.registers} <= set(compiled.pools)
    assert pool >= 2 * 32 * HOPPER.num_warps * HOPPER.registers + 128 * 24
    costs = compiled.instructions_a_pair
    assert costs.keys() == {"joined", "masked"}
    assert costs["joined"] <= most.joined and costs["masked"] <= most.masked
