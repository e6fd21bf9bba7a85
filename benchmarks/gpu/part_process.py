"""Runs parts in a process of its own, which may crash, hang or lose its GPU context."""

from __future__ import annotations

import contextlib
import gc
import multiprocessing
import os
import signal
import time
import traceback
from collections.abc import Callable, Iterator

import torch

from .parts.run import Run, Skipped

Rows = Callable[[Run], Iterator[dict]]
Event = tuple[str, dict | str | None]  # ("row", row), and last ("ok" | "failed" | "skipped", why)


def events(rows: Rows, run: Run) -> Iterator[Event]:
    """The rows as they come, then how it ended. Raises nothing."""
    try:
        try:
            for row in rows(run):
                yield "row", row
        finally:
            _settle()
    except Skipped as reason:
        yield "skipped", str(reason)
    except Exception:
        yield "failed", "".join(traceback.format_exc(limit=-3)).strip()[-1500:]
    else:
        yield "ok", None


def _settle() -> None:
    """Wait for what a part left on the GPU: its errors surface here, the next has its memory."""
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


class PartProcess:
    """One process that serves one call of :meth:`events` after the other until one goes wrong."""

    GRACE = 15  # seconds beyond the deadline; parts look at the deadline themselves

    def __init__(self) -> None:
        spawn = multiprocessing.get_context("spawn")  # CUDA does not survive a fork
        self.connection, theirs = spawn.Pipe()
        self.process = spawn.Process(target=_serve, args=(theirs,), daemon=False)
        self.process.start()
        theirs.close()

    def events(self, rows: Rows, run: Run) -> Iterator[Event]:
        self.connection.send((rows, run))
        while True:
            try:
                wait = run.deadline + self.GRACE - time.monotonic()
                if not self.connection.poll(max(wait, 0)):
                    self.close()
                    yield "failed", "still running past its deadline: its process was ended"
                    return
                event = self.connection.recv()
            except (EOFError, ConnectionResetError):
                self.process.join()
                yield "failed", f"its process ended with code {self.process.exitcode}"
                return
            yield event
            if event[0] != "row":
                return

    def close(self) -> None:
        """End the process and what it has started, which would disturb what follows."""
        self.connection.close()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.kill()  # if it was too young to have a group of its own
        self.process.join()


def _serve(connection) -> None:
    os.setpgrp()  # close() ends the group
    while True:
        try:
            rows, run = connection.recv()
        except EOFError:
            return
        for event in events(rows, run):
            connection.send(event)
