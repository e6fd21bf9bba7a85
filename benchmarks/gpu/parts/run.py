"""What every part is given: the device, the sizes, and the time when it has to end."""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from ...common.baselines import BASELINES, default_fused, obstacles
from ...common.memory import measured_elsewhere
from ...common.workloads import Case

MIB = 1 << 20
TRIAL = (256, 64)  # batch size, dim


class Skipped(Exception):
    """A part (or what is left of it) cannot run here; the message says why."""


@dataclass(frozen=True)
class Point:
    """One shape at which losses are timed."""

    batch_size: int
    dim: int
    dtype: str = "bfloat16"
    precision: str = "highest"  # of float32 products
    logit_scale: float = 10.0
    modes: bool = False  # also with a frozen tower, and without gradients
    only: Sequence[str] = ()  # these losses; by default all but torch.compile


@dataclass(frozen=True)
class Sizes:
    speed: Sequence[Point]
    repeats: int
    accuracy: Sequence[tuple[int, int]]  # (batch size, dim), against all of float64; bf16 at all
    # of them, other operands at the first
    sampled: Sequence[tuple[int, int]]  # likewise, by sampled rows
    alternative: Sequence[tuple[int, int]]
    panels: tuple[int, int]  # one (batch size, dim)
    workspaces: Sequence[int]  # bytes
    latency: Sequence[int]  # batch sizes, at the first dim of panels
    million: tuple[int, int]
    determinism: tuple[int, int]
    runs: int  # of the determinism check
    tests: Sequence[str]  # pytest's arguments


_TARGETS = [(32768, 768), (65536, 768), (32768, 1152), (65536, 1152)]  # of issue "Speed"
_SIZES = (1024, 4096, 16384, 512, 2048, 8192)

FULL = Sizes(
    speed=[
        *(Point(*at, modes=at == _TARGETS[0]) for at in _TARGETS),
        *(Point(*at, logit_scale=100.0, only=("fused_triton",)) for at in _TARGETS),
        Point(1024, 768),
        # torch.compile takes half a minute for a shape: a row of its own
        Point(*_TARGETS[0], only=("compiled",)),
        *(Point(4096, 768, dtype, precision) for dtype, precision in (
            ("float16", "highest"), ("float32", "highest"), ("float32", "high"))),
        *(Point(size, 768) for size in _SIZES[1:]),
        Point(1024, 768, only=("compiled",)),
        *(Point(size, dim) for dim in (1152, 1024) for size in (32768, *_SIZES, 65536)
          if (size, dim) not in _TARGETS),
    ],
    repeats=10,
    accuracy=[(4096, 768), (1000, 720), (8192, 1152), (4099, 1000)],
    sampled=[(32768, 768), (65535, 1152)],
    alternative=[(32768, 768), (65536, 1152), (8192, 768)],
    panels=(32768, 768),
    workspaces=[size * MIB for size in (64, 128, 256, 384, 512, 1024)],
    latency=(256, 512, 1024, 2048, 4096),
    million=(1 << 20, 768),
    determinism=(5000, 768),
    runs=100,
    tests=(
        "tests/triton_backend/test_hopper.py", "tests/triton_backend/test_triton_panel.py",
        "tests/triton_backend/test_triton_math.py", "tests/triton_backend/test_triton_products.py",
        "tests/triton_backend/test_triton_selection.py", "tests/core/test_loss.py",
        "tests/core/test_autograd.py",
    ),
)  # fmt: skip
QUICK = Sizes(
    speed=[Point(128, 32, modes=True), Point(256, 32), Point(256, 32, "float32", "high")],
    repeats=2,
    accuracy=[(100, 24)],
    sampled=[(300, 24)],
    alternative=[(256, 32)],
    panels=(512, 32),
    workspaces=[MIB // 2, MIB],
    latency=(64,),
    million=(1024, 32),
    determinism=(300, 32),
    runs=3,
    tests=("tests/core/test_loss.py", "-k", "diagonal and float32"),
)


@dataclass(frozen=True)
class Run:
    """Names and numbers only, so that it can be sent to another process."""

    device: str
    sizes: Sizes
    deadline: float = float("inf")  # time.monotonic(), the same clock in every process

    @property
    def on_gpu(self) -> bool:
        return torch.device(self.device).type == "cuda"

    @property
    def fused(self) -> str:
        """The loss that a user gets."""
        return default_fused(self.device)

    @property
    def backend(self) -> str:
        return self.fused.removeprefix("fused_")

    def seconds_left(self) -> float:
        return self.deadline - time.monotonic()

    def until(self, deadline: float) -> Run:
        return replace(self, deadline=deadline)

    def needs(self, seconds: float, what: object) -> None:
        """Ends the part, by Skipped, where less time is left than ``what`` takes."""
        if self.seconds_left() < seconds:
            raise Skipped(f"no time left for {what} and what follows")

    def main_baselines(self) -> list[str]:
        """The loss that a user gets, the eager loss and the fastest peer."""
        left_out = ("fused_torch", "fused_triton", "compiled", "row_chunked", "open_clip")
        return [self.fused, *self.baselines(left_out)]

    def baselines(self, but: Sequence[str] = ()) -> list[str]:
        """Those that can run here, without ``but``."""
        reasons = obstacles(self.device)
        return [name for name in BASELINES if reasons[name] is None and name not in but]


@contextlib.contextmanager
def matmul_precision(precision: str) -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def usable(names: list[str], run: Run) -> Iterator[dict]:
    """A row for each of ``names`` that fails on a small batch; these are taken out of the list.

    So that a peer that does not run here costs its own numbers and no others.
    """
    for name in list(names):
        if name.startswith("fused_"):
            continue
        why = trial(name, run.device)
        if why is not None:
            names.remove(name)
            yield {"kind": "left_out", "loss": name, "device": run.device, "reason": why}


@functools.cache
def trial(name: str, device: str) -> str | None:
    """Why a loss fails on a small batch, or None. A foreign kernel is tried in another process:
    an illegal access would take this one's GPU context with it."""
    case = Case(name, *TRIAL, "bfloat16", device)
    try:
        if name == "siglip_kernel":
            measured_elsewhere(case, timeout=60)
        else:
            case.step(case.inputs())()
            if torch.device(device).type == "cuda":
                torch.cuda.synchronize()
    except Exception as error:
        return f"{type(error).__name__}: {str(error).strip()[-200:]}"
    return None
