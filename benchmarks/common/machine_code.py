"""Machine code of compiled Triton kernels for NVIDIA's GPUs, read from the disassembly."""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

import triton

INSTRUCTION = r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9]*)(.*)"


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
