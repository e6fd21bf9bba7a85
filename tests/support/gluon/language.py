"""Triton's and Gluon's names, as plain Python on NumPy, and a loader of files that use them.

A kernel that uses a name which is not here fails with an AttributeError that says so.
"""

from __future__ import annotations

import builtins
import enum
import importlib
import importlib.util
import math
import re
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np

from support.gluon import arrays, hopper
from support.gluon.arrays import Fault, Int, Tensor, binary, value
from support.gluon.schedule import program

ROOT = Path(__file__).resolve().parents[3]
GLUON = "triton.experimental.gluon"
HOPPER = GLUON + ".language.nvidia.hopper"


class Constant(float):
    """A tl.constexpr of a module: host code takes its value."""

    @property
    def value(self) -> float:
        return float(self)


def _constexpr(v):
    return Constant(v) if isinstance(v, float) else v


def _blocked_layout(size_per_thread, threads_per_warp, warps_per_cta, order):
    if math.prod(threads_per_warp) != 32:
        raise Fault("BlockedLayout: a warp has 32 threads")
    return ("blocked", *map(tuple, (size_per_thread, threads_per_warp, warps_per_cta, order)))


def _unary(function: Callable) -> Callable:
    def apply(x):
        with np.errstate(all="ignore"):
            return x.like(function(x.a))

    return apply


def _fma(x, y, z):
    with np.errstate(all="ignore"):  # rounded once
        return x.like(x.a.astype(np.float64) * value(y) + value(z))


def _where(condition, x, y):
    like = x if isinstance(x, Tensor) else y if isinstance(y, Tensor) else None
    dtype = np.float32 if like is None else like.raw.dtype
    return Tensor(
        np.where(value(condition), value(x), value(y)).astype(dtype), None, condition.layout
    )


class _PropagateNan(enum.Enum):
    NONE, ALL = 0, 0xFFFF


def _extremum(of_numbers: Callable, other_than_nan: Callable, nan_first: Callable) -> Callable:
    def apply(x, y, propagate_nan=_PropagateNan.NONE):
        if isinstance(x, int) and isinstance(y, int):
            return Int(of_numbers(x, y))
        return binary(nan_first if propagate_nan is _PropagateNan.ALL else other_than_nan, x, y)

    return apply


def _fold(function: Callable) -> Callable:
    def apply(x, axis=None, keep_dims=False):
        return x.like(function(x.a, axis=axis, keepdims=keep_dims), ("slice", axis, x.layout))

    return apply


def _reduce(x, axis, combine_fn, keep_dims=False):
    """By halves: Triton says as little about the order."""
    array = np.moveaxis(x.a, axis, 0)
    while len(array) > 1:
        if len(array) % 2:
            raise Fault(f"reduce of {x.shape[axis]} numbers: not a power of two")
        array = combine_fn(*(x.like(half, "any") for half in np.split(array, 2))).a
    array = np.moveaxis(array, 0, axis) if keep_dims else array[0]
    return x.like(array, ("slice", axis, x.layout))


def _arange(start, end, layout=None):
    if (end - start).bit_count() != 1:
        raise Fault(f"arange of {end - start} numbers: not a power of two")
    return Tensor(np.arange(start, end, dtype=np.int32), arrays.int32, layout)


def _full(shape, v, dtype, layout=None):
    return Tensor(np.full([int(n) for n in shape], v, dtype.np), dtype, layout)


def _static_assert(cond, msg=""):
    if not cond:
        raise Fault(f"static_assert: {msg}")


def _range(*arguments, **_):
    """Of values that are known at run time only."""
    return map(Int, builtins.range(*map(int, arguments)))


