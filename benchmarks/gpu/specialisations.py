"""Every Triton kernel that a device run compiles, found without a device.

``python -m benchmarks.gpu.specialisations`` runs the parts of device.py at their full sizes with
tensors that have no memory (torch's device "meta") and a driver that neither compiles nor launches
anything. Each line is one specialisation: the part that asks for it first, the kernel, and what
Triton tells it apart by. ``--compile`` also compiles each for sm_90 and times that, which predicts
how long a device run waits for compilers. The part ``tests`` is not rehearsed: its tests read the
values that they compute.
"""

from __future__ import annotations

import argparse
import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar
from unittest import mock

import torch
import triton
from torch import Tensor
from torch.overrides import TorchFunctionMode
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from fused_siglip import settled
from fused_siglip.kernels import registry
from fused_siglip.kernels.triton_panel import INTERPRETED

from ..common.baselines import BASELINES
from ..common.reference import LossAndGrads
from ..common.results import environment, write_results
from .part_process import events
from .parts import PARTS
from .parts.checks import SMALL_CASES
from .parts.run import FULL, Run

TARGET = GPUTarget("cuda", 90, 32)
# An H100, as far as the loss and the benchmarks ask torch about it.
PROPERTIES = SimpleNamespace(
    name="NVIDIA H100 80GB HBM3", major=9, minor=0, multi_processor_count=132,
    L2_cache_size=50 << 20, total_memory=80 << 30,
)  # fmt: skip
REHEARSED = tuple(name for name in PARTS if name not in ("tests", "counters"))


@dataclass
class Specialisation:
    """One compilation: the arguments of JITFunction._do_compile, less the device."""

    part: str  # that asks for it first
    kernel: JITFunction
    signature: dict[str, str]  # type by argument, or "constexpr"
    constants: dict[tuple[int, ...], object]
    options: object
    attributes: dict[tuple[int, ...], list]
    seconds: float | None = None  # to compile

    def row(self) -> dict:
        names = list(self.signature)
        divisible = [names[at[0]] for at, found in self.attributes.items() if found]
        return {
            "kind": "specialisation",
            "part": self.part,
            "kernel": self.kernel.__name__,
            "types": {name: kind for name, kind in self.signature.items() if kind != "constexpr"},
            "constants": {names[at[0]]: str(value) for at, value in self.constants.items()},
            "divisible_by_16": divisible,
            "num_warps": self.options.num_warps,
            "num_stages": self.options.num_stages,
            "compile_seconds": self.seconds,
        }

    def compile(self) -> None:
        """Compile it for an H100, whatever is in Triton's cache."""
        source = self.kernel.ASTSource(self.kernel, self.signature, self.constants, self.attributes)
        start = time.perf_counter()
        with mock.patch.object(triton.knobs.compilation, "always_compile", True):
            triton.compile(source, target=TARGET, options=self.options.__dict__)
        self.seconds = time.perf_counter() - start


class IdleDriver:
    """As much of a driver as Triton asks for before it compiles."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return TARGET


def _exact(x: Tensor, y: Tensor, t: Tensor, b: Tensor, *sample: Tensor) -> LossAndGrads:
    return LossAndGrads(t, x, y, t, b)


class CalledOnce:
    """In place of timing: the first call of a function asks for all that later ones would."""

    def __init__(self) -> None:
        self.functions: set[Callable] = set()

    def __call__(self, function: Callable, queued: bool = True) -> float:
        if function not in self.functions:
            self.functions.add(function)
            function()
        return 1.0


class MetaAsCuda(TorchFunctionMode):
    """Puts what is made on "cuda" on torch's device without memory, and lets nobody notice."""

    ANSWERS: ClassVar = {
        torch.Tensor.device.__get__: torch.device("cuda", 0),
        torch.Tensor.is_cuda.__get__: True,
        torch.Tensor.is_cpu.__get__: False,
        torch.Tensor.is_meta.__get__: False,
        # values: there are none
        torch.Tensor.item: 1.0,
        torch.Tensor.__bool__: True,
        torch.equal: True,
    }

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function in self.ANSWERS:
            return self.ANSWERS[function]
        if "out_dtype" in kwargs:  # products of half operands in float32, which CUDA alone has
            return kwargs["out"]
        if kwargs.get("device") is not None:
            kwargs = kwargs | {"device": "meta"}
        kwargs.pop("generator", None)
        return function(*args, **kwargs)


class CpuGenerator:
    """torch.Generator, whatever the device."""

    def __new__(cls, device: str = "cpu", make=torch.Generator) -> torch.Generator:
        return make()


