"""What the compilers make of the Triton panel kernel, for GPUs that need not be present.

    python -m benchmarks.suites.compiled     # every shipped configuration; a results file

Not in interpreter mode (TRITON_INTERPRET), which replaces the compiler.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import asdict, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fused_siglip.kernels import GRAD_SCALE
from fused_siglip.kernels.triton_configs import PanelConfig, count_config, panel_config
from fused_siglip.kernels.triton_kernels import count_kernel, panel_kernel
from fused_siglip.kernels.triton_math import SATURATED_LOGIT
from fused_siglip.kernels.triton_panel import count_constants
from fused_siglip.kernels.triton_products import ProductConfig, product_kernel
from fused_siglip.kernels.triton_scores import best_kernel, not_below_kernel

from ..common.machine_code import Compiled, inspect_amd, inspect_cuda
from ..common.results import environment, write_results

TARGETS = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942")
# dtype and, for fp32, how it is multiplied
OPERANDS = (
    (torch.bfloat16, "ieee"),
    (torch.float16, "ieee"),
    (torch.float32, "tf32"),
    (torch.float32, "ieee"),
)
_TYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


class Source(NamedTuple):
    """What is compiled."""

    ast: ASTSource
    config: PanelConfig


# What pairs with weights may have, and the panel kernel's arguments that hold it.
WEIGHTS = {
    "rows": ("image_weights_ptr", "text_weights_ptr"),
    "shares": ("image_shares_ptr", "text_shares_ptr"),
    "aligned": ("aligned_diagonal", "aligned_share"),
    "targets": ("targets_ptr",),
    "image losses": ("image_losses_ptr",),
}


def panel_source(  # noqa: PLR0913, all that a launch is compiled for
    target: str,
    dtype: torch.dtype,
    precision: str,
    *,
    ids: bool = False,
    selection: str | None = None,
    weights: tuple[str, ...] = (),
    store_dlogits: bool = True,
    scalar_grads: bool = True,
    d: int = 768,
) -> Source:
    """The panel kernel as a launch on contiguous (.., d) features compiles it.

    selection: how negatives are chosen, by "hash" or by "logit"; None: all take part. weights:
    names of WEIGHTS.
    """
    weighted = bool(weights)
    config = panel_config(_capability(target), dtype, precision, store_dlogits, weighted)
    config = config.by_row() if "image losses" in weights else config
    constants = {
        "stride_xd": 1,
        "stride_yd": 1,
        "D": d,
        "SCALAR_GRADS": scalar_grads,
        "GRAD_SCALE": GRAD_SCALE.get(dtype, 1.0),
        "INPUT_PRECISION": precision,
        **config.constants(),
    }
    absent = [] if ids else ["image_ids_ptr", "text_ids_ptr"]
    absent += [] if selection == "hash" else ["image_keys_ptr", "text_keys_ptr", "hash_cutoff"]
    absent += [] if selection == "logit" else ["center_ptr", "inv_radius_ptr", "threshold_ptr"]
    absent += [] if store_dlogits else ["dlogits_ptr"]
    absent += [] if selection and store_dlogits else ["flags_ptr"]
    absent += [name for kind in WEIGHTS if kind not in weights for name in WEIGHTS[kind]]
    return Source(_ast(panel_kernel, dtype, constants, absent), config)


def count_source(
    target: str, dtype: torch.dtype, precision: str, *, ids: bool = False, step: int = 2
) -> Source:
    """The kernel that counts logits, in one of its three steps."""
    step_constants = count_constants(step)
    config = count_config(_capability(target), dtype, precision, step_constants["TALLIED"])
    constants = {
        "stride_xd": 1,
        "stride_yd": 1,
        "D": 768,
        **step_constants,
        "INPUT_PRECISION": precision,
        **config.tile_constants(),
    }
    absent = [] if ids else ["image_ids_ptr", "text_ids_ptr"]
    absent += [] if step else ["prefix_ptr"]
    pointers = {"counts_ptr": "*u8"} if constants["TALLIED"] else {}
    return Source(_ast(count_kernel, dtype, constants, absent, pointers=pointers), config)


def score_source(
    target: str,
    dtype: torch.dtype,
    precision: str,
    *,
    kernel: str,
    ids: bool = False,
    sides: str = "both",
    d: int = 768,
) -> Source:
    """A kernel that compares similarities: the "best" positives, or the negatives "not below" them.

    sides: "both", or the one whose numbers are wanted: "image" or "text".
    """
    config = panel_config(_capability(target), dtype, precision, store_dlogits=False)
    constants = {
        "stride_xd": 1,
        "stride_yd": 1,
        "D": d,
        "INPUT_PRECISION": precision,
        **config.tile_constants(),
    }
    absent = [] if ids else ["image_ids_ptr", "text_ids_ptr"]
    function = best_kernel if kernel == "best" else not_below_kernel
    values = ("keys",) if kernel == "best" else ("best", "counts")
    missing = {"both": (), "image": ("text",), "text": ("image",)}[sides]
    absent += [f"{side}_{value}_ptr" for side in missing for value in values]
    return Source(_ast(function, dtype, constants, absent), config)


def product_source(
    target: str,
    dtype: torch.dtype,
    precision: str,
    *,
    transposed: bool,
    skips: bool = True,
    accumulate: bool = True,
    d: int = 768,
) -> Source:
    """The product of dlogits (or their transpose) that skips tiles or takes them all."""
    config = panel_config(_capability(target), dtype, precision, store_dlogits=True)
    tile = config.tile[::-1] if transposed else config.tile
    constants = {
        "stride_od": 1,
        "stride_zm" if transposed else "stride_zk": 1,
        "stride_yd": 1,
        "ACCUMULATE": accumulate,
        "INPUT_PRECISION": precision,
        **ProductConfig(config, tile, precision).constants(),
    }
    absent = [] if skips else ["lists_ptr"]
    return Source(_ast(product_kernel, dtype, constants, absent, d), config)


def compile_panel(target: str, dtype: torch.dtype, precision: str, **options: object) -> Compiled:
    """Compile a :func:`panel_source`."""
    compiled = _compile(panel_source(target, dtype, precision, **options), target)
    # every form of a choice selects, and weights add selections: the forms cannot be told apart
    selects = options.get("selection") or options.get("weights")
    return replace(compiled, epilogue={}) if selects else compiled


def compile_count(target: str, dtype: torch.dtype, precision: str, **options: object) -> Compiled:
    """Compile a :func:`count_source`."""
    return _compile(count_source(target, dtype, precision, **options), target)


def compile_score(target: str, dtype: torch.dtype, precision: str, **options: object) -> Compiled:
    """Compile a :func:`score_source`."""
    return _compile(score_source(target, dtype, precision, **options), target)


def compile_product(target: str, dtype: torch.dtype, precision: str, **options: object) -> Compiled:
    """Compile a :func:`product_source`."""
    return _compile(product_source(target, dtype, precision, **options), target)


def _capability(target: str) -> tuple[int, int] | str:
    return "hip" if target.startswith("gfx") else divmod(int(target.removeprefix("sm_")), 10)


_POINTERS = {
    "image_ids_ptr": "*i64",
    "text_ids_ptr": "*i64",
    **dict.fromkeys(("image_keys_ptr", "text_keys_ptr", "prefix_ptr"), "*i32"),
    **dict.fromkeys(("image_counts_ptr", "text_counts_ptr"), "*i32"),
    **dict.fromkeys(("flags_ptr", "lists_ptr", "counts_ptr"), "*i32"),
}


def _ast(
    kernel: triton.JITFunction,
    dtype: torch.dtype,
    constants: dict,
    absent: list[str],
    d: int = 768,
    pointers: dict[str, str] | None = None,
) -> ASTSource:
    """A kernel with its arguments' types, constants and what Triton knows of their divisors.

    absent: arguments that are None. pointers: types of arguments that depend on the call.
    tests/tooling/test_specialisations.py compares it with what a launch asks for.
    """
    constants = constants | dict.fromkeys(absent)
    pointers = _POINTERS | (pointers or {})
    pointers |= dict.fromkeys(("x_ptr", "y_ptr", "dlogits_ptr"), "*" + _TYPES[dtype])
    signature, attributes = {}, {}
    for i, name in enumerate(kernel.arg_names):
        pointer = name.endswith("_ptr")
        number = "fp32" if name in ("alpha", "aligned_share") else "i32"
        kind = pointers.get(name, "*fp32" if pointer else number)
        signature[name] = "constexpr" if name in constants else kind
        # torch's pointers are aligned, and so are the rows of dlogits and of features, which the
        # sweep pads. Strides of lists are not specialised.
        row = name in ("stride_xm", "stride_yn", "stride_yk", "stride_zm", "stride_zk")
        of_out = name in ("D", "stride_om") and d % 16 == 0
        if name not in constants and (pointer or row or of_out):
            attributes[(i,)] = [["tt.divisibility", 16]]
    return ASTSource(kernel, signature, constants, attributes)


def _compile(source: Source, target: str) -> Compiled:
    if target.startswith("gfx"):
        gpu, inspect = GPUTarget("hip", target, 64), inspect_amd
    else:
        gpu, inspect = GPUTarget("cuda", int(target.removeprefix("sm_")), 32), inspect_cuda
    options = source.config.options()
    return inspect(triton.compile(source.ast, target=gpu, options=options), source.config, target)


def shipped() -> list[tuple[str, torch.dtype, str]]:
    """Target, dtype and precision of everything the backend may launch."""
    everything = [(t, *operand) for t, operand in product(TARGETS, OPERANDS)]
    return [row for row in everything if row[::2] != ("gfx942", "tf32")]


# The kernels beside the one that writes dlogits of all pairs, and how they are compiled.
OTHERS = {
    "no dlogits": partial(compile_panel, store_dlogits=False),
    "negatives by hash": partial(compile_panel, selection="hash"),
    "negatives by logit": partial(compile_panel, selection="logit"),
    "weights of rows": partial(compile_panel, weights=("rows",)),
    "counting of logits": partial(compile_count, step=1),
    "best positives": partial(compile_score, kernel="best", ids=True),
    "negatives not below": partial(compile_score, kernel="not below"),
    "dlogits Y, tiles skipped": partial(compile_product, transposed=False),
    "dlogits^T X, tiles skipped": partial(compile_product, transposed=True),
}


def compiled_rows() -> Iterator[dict]:
    """A row for each portable kernel (of those beside the panel kernel in bf16 alone)."""
    for (target, dtype, precision), ids in product(shipped(), (False, True)):
        compiled = compile_panel(target, dtype, precision, ids=ids)
        yield _row(compiled, "panel", target, dtype, precision, ids, shipped=True)
    half = torch.bfloat16, "ieee"
    for (name, compiling), target in product(OTHERS.items(), TARGETS):
        yield _row(compiling(target, *half), name, target, *half, False, shipped=True)


def _row(
    compiled: Compiled,
    kernel: str,
    target: str,
    dtype: torch.dtype,
    precision: str,
    ids: bool,
    shipped: bool,
) -> dict:
    found = asdict(compiled)
    config = found.pop("config") | compiled.config.constants()
    return {
        "kind": "compiled",
        "kernel": kernel,
        "shipped": shipped,
        "target": target,
        "dtype": _TYPES[dtype],
        "precision": precision,
        "positives": "ids" if ids else "diagonal",
        "dim": 768,
        "block_m": config["BLOCK_M"],
        "block_n": config["BLOCK_N"],
        "num_warps": config["num_warps"],
        "saturated_logit": SATURATED_LOGIT.value,
        **found,
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.suites.compiled", description=__doc__)
    parser.add_argument("--output", type=Path, help="results file; by default under results/")
    args = parser.parse_args()
    columns = ("target", "dtype", "precision", "positives", "registers", "stack_bytes", "spills")
    columns += ("shared_bytes", "tensor_core", "arithmetic", "special", "occupancy", "kernel")
    print(
        f"triton {triton.__version__}, D = 768, dlogits and all sums written\n{' '.join(columns)}"
    )
    rows = []
    for row in compiled_rows():
        rows.append(row)
        print(*(row[column] for column in columns), flush=True)
    print(f"written to {write_results('compiled', environment(), rows, args.output)}")


if __name__ == "__main__":
    main()
