"""Shared memory, barriers, copies and products of Hopper, as a Gluon kernel sees them.

A copy to shared memory lands later, an event of its own, and its target is poison until then. A
product or a copy to global memory reads its operands when it completes, also an event of its own.
What a partition itself writes to shared memory they see only after a fence.

Not emulated: single warps and what synchronises them, layouts, scratch memory, clusters.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from types import SimpleNamespace

import numpy as np

from support.gluon.arrays import Buffer, DType, Fault, Race, Tensor, float32
from support.gluon.schedule import overlap, program

POISON = np.uint32(0x7FC0DEAD)  # a NaN that no arithmetic makes


def _poisoned(array: np.ndarray) -> bool:
    return bool((array.view(np.uint32) == POISON).any())


class Barrier:
    """A phase ends when no arrivals and no bytes are owed; a wait for a parity passes while the
    phase that ended last has it."""

    def __init__(self):
        self.count = None

    def init(self, count: int) -> None:
        if self.count is not None:
            raise Fault("barrier initialised twice")
        self.count = self.owed = count
        self.phase = self.bytes = self.gathered = self.known = 0
        program().barriers.append(self)

    def advance(self, arrivals: int, nbytes: int, known: int) -> None:
        if self.count is None:
            raise Fault("barrier used before it was initialised")
        self.owed, self.bytes = self.owed - arrivals, self.bytes + nbytes
        self.gathered |= known
        if self.owed < 0 or abs(self.bytes) >= 1 << 20:
            raise Fault("barrier: more arrivals than its count, or too many bytes")
        if self.owed == 0 and self.bytes == 0:
            self.phase, self.owed, self.known = self.phase + 1, self.count, self.gathered

    def arrive(self, *, count: int = 1, pred=True) -> None:
        program().hand_over()
        if pred:
            self.advance(count, 0, program().current.known)

    def expect(self, nbytes: int, pred=True) -> None:
        """Arrives once, too."""
        program().hand_over()
        if pred:
            self.advance(1, nbytes, program().current.known)

    def wait(self, phase: int, pred=True, deps=()) -> None:
        if self.count is None:
            raise Fault("barrier used before it was initialised")
        if pred:
            program().hand_over(lambda: (self.phase & 1) != (phase & 1))
            program().current.known |= self.known


class Shared:
    """A view of a shared allocation; of barriers, a list of them."""

    def __init__(self, array, dtype: DType, layout, barriers=None):
        self.array, self.dtype, self.layout, self.barriers = array, dtype, layout, barriers
        self.shape = list(array.shape)
        self.type = SimpleNamespace(shape=self.shape, layout=layout, element_ty=dtype)

    def index(self, i: int) -> Shared | Barrier:
        if not 0 <= i < self.shape[0]:
            raise Fault("shared memory view out of bounds")
        if self.barriers:
            return self.barriers[i]
        return Shared(self.array[i], self.dtype, self.layout)

    def slice(self, start: int, length: int, dim: int = 0) -> Shared:
        if not 0 <= start <= start + length <= self.shape[dim]:
            raise Fault("shared memory view out of bounds")
        at = (slice(None),) * dim + (slice(start, start + length),)
        return Shared(self.array[at], self.dtype, self.layout)

    def permute(self, order) -> Shared:
        return Shared(self.array.transpose(order), self.dtype, self.layout)

    def store(self, x: Tensor) -> None:
        program().hand_over()
        if x.dtype is not self.dtype or list(x.shape) != self.shape:
            raise Fault(f"store of {x.dtype.name} {x.shape} to {self.dtype.name} {self.shape}")
        partition = program().current
        partition.known |= program().use("store", (self.array,), True)
        partition.unfenced.append(self.array)
        self.array[...] = x.a


def allocate_shared(dtype: DType, shape: Sequence[int], layout) -> Shared:
    array = np.full(shape, POISON, np.uint32).view(np.float32)
    barriers = [Barrier() for _ in range(shape[0])] if layout == "barrier" else None
    if barriers is None:
        program().shared_bytes += math.prod(shape) * dtype.nbytes
        if program().shared_bytes > program().shared_limit:
            raise Fault(f"{program().shared_bytes} bytes of shared memory")
    return Shared(array, dtype, layout, barriers)


class Descriptor:
    """Of a 2-D array in global memory. Outside the array copies read zeros and write nothing; but
    what lies outside counts among a copy's bytes."""

    def __init__(self, memory: Buffer, block_shape: Sequence[int]):
        self.memory, self.dtype, self.layout = memory, memory.dtype, "swizzled"
        self.block_shape = list(block_shape)
        self.block_type = SimpleNamespace(
            shape=self.block_shape, nbytes=math.prod(block_shape) * memory.dtype.nbytes
        )

    @property
    def array(self) -> np.ndarray:
        return self.memory.data

    def part(self, array: np.ndarray, row: int, col: int) -> np.ndarray:
        if row < 0 or col < 0:
            raise Fault("copy at a negative coordinate")
        height, width = self.block_shape
        return array[row : row + height, col : col + width]

    def read(self, row: int, col: int) -> np.ndarray:
        out, part = np.zeros(self.block_shape, np.float32), self.part(self.array, row, col)
        out[: part.shape[0], : part.shape[1]] = part
        return out

    def write(self, row: int, col: int, block: np.ndarray) -> None:
        part = self.part(self.array, row, col)
        part[...] = block[: part.shape[0], : part.shape[1]]
        writes = self.part(self.memory.writes, row, col)
        writes += 1
        if (writes > 1).any():
            raise Fault("element written twice")


