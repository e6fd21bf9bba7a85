"""A warp-specialised Gluon kernel for Hopper, run from its own source on NumPy.

    kernel = load(path).panel_ws_kernel          # of gluon_language.py
    launch(kernel, grid, arguments, RandomOrder(seed))

Programs run one after another. Each partition of warp_specialize is a thread; one runs at a time
and hands over at every barrier, copy and product, where the order decides what happens next. A
copy lands later, an event of its own, and its target is poison until then. A product reads its
operands when it completes, also an event of its own, in order within a partition.

Races are found in every order, not only where they strike: a partition knows which copies and
products are over from its own waits and from the barriers that it waited for, and may use a buffer
only once it knows that every conflicting use is over.

Not emulated: single warps and what synchronises them, layouts, scratch memory, clusters.
"""

from __future__ import annotations

import math
import random
import threading
from collections.abc import Callable, Sequence
from types import SimpleNamespace

import numpy as np

from support.gluon_arrays import Deadlock, DType, Fault, Race, Tensor, float32, rounded

POISON = np.uint32(0x7FC0DEAD)  # a NaN that no arithmetic makes
_running: Program | None = None


def program() -> Program:
    """The program that runs now."""
    return _running


def _poisoned(array: np.ndarray) -> bool:
    return bool((array.view(np.uint32) == POISON).any())


# Shared memory, barriers, and what runs asynchronously.
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


def allocate_shared(dtype: DType, shape: Sequence[int], layout) -> Shared:
    array = np.full(shape, POISON, np.uint32).view(np.float32)
    barriers = [Barrier() for _ in range(shape[0])] if layout == "barrier" else None
    if barriers is None:
        program().shared_bytes += math.prod(shape) * dtype.nbytes
        if program().shared_bytes > program().shared_limit:
            raise Fault(f"{program().shared_bytes} bytes of shared memory")
    return Shared(array, dtype, layout, barriers)


class Descriptor:
    """Of a 2-D array. Outside the array a copy reads zeros, and counts their bytes."""

    def __init__(self, array, block_shape: Sequence[int], dtype: DType):
        self.array, self.dtype, self.layout = rounded(array, dtype), dtype, "swizzled"
        nbytes = math.prod(block_shape) * dtype.nbytes
        self.block_shape, self.block_type = (
            list(block_shape),
            SimpleNamespace(shape=list(block_shape), nbytes=nbytes),
        )

    def read(self, row: int, col: int) -> np.ndarray:
        if row < 0 or col < 0:
            raise Fault("copy from a negative coordinate")
        height, width = self.block_shape
        out = np.zeros((height, width), np.float32)
        part = self.array[row : row + height, col : col + width]
        out[: part.shape[0], : part.shape[1]] = part
        return out


class Copy:
    """Global to shared memory; its bytes arrive at a barrier."""

    kind = "copy"

    def __init__(self, descriptor: Descriptor, coordinate, barrier: Barrier, target: Shared):
        if target.shape != descriptor.block_shape:
            raise Fault(f"copy of {descriptor.block_shape} to {target.shape}")
        self.descriptor, self.coordinate, self.barrier = descriptor, list(coordinate), barrier
        self.target = target.array
        self.known = program().current.known | program().use(self, (self.target,), True)
        self.target.view(np.uint32)[...] = POISON

    @property
    def name(self) -> str:
        return self.kind

    def complete(self) -> None:
        self.target[...] = self.descriptor.read(*self.coordinate)
        self.barrier.advance(0, -self.descriptor.block_type.nbytes, self.known)


class Product:
    """x y of shared memory, added to an accumulator or written to it."""

    kind = "product"

    def __init__(self, x: Shared, y: Shared, accumulator: np.ndarray, add: bool):
        self.x, self.y, self.accumulator, self.add = x.array, y.array, accumulator, add
        self.partition, self.known = program().current, False
        self.bit = program().use(self, (self.x, self.y), False)
        self.partition.in_flight.append(self)
        self.partition.unknown.append(self)

    @property
    def name(self) -> str:
        return self.kind + self.partition.name

    def complete(self) -> None:
        self.partition.in_flight.remove(self)
        if _poisoned(self.x) or _poisoned(self.y):
            raise Race("product read a buffer whose copy had not landed")
        product = self.x @ self.y
        self.accumulator[...] = self.accumulator + product if self.add else product


def copy_to_shared(descriptor, coordinate, barrier, target, pred=True) -> None:
    program().hand_over()
    if pred:
        Copy(descriptor, coordinate, barrier, target)


