"""Launches of the emulated Gluon panel kernel, and their numbers against float64."""

from __future__ import annotations

import inspect
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from types import ModuleType
from typing import NamedTuple

import numpy as np

from support.gluon.arrays import Buffer, DType, Fault, Int, Pointer, bfloat16, float16, float32
from support.gluon.hopper import Descriptor
from support.gluon.language import ROOT
from support.gluon.schedule import RandomOrder, launch

KERNEL = ROOT / "kernels/hopper_kernel.py"
EPS = 2.0**-24
UNIT_ROUNDOFF = {bfloat16: 2.0**-8, float16: 2.0**-11}
TINY = {bfloat16: 2.0**-126, float16: 2.0**-14}  # below it, roundings do not shrink
NO_DIAGONAL = 1 << 20  # meets no pair
FORMS = ("moderate_exp", "softplus_sigmoid")  # of the epilogue


@dataclass(frozen=True)
class Case:
    m: int
    n: int
    d: int
    t: float = 10.0
    b: float = -10.0
    diagonal: int = 0
    grid: int = 2
    group: int = 2
    stages: int = 4
    width: int = 16  # columns of a round of the epilogue
    grad_scale: float = 1.0
    block: tuple[int, int, int] = (32, 64, 16)
    warps: int = 4  # a consumer
    buffers: int = 2  # a consumer, from which dlogits are copied
    dtype: DType = bfloat16
    store_dlogits: bool = True
    padded: bool = False  # dlogits have room for whole tiles
    scalar_grads: bool = True
    odd: tuple[tuple[int, int, int, float], ...] = ()  # 0: x, 1: y; row; column; what is there


# "shipped": as kernels/hopper.py has it, in smaller blocks. The others leave to the shapes what
# they do not name.
CONFIGS = {
    "shipped": {"stages": 5, "group": 16, "width": 16, "buffers": 4},
    "fp16": {"block": (16, 128, 16), "stages": 5, "width": 32, "buffers": 4, "dtype": float16,
             "grad_scale": 2.0**15},
    "two buffers": {},
    "one buffer": {"buffers": 1, "padded": True},
    "two stages": {"stages": 2, "group": 1},
}  # fmt: skip

# Their pairs share a reciprocal with others that are as always. The text: in the right half of its
# tile, left of which all is as always.
ODD_IMAGES = ((0, 3, 5, np.nan), (0, 33, 47, np.inf), (0, 50, 20, -np.inf))
ODD_TEXT = ((1, 100, 7, np.nan),)

SHAPES = (
    {"m": 64, "n": 128, "d": 48},
    {"m": 64, "n": 128, "d": 40, "t": 100.0},  # the last step of D is not whole
    {"m": 70, "n": 150, "d": 64, "diagonal": -23, "grid": 3},
    {"m": 64, "n": 128, "d": 32, "t": -100.0, "b": 0.0, "diagonal": NO_DIAGONAL},
    {"m": 64, "n": 128, "d": 32, "t": 100.0, "b": 0.0, "diagonal": NO_DIAGONAL},
    {"m": 50, "n": 100, "d": 48, "grad_scale": 0.125, "diagonal": 10},
    {"m": 33, "n": 65, "d": 16, "t": 100.0, "diagonal": 5},  # one step
    {"m": 96, "n": 64, "d": 128, "diagonal": NO_DIAGONAL, "grid": 1},
    {"m": 65, "n": 190, "d": 77, "t": 100.0, "diagonal": 77, "grid": 5, "group": 1},
    {"m": 1, "n": 1, "d": 48},
    {"m": 31, "n": 63, "d": 32, "t": 0.5},
    {"m": 130, "n": 70, "d": 48, "diagonal": -64, "grid": 4, "group": 8, "stages": 3},
    {"m": 64, "n": 192, "d": 96, "stages": 2, "grid": 1, "b": -2.0},
    {"m": 64, "n": 192, "d": 48, "stages": 5, "grid": 1, "t": -3.0},
    {"m": 70, "n": 150, "d": 112, "stages": 3, "width": 32, "grid": 7},
    {"m": 70, "n": 150, "d": 96, "b": -20.0, "diagonal": 30},
    {"m": 60, "n": 128, "d": 48, "t": 30.0, "b": 5.0},
    {"m": 70, "n": 150, "d": 48, "diagonal": NO_DIAGONAL, "odd": ODD_IMAGES},
    {"m": 70, "n": 150, "d": 48, "diagonal": NO_DIAGONAL, "odd": ODD_TEXT},
)


