"""Programs and partitions of emulated Gluon kernels, and what happens in which order.

Programs run one after another. Each partition of warp_specialize is a thread; one runs at a time
and hands over at every barrier, copy and product, where the order decides what happens next.

Races are found in every order, not only where they strike: a partition knows which copies and
products are over from its own waits and from the barriers that it waited for, and may use a buffer
only once it knows that every conflicting use is over.
"""

from __future__ import annotations

import math
import random
import threading
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import numpy as np

from support.gluon.arrays import Deadlock, Fault, Race

_running: Program | None = None


def program() -> Program:
    """The program that runs now."""
    return _running


class Event(Protocol):
    """A copy or product under way."""

    name: str  # of its kind: those of one name are about as fast

    def may_complete(self) -> bool: ...

    def complete(self) -> None: ...


class Partition(threading.Thread):
    """``known``: the copies and products, bits of a number, that it knows to be over."""

    def __init__(self, owner: Program, name: str, warps: int, function: Callable, arguments):
        super().__init__(daemon=True)
        self.owner, self.name, self.function, self.arguments = owner, name, function, arguments
        self.warps = warps
        self.go, self.known = threading.Semaphore(0), 0
        self.in_flight, self.unknown = [], []  # products: not complete; not known to be
        self.stores = []  # copies out of shared memory, not known to be over
        self.unfenced = []  # views of shared memory it wrote, which copies and products may not see
        self.condition, self.finished, self.error, self.stopped = None, False, None, False
        self.start()

    def run(self) -> None:
        self.go.acquire()
        try:
            if not self.stopped:
                self.function(*self.arguments)
                if self.stores or self.unknown:
                    raise Race("a partition ends before what it began")
        except BaseException as error:  # raised again in the thread of the test
            self.error = error
        self.finished = True
        self.owner.turn.release()

    def step(self) -> None:
        self.go.release()
        self.owner.turn.acquire()
        if self.error and not self.stopped:
            raise self.error


class Use(NamedTuple):
    """Of shared memory."""

    kind: str
    views: Sequence[np.ndarray]
    write: bool
    bit: int


def overlap(views: Sequence[np.ndarray], others: Sequence[np.ndarray]) -> bool:
    return any(np.may_share_memory(a, b) for a in views for b in others)


class Program:
    """One program of a launch: its partitions, and what is under way."""

    shared_limit = 232448  # bytes that one program may take on Hopper

    def __init__(self, pid: int, grid: int, warps: int, order: RandomOrder):
        self.pid, self.grid, self.warps, self.order = pid, grid, warps, order
        self.events, self.barriers, self.uses, self.bits = [], [], [], 0
        self.turn, self.current, self.shared_bytes = threading.Semaphore(0), None, 0

    def use(self, kind: str, views: Sequence[np.ndarray], write: bool) -> int:
        """Begin a use of shared memory by the current partition; returns its bit."""
        for other in [u for u in self.uses if write or u.write]:
            if overlap(views, other.views):
                if not self.current.known & other.bit:
                    raise Race(f"{kind}: nothing tells that the {other.kind} before is over")
                if write:
                    self.uses = [u for u in self.uses if u is not other]
        self.bits += 1
        self.uses.append(Use(kind, views, write, 1 << self.bits))
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
            Partition(self, str(i), warps, *partition)
            for i, (warps, partition) in enumerate(
                zip([self.warps, *worker_warps], partitions, strict=True)
            )
        ]
        try:
            while True:
                ready = [
                    p for p in running if not p.finished and (not p.condition or p.condition())
                ]
                done = [e for e in self.events if e.may_complete()]
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

    def choose(self, options: Sequence[Partition | Event]):
        weights = [
            self.weights.setdefault(o.name, math.exp(self.draw.gauss(0, self.spread)))
            for o in options
        ]
        return self.draw.choices(options, weights)[0]


def launch(kernel: Callable, grid: int, arguments: dict, order: RandomOrder) -> None:
    global _running
    for pid in range(grid):
        _running = Program(pid, grid, arguments.get("num_warps", 4), order)
        try:
            kernel(**arguments)
        finally:
            _running = None
