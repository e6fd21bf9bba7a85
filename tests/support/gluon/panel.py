"""Launches of an emulated Gluon panel kernel, held to float64, and the kernel broken on purpose."""

from __future__ import annotations

import ast
import inspect
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import NamedTuple

import numpy as np

from support.gluon.arrays import Buffer, Fault, Int, Pointer, bfloat16, float32
from support.gluon.hopper import Descriptor
from support.gluon.schedule import RandomOrder, launch

EPS = 2.0**-24
UNIT_ROUNDOFF_BF16 = 2.0**-8
NO_DIAGONAL = 1 << 20  # meets no pair
FORMS = ("easy_softplus_sigmoid", "exp_sigmoid", "softplus_sigmoid")  # of the epilogue


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
    parts: int = 4
    grad_scale: float = 1.0
    block: tuple[int, int, int] = (32, 64, 16)
    shared: bool = True  # both consumers work on one tile
    hold: bool = False
    copies: int | None = None  # g leaves in blocks of so many columns; None: through registers
    buffers: int = 2  # of these blocks, a consumer
    store_g: bool = True
    scalar_grads: bool = True


class Outcome(NamedTuple):
    g: float  # largest error over what rounding may cause
    sums: float
    forms: Counter  # of the epilogue: how often each ran


def features(case: Case, seed: int) -> tuple[Descriptor, Descriptor]:
    """Normalised rows, positives alike."""
    draw = np.random.default_rng(seed)
    x, y = draw.standard_normal((case.m, case.d)), draw.standard_normal((case.n, case.d))
    for i in range(max(0, -case.diagonal), min(case.m, case.n - case.diagonal)):
        y[i + case.diagonal] = x[i] + 0.5 * y[i + case.diagonal]
    block_m, block_n, block_k = case.block
    return tuple(
        Descriptor(
            Buffer(f.shape, bfloat16, f / np.linalg.norm(f, axis=1, keepdims=True)),
            (rows, block_k),
        )
        for f, rows in ((x, block_m), (y, block_n))
    )


def formula(x, y, case: Case, dtype) -> list[np.ndarray]:
    """Element by element in plain NumPy: softplus(u), g*s and g."""
    s = x.astype(dtype) @ y.astype(dtype).T
    positive = np.arange(case.m)[:, None] + case.diagonal == np.arange(case.n)
    sign = np.where(positive, -1, 1).astype(dtype)
    u = sign * (s * dtype(case.t) + dtype(case.b))
    with np.errstate(over="ignore"):
        g = sign / (1 + np.exp(-u))
    return [np.maximum(u, 0) + np.log1p(np.exp(-np.abs(u))), g * s, g]


def check(case: Case, x: Descriptor, y: Descriptor, sums, g) -> tuple[float, float]:
    """Errors of g and of the sums over what rounding may cause: as for the other panels, 4 times
    what float32 deviates element by element, and the roundings of the functions and of g."""
    exact = formula(x.array, y.array, case, np.float64)
    eager = formula(x.array, y.array, case, np.float32)
    deviation = (np.abs(eager[2] - exact[2]) / np.maximum(np.abs(exact[2]), 1e-300)).max()
    slack = (4 * deviation + 8 * EPS + UNIT_ROUNDOFF_BF16) * np.abs(exact[2]) + 2.0**-126
    of_g = (np.abs(g - exact[2]) / slack).max() if case.store_g else 0.0
    of_sums = [
        abs(total - e.sum()) / (4 * np.abs(f - e).sum() + 32 * EPS * np.abs(e).sum())
        for total, e, f in zip(sums, exact, eager, strict=case.scalar_grads)
    ]
    return of_g, max(of_sums)


def run(module: ModuleType, case: Case, seed: int) -> Outcome:
    """One launch in an order that the seed decides. Raises what the emulator does."""
    block_m, block_n, _ = case.block
    tiles_m, tiles_n = -(-case.m // block_m), -(-case.n // block_n)
    x, y = features(case, seed)
    stride = 1 << 27  # offsets of g need 64 bits
    # copies stop at the edge; what goes through registers is whole tiles
    padded = (tiles_m * block_m, tiles_n * block_n)
    g = Buffer(padded if case.copies is None else (case.m, case.n), bfloat16, stride=stride)
    g_desc = None
    if case.copies is not None:
        g_desc = Descriptor(g, (block_m // 2 if case.shared else block_m, case.copies))
    slots = tiles_m * tiles_n * (2 if case.shared else 1)
    partials = Buffer((3 if case.scalar_grads else 1, slots), float32)
    forms: Counter = Counter()
    for name in FORMS:
        vars(module)[name] = _counted(getattr(module, name), forms, name)
    arguments = {
        "x_desc": x,
        "y_desc": y,
        "g_ptr": Pointer(g) if case.store_g and g_desc is None else None,
        "g_desc": g_desc,
        "partials_ptr": Pointer(partials),
        "scale_ptr": Pointer(Buffer((1, 1), float32, case.t)),
        "bias_ptr": Pointer(Buffer((1, 1), float32, case.b)),
        "M": Int(case.m),
        "N": Int(case.n),
        "diagonal": Int(case.diagonal),
        "stride_gm": Int(stride),
        "D": case.d,
        "GROUP_M": case.group,
        "STAGES": case.stages,
        "PARTS": case.parts,
        "GRAD_SCALE": case.grad_scale,
        "SCALAR_GRADS": case.scalar_grads,
        "SHARED": case.shared,
        "HOLD": case.hold,
        "STORE_BUFFERS": case.buffers,
        "num_warps": 4,
    }
    launch(module.panel_ws_kernel, case.grid, arguments, RandomOrder(seed))
    if not (g.writes == case.store_g).all() or not (partials.writes == 1).all():
        raise Fault("g or the partial sums are not written throughout")
    if case.store_g and (g.data[case.m :].any() or g.data[:, case.n :].any()):
        raise Fault("g past the last row or column is not 0")
    sums = partials.data.astype(np.float64).sum(1)
    errors = check(case, x, y, sums, g.data[: case.m, : case.n] / case.grad_scale)
    if not max(errors) <= 1:
        raise AssertionError(f"g {errors[0]:.3g}, sums {errors[1]:.3g} times what rounding causes")
    return Outcome(*errors, forms)


def _counted(function: Callable, calls: Counter, name: str) -> Callable:
    function = inspect.unwrap(function)

    def count(u):
        calls[name] += 1
        return function(u)

    count.__wrapped__ = function
    return count


class Break(NamedTuple):
    """Of one function, formatted as by ast.unparse: comments and line breaks do not matter."""

    what: str
    function: str
    old: str  # occurs once there
    new: str

    def edit(self, source: str) -> str:
        """The file's source, broken; ValueError where it is not what this break was made for."""
        tree = ast.parse(source)
        found = [f for f in tree.body if isinstance(f, ast.FunctionDef) and f.name == self.function]
        text = ast.unparse(found[0]) if found else ""
        if text.count(self.old) != 1:
            raise ValueError(
                f"{self.what}: {self.function} holds {self.old!r} {text.count(self.old)} times: "
                "expected once"
            )
        broken = ast.parse(text.replace(self.old, self.new)).body[0]
        tree.body[tree.body.index(found[0])] = broken
        return ast.unparse(tree)
