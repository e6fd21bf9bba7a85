"""What the compilers make of the Triton panel kernel, for GPUs that need not be present.

    python -m benchmarks.suites.compiled     # every shipped configuration; a results file

Not in interpreter mode (TRITON_INTERPRET), which replaces the compiler.
"""

from __future__ import annotations

import argparse
import re
import statistics
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path

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

from ..common.machine_code import basic_blocks, disassemble
from ..common.results import environment, write_results

TARGETS = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942")
# dtype and, for fp32, how it is multiplied
OPERANDS = (
    (torch.bfloat16, "ieee"),
    (torch.float16, "ieee"),
    (torch.float32, "tf32"),
    (torch.float32, "ieee"),
)
# shared memory in bytes: of a multiprocessor, and the most one program may take
SHARED = {"sm_80": (167936, 166912)}
SHARED |= dict.fromkeys(("sm_86", "sm_89", "sm_120"), (102400, 101376))
SHARED |= dict.fromkeys(("sm_90", "sm_100"), (233472, 232448))
SHARED["gfx942"] = (65536, 65536)
_TYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


@dataclass(frozen=True)
class Compiled:
    """One compiled kernel."""

    config: PanelConfig
    registers: int  # a thread (AMD: vector registers)
    stack_bytes: int  # a thread
    spills: int  # instructions that load or store the stack (AMD: spilled registers)
    shared_bytes: int  # a program
    tensor_core: str  # the matrix instruction, "" for none
    async_copies: int  # instructions from global to shared memory
    arithmetic: int  # other floating-point instructions (CUDA: F..., without the matrix units')
    special: int  # special-function instructions
    instructions: int
    occupancy: int | None  # programs a multiprocessor holds (CUDA)
    # instructions a pair in the epilogue's three forms, by the name of the form: see _epilogues
    epilogue: dict[str, float]


def compile_panel(
    target: str,
    dtype: torch.dtype,
    precision: str,
    *,
    ids: bool = False,
    kept: str | None = None,
    store_dlogits: bool = True,
    scalar_grads: bool = True,
    d: int = 768,
) -> Compiled:
    """Compile the panel kernel as a launch on contiguous (.., d) features does.

    kept: how negatives are chosen, by "hash" or by "logit"; None: all are kept.
    """
    config = panel_config(_capability(target), dtype, precision, store_dlogits)
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
    absent += [] if kept == "hash" else ["image_keys_ptr", "text_keys_ptr", "hash_cutoff"]
    absent += [] if kept == "logit" else ["center_ptr", "inv_radius_ptr", "threshold_ptr"]
    if not store_dlogits:
        absent += ["dlogits_ptr"]
        constants["stride_zm"] = 0
    if not (kept and store_dlogits):
        absent += ["flags_ptr"]
    compiled = _compile(panel_kernel, target, dtype, constants, absent, config)
    # every form of a choice selects: they cannot be told apart by that
    return replace(compiled, epilogue={}) if kept else compiled


def compile_count(
    target: str, dtype: torch.dtype, precision: str, *, ids: bool = False, step: int = 2
) -> Compiled:
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
    return _compile(count_kernel, target, dtype, constants, absent, config, pointers=pointers)


def compile_product(
    target: str,
    dtype: torch.dtype,
    precision: str,
    *,
    transposed: bool,
    skips: bool = True,
    accumulate: bool = True,
    d: int = 768,
) -> Compiled:
    """The product of dlogits (or their transpose) that skips tiles or takes them all."""
    config = panel_config(_capability(target), dtype, precision, store_dlogits=True)
    tile = config.tile[::-1] if transposed else config.tile
    product = ProductConfig(config, tile, precision)
    constants = {
        "stride_od": 1,
        "stride_zm" if transposed else "stride_zk": 1,
        "stride_yd": 1,
        "ACCUMULATE": accumulate,
        "INPUT_PRECISION": precision,
        **product.constants(),
    }
    absent = [] if skips else ["lists_ptr"]
    return _compile(product_kernel, target, dtype, constants, absent, config, d)


def _capability(target: str) -> tuple[int, int] | str:
    return "hip" if target.startswith("gfx") else divmod(int(target.removeprefix("sm_")), 10)


_POINTERS = {
    "image_ids_ptr": "*i64",
    "text_ids_ptr": "*i64",
    **dict.fromkeys(("image_keys_ptr", "text_keys_ptr", "prefix_ptr"), "*i32"),
    **dict.fromkeys(("flags_ptr", "lists_ptr", "counts_ptr"), "*i32"),
}


