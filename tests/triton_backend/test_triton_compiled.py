"""The shipped Triton configurations, compiled ahead of time: no GPU is needed."""

from __future__ import annotations

from itertools import product

import pytest
import torch

from support.devices import INTERPRETED

pytest.importorskip("triton")
if INTERPRETED:
    pytest.skip(
        "the interpreter replaces the compiler: run this file without TRITON_INTERPRET",
        allow_module_level=True,
    )

from benchmarks.common.machine_code import SHARED, Compiled
from benchmarks.suites.compiled import (
    compile_count,
    compile_panel,
    compile_product,
    compile_score,
    shipped,
)

pytestmark = pytest.mark.exhaustive

SHARE_A_CONFIG = ("sm_86", "sm_89", "sm_120")
MATRIX_INSTRUCTION = {
    **dict.fromkeys(("sm_80", *SHARE_A_CONFIG), "HMMA"),
    "sm_90": "HGMMA",
    "sm_100": "UTCHMMA",
    "gfx942": "v_mfma",
}


beyond_ci = pytest.mark.beyond_ci


def gate(*row, id: str, ids: bool | None = None):
    """A kernel to compile; .ci/run takes those that a regression would show in first.

    In bf16 one architecture of each configuration in every variant, and those that share one with
    the plain panel; the other dtypes with the diagonal, which has every form of the epilogue.
    """
    target, dtype = row[:2]
    panel = ids is not None
    first = target not in SHARE_A_CONFIG or (panel and target != "sm_89")
    first &= dtype == torch.bfloat16 or (panel and not ids and target not in SHARE_A_CONFIG)
    return pytest.param(*row, id=id, marks=[] if first else beyond_ci)


def check(compiled: Compiled, target: str) -> None:
    assert compiled.spills == 0 and compiled.stack_bytes == 0, compiled
    assert compiled.shared_bytes <= SHARED[target][1], compiled


def gated() -> list:
    """Every shipped kernel, but of chips that share a config with another, only what differs:
    fp32 runs outside the tensor cores everywhere, and sm_89 compiles as sm_86 does."""
    return [
        gate(*row, ids, id="-".join([*map(str, row), "ids" if ids else "diagonal"]), ids=ids)
        for row, ids in product(shipped(), (False, True))
        if row[0] not in SHARE_A_CONFIG or (row[1:] != (torch.float32, "ieee"))
        if row[0] != "sm_89" or not ids
    ]


@pytest.mark.parametrize("target, dtype, precision, ids", gated())
def test_no_spills(target, dtype, precision, ids):
    compiled = compile_panel(target, dtype, precision, ids=ids)
    check(compiled, target)
    if target == "gfx942" or dtype != torch.float32 or precision == "tf32":
        assert compiled.tensor_core.startswith(MATRIX_INSTRUCTION[target])
    if target != "gfx942":
        assert compiled.async_copies > 0
    if target.startswith("sm") and dtype != torch.float32:
        assert compiled.occupancy == 2  # one program's epilogue under the other's product


VARIANTS = {
    "forward": {"store_dlogits": False, "scalar_grads": False},
    "sums": {"store_dlogits": False},
    "frozen scalars": {"scalar_grads": False},
    "D=1152": {"d": 1152},
    "D=720": {"d": 720},  # not a multiple of block_d: masked loads
}


def variants() -> list:
    """In bf16. Another D changes the loop around the product alone: .ci/run looks at one target."""
    return [
        pytest.param(
            target,
            variant,
            id=f"{name}-{target}",
            marks=beyond_ci
            if target in SHARE_A_CONFIG or (name.startswith("D=") and target != "sm_90")
            else [],
        )
        for (name, variant), target in product(
            VARIANTS.items(), ("sm_80", "sm_86", "sm_90", "sm_100")
        )
    ]


@pytest.mark.parametrize("target, variant", variants())
def test_no_spills_in_variants(target, variant):
    check(compile_panel(target, torch.bfloat16, "ieee", **variant), target)


def once() -> list:
    """Of the gated kernels those that differ in more than the bits of a half operand; fp32 of
    chips that share a config once."""
    return [
        gate(*row, id="-".join(map(str, row)))
        for row in shipped()
        if row[1] != torch.float16 and row[0] != "sm_89"
        if row[0] not in SHARE_A_CONFIG or row[1] != torch.float32
    ]


def chosen() -> list:
    """By hash .ci/run compiles sm_90 alone; by logit and ids, which hold more in registers, all."""
    return [
        pytest.param(
            *row.values,
            *choice,
            id=f"{row.id}-{choice[0]}-{choice[1]}",
            marks=row.marks if "sm_90" in row.values or "logit" in choice else beyond_ci,
        )
        for row in once()
        for choice in (("hash", False), ("logit", True))
    ]


