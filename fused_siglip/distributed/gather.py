"""Texts of all ranks are collected at once, and what comes back to them is scattered."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from torch import Tensor

from . import collectives
from .collectives import comm_errors
from .exchange import GroupExchange, TextResult, Texts, Visit


class Gather(GroupExchange):
    """Texts are collected, and the sums of their results scattered to their owners."""

    def __init__(self, *args: Any):
        super().__init__(*args)
        ids = None if self.text_ids is None else self._gather(self.text_ids)
        # texts and ids, until the last visit is over
        self.gathered = [(self._gather(self.y), ids)]

    def _gather(self, local: Tensor) -> Tensor:
        """Everybody's rows, as many a rank as the largest has."""
        # collectives want equal blocks: shorter ones are sent with rows that nobody reads
        capacity = max(self.text_rows)
        block = local.new_zeros(capacity, *local.shape[1:])
        block[: len(local)].copy_(local)
        out = local.new_empty(self.size * capacity, *local.shape[1:])
        with comm_errors(self.group, "gathering of the texts"):
            collectives.all_gather(out, block, group=self.group)
        return out

    def for_each(
        self,
        visit: Visit,
        result: TextResult | None = None,
        extras: tuple[Tensor, ...] = (),
        last: bool = False,
    ) -> Tensor | None:  # (N, ...)
        capacity, out = max(self.text_rows), None
        texts, ids = self.gathered[0]
        columns = [self._gather(extra) for extra in extras]
        if result is not None:
            out = result.empty(self.size * capacity, self.y.device).zero_()
        for step, (block, first, diagonal) in enumerate(self._blocks()):
            in_block = None if ids is None else ids[block]
            of_block = tuple(column[block] for column in columns)
            chunk = Texts(texts[block], in_block, first, diagonal, step, of_block)
            visit(chunk, None if out is None else out[block])
        if out is None or result is None:
            return None
        if last:
            # texts are not needed beside the sum of their gradients, for which a backend may take
            # buffers
            self.gathered.clear()
            del texts, ids, columns, chunk, in_block, of_block
        own = result.empty(capacity, self.y.device)
        op = getattr(dist.ReduceOp, result.op)
        with comm_errors(self.group, "summing of the texts' gradients"):
            collectives.reduce_scatter(own, out, op=op, group=self.group)
        return own[: self.text_rows[self.rank]]

    def _blocks(self) -> list[tuple[slice, int, int | None]]:
        """What is visited at once: rows of what was gathered, their first text, their diagonal."""
        rows, capacity = self.text_rows, max(self.text_rows)
        if min(rows) == capacity:  # one visit of all texts
            return [(slice(0, self.size * capacity), 0, self.rank * capacity)]
        # one for each rank, of the rows that hold something
        return [
            (slice(r * capacity, r * capacity + n), sum(rows[:r]), 0 if r == self.rank else None)
            for r, n in enumerate(rows)
        ]