def _compile(
    kernel: triton.JITFunction,
    target: str,
    dtype: torch.dtype,
    constants: dict,
    absent: list[str],
    config: PanelConfig,
    d: int = 768,
    pointers: dict[str, str] | None = None,
) -> Compiled:
    """Compile a kernel and read its machine code.

    absent: arguments that are None. pointers: types of arguments that depend on the call.
    """
    constants = constants | dict.fromkeys(absent)
    pointers = _POINTERS | (pointers or {})
    pointers |= dict.fromkeys(("x_ptr", "y_ptr", "dlogits_ptr"), "*" + _TYPES[dtype])
    signature, attributes = {}, {}
    for i, name in enumerate(kernel.arg_names):
        pointer = name.endswith("_ptr")
        kind = pointers.get(name, "*fp32" if pointer else "fp32" if name == "alpha" else "i32")
        signature[name] = "constexpr" if name in constants else kind
        # What the launcher sees: torch's pointers are aligned, and so are the rows of features
        # that the sweep pads, and of g. Strides of lists are not specialised.
        row = name in ("stride_xm", "stride_yn", "stride_yk", "stride_gm", "stride_gk")
        of_out = name in ("D", "stride_om") and d % 16 == 0
        if name not in constants and (pointer or row or of_out):
            attributes[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, attributes)
    if target.startswith("gfx"):
        gpu, inspect = GPUTarget("hip", target, 64), _inspect_amd
    else:
        gpu, inspect = GPUTarget("cuda", int(target.removeprefix("sm_")), 32), _inspect_cuda
    return inspect(triton.compile(source, target=gpu, options=config.options()), config, target)


def _inspect_cuda(kernel, config: PanelConfig, target: str) -> Compiled:
    code = disassemble(kernel)
    opcodes = code.opcodes
    shared = kernel.metadata.shared
    threads = 32 * config.num_warps
    matrix = ("HGMMA", "UTCHMMA", "HMMA")
    return Compiled(
        config,
        registers=code.registers,
        stack_bytes=code.stack_bytes,
        spills=sum(op in ("LDL", "STL") for op in opcodes),
        shared_bytes=shared,
        tensor_core=next((op for op in matrix if op in opcodes), ""),
        async_copies=opcodes.count("LDGSTS"),
        arithmetic=sum(op[0] == "F" and op != "FENCE" for op in opcodes),
        special=opcodes.count("MUFU"),
        instructions=len(opcodes),
        # registers come in eights, and the system takes 1 KiB of shared memory a program
        occupancy=min(
            65536 // (threads * -(-code.registers // 8) * 8), SHARED[target][0] // (shared + 1024)
        ),
        epilogue=_epilogues(code.sass),
    )


def _epilogues(sass: str) -> dict[str, float]:
    """Instructions a pair, from the basic blocks that hold exponentials: a part of a tile each.

    "easy" has one special function a pair and selects nothing; "plain" has two, and selects once;
    "masked" also tells pairs apart. What comes once a tile (its maximum, the last sums) is not in.
    """
    found: dict[str, list[float]] = {}
    for block in basic_blocks(sass):
        block = [re.match(r"[A-Z0-9]+", op)[0] for op in block]
        special, selects = block.count("MUFU"), block.count("FSEL")
        if special < 4:
            continue
        pairs = special / 2 if selects else special
        form = "easy" if not selects else "plain" if selects <= pairs else "masked"
        found.setdefault(form, []).append(len(block) / pairs)
    return {form: statistics.median(costs) for form, costs in found.items()}


def _inspect_amd(kernel, config: PanelConfig, target: str) -> Compiled:
    text = kernel.asm["amdgcn"]

    def field(name: str) -> int:
        return int(re.search(rf"\.{name}:\s+(\d+)", text)[1])

    opcodes = re.findall(r"^\s+([a-z]+_[a-z0-9_]+)", text, re.M)
    return Compiled(
        config,
        registers=field("vgpr_count"),
        stack_bytes=field("private_segment_fixed_size"),
        spills=field("vgpr_spill_count") + field("sgpr_spill_count"),
        shared_bytes=kernel.metadata.shared,
        tensor_core=next((op for op in opcodes if op.startswith("v_mfma")), ""),
        async_copies=sum(op.endswith("_lds") for op in opcodes),
        arithmetic=sum(op.startswith("v_") and "_f32" in op for op in opcodes),
        special=sum(op.startswith(("v_exp_f32", "v_rsq_f32")) for op in opcodes),
        instructions=len(opcodes),
        occupancy=None,
        epilogue={},
    )


def shipped() -> list[tuple[str, torch.dtype, str]]:
    """Target, dtype and precision of everything the backend may launch."""
    everything = [(t, *operand) for t, operand in product(TARGETS, OPERANDS)]
    return [row for row in everything if row[::2] != ("gfx942", "tf32")]


# The kernels beside the one that writes g of all pairs, and how they are compiled.
OTHERS = {
    "no g": partial(compile_panel, store_dlogits=False),
    "negatives by hash": partial(compile_panel, kept="hash"),
    "negatives by logit": partial(compile_panel, kept="logit"),
    "counting of logits": partial(compile_count, step=1),
    "g Y, tiles skipped": partial(compile_product, transposed=False),
    "g^T X, tiles skipped": partial(compile_product, transposed=True),
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
        "easy_logit": SATURATED_LOGIT.value,
        **found,
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.suites.compiled", description=__doc__)
    parser.add_argument("--output", type=Path, help="results file; by default under results/")
    args = parser.parse_args()
    columns = ("target", "dtype", "precision", "positives", "registers", "stack_bytes", "spills")
    columns += ("shared_bytes", "tensor_core", "arithmetic", "special", "occupancy", "kernel")
    print(f"triton {triton.__version__}, D = 768, g and all sums written\n{' '.join(columns)}")
    rows = []
    for row in compiled_rows():
        rows.append(row)
        print(*(row[column] for column in columns), flush=True)
    print(f"written to {write_results('compiled', environment(), rows, args.output)}")


if __name__ == "__main__":
    main()