@pytest.mark.parametrize("target, dtype, precision, selection, ids", chosen())
def test_no_spills_where_negatives_are_chosen(target, dtype, precision, selection, ids):
    compiled = compile_panel(target, dtype, precision, selection=selection, ids=ids)
    check(compiled, target)
    if target.startswith("sm") and dtype != torch.float32:
        assert compiled.occupancy == 2


ALL_WEIGHTS = ("rows", "shares", "aligned", "targets")
NOTHING_STORED = {"store_dlogits": False, "scalar_grads": False}
WEIGHTED = {
    "rows": {"weights": ("rows",)},
    "rows, by logit": {"weights": ("rows",), "selection": "logit"},
    "all, ids": {"weights": ALL_WEIGHTS, "ids": True},
    "all, ids, by hash": {"weights": ALL_WEIGHTS, "ids": True, "selection": "hash"},
    "sums": {"weights": ("rows", "shares", "targets"), "store_dlogits": False},
    "image losses": {"weights": (*ALL_WEIGHTS, "image losses"), "ids": True, **NOTHING_STORED},
}


def weighted() -> list:
    """.ci/run compiles all of them for one target, and for others those that hold the most."""
    return [
        pytest.param(
            target,
            variant,
            marks=[]
            if target == "sm_90"
            or (target not in SHARE_A_CONFIG and variant in ("all, ids", "image losses"))
            else beyond_ci,
        )
        for target in ("sm_80", "sm_86", "sm_90", "sm_100", "sm_120", "gfx942")
        for variant in WEIGHTED
    ]


@pytest.mark.parametrize("target, variant", weighted())
def test_no_spills_where_pairs_have_weights(target, variant):
    """In bf16: the others differ in the product."""
    compiled = compile_panel(target, torch.bfloat16, "ieee", **WEIGHTED[variant])
    check(compiled, target)
    if target.startswith("sm"):
        assert compiled.occupancy == 2


@pytest.mark.parametrize("step", [1, 2], ids=["tallied", "added in memory"])
@pytest.mark.parametrize("target, dtype, precision", once())
def test_no_spills_where_logits_are_counted(target, dtype, precision, step):
    """The first step is the second without the bits that are known."""
    check(compile_count(target, dtype, precision, ids=True, step=step), target)


@pytest.mark.parametrize("ids", [False, True])
@pytest.mark.parametrize("kernel", ["best", "not below"])
@pytest.mark.parametrize("target, dtype, precision", once())
def test_no_spills_where_similarities_are_compared(target, dtype, precision, kernel, ids):
    compiled = compile_score(target, dtype, precision, kernel=kernel, ids=ids)
    check(compiled, target)
    if target == "gfx942" or dtype != torch.float32 or precision == "tf32":
        assert compiled.tensor_core.startswith(MATRIX_INSTRUCTION[target])
    if target.startswith("sm") and dtype != torch.float32:
        assert compiled.occupancy == 2


@pytest.mark.parametrize("sides, d", [("image", 768), ("text", 768), ("both", 720)])
@pytest.mark.parametrize("kernel", ["best", "not below"])
@pytest.mark.parametrize(
    "target",
    [
        "sm_90",
        *(pytest.param(t, marks=beyond_ci) for t in ("sm_80", "sm_100", "gfx942")),
    ],
)
def test_no_spills_in_variants_of_comparing(target, kernel, sides, d):
    options = {"kernel": kernel, "ids": True, "sides": sides, "d": d}
    check(compile_score(target, torch.bfloat16, "ieee", **options), target)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("target, dtype, precision", once())
def test_no_spills_in_products_that_skip_tiles(target, dtype, precision, transposed):
    compiled = compile_product(target, dtype, precision, transposed=transposed)
    check(compiled, target)
    if target == "gfx942" or dtype != torch.float32 or precision == "tf32":
        assert compiled.tensor_core.startswith(MATRIX_INSTRUCTION[target])
    if target != "gfx942":
        assert compiled.async_copies > 0  # tiles are loaded ahead, though a list names them
    if target.startswith("sm") and dtype != torch.float32:
        assert compiled.occupancy == 2


@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, pytest.param(torch.float16, marks=beyond_ci)], ids=str
)
@pytest.mark.parametrize("transposed", [False, True])
def test_no_spills_in_products_where_the_library_has_none(transposed, dtype):
    for d in (768, 1000):  # rows of out that are no multiple of 16 apart
        compiled = compile_product("gfx942", dtype, "ieee", transposed=transposed, skips=False, d=d)
        check(compiled, "gfx942")
        assert compiled.tensor_core.endswith("_f16" if dtype == torch.float16 else "_bf16")


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100", "gfx942"])
def test_no_spills_in_a_product_with_masked_features(target):
    check(
        compile_product(target, torch.bfloat16, "ieee", transposed=True, accumulate=False, d=720),
        target,
    )
