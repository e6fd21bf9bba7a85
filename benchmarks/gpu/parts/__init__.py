"""The parts of device.py, most valuable first: functions of a Run that yield rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

from . import breakdown, checks, timings
from .run import Run


class Part(NamedTuple):
    rows: Callable[[Run], Iterator[dict]]
    # What it is given on a GPU, and what earlier parts have left; with less than a third of it to
    # go, the part is skipped. All of them together stay below ten minutes.
    seconds: int


PARTS = {
    "speed": Part(timings.speed, 110),
    "tests": Part(checks.tests, 120),
    "correctness": Part(checks.correctness, 40),
    "million": Part(timings.million, 30),
    "alternative": Part(timings.alternative, 40),
    "breakdown": Part(breakdown.breakdown, 20),
    "panels": Part(timings.panels, 20),
    "latency": Part(timings.latency, 25),
    "determinism": Part(checks.determinism, 15),
    "sanitizer": Part(checks.sanitizer, 60),
    "counters": Part(breakdown.counters, 30),
}