def random_case(seed: int) -> Case:
    """Sizes around one to three tiles, and what a launch may choose."""
    draw = random.Random(seed)
    config = CONFIGS[draw.choice(list(CONFIGS))]
    m, n = draw.randint(1, 100), draw.randint(1, 200)
    scale = draw.choice([(10.0, -10.0), (100.0, -10.0), (100.0, 0.0), (-8.0, -3.0), (0.0, -5.0)])
    case = Case(
        m,
        n,
        draw.choice([draw.randint(1, 64), 16 * draw.randint(1, 7)]),
        *scale,
        draw.choice([0, draw.randint(-m, n), NO_DIAGONAL]),
        grid=draw.randint(1, 6),
        group=draw.choice([1, 2, 8, 16]),
        stages=draw.randint(2, 5),
        width=draw.choice([16, 32]),
        grad_scale=draw.choice([1.0, 0.25]),
        store_dlogits=draw.random() < 0.9,
        scalar_grads=draw.random() < 0.9,
        odd=draw.choice([(), (), (), (), ((0, m // 2, 0, np.nan),), ((1, n // 2, 0, np.nan),)]),
    )
    chosen = ("block", "dtype", "padded", "grad_scale")
    case = replace(case, **{k: v for k, v in config.items() if k in chosen})
    rounds = case.block[1] // case.width  # of a tile: they go round in the buffers
    return replace(case, buffers=draw.choice([k for k in (1, 2, 4) if k <= rounds]))


class Outcome(NamedTuple):
    dlogits: float  # largest error over what rounding may cause
    sums: float
    forms: Counter  # of the epilogue: how often each ran


def features(case: Case, seed: int) -> tuple[Descriptor, Descriptor]:
    """Normalised rows, positives alike."""
    draw = np.random.default_rng(seed)
    x, y = draw.standard_normal((case.m, case.d)), draw.standard_normal((case.n, case.d))
    for i in range(max(0, -case.diagonal), min(case.m, case.n - case.diagonal)):
        y[i + case.diagonal] = x[i] + 0.5 * y[i + case.diagonal]
    x, y = (f / np.linalg.norm(f, axis=1, keepdims=True) for f in (x, y))
    for which, row, column, odd in case.odd:
        (x, y)[which][row, column] = odd
    block_m, block_n, block_k = case.block
    return tuple(
        Descriptor(Buffer(f.shape, case.dtype, f), (rows, block_k))
        for f, rows in ((x, block_m), (y, block_n))
    )


def formula(x, y, case: Case, dtype) -> list[np.ndarray]:
    """Element by element in plain NumPy: softplus(u), dlogits * s and dlogits."""
    with np.errstate(invalid="ignore"):
        s = x.astype(dtype) @ y.astype(dtype).T
    positive = np.arange(case.m)[:, None] + case.diagonal == np.arange(case.n)
    sign = np.where(positive, -1, 1).astype(dtype)
    u = sign * (s * dtype(case.t) + dtype(case.b))
    with np.errstate(over="ignore", invalid="ignore"):
        dlogits = sign / (1 + np.exp(-u))
        return [np.maximum(u, 0) + np.log1p(np.exp(-np.abs(u))), dlogits * s, dlogits]


def check(case: Case, x: Descriptor, y: Descriptor, sums, dlogits) -> tuple[float, float]:
    """Errors of dlogits and of the sums over what rounding may cause: as for the other panels, 4
    times what float32 deviates element by element, and the roundings of the functions and of
    dlogits. NaN has
    to be where it is in float64."""
    exact = formula(x.array, y.array, case, np.float64)
    eager = formula(x.array, y.array, case, np.float32)
    some = ~np.isnan(exact[2])  # other pairs have no NaN to be compared
    of_dlogits = 0.0
    if case.store_dlogits:
        if (np.isnan(dlogits) == some).any():
            wrong = (np.isnan(dlogits) == some).sum()
            raise AssertionError(f"{wrong} of dlogits are NaN or are not, wrongly")
        size = np.abs(exact[2][some])
        deviation = np.abs(eager[2][some] - exact[2][some]) / np.maximum(size, 1e-300)
        slack = (4 * deviation.max(initial=0) + 8 * EPS + UNIT_ROUNDOFF[case.dtype]) * size
        slack += TINY[case.dtype] / case.grad_scale
        of_dlogits = (np.abs(dlogits[some] - exact[2][some]) / slack).max(initial=0)
    of_sums = [
        abs(total - e.sum()) / (4 * np.abs(f - e).sum() + 32 * EPS * np.abs(e).sum())
        if some.all()
        else (0.0 if np.isnan(total) else np.inf)
        for total, e, f in zip(sums, exact, eager, strict=case.scalar_grads)
    ]
    return of_dlogits, max(of_sums)


def run(module: ModuleType, case: Case, seed: int) -> Outcome:
    """One launch in an order that the seed decides. Raises what the emulator does."""
    block_m, block_n, _ = case.block
    tiles_m, tiles_n = -(-case.m // block_m), -(-case.n // block_n)
    x, y = features(case, seed)
    padded = (tiles_m * block_m, tiles_n * block_n)
    dlogits = Buffer(padded if case.padded else (case.m, case.n), case.dtype)
    partials = Buffer((3 if case.scalar_grads else 1, tiles_m * tiles_n), float32)
    forms: Counter = Counter()
    for name in FORMS:
        vars(module)[name] = _counted(getattr(module, name), forms, name)
    arguments = {
        "x_desc": x,
        "y_desc": y,
        "out_desc": Descriptor(dlogits, (block_m, case.width)) if case.store_dlogits else None,
        "partials_ptr": Pointer(partials),
        "scale_ptr": Pointer(Buffer((1, 1), float32, case.t)),
        "bias_ptr": Pointer(Buffer((1, 1), float32, case.b)),
        "M": Int(case.m),
        "N": Int(case.n),
        "diagonal": Int(case.diagonal),
        "D": case.d,
        "GROUP_M": case.group,
        "STAGES": case.stages,
        "WIDTH": case.width,
        "GRAD_SCALE": case.grad_scale,
        "SCALAR_GRADS": case.scalar_grads,
        "STORE_BUFFERS": case.buffers,
        "REGISTERS": 112,
        "num_warps": case.warps,
    }
    launch(module.hopper_panel_kernel, case.grid, arguments, RandomOrder(seed))
    if not (dlogits.writes == case.store_dlogits).all() or not (partials.writes == 1).all():
        raise Fault("dlogits or the partial sums are not written throughout")
    if case.store_dlogits and (dlogits.data[case.m :].any() or dlogits.data[:, case.n :].any()):
        raise Fault("dlogits past the last row or column are not 0")
    sums = partials.data.astype(np.float64).sum(1)
    errors = check(case, x, y, sums, dlogits.data[: case.m, : case.n] / case.grad_scale)
    if not max(errors) <= 1:
        of_dlogits, of_sums = (f"{error:.3g}" for error in errors)
        raise AssertionError(f"dlogits {of_dlogits}, sums {of_sums} times what rounding causes")
    return Outcome(*errors, forms)


def _counted(function: Callable, calls: Counter, name: str) -> Callable:
    function = inspect.unwrap(function)

    def count(u):
        calls[name] += 1
        return function(u)

    count.__wrapped__ = function
    return count