def _blocks_match(descriptor: Descriptor, shared: Shared) -> None:
    if shared.shape != descriptor.block_shape or shared.dtype is not descriptor.dtype:
        raise Fault(f"copy of {descriptor.block_shape}, but {shared.shape} in shared memory")


def _fenced(views: Sequence[np.ndarray]) -> None:
    if overlap(views, program().current.unfenced):
        raise Race("no fence after the stores to what a copy or product reads")


class Load:
    """Global to shared memory; its bytes arrive at a barrier."""

    name = "load"

    def __init__(self, descriptor: Descriptor, coordinate, barrier: Barrier, target: Shared):
        _blocks_match(descriptor, target)
        self.descriptor, self.coordinate, self.barrier = descriptor, list(coordinate), barrier
        self.target = target.array
        self.known = program().current.known | program().use("copy", (self.target,), True)
        self.target.view(np.uint32)[...] = POISON
        program().events.append(self)

    def may_complete(self) -> bool:
        return True

    def complete(self) -> None:
        self.target[...] = self.descriptor.read(*self.coordinate)
        self.barrier.advance(0, -self.descriptor.block_type.nbytes, self.known)


class Store:
    """Shared to global memory; the partition itself waits for it."""

    name = "store"

    def __init__(self, descriptor: Descriptor, coordinate, source: Shared):
        _blocks_match(descriptor, source)
        _fenced((source.array,))
        self.descriptor, self.coordinate, self.source = descriptor, list(coordinate), source.array
        self.bit, self.over = program().use("copy", (self.source,), False), False
        program().current.stores.append(self)
        program().events.append(self)

    def may_complete(self) -> bool:
        return True

    def complete(self) -> None:
        if _poisoned(self.source):
            raise Race("copy of what was never stored")
        self.descriptor.write(*self.coordinate, self.source)
        self.over = True


class Product:
    """x y of shared memory, added to an accumulator or written to it; a partition's in order."""

    def __init__(self, x: Shared, y: Shared, accumulator: np.ndarray, add: bool):
        self.x, self.y, self.accumulator, self.add = x.array, y.array, accumulator, add
        _fenced((self.x, self.y))
        self.partition, self.known = program().current, False
        self.name = "product" + self.partition.name
        self.bit = program().use("product", (self.x, self.y), False)
        self.partition.in_flight.append(self)
        self.partition.unknown.append(self)
        program().events.append(self)

    def may_complete(self) -> bool:
        return self.partition.in_flight[0] is self

    def complete(self) -> None:
        self.partition.in_flight.remove(self)
        if _poisoned(self.x) or _poisoned(self.y):
            raise Race("product read a buffer whose copy had not landed")
        with np.errstate(invalid="ignore"):
            product = self.x @ self.y
        self.accumulator[...] = self.accumulator + product if self.add else product


def copy_to_shared(descriptor, coordinate, barrier, target, pred=True) -> None:
    program().hand_over()
    if pred:
        Load(descriptor, coordinate, barrier, target)


def copy_to_global(descriptor, coordinate, source) -> None:
    program().hand_over()
    Store(descriptor, coordinate, source)


def wait_for_stores(pendings: int) -> None:
    """Until all but the last ``pendings`` are over."""
    partition = program().current
    first = partition.stores[: max(len(partition.stores) - pendings, 0)]
    program().hand_over(lambda: all(store.over for store in first))
    for store in first:
        partition.known |= store.bit
        partition.stores.remove(store)


def fence(cluster: bool = False) -> None:
    program().hand_over()
    program().current.unfenced.clear()


def multiply(x, y, accumulator: Tensor, *, use_acc=True, is_async=False):
    program().hand_over()
    if (*x.shape, y.shape[1]) != (accumulator.shape[0], y.shape[0], accumulator.shape[1]):
        raise Fault("shapes of a product")
    product = Product(x, y, accumulator.raw, bool(use_acc))
    pending = [*(p for p in accumulator.pending if not p.known), product]
    out = Tensor(accumulator.raw, float32, accumulator.layout, pending)
    return out if is_async else wait_for_products(0, (out,))


def wait_for_products(num_outstanding: int = 0, deps=()):
    partition = program().current
    program().hand_over(lambda: len(partition.in_flight) <= num_outstanding)
    for product in partition.unknown[: max(len(partition.unknown) - num_outstanding, 0)]:
        product.known, partition.known = True, partition.known | product.bit
        partition.unknown.remove(product)
    return deps[0] if len(deps) == 1 else tuple(deps)
