"""Texts travel round the ranks, and their gradients one step behind them."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from .collectives import comm_errors
from .exchange import GroupExchange, TextResult, Texts, Visit

_RESULTS, _COLUMNS = 0, 1  # the channels between two neighbors: one for each column from here on


class RingComm:
    """Exchanges with the two neighbors: send to the right, receive from the left."""

    def __init__(self, group: dist.ProcessGroup):
        self.group = group
        rank, size = dist.get_rank(group), dist.get_world_size(group)
        self.right = dist.get_global_rank(group, (rank + 1) % size)
        self.left = dist.get_global_rank(group, (rank - 1) % size)
        self.pending: list[dist.P2POp] = []
        self.works: list[dist.Work] = []

    def exchange(self, channel: int, out: Tensor, into: Tensor) -> None:
        """Queue a send and a receipt; all ranks queue their channels in the same order."""
        for op, tensor, peer in ((dist.isend, out, self.right), (dist.irecv, into, self.left)):
            if tensor.numel() > 0:
                self.pending.append(dist.P2POp(op, tensor, peer, self.group, channel))

    def start(self) -> None:
        """Send and receive all that is queued."""
        with comm_errors(self.group, "ring exchange"):
            self.works = dist.batch_isend_irecv(self.pending) if self.pending else []
        self.pending = []

    def wait(self) -> None:
        """Until what was started has arrived."""
        with comm_errors(self.group, "ring exchange"):
            for work in self.works:
                work.wait()
        self.works = []


class Ring(GroupExchange):
    """Texts travel round the ring and their results one step behind them, on their own channel.

    While a chunk is swept, the next one arrives, and so does what the ranks before this one have
    added to the result of the present one. After as many steps as there are ranks every result is
    back at its owner. Memory: two chunks of texts and three of results, whatever the size.
    """

    def for_each(
        self,
        visit: Visit,
        result: TextResult | None = None,
        extras: tuple[Tensor, ...] = (),
        last: bool = False,
    ) -> Tensor | None:  # (N, ...)
        ring, rows, device = RingComm(self.group), self.text_rows, self.y.device
        capacity = max(rows)
        columns = [_two_chunks(own, capacity) for own in self._columns(extras)]
        results = [] if result is None else [result.empty(capacity, device) for _ in range(3)]

        # what this rank and those before it have added for the chunk that it swept last
        leaving: Tensor | None = None
        for step in range(self.size):
            owner = (self.rank - step) % self.size
            here, there = step % 2, 1 - step % 2
            n, n_next = rows[owner], rows[(owner - 1) % self.size]
            if step + 1 < self.size:
                for channel, chunks in enumerate(columns, _COLUMNS):
                    ring.exchange(channel, chunks[here][:n], chunks[there][:n_next])
            # three results rotate: one leaves, one arrives, one is computed
            computed = results[step % 3][:n] if results else None
            arriving = None
            if leaving is not None:
                arriving = results[(step + 1) % 3][:n]
                ring.exchange(_RESULTS, leaving, arriving)
            ring.start()
            features, *others = (chunks[here][:n] for chunks in columns)
            in_chunk = others.pop(0) if self.text_ids is not None else None
            diagonal = 0 if step == 0 else None
            first = sum(rows[:owner])
            visit(Texts(features, in_chunk, first, diagonal, step, tuple(others)), computed)
            ring.wait()
            if computed is not None and result is not None:
                leaving = computed if arriving is None else _joined(computed, arriving, result.op)
        if leaving is None or result is None:
            return None
        own = result.empty(self.y.shape[0], device)
        ring.exchange(_RESULTS, leaving, own)
        ring.start()
        ring.wait()
        return own

    def _columns(self, extras: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """What travels: (N, ...) each."""
        return self.y, *(() if self.text_ids is None else (self.text_ids,)), *extras


def _two_chunks(own: Tensor, capacity: int) -> list[Tensor]:  # (N, ...) -> 2 of (capacity, ...)
    """Where a rank's rows lie, and where the next ones arrive."""
    chunks = [own.new_empty(capacity, *own.shape[1:]) for _ in range(2)]
    chunks[0][: own.shape[0]].copy_(own)
    return chunks


def _joined(computed: Tensor, arriving: Tensor, op: str) -> Tensor:
    """This rank's part of a result and that of the ranks before, as one; in ``computed``."""
    if op == "MAX":
        return torch.maximum(computed, arriving, out=computed)
    return computed.add_(arriving)
