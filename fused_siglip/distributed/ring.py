"""Texts travel round the ranks, and their gradients one step behind them."""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor

from .collectives import comm_errors
from .exchange import GroupExchange, Texts, Visit

_TEXTS, _IDS, _GRADS = range(3)  # the channels between two neighbors


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
    """Texts travel round the ring and their gradients one step behind them, on their own channel.

    While a chunk is swept, the next one arrives, and so does what the ranks before this one have
    added to the gradient of the present one. After as many steps as there are ranks every gradient
    is back at its owner. Memory: two chunks of texts and three of gradients, whatever the size.
    """

    def for_each(self, visit: Visit, need_grad: bool) -> Tensor | None:  # (N, D)
        ring, rows = RingComm(self.group), self.text_rows
        capacity, d = max(rows), self.y.shape[1]
        texts = [self.y.new_empty(capacity, d) for _ in range(2)]
        ids: list[Tensor] = []
        if self.text_ids is not None:
            ids = [self.text_ids.new_empty(capacity) for _ in range(2)]
            ids[0][: rows[self.rank]].copy_(self.text_ids)
        grads = [
            self.y.new_empty(capacity, d, dtype=self.acc) for _ in range(3 if need_grad else 0)
        ]
        texts[0][: rows[self.rank]].copy_(self.y)

        # what this rank and those before it have added for the chunk that it swept last
        leaving: Tensor | None = None
        for step in range(self.size):
            owner = (self.rank - step) % self.size
            here, there = step % 2, 1 - step % 2
            n, n_next = rows[owner], rows[(owner - 1) % self.size]
            if step + 1 < self.size:
                ring.exchange(_TEXTS, texts[here][:n], texts[there][:n_next])
                if ids:
                    ring.exchange(_IDS, ids[here][:n], ids[there][:n_next])
            # three gradients rotate: one leaves, one arrives, one is computed
            computed = grads[step % 3][:n] if need_grad else None
            arriving = None
            if leaving is not None:
                arriving = grads[(step + 1) % 3][:n]
                ring.exchange(_GRADS, leaving, arriving)
            ring.start()
            in_chunk = ids[here][:n] if ids else None
            diagonal = 0 if step == 0 else None
            visit(Texts(texts[here][:n], in_chunk, sum(rows[:owner]), diagonal, step), computed)
            ring.wait()
            if computed is not None:
                leaving = computed if arriving is None else computed.add_(arriving)
        if leaving is None:
            return None
        grad_y = self.y.new_empty(self.y.shape, dtype=self.acc)
        ring.exchange(_GRADS, leaving, grad_y)
        ring.start()
        ring.wait()
        return grad_y
