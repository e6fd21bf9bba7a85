"""How texts reach every rank, and their gradients come back: alone, gathered, or round a ring.

Rank r holds X_r and Y_r. It computes its rows of the global pair matrix, all texts against its own
images, and gets back what the other ranks' rows contribute to dL/dY_r. One process is a group of
one, and exchanges nothing.
"""

from __future__ import annotations

import abc
import logging
from collections.abc import Callable, Iterator
from typing import NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from ..kernels import Affine, Ids, accumulate_dtype
from ..planner import PlanRequest, plan_panels
from ..rows import RowData, all_ones, is_weighted
from ..selection.thresholds import ROWS_AT_ONCE
from ..spec import Execution, LossSpec
from .agreement import (
    DIST_IMPLS,
    CallHeader,
    RealRows,
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
        return torch.empty(rows, *self.shape, dtype=self.dtype, device=device)


class Largest(NamedTuple):
    """What the panels of all ranks must suit, where all must have the same shape."""

    images: int  # of a rank
    texts: int  # likewise
    workspace_bytes: int | None  # the smallest that a rank was given


class TextExchange(Protocol):
    """Brings all texts of the global batch to this rank's images."""

    first_image: int  # index of this rank's first image in the global batch
    images_at_once: int | None  # how many images search thresholds together; None: all of them
    text_grad: bool  # whether any rank needs the gradient of its texts
    all_ones: bool  # whether no rank's weights say anything

    @property
    def largest(self) -> Largest:
        """Over the ranks."""
        ...

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

    def real_texts(self) -> float | Tensor:  # ()
        """How many texts of the global batch are no padding, and at least 1."""
        ...

    def blocks_of_ids(self) -> Iterator[Ids]:
        """The ids of all ranks, a rank at a time."""
        ...


class Local:
    """One process: its own texts, once."""

    first_image = 0
    images_at_once: int | None = ROWS_AT_ONCE

    def __init__(self, x: Tensor, y: Tensor, rows: RowData, spec: LossSpec):
        self.images, self.y, self.ids = x.shape[0], y, rows.ids
        self.workspace_bytes = spec.workspace_bytes
        self.text_grad, self.all_ones = spec.grads.text, all_ones(rows)

    def for_each(
        self,
        visit: Visit,
        result: TextResult | None = None,
        extras: tuple[Tensor, ...] = (),
        last: bool = False,
    ) -> Tensor | None:  # (N, ...)
        y = self.y
        out = None if result is None else result.empty(y.shape[0], y.device)
        ids = None if self.ids is None else self.ids.texts
        visit(Texts(y, ids, 0, 0, 0, extras), out)
        return out

    @property
    def largest(self) -> Largest:
        return Largest(self.images, self.y.shape[0], self.workspace_bytes)

    def all_reduce(self, tensor: Tensor, op: str) -> None:
        pass

    def divisor(self, reduction: str) -> float | Tensor:
        if reduction != "mean":
            return 1
        if self.ids is None:
            return max(self.images, 1)
        return (self.ids.images >= 0).sum().clamp(min=1)

    def real_texts(self) -> float | Tensor:
        if self.ids is None:
            return max(self.y.shape[0], 1)
        return (self.ids.texts >= 0).sum().clamp(min=1)

    def blocks_of_ids(self) -> Iterator[Ids]:
        if self.ids is not None:
            yield self.ids


class GroupExchange(abc.ABC):
    """What ring and gather have in common: who has how many rows, and what is summed up."""

    images_at_once: int | None = None

    def __init__(
        self,
        y: Tensor,  # (N, D)
        ids: Ids | None,
        acc: torch.dtype,
        headers: list[CallHeader],
        real: RealRows,
        group: dist.ProcessGroup,
    ):
        self.y, self.ids, self.acc, self.group = y, ids, acc, group
        self.text_ids = None if ids is None else ids.texts
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        self.text_rows, self.image_rows = [h.rows for h in headers], [h.images for h in headers]
        self.first_image = sum(h.images for h in headers[: self.rank])
        bounds = [h.workspace_bytes for h in headers if h.workspace_bytes]
        self.largest = Largest(
            max(h.images for h in headers), max(self.text_rows), min(bounds, default=None)
        )
        self.text_grad = any(h.need_text_grad for h in headers)
        self.all_ones = all(h.all_ones for h in headers)
        self.total_images = sum(h.real_images for h in headers)
        self.total_texts = sum(h.real_texts for h in headers)
        self.real = real
        self.total: Tensor | None = None  # of images over the ranks, once it was asked for

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
        all_reduce(tensor, op, self.group, "exchange of sums")

    def divisor(self, reduction: str) -> float | Tensor:
        if reduction != "mean":
            return 1 / self.size if reduction == "sum" else 1.0
        if not isinstance(self.real.images, Tensor):
            return max(self.total_images, 1) / self.size
        # where the host would have to wait for their number; a collective, so once
        if self.total is None:
            what = "sum of the numbers of images"
            self.total = all_reduce(self.real.images, "SUM", self.group, what)
        return (self.total.clamp(min=1) / self.size).to(self.acc)

    def real_texts(self) -> float | Tensor:
        if not isinstance(self.real.texts, Tensor):
            return max(self.total_texts, 1)
        what = "sum of the numbers of texts"
        return all_reduce(self.real.texts.clone(), "SUM", self.group, what).clamp(min=1)

    def blocks_of_ids(self) -> Iterator[Ids]:
        if self.ids is None:
            return
        for rank in range(self.size):
            sizes = self.image_rows[rank], self.text_rows[rank]
            block = self.ids.images.new_empty(sum(sizes))
            if rank == self.rank:
                torch.cat(self.ids, out=block)
            if block.numel() > 0:
                with comm_errors(self.group, "exchange of ids"):
                    source = dist.get_global_rank(self.group, rank)
                    dist.broadcast(block, source, group=self.group)
            yield Ids(*block.split(sizes))


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
    rows: RowData,
    spec: LossSpec,
    run: Execution,
) -> TextExchange:
    """The exchange of this call, after all ranks of its group have agreed on it.

    Raises:
        ValueError: on every rank, where the arguments of one are refused or do not agree.
    """
    acc = affine.scale.dtype
    if spec.group_name is None:
        return Local(x, y, rows, spec)
    from .gather import Gather
    from .ring import Ring

    group = resolve_group(spec.group_name)
    check_device(group, x.device)
    holds = _holds_text_grad(x, rows, spec, run, group)
    real = RealRows(*(_real_rows(*side) for side in ((x, rows.image_ids), (y, rows.text_ids))))
    header = header_of((x, y, affine), rows, spec, run, real, holds)
    headers = check_ranks_agree(header, group, x.device)
    text_rows, world_size = [h.rows for h in headers], len(headers)
    if spec.dist_impl is not None:
        impl = DIST_IMPLS[spec.dist_impl]
    else:
        need_text_grad = any(h.need_text_grad for h in headers)
        impl = choose_impl(max(text_rows), x.shape[1], x.dtype, world_size, need_text_grad)
    logger.debug(
        "dist_impl=%s: %s over %d ranks, texts %s", spec.dist_impl, impl, world_size, text_rows
    )
    exchange = Gather if impl == "gather" else Ring
    return exchange(y, rows.ids, acc, headers, real, group)


def _real_rows(features: Tensor, ids: Tensor | None) -> int | Tensor:
    """Rows that are no padding; a tensor where the host would have to wait for their number."""
    if ids is None:
        return features.shape[0]
    real = (ids >= 0).sum()
    return int(real) if _is_read_freely(features.device) else real


def _is_read_freely(device: torch.device) -> bool:
    """Whether the host may read a value there without waiting."""
    return device.type == "cpu"


def _holds_text_grad(
    x: Tensor, rows: RowData, spec: LossSpec, run: Execution, group: dist.ProcessGroup
) -> bool:
    """Whether the workspace can hold a tile where another rank needs the gradient of its texts.

    One that cannot hold a tile at all is refused before other ranks wait for this one's sweep.
    """
    if run.workspace_bytes is None:
        return True
    many = 1 << 20  # rows of images and texts: this rank does not know yet how many will come
    request = PlanRequest(
        many, many, x.shape[1], x.dtype, x.device.type, run.backend, spec.grads,
        filters_negatives=spec.negatives.kind is not None, weighted=is_weighted(rows, spec),
        workspace_bytes=run.workspace_bytes,
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