TIMER = "benchmarks.common.timing._cuda_seconds"
# What must not reach a device that is not there, and what stands in for it.
STAND_INS = {
    "torch.cuda.get_device_properties": lambda *_: PROPERTIES,
    "torch.cuda.get_device_capability": lambda *_: (PROPERTIES.major, PROPERTIES.minor),
    "torch.cuda.mem_get_info": lambda *_: (PROPERTIES.total_memory,) * 2,
    "torch.cuda.memory_allocated": lambda *_: 0,
    "torch.cuda.max_memory_allocated": lambda *_: 0,
    "torch.cuda.reset_peak_memory_stats": lambda *_: None,
    "torch.cuda.synchronize": lambda *_: None,
    "torch.cuda.empty_cache": lambda: None,
    "torch.cuda.device_of": lambda _: contextlib.nullcontext(),
    "torch.Generator": CpuGenerator,
    "benchmarks.suites.loss.float64_reference": _exact,
    "benchmarks.suites.loss.sampled_reference": _exact,
    "benchmarks.suites.loss.relative_errors": lambda *_: {},
    "benchmarks.gpu.parts.timings.captured": lambda function: function,
    "benchmarks.gpu.candidate_checks.captured": lambda function: function,
    # otherwise the operator's fake would stand in for the kernels
    "fused_siglip.operator.is_eager": lambda *_: True,
    "fused_siglip.function.is_eager": lambda *_: True,
    "fused_siglip.score_operators.is_eager": lambda *_: True,
}


@contextlib.contextmanager
def pretended_gpu() -> Iterator[None]:
    """Inside, tensors on "cuda" have no memory, and what asks for the device meets an H100."""
    with contextlib.ExitStack() as stack:
        for name, stand_in in {**STAND_INS, TIMER: CalledOnce()}.items():
            stack.enter_context(mock.patch(name, stand_in))
        stack.enter_context(mock.patch.object(triton.runtime.driver, "_active", IdleDriver()))
        stack.enter_context(MetaAsCuda())
        _forget_the_gpu()
        stack.callback(_forget_the_gpu)
        yield


def _forget_the_gpu() -> None:
    """What the package has been told about a GPU is not true of another."""
    registry._gpu.cache_clear()
    settled._default_on_gpu.cache_clear()


@contextlib.contextmanager
def recorded(found: dict[tuple, Specialisation], part: str) -> Iterator[None]:
    """Adds to ``found`` what is launched inside; nothing is compiled."""

    def record(kernel, key, signature, device, constants, options, attributes, warmup) -> None:
        made = Specialisation(part, kernel, signature, constants, options, attributes)
        found.setdefault((kernel.__name__, key), made)

    with mock.patch.object(JITFunction, "_do_compile", record):
        yield


def small_cases(run: Run) -> Iterator[dict]:
    """What the part `sanitizer` runs under the toolkit's checkers."""
    exec(SMALL_CASES, {})
    yield {}


def rehearse(names: Sequence[str] = REHEARSED, sizes=FULL) -> tuple[list[Specialisation], list]:
    """The specialisations of these parts, and (part, status, why) of each."""
    found: dict[tuple, Specialisation] = {}
    ended = []
    others = {name: loss for name, loss in BASELINES.items() if name.startswith("fused_")}
    with pretended_gpu(), mock.patch.dict(BASELINES, others, clear=True):
        for name in names:
            rows = small_cases if name == "sanitizer" else PARTS[name].rows
            with recorded(found, name):
                *_, (status, why) = events(rows, Run("cuda", sizes))
            ended.append((name, status, why))
    return list(found.values()), ended


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.gpu.specialisations", description=__doc__)
    parser.add_argument("--only", nargs="+", choices=REHEARSED, default=REHEARSED, metavar="part")
    parser.add_argument("--compile", action="store_true", help="compile for sm_90, and time it")
    parser.add_argument("--output", type=Path, help="also write a results file")
    args = parser.parse_args(arguments)
    if INTERPRETED:
        parser.error("the interpreter replaces the compiler: run this without TRITON_INTERPRET")
    found, ended = rehearse(args.only)
    rows = []
    for made in found:
        if args.compile:
            made.compile()
        row = made.row()
        rows.append(row)
        seconds = f"{made.seconds:5.1f} s  " if args.compile else ""
        print(f"{seconds}{made.part:<12} {row['kernel']:<22} {summary(row)}", flush=True)
    for name, status, why in ended:
        mine = [made for made in found if made.part == name]
        print(f"{name:<12} {len(mine):>3} new" + (f"  {status}: {why}" if why else ""))
    total = f", {sum(made.seconds for made in found):.0f} s in one process" if args.compile else ""
    print(f"{len(found)} specialisations{total}")
    if args.output:
        write_results("specialisations", environment(), rows, args.output)
    return int(any(status == "failed" for _, status, _ in ended))


def summary(row: dict) -> str:
    """What tells a specialisation apart at a glance."""
    kinds = {kind for kind in row["types"].values() if kind.startswith(("*bf", "*fp16", "tensor"))}
    half = ", ".join(sorted(kind.split("[")[0] for kind in kinds)) or "*fp32"
    shown = ("D", "SCALAR_GRADS", "INPUT_PRECISION", "dlogits_ptr", "out_desc", "image_ids_ptr")
    constants = (f"{k}={row['constants'][k]}" for k in shown if k in row["constants"])
    return f"{half}  {' '.join(constants)}  num_warps={row['num_warps']}"


if __name__ == "__main__":
    raise SystemExit(main())
