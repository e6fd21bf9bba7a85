"""What the compiler makes of the panel kernel for Hopper; no GPU is needed.

python -m benchmarks.suites.compiled_hopper     # as it is shipped: a results file
"""

from __future__ import annotations

import argparse
import re
import statistics
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.experimental.gluon import language as gl
from triton.experimental.gluon._runtime import GluonASTSource

from fused_siglip.kernels import GRAD_SCALE
from fused_siglip.kernels.hopper import HOPPER, HopperConfig
from fused_siglip.kernels.hopper_kernel import hopper_panel_kernel

from ..common.machine_code import basic_blocks, disassemble
from ..common.results import environment, write_results


@dataclass(frozen=True)
class Compiled:
    """What was found in the code of the whole kernel: both consumers and the producer."""

    registers: int  # a thread, when the kernel starts
    threads: int
    pools: tuple[int, ...]  # registers a thread that warps set themselves
    stack_bytes: int
    spills: int  # loads and stores of the stack
    spills_in_loops: int  # of these, beside products and exponentials; the others run once a tile
    shared_bytes: int
    product: str  # the shape of the matrix instruction
    copies_in: int
    copies_out: int
    unsynchronised: tuple[str, ...]  # which of UNTIL_ALL_WARPS are broken
    instructions_a_pair: dict[str, float]


# Of a partition one thread arrives at a barrier or copies for all: after a wait or fence, its warps
# have to meet before that. The compiler sees to it. What; who must not come before the others.
UNTIL_ALL_WARPS = {
    "a stage is freed": (r"wgmma\.wait_group", r"mbarrier\.arrive"),
    "a buffer of dlogits is written": (r"cp\.async\.bulk\.wait_group", r"st\.shared|stmatrix"),
    "dlogits are copied": (r"fence\.proxy\.async", r"cp\.async\.bulk\.tensor\S*\.global\.shared"),
}


def compile_gluon(
    config: HopperConfig,
    dtype: torch.dtype = torch.bfloat16,
    *,
    d: int = 768,
    store_dlogits: bool = True,
    scalar_grads: bool = True,
) -> Compiled:
    """Compile the kernel as a launch on contiguous (.., d) features does."""
    kind = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16}[dtype]

    def descriptor(*block: int) -> str:
        layout = gl.NVMMASharedLayout.get_default_for(list(block), kind)
        return f"tensordesc<{kind.name}{list(block)},{layout!r}>"

    constants = {
        "D": d,
        "GROUP_M": config.group_m,
        "STAGES": config.stages,
        "WIDTH": config.width,
        "GRAD_SCALE": GRAD_SCALE.get(dtype, 1.0),
        "SCALAR_GRADS": scalar_grads,
        "STORE_BUFFERS": config.store_buffers,
        "REGISTERS": config.registers,
        "num_warps": config.num_warps,
    }
    if not store_dlogits:
        constants["out_desc"] = None
    kinds = {
        "x_desc": descriptor(config.tile[0], config.block_k),
        "y_desc": descriptor(config.tile[1], config.block_k),
        "out_desc": descriptor(config.tile[0], config.width),
        **dict.fromkeys(("partials_ptr", "scale_ptr", "bias_ptr"), "*fp32"),
    }
    signature, attributes = {}, {}
    for i, name in enumerate(hopper_panel_kernel.arg_names):
        signature[name] = "constexpr" if name in constants else kinds.get(name, "i32")
        if name not in constants and name.endswith("_ptr"):
            attributes[(i,)] = [["tt.divisibility", 16]]
    source = GluonASTSource(hopper_panel_kernel, signature, constants, attributes)
    kernel = triton.compile(
        source, target=GPUTarget("cuda", 90, 32), options={"num_warps": config.num_warps}
    )
    return _inspect(kernel)


def _inspect(kernel) -> Compiled:
    code = disassemble(kernel)
    opcodes, sass = Counter(code.opcodes), code.sass
    products = set(re.findall(r"HGMMA\.([0-9x]+)", sass))
    threads = re.search(r"\.reqntid (\d+)", kernel.asm["ptx"])
    return Compiled(
        registers=code.registers,
        threads=int(threads[1]),
        pools=tuple(int(n) for n in re.findall(r"setmaxnreg\S+\s+(\d+)", kernel.asm["ptx"])),
        stack_bytes=code.stack_bytes,
        spills=opcodes["LDL"] + opcodes["STL"],
        spills_in_loops=sum(
            op.startswith(("LDL", "STL"))
            for block in basic_blocks(sass)
            if any(op.startswith(("HGMMA", "MUFU.EX2")) for op in block)
            for op in block
        ),
        shared_bytes=kernel.metadata.shared,
        product=", ".join(sorted(products)),
        copies_in=opcodes["UTMALDG"],
        copies_out=opcodes["UTMASTG"],
        unsynchronised=tuple(
            what
            for what, (first, then) in UNTIL_ALL_WARPS.items()
            if not _warps_meet(kernel.asm["ptx"], first, then)
        ),
        instructions_a_pair=_costs(sass),
    )


def _warps_meet(ptx: str, first: str, then: str) -> bool:
    """Whether between all of ``first`` and what comes ``then`` there is a barrier of warps."""
    waiting = False
    for line in re.findall(rf".*(?:{first}|{then}|bar\.sync).*", ptx):
        if waiting and re.search(then, line):
            return False
        waiting = "bar.sync" not in line and (waiting or bool(re.search(first, line)))
    return True


def _costs(sass: str) -> dict[str, float]:
    """Instructions a pair by the form of the epilogue, from blocks that hold exponentials.

    "joined": one logarithm for several pairs; "plain": one polynomial a pair; "masked": pairs are
    told apart, too. The product and what comes once a tile are not in.
    """
    found: dict[str, list[float]] = {}
    for block in basic_blocks(sass):
        pairs, filters_negatives = block.count("MUFU.EX2"), block.count("FSEL")
        if pairs < 4:
            continue
        joined = "MUFU.LG2" in block
        form = "joined" if joined else "plain" if filters_negatives <= pairs else "masked"
        found.setdefault(form, []).append(len(block) / pairs)
    return {form: statistics.median(costs) for form, costs in found.items()}


def rows() -> Iterator[dict]:
    """A row for each kind of operands of the kernel as it is shipped."""
    for dtype in (torch.bfloat16, torch.float16):
        row = {"kind": "gluon", "target": "sm_90", "dtype": str(dtype).split(".")[1], "dim": 768}
        yield row | {"config": asdict(HOPPER)} | asdict(compile_gluon(HOPPER, dtype))


def main() -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.suites.compiled_hopper", description=__doc__)
    parser.add_argument("--output", type=Path, help="results file; by default under results/")
    args = parser.parse_args()
    found = list(rows())
    for row in found:
        print(*(f"{key}={value}" for key, value in row.items()))
    print(f"written to {write_results('gluon', environment(), found, args.output)}")


if __name__ == "__main__":
    main()
