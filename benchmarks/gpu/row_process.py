"""Runs what may crash or hang in a process of its own, and reads its rows as they come."""

from __future__ import annotations

import json
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

from ..common.results import ROOT

SILENCE = 25  # seconds without a row after which a process is taken to hang


class RowProcess:
    """A process that runs a module, which prints rows as lines of JSON."""

    def __init__(self, module: str, *arguments: str):
        command = [sys.executable, "-m", module, *arguments]
        self.process = subprocess.Popen(
            command, cwd=ROOT, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
        self.lines: queue.Queue[str | None] = queue.Queue()
        self.errors: list[str] = []
        self.readers = [
            threading.Thread(target=self._read, daemon=True),
            threading.Thread(target=lambda: self.errors.extend(self.process.stderr), daemon=True),
        ]
        for reader in self.readers:
            reader.start()

    def go(self) -> None:
        self.process.stdin.write("go\n")
        self.process.stdin.close()

    def _read(self) -> None:
        for line in self.process.stdout:
            self.lines.put(line)
        self.lines.put(None)

    def rows(self, deadline: float, silence: float = SILENCE) -> Iterator[dict]:
        """Its rows, and last one of kind "ended" that says how: None, or what went wrong."""
        why = None
        while True:
            wait = min(silence, deadline - time.monotonic())
            try:
                line = self.lines.get(timeout=max(wait, 0.01))
            except queue.Empty:
                why = f"no row for {silence:.0f} s" if wait == silence else "no time left"
                break
            if line is None:
                if self.process.wait():
                    self.readers[1].join()
                    why = "".join(self.errors)[-1500:] or f"code {self.process.returncode}"
                break
            if line.startswith("{"):
                yield json.loads(line)
        self.close()
        yield {"kind": "ended", "why": why}

    def close(self) -> None:
        """End the process, if it has not ended."""
        self.process.kill()
        self.process.wait()
        for reader in self.readers:
            reader.join()
        for stream in (self.process.stdin, self.process.stdout, self.process.stderr):
            stream.close()
