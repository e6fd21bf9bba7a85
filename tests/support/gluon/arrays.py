"""Numbers, tensors and global memory of emulated Gluon kernels: see hopper.py."""

from __future__ import annotations

import operator
from collections import namedtuple
from types import SimpleNamespace

import numpy as np

DType = namedtuple("DType", "name np nbytes")
int1 = DType("int1", np.bool_, 1)
int32 = DType("int32", np.int32, 4)
int64 = DType("int64", np.int64, 8)
float32 = DType("float32", np.float32, 4)
float16 = DType("float16", np.float32, 2)  # both halves are kept in float32, rounded
bfloat16 = DType("bfloat16", np.float32, 2)
_BY_NUMPY = {np.dtype(d.np): d for d in (int1, int32, int64, float32)}


class Race(Exception):
    """Something is used while nothing tells that its last use is over."""


class Deadlock(Exception):
    """Some partition waits forever."""


class Fault(Exception):
    """Out of bounds, unwritten or twice written memory, overflow, or a barrier misused."""


def rounded(array, dtype: DType) -> np.ndarray:
    """As ``dtype`` holds it; halves to nearest, ties to even."""
    if dtype is float16:
        with np.errstate(over="ignore"):
            return np.asarray(array).astype(np.float16).astype(np.float32)
    if dtype is bfloat16:
        array = np.ascontiguousarray(array, np.float32)
        bits = array.view(np.uint32)
        bits = (bits + 0x7FFF + (bits >> 16 & 1)) & np.uint32(0xFFFF0000)
        return np.where(np.isfinite(array), bits.view(np.float32).reshape(array.shape), array)
    return np.asarray(array).astype(dtype.np)


def _int32(number: int) -> Int:
    if not -(2**31) <= number < 2**31:
        raise Fault(f"{number} overflows int32")
    return Int(number)


class Int(int):
    """A scalar that the kernel computes at run time: int32, and // and % as in C."""

    __hash__ = int.__hash__

    def __neg__(self):
        return _int32(-int(self))

    def to(self, dtype):
        return Tensor(np.asarray(int(self), dtype.np), dtype)


def _arithmetic(function, x, y):
    if not (isinstance(x, int) and isinstance(y, int)):
        return NotImplemented
    if function in (operator.floordiv, operator.mod) and (x < 0 or y <= 0):
        raise Fault("// or % of a negative number: Triton rounds towards zero, Python down")
    return _int32(function(int(x), int(y)))


def _comparison(function, x, y):
    if not isinstance(y, int):
        return NotImplemented
    return np.bool_(function(int(x), int(y)))  # ~ of it is logical


for _name in ["add", "sub", "mul", "floordiv", "mod", "and_", "or_", "xor"]:
    _function = getattr(operator, _name)
    setattr(Int, f"__{_name.rstrip('_')}__", lambda x, y, f=_function: _arithmetic(f, x, y))
    setattr(Int, f"__r{_name.rstrip('_')}__", lambda x, y, f=_function: _arithmetic(f, y, x))
for _name in ["lt", "le", "gt", "ge", "eq", "ne"]:
    _function = getattr(operator, _name)
    setattr(Int, f"__{_name}__", lambda x, y, f=_function: _comparison(f, x, y))


class Tensor:
    """An array, its dtype and layout; ``pending`` are the matrix products that write it."""

    __array_ufunc__ = None  # so that NumPy's own numbers leave arithmetic to this class

    def __init__(self, array, dtype: DType | None = None, layout=None, pending=()):
        self.raw, self.layout, self.pending = np.asarray(array), layout, list(pending)
        self.dtype, self.shape = dtype or _BY_NUMPY[self.raw.dtype], self.raw.shape
        self.type = SimpleNamespace(
            layout=layout, shape=list(self.shape), element_ty=self.dtype, scalar=self.dtype
        )

    @property
    def a(self) -> np.ndarray:
        if not all(product.known for product in self.pending):
            raise Race("accumulator read before a wait covers the product that writes it")
        return self.raw

    def like(self, array, layout=None) -> Tensor:
        """Of the same dtype and, if no other is given, layout."""
        return Tensor(np.asarray(array, self.raw.dtype), self.dtype, layout or self.layout)

    def to(self, dtype: DType, bitcast: bool = False) -> Tensor:
        if bitcast:
            return Tensor(self.a.view(dtype.np), dtype, self.layout)
        return Tensor(rounded(self.a, dtype), dtype, self.layout)

    def __bool__(self):
        return bool(self.a)

    def __getitem__(self, key):
        return self.like(self.a[key])

    def __neg__(self):
        return self.like(-self.a)

    def __invert__(self):
        return self.like(~self.a)


