"""The shipped Triton configurations, compiled ahead of time: no GPU is needed."""

from __future__ import annotations

import pytest
import torch
from conftest import INTERPRETED

pytest.importorskip("triton")
if INTERPRETED:
    pytest.skip(
        "the interpreter replaces the compiler: run this file without TRITON_INTERPRET",
        allow_module_level=True,
    )

from benchmarks.compiled import SHARED, TARGETS, Compiled, compile_panel, shipped

MATRIX_INSTRUCTION = {
    **dict.fromkeys(("sm_80", "sm_86", "sm_89", "sm_120"), "HMMA"),
    "sm_90": "HGMMA",
    "sm_100": "UTCHMMA",
    "gfx942": "v_mfma",
}


def check(compiled: Compiled, target: str) -> None:
    assert compiled.spills == 0 and compiled.stack_bytes == 0, compiled
    assert compiled.shared_bytes <= SHARED[target][1], compiled


@pytest.mark.parametrize("ids", [False, True], ids=["diagonal", "ids"])
@pytest.mark.parametrize("target, dtype, precision", shipped())
def test_no_spills(target, dtype, precision, ids):
    compiled = compile_panel(target, dtype, precision, ids=ids)
    check(compiled, target)
    if target == "gfx942" or dtype != torch.float32 or precision == "tf32":
        assert compiled.tensor_core.startswith(MATRIX_INSTRUCTION[target])
    if target != "gfx942":
        assert compiled.async_copies > 0
    if target.startswith("sm") and dtype != torch.float32:
        assert compiled.occupancy == 2  # one program's epilogue under the other's product


@pytest.mark.parametrize("target", [t for t in TARGETS if t != "gfx942"])
@pytest.mark.parametrize(
    "variant",
    [
        {"write_g": False, "scalar_grads": False},
        {"write_g": False},
        {"scalar_grads": False},
        {"d": 1152},
        {"d": 720},  # not a multiple of block_d: masked loads
    ],
    ids=["forward", "sums", "frozen scalars", "D=1152", "D=720"],
)
def test_no_spills_in_variants(target, variant):
    check(compile_panel(target, torch.bfloat16, "ieee", **variant), target)
