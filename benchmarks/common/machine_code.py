"""What the machine code of a compiled Triton kernel says: registers, spills, instructions."""

from __future__ import annotations

import re
import statistics
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import triton

from fused_siglip.kernels.triton_configs import PanelConfig

INSTRUCTION = r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9]*)(.*)"


# shared memory in bytes: of a multiprocessor, and the most one program may take
SHARED = {"sm_80": (167936, 166912)}
SHARED |= dict.fromkeys(("sm_86", "sm_89", "sm_120"), (102400, 101376))
SHARED |= dict.fromkeys(("sm_90", "sm_100"), (233472, 232448))
SHARED["gfx942"] = (65536, 65536)


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


class Disassembly(NamedTuple):
    registers: int  # a thread
    stack_bytes: int  # a thread
    sass: str

    @property
    def opcodes(self) -> list[str]:
        return [op for _, op, _ in re.findall(INSTRUCTION, self.sass, re.M)]


def disassemble(kernel: triton.compiler.CompiledKernel) -> Disassembly:
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "kernel.cubin")
        cubin.write_bytes(kernel.asm["cubin"])
        tool = triton.knobs.nvidia.cuobjdump.path
        usage, sass = (
            subprocess.run([tool, flag, cubin], capture_output=True, text=True, check=True).stdout
            for flag in ("-res-usage", "-sass")
        )
    registers, stack = (int(re.search(rf"{name}:(\d+)", usage)[1]) for name in ("REG", "STACK"))
    return Disassembly(registers, stack, sass)


def basic_blocks(sass: str) -> list[list[str]]:
    """Instructions without their operands, between branches and what these lead to."""
    code = [(int(at, 16), op, rest) for at, op, rest in re.findall(INSTRUCTION, sass, re.M)]
    targets = {int(t, 16) for _, op, rest in code if op == "BRA"
               for t in re.findall(r"0x([0-9a-f]+)", rest)}  # fmt: skip
    blocks: list[list[str]] = [[]]
    for at, op, rest in code:
        if at in targets:
            blocks.append([])
        blocks[-1].append(op + re.match(r"\S*", rest)[0])
        if op in ("BRA", "EXIT"):
            blocks.append([])
    return blocks


def inspect_cuda(kernel, config: PanelConfig, target: str) -> Compiled:
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

    "saturated" has one special function a pair and selects nothing; "plain" has two, and selects
    once; "masked" also tells pairs apart. What comes once a tile (its maximum, the last sums) is
    not in.
    """
    found: dict[str, list[float]] = {}
    for block in basic_blocks(sass):
        block = [re.match(r"[A-Z0-9]+", op)[0] for op in block]
        special, selects = block.count("MUFU"), block.count("FSEL")
        if special < 4:
            continue
        pairs = special / 2 if selects else special
        form = "saturated" if not selects else "plain" if selects <= pairs else "masked"
        found.setdefault(form, []).append(len(block) / pairs)
    return {form: statistics.median(costs) for form, costs in found.items()}


def inspect_amd(kernel, config: PanelConfig, target: str) -> Compiled:
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
