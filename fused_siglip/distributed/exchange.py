"""How texts reach every rank, and their gradients come back: alone, gathered, or round a ring.

Rank r holds X_r and Y_r. It computes its rows of the global pair matrix, all texts against its own
images, and gets back what the other ranks' rows contribute to dL/dY_r. One process is a group of
one, and exchanges nothing.
"""

from __future__ import annotations

import abc
import logging
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from ..kernels import Affine, Pairs, accumulate_dtype
from ..planner import PlanRequest, plan_panels
from ..selection.thresholds import ROWS_AT_ONCE
from ..spec import Execution, LossSpec
from . import collectives
from .agreement import (
    DIST_IMPLS,
    CallHeader,
    check_device,
    check_ranks_agree,
    header_of,
    report_bad_arguments,
)
from .collectives import all_reduce, comm_errors, resolve_group

logger = logging.getLogger("fused_siglip")

# Without dist_impl, texts are gathered where they and their gradients take no more bytes than this:
# a constant, whatever the world size.
_GATHER_BUDGET = 256 << 20


class Texts(NamedTuple):
    """Texts of the global batch that are swept at once."""

    features: Tensor  # (n, D)
    ids: Tensor | None  # (n,)
    first: int  # index of the first one in the global batch
    diagonal: int | None  # this rank's image i and text i + diagonal are a pair; None: no pair is
    step: int  # how many visits came before
    extras: tuple[Tensor, ...] = ()  # (n,) each


# Called for the texts that have come. Writes this rank's part of their result, where there is one.
Visit = Callable[[Texts, Tensor | None], None]


class TextResult(NamedTuple):
    """What comes back to every text from the images of all ranks."""

    shape: tuple[int, ...]  # of one text's
    dtype: torch.dtype
    op: str = "SUM"  # or "MAX": what the ranks' parts become

    def empty(self, rows: int, device: torch.device) -> Tensor:
        # not new_empty, which takes twice as long
        return torch.empty((rows, *self.shape), dtype=self.dtype, device=device)


class Largest(NamedTuple):
    """What the panels of all ranks must suit, where all must have the same shape."""

    images: int  # of a rank
    texts: int  # likewise
    workspace_bytes: int | None  # the smallest that a rank was given


class TextExchange(Protocol):
    """Brings all texts of the global batch to this rank's images."""

    first_image: int  # index of this rank's first image in the global batch
    largest: Largest  # over the ranks
    images_at_once: int | None  # how many images search thresholds together; None: all of them
    text_grad: bool  # whether any rank needs the gradient of its texts

    def for_each(
        self,
        visit: Visit,
        result: TextResult | None = None,
        extras: tuple[Tensor, ...] = (),  # (N,) each, which travel with the texts
        last: bool = False,  # no visit comes after these: texts need not be kept
    ) -> Tensor | None:  # (N, ...)
        """Visit all texts; return the result of this rank's own, from the images of all ranks."""
        ...

    def all_reduce(self, tensor: Tensor, op: str) -> None:
        """Replace ``tensor`` by its "SUM" or "MAX" over the ranks."""
        ...

    def divisor(self, reduction: str) -> float | Tensor:  # ()
        """What this rank's sum over pairs is divided by.

        With "mean" the mean over the ranks of what they return is the loss of the global batch.
        """
        ...


class Local:
    """One process: its own texts, once."""

    first_image = 0
    images_at_once: int | None = ROWS_AT_ONCE

    def __init__(self, x: Tensor, y: Tensor, pairs: Pairs, spec: LossSpec):
        self.images, self.y, self.pairs = x.shape[0], y, pairs
        self.largest = Largest(x.shape[0], y.shape[0], spec.workspace_bytes)
        self.text_grad = spec.grads.text
        self._divisor: float | Tensor | None = None

    def for_each(
        self,
        visit: Visit,
        result: TextResult | None = None,
        extras: tuple[Tensor, ...] = (),
        last: bool = False,
    ) -> Tensor | None:  # (N, ...)
        y = self.y
        out = None if result is None else result.empty(y.shape[0], y.device)
        ids = None if self.pairs.ids is None else self.pairs.ids.texts
        visit(Texts(y, ids, 0, 0, 0, extras), out)
        return out

    def all_reduce(self, tensor: Tensor, op: str) -> None:
        pass

    def divisor(self, reduction: str) -> float | Tensor:
        if self._divisor is None:
            if reduction == "sum":
                self._divisor = 1
            elif self.pairs.ids is None:
                self._divisor = max(self.images, 1)
            else:
                self._divisor = (self.pairs.ids.images >= 0).sum().clamp(min=1)
        return self._divisor