def value(x):
    return x.a if isinstance(x, Tensor) else int(x) if isinstance(x, Int) else x


def binary(function, x, y):
    """An operation on tensors and numbers, in float32 or without overflow in int32."""
    if not (isinstance(x, Tensor) or isinstance(y, Tensor)):
        return function(x, y)
    a, b = (np.float32(v) if isinstance(v, float) else v for v in (value(x), value(y)))
    with np.errstate(invalid="ignore", over="ignore", under="ignore"):
        result = np.asarray(function(a, b))
    if result.dtype == np.float64:
        raise Fault("arithmetic in float64")
    if result.dtype == np.int32:
        wide = function(np.asarray(a, np.int64), np.asarray(b, np.int64))
        if (wide != result).any():
            raise Fault("int32 overflows")
    layout = next((t.layout for t in (x, y) if isinstance(t, Tensor) and t.layout), None)
    return Tensor(result, None, layout)


for _name in ["add", "sub", "mul", "lt", "le", "gt", "ge", "eq", "ne", "and_", "or_", "xor"]:
    _function = getattr(operator, _name)
    setattr(Tensor, f"__{_name.rstrip('_')}__", lambda x, y, f=_function: binary(f, x, y))
    setattr(Tensor, f"__r{_name.rstrip('_')}__", lambda x, y, f=_function: binary(f, y, x))
Tensor.__hash__ = None


class Buffer:
    """Global memory of (rows, cols), ``stride`` elements from row to row; all else is outside."""

    def __init__(self, shape, dtype: DType, init=None, stride: int | None = None):
        self.dtype, self.stride = dtype, shape[1] if stride is None else stride
        unwritten = np.nan if dtype.np is np.float32 else -1
        self.data, self.writes = np.full(shape, unwritten, dtype.np), np.zeros(shape, np.int32)
        if init is not None:
            self.data[:], self.writes[:] = rounded(np.reshape(init, shape), dtype), 1

    def locate(self, offsets):
        rows, cols = np.divmod(offsets, self.stride)
        outside = (rows < 0) | (rows >= self.data.shape[0]) | (cols >= self.data.shape[1])
        if outside.any():
            raise Fault(f"offset {offsets[outside][0]} is outside the buffer")
        return rows, cols


class Pointer:
    """Or a tensor of pointers into one buffer."""

    __array_ufunc__ = None

    def __init__(self, buffer: Buffer, offsets=0):
        self.buffer, self.offsets = buffer, np.asarray(offsets, np.int64)
        self.dtype = SimpleNamespace(element_ty=buffer.dtype)

    def __add__(self, offsets):
        return Pointer(self.buffer, self.offsets + value(offsets))

    __radd__ = __add__


def load_global(pointer: Pointer, mask=True, other=None) -> Tensor:
    buffer, mask = pointer.buffer, np.broadcast_to(value(mask), pointer.offsets.shape)
    at = buffer.locate(pointer.offsets[mask])
    if not buffer.writes[at].all():
        raise Fault("load of unwritten memory")
    if not mask.all() and other is None:
        raise Fault("masked load without other")
    out = np.full(mask.shape, 0 if other is None else value(other), buffer.dtype.np)
    out[mask] = buffer.data[at]
    return Tensor(out, buffer.dtype)


def store_global(pointer: Pointer, x, mask=True) -> None:
    buffer = pointer.buffer
    if x.dtype is not buffer.dtype:
        raise Fault(f"store of {x.dtype.name} to {buffer.dtype.name}")
    if x.shape != pointer.offsets.shape:
        raise Fault(f"store of {x.shape} to {pointer.offsets.shape}")
    mask = np.broadcast_to(value(mask), x.shape)
    at = buffer.locate(pointer.offsets[mask])
    buffer.data[at] = x.a[mask]
    np.add.at(buffer.writes, at, 1)
    if (buffer.writes[at] > 1).any():
        raise Fault("element written twice")
