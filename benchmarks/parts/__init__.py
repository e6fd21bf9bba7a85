"""What device.py runs, most valuable first. A part is a function of a Run that yields rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

from . import anatomy, checks, timings
from .run import Run


class Part(NamedTuple):
    rows: Callable[[Run], Iterator[dict]]
    seconds: int  # what it may take on a GPU; with less than a third of that left it is skipped


PARTS = {
    "correctness": Part(checks.correctness, 60),
    "speed": Part(timings.speed, 150),
    "million": Part(timings.million, 40),
    "tests": Part(checks.tests, 150),
    "alternative": Part(timings.alternative, 40),
    "breakdown": Part(anatomy.breakdown, 30),
    "panels": Part(timings.panels, 30),
    "latency": Part(timings.latency, 30),
    "determinism": Part(checks.determinism, 20),
    "sanitizer": Part(checks.sanitizer, 120),
    "counters": Part(anatomy.counters, 90),
}