class GroupExchange(abc.ABC):
    """What ring and gather have in common: who has how many rows, and what is summed up."""

    images_at_once: int | None = None

    def __init__(
        self,
        y: Tensor,  # (N, D)
        text_ids: Tensor | None,  # (N,)
        acc: torch.dtype,
        headers: list[CallHeader],
        real_images: int | Tensor,
        group: dist.ProcessGroup,
    ):
        self.y, self.text_ids, self.acc, self.group = y, text_ids, acc, group
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        self.text_rows = [h.rows for h in headers]
        self.first_image = sum(h.images for h in headers[: self.rank])
        bounds = [h.workspace_bytes for h in headers if h.workspace_bytes]
        self.largest = Largest(
            max(h.images for h in headers), max(self.text_rows), min(bounds, default=None)
        )
        self.text_grad = any(h.need_text_grad for h in headers)
        self.total_images = sum(h.real_images for h in headers)
        self.real_images = real_images
        self.total: Tensor | None = None  # over the ranks, once it was asked for

    @abc.abstractmethod
    def for_each(
        self,
        visit: Visit,
        result: TextResult | None = None,
        extras: tuple[Tensor, ...] = (),
        last: bool = False,
    ) -> Tensor | None:  # (N, ...)
        """See :class:`TextExchange`."""

    def all_reduce(self, tensor: Tensor, op: str) -> None:
        all_reduce(tensor, op, self.group, "search for the range of the texts")

    def divisor(self, reduction: str) -> float | Tensor:
        if reduction == "sum":
            return 1 / self.size
        if not isinstance(self.real_images, Tensor):
            return max(self.total_images, 1) / self.size
        # where the host would have to wait for their number; a collective, so once
        if self.total is None:
            what = "sum of the numbers of images"
            self.total = all_reduce(self.real_images, "SUM", self.group, what)
        return (self.total.clamp(min=1) / self.size).to(self.acc)


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


def choose_impl(
    rows: int, dim: int, dtype: torch.dtype, world_size: int, need_text_grad: bool
) -> str:
    """Gather while the gathered texts (and their gradients) stay small, otherwise the ring."""
    accumulated = accumulate_dtype(dtype).itemsize
    gathered = world_size * rows * dim * (dtype.itemsize + need_text_grad * accumulated)
    return "gather" if gathered <= _GATHER_BUDGET else "ring"


def open_exchange(
    x: Tensor,  # (M, D)
    y: Tensor,  # (N, D)
    affine: Affine,
    pairs: Pairs,
    spec: LossSpec,
    run: Execution,
) -> TextExchange:
    """The exchange of this call, after all ranks of its group have agreed on it.

    Raises:
        ValueError: on every rank, where the arguments of one are refused or do not agree.
    """
    acc = affine.scale.dtype
    if spec.group_name is None:
        return Local(x, y, pairs, spec)
    from .ring import Ring

    group = resolve_group(spec.group_name)
    check_device(group, x.device)
    real_images: int | Tensor = x.shape[0]
    if pairs.ids is not None:
        real_images = (pairs.ids.images >= 0).sum()
        if _is_read_freely(x.device):
            real_images = int(real_images)
    known = 0 if isinstance(real_images, Tensor) else real_images
    holds = _holds_text_grad(x, spec, run, group)
    header = header_of(x, y, affine, pairs, spec, run, known, holds)
    headers = check_ranks_agree(header, group, x.device)
    rows, world_size = [h.rows for h in headers], len(headers)
    if spec.dist_impl is not None:
        impl = DIST_IMPLS[spec.dist_impl]
    else:
        need_text_grad = any(h.need_text_grad for h in headers)
        impl = choose_impl(max(rows), x.shape[1], x.dtype, world_size, need_text_grad)
    logger.debug("dist_impl=%s: %s over %d ranks, texts %s", spec.dist_impl, impl, world_size, rows)
    exchange = Gather if impl == "gather" else Ring
    text_ids = None if pairs.ids is None else pairs.ids.texts
    return exchange(y, text_ids, acc, headers, real_images, group)


def _is_read_freely(device: torch.device) -> bool:
    """Whether the host may read a value there without waiting."""
    return device.type == "cpu"


def _holds_text_grad(x: Tensor, spec: LossSpec, run: Execution, group: dist.ProcessGroup) -> bool:
    """Whether the workspace can hold a tile where another rank needs the gradient of its texts.

    One that cannot hold a tile at all is refused before other ranks wait for this one's sweep.
    """
    if run.workspace_bytes is None:
        return True
    many = 1 << 20  # rows of images and texts: this rank does not know yet how many will come
    request = PlanRequest(
        many, many, x.shape[1], x.dtype, x.device.type, run.backend, spec.grads,
        filters_negatives=spec.negatives.kind is not None, workspace_bytes=run.workspace_bytes,
    )  # fmt: skip
    try:
        plan_panels(request)
    except ValueError:
        report_bad_arguments(group, x.device)
        raise
    try:
        plan_panels(request._replace(grads=spec.grads._replace(text=True)))
    except ValueError:
        return False
    return True