# What gl and tl share.
_LANGUAGE = {
    **{name: getattr(arrays, name) for name in ("int1", "int32", "int64", "float32", "float16")},
    "bfloat16": arrays.bfloat16,
    "constexpr": _constexpr,
    "static_range": builtins.range,
    "static_assert": _static_assert,
    "range": _range,
    "program_id": lambda axis: Int(program().pid),
    "num_programs": lambda axis: Int(program().grid),
    "cdiv": lambda x, div: (x + div - 1) // div,
    "minimum": _extremum(min, np.fmin, np.minimum),
    "maximum": _extremum(max, np.fmax, np.maximum),
    "where": _where,
    "abs": _unary(np.abs),
    "exp2": _unary(np.exp2),
    "log2": _unary(np.log2),
    "rsqrt": _unary(lambda a: 1 / np.sqrt(a)),
    "fma": _fma,
    "max": _fold(np.fmax.reduce),
    "min": _fold(np.fmin.reduce),
    "sum": _fold(np.sum),
    "reduce": _reduce,
    "zeros": lambda shape, dtype, layout=None: _full(shape, 0, dtype, layout),
    "full": _full,
    "zeros_like": lambda x: x.like(np.zeros(x.shape)),
    "full_like": lambda x, v: x.like(np.full(x.shape, v)),
    "arange": _arange,
    "reshape": lambda x, shape: x.like(x.a.reshape(shape), ("reshape", x.layout)),
    "permute": lambda x, dims: x.like(x.a.transpose(dims), ("permute", x.layout)),
    "join": lambda a, b: a.like(np.stack([a.a, b.a], -1), ("join", a.layout)),
    "split": lambda x: tuple(x.like(x.a[..., i], ("split", x.layout)) for i in (0, 1)),
    "expand_dims": lambda x, axis: x.like(np.expand_dims(x.a, axis)),
    "load": arrays.load_global,
    "store": arrays.store_global,
}
_GLUON_LANGUAGE = {
    "allocate_shared_memory": hopper.allocate_shared,
    "convert_layout": lambda x, layout: x.like(x.a, layout),
    "warp_specialize": lambda partitions, warps, registers: program().specialise(
        partitions, warps, registers
    ),
    "BlockedLayout": _blocked_layout,
    "SliceLayout": lambda dim, parent: ("slice", dim, parent),
    "NVMMADistributedLayout": lambda version, warps_per_cta, instr_shape: (
        "mma", *map(tuple, (version, warps_per_cta, instr_shape)),
    ),
    "num_warps": lambda: program().current.warps,
    "thread_barrier": lambda: None,
}  # fmt: skip
_HOPPER = {
    "tma": SimpleNamespace(
        async_copy_global_to_shared=hopper.copy_to_shared,
        async_copy_shared_to_global=hopper.copy_to_global,
        store_wait=hopper.wait_for_stores,
    ),
    "warpgroup_mma": hopper.multiply,
    "warpgroup_mma_init": lambda x: x,
    "warpgroup_mma_wait": hopper.wait_for_products,
    "fence_async_shared": hopper.fence,
    "mbarrier": SimpleNamespace(
        MBarrierLayout=lambda: "barrier",
        init=hopper.Barrier.init,
        expect=hopper.Barrier.expect,
        arrive=hopper.Barrier.arrive,
        wait=hopper.Barrier.wait,
    ),
}


def _jit(function=None, **_):
    return function or (lambda f: f)


class Stub(ModuleType):
    def __getattr__(self, name):
        raise AttributeError(f"the emulator has no {self.__name__}.{name}")


def stubs() -> dict[str, Stub]:
    contents = {
        "triton": {"jit": _jit, "cdiv": _LANGUAGE["cdiv"]},
        "triton.language": _LANGUAGE | {"PropagateNan": _PropagateNan},
        "triton.language.extra": {"libdevice": SimpleNamespace(fast_log2f=_unary(np.log2))},
        "triton.experimental": {},
        GLUON: {"jit": _jit, "constexpr_function": _jit},
        GLUON + ".language": _LANGUAGE | _GLUON_LANGUAGE,
        GLUON + ".language.nvidia": {},
        HOPPER: _HOPPER,
        GLUON + ".nvidia": {},
        GLUON + ".nvidia.hopper": {"TensorDescriptor": hopper.Descriptor},
    }
    modules = {name: Stub(name) for name in contents}
    for name, module in modules.items():
        vars(module).update(contents[name])
        parent, _, leaf = name.rpartition(".")
        if parent:
            setattr(modules[parent], leaf, module)
    return modules


class _Loader:
    """Imports files that use triton with the names above instead, and everything else as it is."""

    def __init__(self, edits: dict[Path, Callable[[str], str]]):
        self.stubs, self.edits, self.modules = stubs(), edits, {}
        self.builtins = vars(builtins) | {"__import__": self._import, "range": _range}

    def load(self, path: Path, name: str) -> ModuleType:
        if path not in self.modules:
            source = path.read_text()
            source = self.edits.get(path, lambda text: text)(source)
            module = self.modules[path] = ModuleType(name)
            module.__package__, module.__file__ = name.rpartition(".")[0], str(path)
            vars(module)["__builtins__"] = self.builtins
            exec(compile(source, str(path), "exec"), vars(module))
        return self.modules[path]

    def _find(self, name: str) -> ModuleType:
        if name in self.stubs:
            return self.stubs[name]
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.origin and spec.origin.endswith(".py"):
            path = Path(spec.origin).resolve()
            ours = path.is_relative_to(ROOT) and not path.is_relative_to(ROOT / ".venv")
            if ours and re.search(r"^(import|from) triton\b", path.read_text(), re.MULTILINE):
                return self.load(path, name)
        return importlib.import_module(name)

    def _import(self, name, globals=None, locals=None, fromlist=(), level=0):
        if level:
            name = importlib.util.resolve_name("." * level + name, globals["__package__"])
        if not fromlist:
            top = name.partition(".")[0]
            return self.stubs[top] if top in self.stubs else builtins.__import__(name)
        module = self._find(name)
        if hasattr(module, "__path__"):  # what is imported may be modules of a package
            module = SimpleNamespace(
                **{leaf: self._attribute(module, name, leaf) for leaf in fromlist}
            )
        return module

    def _attribute(self, package, name: str, leaf: str):
        if importlib.util.find_spec(f"{name}.{leaf}") is not None:
            return self._find(f"{name}.{leaf}")
        return getattr(package, leaf)


def load(path: Path, edit: Callable[[str], str] | None = None) -> ModuleType:
    """A file of this tree that holds Gluon kernels, and the files of the tree that it imports.

    edit: what to do to the file's source before it runs.
    """
    path = path.resolve()
    name = "emulated"
    if path.is_relative_to(ROOT):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        name = re.sub("^kernels", "fused_siglip.kernels", name)
    return _Loader({path: edit} if edit else {}).load(path, name)