def multiply(x, y, accumulator: Tensor, *, use_acc=True, is_async=False):
    program().hand_over()
    if (x.shape[0], x.shape[1], y.shape[1]) != (
        accumulator.shape[0], y.shape[0], accumulator.shape[1],
    ):  # fmt: skip
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


class Partition(threading.Thread):
    """``known``: the copies and products, bits of a number, that it knows to be over."""

    def __init__(self, owner: Program, name: str, function: Callable, arguments: Sequence):
        super().__init__(daemon=True)
        self.owner, self.name, self.function, self.arguments = owner, name, function, arguments
        self.go, self.known, self.in_flight, self.unknown = threading.Semaphore(0), 0, [], []
        self.condition, self.finished, self.error, self.stopped = None, False, None, False
        self.start()

    def run(self) -> None:
        self.go.acquire()
        try:
            if not self.stopped:
                self.function(*self.arguments)
        except BaseException as error:  # raised again in the thread of the test
            self.error = error
        self.finished = True
        self.owner.turn.release()

    def step(self) -> None:
        self.go.release()
        self.owner.turn.acquire()
        if self.error and not self.stopped:
            raise self.error


class Program:
    """One program of a launch: its partitions, and what is under way."""

    shared_limit = 232448  # bytes that one program may take on Hopper

    def __init__(self, pid: int, grid: int, order):
        self.pid, self.grid, self.order = pid, grid, order
        self.events, self.barriers, self.uses, self.bits = [], [], [], 0
        self.turn, self.current, self.shared_bytes = threading.Semaphore(0), None, 0

    def use(self, event: Copy | Product, views: Sequence[np.ndarray], write: bool) -> int:
        """Begin a use of shared memory by the current partition; returns its bit."""
        for other in [u for u in self.uses if write or u[1]]:
            if any(np.may_share_memory(a, b) for a in views for b in other[0]):
                if not self.current.known >> other[2] & 1:
                    before = "copy" if other[1] else "product"
                    raise Race(f"{event.kind}: nothing tells that the {before} before is over")
                if write:
                    self.uses = [u for u in self.uses if u is not other]
        self.bits += 1
        self.uses.append((views, write, self.bits))
        self.events.append(event)
        return 1 << self.bits

    def hand_over(self, condition: Callable[[], bool] | None = None) -> None:
        """Called by a partition, which goes on once the condition holds."""
        partition, partition.condition = self.current, condition
        self.turn.release()
        partition.go.acquire()
        if partition.stopped:
            raise SystemExit

    def specialise(self, partitions, worker_warps, worker_registers) -> None:
        """gl.warp_specialize: run the partitions until all end."""
        if not len(partitions) - 1 == len(worker_warps) == len(worker_registers):
            raise Fault("warps and registers of every partition but the first")
        running = [
            Partition(self, str(i), function, arguments)
            for i, (function, arguments) in enumerate(partitions)
        ]
        try:
            while True:
                ready = [
                    p for p in running if not p.finished and (not p.condition or p.condition())
                ]
                done = [e for e in self.events if e.kind == "copy" or e.partition.in_flight[0] is e]
                if not ready and not done:
                    break
                choice = self.order.choose([*ready, *done])
                if isinstance(choice, Partition):
                    self.current = choice
                    choice.step()
                else:
                    self.events.remove(choice)
                    choice.complete()
            blocked = [p.name for p in running if not p.finished]
            if blocked:
                raise Deadlock(f"partitions {', '.join(blocked)} wait forever")
            if any(b.bytes or b.owed != b.count for b in self.barriers):
                raise Fault("barrier left in the middle of a phase")
        finally:
            for partition in running:
                if not partition.finished:
                    partition.stopped = True
                    partition.step()


class RandomOrder:
    """What happens next; each partition and kind of event has a weight that is random too, so that
    some are far slower than others."""

    def __init__(self, seed: int, spread: float = 2.0):
        self.draw, self.spread, self.weights = random.Random(seed), spread, {}

    def choose(self, options: Sequence[Partition | Copy | Product]):
        weights = [
            self.weights.setdefault(o.name, math.exp(self.draw.gauss(0, self.spread)))
            for o in options
        ]
        return self.draw.choices(options, weights)[0]


def launch(kernel: Callable, grid: int, arguments: dict, order: RandomOrder) -> None:
    global _running
    for pid in range(grid):
        _running = Program(pid, grid, order)
        try:
            kernel(**arguments)
        finally:
            _running = None
