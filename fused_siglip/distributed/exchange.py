"""The loss of the global batch: ring and gather loops over the sweep.

Rank r holds X_r and Y_r. It computes its rows of the global pair matrix, all texts against its own
images, and gets back what the other ranks' rows contribute to dL/dY_r.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import struct
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ..kernels import BACKENDS, RandomMask, ScoreThreshold, panel_class
from ..negatives import (
    KINDS,
    hash_cutoff,
    image_keys,
    score_normalizer,
    search_thresholds,
    text_center_radius,
    text_keys,
)
from ..planner import plan_panels
from ..sweep import Needs, count_negatives, sweep
from ..validation import FEATURE_DTYPES, REDUCTIONS

logger = logging.getLogger("fused_siglip")

# What each name runs. open_clip's four give the same numbers by other exchanges: those that pass
# features on from neighbour to neighbour mean the ring, those that collect them mean gather.
DIST_IMPLS = {
    "ring": "ring",
    "gather": "gather",
    "bidir": "ring",
    "shift": "ring",
    "reduce": "gather",
}

# Left to choose, the gathered texts and their gradients may take this much: a constant, whatever
# the world size.
_GATHER_BUDGET = 256 << 20


class _Terms(NamedTuple):
    """What ranks tell each other before the first large exchange."""

    valid: int  # 0: this rank's arguments were refused, and it has raised
    dim: int
    dtype: int  # index into FEATURE_DTYPES
    has_ids: int
    negative_only: int
    dist_impl: int  # index into DIST_IMPLS, -1 for None
    reduction: int  # index into REDUCTIONS
    rows: int  # texts on this rank
    images: int  # images on this rank
    real_images: int  # without padding
    need_text_grad: int
    negatives: int  # index into KINDS, -1 for None
    keep: int  # bits of the float
    seed: int
    counting: int  # index into BACKENDS where thresholds are looked for: how often texts go round
    device: int  # index into _DEVICES, -1 for another
    logit_scale: int  # bits of the float, like logit_bias: see _scalar_bits
    logit_bias: int


# The fields all ranks must agree on, in the words of the public function.
_AGREED = {"dim": "D", "dtype": "dtype", "has_ids": "ids", "negative_only": "negative_only",
           "dist_impl": "dist_impl", "reduction": "reduction", "negatives": "negatives",
           "keep": "keep of negatives", "seed": "seed of negatives",
           "counting": "backend", "device": "device",
           "logit_scale": "logit_scale", "logit_bias": "logit_bias"}  # fmt: skip

_DEVICES = ("cpu", "cuda", "xpu", "hpu", "mps")


def _bits(value: float) -> int:
    return struct.unpack("q", struct.pack("d", value))[0]


def _float(bits: int) -> float:
    return struct.unpack("d", struct.pack("q", bits))[0]


# What a field's number stands for, where it is not that number.
_SAID: dict[str, Callable[[int], object]] = {
    "dtype": lambda v: FEATURE_DTYPES[v],
    "negative_only": bool,
    "reduction": lambda v: REDUCTIONS[v],
    "has_ids": lambda v: "given" if v else "missing",
    "dist_impl": lambda v: None if v < 0 else list(DIST_IMPLS)[v],
    "negatives": lambda v: None if v < 0 else list(KINDS.values())[v].__name__,
    "keep": _float,
    "counting": lambda v: list(BACKENDS)[v],
    "device": lambda v: "another" if v < 0 else _DEVICES[v],
    "logit_scale": _float,
    "logit_bias": _float,
}

# torch 2.13 renamed the collectives over one tensor and warns of the old names
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def resolve_group(group_name: str) -> dist.ProcessGroup:
    return dist.distributed_c10d._resolve_process_group(group_name)


@contextlib.contextmanager
def _contact(group: dist.ProcessGroup, what: str) -> Iterator[None]:
    """Say what failed where a collective ends in an error of its transport."""
    try:
        yield
    except RuntimeError as error:
        raise RuntimeError(
            f"siglip_loss: rank {dist.get_rank(group)} of {dist.get_world_size(group)} lost "
            f"contact in the {what}: another rank failed, left the group or is late"
        ) from error


def _terms_device(group: dist.ProcessGroup, device: torch.device | None) -> torch.device:
    """Where the terms travel: on the CPU where the group can, so that no GPU waits for them.

    Otherwise on the features' device, which need not be the current one. device: None if unknown.
    """
    kinds = [pair.split(":")[0] for pair in dist.get_backend_config(group).split(",")]
    if "cpu" in kinds:  # such as "cpu:gloo,cuda:nccl"
        return torch.device("cpu")
    return device if device is not None and device.type in kinds else torch.device(kinds[0])


def _exchange(terms: _Terms, group: dist.ProcessGroup, device: torch.device | None) -> list[_Terms]:
    """Every rank's terms."""
    device = _terms_device(group, device)
    mine = torch.tensor(terms, dtype=torch.int64, device=device)
    world_size = dist.get_world_size(group)
    all_terms = mine.new_empty(world_size * len(terms))
    with _contact(group, "exchange of sizes"):
        if device.type == "cpu":  # to everybody at once: gloo's all-gather goes round by rank
            dist.all_to_all_single(all_terms, mine.repeat(world_size), group=group)
        else:
            _all_gather(all_terms, mine, group=group)
    return [_Terms(*row) for row in all_terms.view(-1, len(terms)).tolist()]


def report_bad_arguments(group: dist.ProcessGroup, device: torch.device | None = None) -> None:
    """Tell the others that this rank is about to raise, so that they raise too and do not wait."""
    _exchange(_Terms(0, *[0] * (len(_Terms._fields) - 1)), group, device)


def _check_backend(group: dist.ProcessGroup, device: torch.device) -> None:
    """Refuse features where the group has no transport, before torch does in its own words."""
    config = dist.get_backend_config(group)
    if device.type not in [pair.split(":")[0] for pair in config.split(",")]:
        report_bad_arguments(group)
        raise ValueError(
            f"image_features is on {device} and group has the backends {config}: expected features "
            "on a device of the group"
        )


def _scalar_bits(value: Tensor) -> int:
    """What TORCH_DISTRIBUTED_DEBUG lets ranks compare t and b by; 0 without, since a GPU would be
    waited for."""
    if dist.get_debug_level() == dist.DebugLevel.OFF:
        return 0
    return _bits(value.item())


def _is_read_freely(device: torch.device) -> bool:
    """Whether the host may read a value there without waiting."""
    return device.type == "cpu"


def _sum_over_ranks(value: Tensor, group: dist.ProcessGroup) -> Tensor:
    with _contact(group, "sum of the numbers of images"):
        dist.all_reduce(value, group=group)
    return value


def _agree(terms: _Terms, group: dist.ProcessGroup, device: torch.device) -> list[_Terms]:
    """Exchange terms and hold them against each other: the same ValueError on every rank."""
    everyone = _exchange(terms, group, device)
    refused = [rank for rank, t in enumerate(everyone) if not t.valid]
    if refused:
        raise ValueError(
            f"siglip_loss was called with bad arguments on rank {refused[0]} of the group, which "
            "has the details: expected a good call on every rank"
        )
    for field, name in _AGREED.items():
        values = [getattr(t, field) for t in everyone]
        if len(set(values)) > 1:
            said = _SAID.get(field, str)
            other = next(rank for rank, v in enumerate(values) if v != values[0])
            raise ValueError(
                f"ranks disagree on {name}: {said(values[0])} on rank 0 and {said(values[other])} "
                f"on rank {other} of the group: expected the same on every rank"
            )
    return everyone


def choose_impl(
    rows: int, dim: int, dtype: torch.dtype, world_size: int, need_text_grad: bool
) -> str:
    """Gather while the gathered texts (and their gradients) stay small, otherwise the ring."""
    accumulated = torch.promote_types(dtype, torch.float32).itemsize
    gathered = world_size * rows * dim * (dtype.itemsize + need_text_grad * accumulated)
    return "gather" if gathered <= _GATHER_BUDGET else "ring"


def global_sweep(
    x: Tensor,  # (M, D)
    y: Tensor,  # (N, D)
    logit_scale: Tensor,  # ()
    logit_bias: Tensor,  # ()
    image_ids: Tensor | None,  # (M,)
    text_ids: Tensor | None,  # (N,)
    negative_only: bool,
    needs: Needs,
    group_name: str,
    dist_impl: str | None,
    reduction: str,
    negatives: tuple[str | None, float, int],  # kind, share, seed
    *,
    workspace_bytes: int | None,
    backend: str,
) -> tuple[Tensor, Tensor | None, Tensor | None, float | Tensor]:
    """This rank's sums and gradients in the global batch, and what its sum is divided by.

    As :func:`fused_siglip.sweep.sweep`, with the texts of all ranks as columns; the gradient of
    this rank's texts holds the contributions of all ranks. What is not needed is None.
    """
    group = resolve_group(group_name)
    rank, world_size = dist.get_rank(group), dist.get_world_size(group)
    kind, keep, seed = negatives
    _check_backend(group, x.device)
    on_host = image_ids is None or _is_read_freely(x.device)
    real_images = x.shape[0] if image_ids is None else (image_ids >= 0).sum()
    if workspace_bytes is not None:
        _check_workspace(x, needs, kind is not None, workspace_bytes, backend, group)
    everyone = _agree(
        _Terms(
            valid=1,
            dim=x.shape[1],
            dtype=FEATURE_DTYPES.index(x.dtype),
            has_ids=image_ids is not None,
            negative_only=negative_only,
            dist_impl=-1 if dist_impl is None else list(DIST_IMPLS).index(dist_impl),
            reduction=REDUCTIONS.index(reduction),
            rows=y.shape[0],
            images=x.shape[0],
            real_images=int(real_images) if on_host else 0,
            need_text_grad=needs.text,
            negatives=-1 if kind is None else list(KINDS).index(kind),
            keep=_bits(keep),
            seed=seed,
            counting=list(BACKENDS).index(backend) if kind in ("hardest", "easiest") else 0,
            device=_DEVICES.index(x.device.type) if x.device.type in _DEVICES else -1,
            logit_scale=_scalar_bits(logit_scale),
            logit_bias=_scalar_bits(logit_bias),
        ),
        group,
        x.device,
    )
    rows = [t.rows for t in everyone]
    need_text_grad = any(t.need_text_grad for t in everyone)
    impl = DIST_IMPLS.get(dist_impl) or choose_impl(
        max(rows), x.shape[1], x.dtype, world_size, need_text_grad
    )
    logger.debug("dist_impl=%s: %s over %d ranks, texts %s", dist_impl, impl, world_size, rows)

    acc = logit_scale.dtype
    grad_x = x.new_empty(x.shape, dtype=acc) if needs.image else None

    sums = torch.zeros(3 if needs.scalars else 1, 1, dtype=acc, device=x.device)
    visit = _ring
    if impl == "gather":
        gathered = _gather_texts(y, text_ids, max(rows), group)
        visit = functools.partial(_gather, gathered)
    options = {"workspace_bytes": workspace_bytes, "backend": backend}
    thresholds = None

    def diagonal_of(chunk: _Chunk) -> int | None:
        return chunk.diagonal if image_ids is None and not negative_only else None

    if kind in ("hardest", "easiest"):
        steps = panel_class(backend).count_bits

        def reduce(tensor: Tensor, op: str) -> None:
            with _contact(group, "search for the range of the texts"):
                dist.all_reduce(tensor, getattr(dist.ReduceOp, op), group)

        units = score_normalizer(x, text_center_radius(y, text_ids, acc, reduce), logit_scale, kind)

        def count(known: Tensor | None, step: int) -> Tensor:
            counts = x.new_zeros(len(x), 2 ** steps[step], dtype=torch.int32)

            def count_texts(chunk: _Chunk, _) -> None:
                counted = count_negatives(
                    x, chunk.texts, image_ids, chunk.ids, diagonal_of(chunk), *units, known, step,
                    **options,
                )  # fmt: skip
                counts.add_(counted)

            visit(count_texts, y, text_ids, rows, acc, False, group)
            return counts

        thresholds = ScoreThreshold(*units, search_thresholds(keep, acc, steps, count))

    if kind == "random":
        first_image = sum(t.images for t in everyone[:rank])
        images = image_keys(seed, first_image, x.shape[0], x.device)

    def sweep_texts(chunk: _Chunk, grad_texts: Tensor | None) -> None:
        kept = thresholds
        if kind == "random":
            texts = text_keys(seed, chunk.first, chunk.texts.shape[0], x.device)
            kept = RandomMask(images, texts, hash_cutoff(keep))
        sums.add_(
            sweep(
                x,
                chunk.texts,
                logit_scale,
                logit_bias,
                image_ids,
                chunk.ids,
                diagonal_of(chunk),
                grad_x,
                grad_texts,
                scalar_grads=needs.scalars,
                add_to_grad_x=chunk.step > 0,
                kept=kept,
                **options,
            ).sum(1, keepdim=True)
        )

    grad_y = visit(sweep_texts, y, text_ids, rows, acc, need_text_grad, group)

    # the mean over the ranks is the loss of the global batch
    if on_host or reduction == "sum":
        images = sum(t.real_images for t in everyone) if reduction == "mean" else 1
        divisor = max(images, 1) / world_size
    else:  # where the host would have to wait for their number
        divisor = (_sum_over_ranks(real_images, group).clamp(min=1) / world_size).to(acc)
    return sums, grad_x, grad_y if needs.text else None, divisor


def _check_workspace(
    x: Tensor,
    needs: Needs,
    filters_negatives: bool,
    workspace_bytes: int,
    backend: str,
    group: dist.ProcessGroup,
) -> None:
    """Refuse a workspace that cannot hold a tile before other ranks wait for this one's sweep."""
    try:
        many = 1 << 20  # rows of images and texts: this rank does not know yet how many will come
        plan_panels(
            many, many, x.shape[1], x.dtype, x.device.type, backend,
            need_image_grad=needs.image, need_text_grad=needs.text,
            need_scalar_grads=needs.scalars, filters_negatives=filters_negatives, workspace_bytes=workspace_bytes,
        )  # fmt: skip
    except ValueError:
        report_bad_arguments(group, x.device)
        raise


class _Chunk(NamedTuple):
    """Texts of the global batch that are swept at once."""

    texts: Tensor  # (n, D)
    ids: Tensor | None  # (n,)
    first: int  # index of the first one in the global batch
    diagonal: int | None  # local image i and text i + diagonal are a pair
    step: int  # how many chunks came before


_TEXTS, _IDS, _GRADS = range(3)  # the channels between two neighbours


class _Ring:
    """Exchanges with the two neighbours: send to the right, receive from the left."""

    def __init__(self, group: dist.ProcessGroup):
        self.group = group
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        self.right = dist.get_global_rank(group, (self.rank + 1) % self.size)
        self.left = dist.get_global_rank(group, (self.rank - 1) % self.size)
        self.pending: list[dist.P2POp] = []
        self.works: list[dist.Work] = []

    def exchange(self, channel: int, out: Tensor, into: Tensor) -> None:
        """Queue a send and a receipt; all ranks queue their channels in the same order."""
        for op, tensor, peer in ((dist.isend, out, self.right), (dist.irecv, into, self.left)):
            if tensor.numel() > 0:
                self.pending.append(dist.P2POp(op, tensor, peer, self.group, channel))

    def start(self) -> None:
        with _contact(self.group, "ring exchange"):
            self.works = dist.batch_isend_irecv(self.pending) if self.pending else []
        self.pending = []

    def wait(self) -> None:
        with _contact(self.group, "ring exchange"):
            for work in self.works:
                work.wait()
        self.works = []


def _ring(
    use: Callable[[_Chunk, Tensor | None], None],
    y: Tensor,  # (N, D)
    text_ids: Tensor | None,  # (N,)
    rows: list[int],
    acc: torch.dtype,
    need_grad: bool,
    group: dist.ProcessGroup,
) -> Tensor | None:  # (N, D)
    """Hand every rank's texts to ``use``, which writes its share of their gradient.

    Texts travel round the ring and their gradients one step behind them, on their own channel.

    While a chunk is swept, the next one arrives, and so does what the ranks before this one have
    added to the gradient of the present one. After as many steps as there are ranks every gradient
    is back at its owner. Memory: two chunks of texts and three of gradients, whatever the size.
    """
    ring = _Ring(group)
    capacity, d = max(rows), y.shape[1]
    texts = [y.new_empty(capacity, d) for _ in range(2)]
    ids = [text_ids.new_empty(capacity) for _ in range(2)] if text_ids is not None else None
    grads = [y.new_empty(capacity, d, dtype=acc) for _ in range(3 if need_grad else 0)]
    texts[0][: rows[ring.rank]].copy_(y)
    if ids:
        ids[0][: rows[ring.rank]].copy_(text_ids)

    leaving = None  # the finished gradient of the chunk that moved on in the last step
    for step in range(ring.size):
        owner = (ring.rank - step) % ring.size
        here, there = step % 2, 1 - step % 2
        n, n_next = rows[owner], rows[(owner - 1) % ring.size]
        # three gradients rotate: one leaves, one arrives, one is computed
        if need_grad:
            computed, arriving = grads[step % 3][:n], grads[(step + 1) % 3][:n]
        else:
            computed = arriving = None
        if step + 1 < ring.size:
            ring.exchange(_TEXTS, texts[here][:n], texts[there][:n_next])
            if ids:
                ring.exchange(_IDS, ids[here][:n], ids[there][:n_next])
        if need_grad and step > 0:
            ring.exchange(_GRADS, leaving, arriving)
        ring.start()
        chunk = _Chunk(
            texts[here][:n],
            ids[here][:n] if ids else None,
            sum(rows[:owner]),
            0 if step == 0 else None,
            step,
        )
        use(chunk, computed)
        ring.wait()
        if need_grad:
            leaving = computed if step == 0 else computed.add_(arriving)
    if not need_grad:
        return None
    grad_y = y.new_empty(y.shape, dtype=acc)
    ring.exchange(_GRADS, leaving, grad_y)
    ring.start()
    ring.wait()
    return grad_y


def _gather_texts(
    y: Tensor,  # (N, D)
    text_ids: Tensor | None,  # (N,)
    capacity: int,
    group: dist.ProcessGroup,
) -> list[Tensor | None]:  # (ranks * capacity, D), (ranks * capacity,)
    """Everybody's texts and ids, ``capacity`` rows a rank."""

    def gathered(local: Tensor) -> Tensor:
        # collectives want equal blocks: shorter ones are sent with rows that nobody reads
        block = local.new_zeros(capacity, *local.shape[1:])
        block[: len(local)].copy_(local)
        out = local.new_empty(dist.get_world_size(group) * capacity, *local.shape[1:])
        with _contact(group, "gathering of the texts"):
            _all_gather(out, block, group=group)
        return out

    return [gathered(y), None if text_ids is None else gathered(text_ids)]


def _gather(
    gathered: list[Tensor | None],  # of _gather_texts; empty once gradients were computed
    use: Callable[[_Chunk, Tensor | None], None],
    y: Tensor,  # (N, D)
    text_ids: Tensor | None,  # (N,)
    rows: list[int],
    acc: torch.dtype,
    need_grad: bool,
    group: dist.ProcessGroup,
) -> Tensor | None:  # (N, D)
    """As :func:`_ring`, with texts that were gathered; gradients are summed to their owners."""
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    capacity, d = max(rows), y.shape[1]
    texts, ids = gathered
    grads = y.new_zeros(size * capacity, d, dtype=acc) if need_grad else None
    if min(rows) == capacity:  # one sweep over all columns
        blocks = [(slice(0, size * capacity), 0, rank * capacity)]
    else:  # a sweep a rank, over the rows that hold something
        blocks = [
            (slice(r * capacity, r * capacity + n), sum(rows[:r]), 0 if r == rank else None)
            for r, n in enumerate(rows)
        ]
    for step, (block, first, diagonal) in enumerate(blocks):
        chunk = _Chunk(texts[block], None if ids is None else ids[block], first, diagonal, step)
        use(chunk, None if grads is None else grads[block])
    if not need_grad:
        return None
    # texts are not needed beside the sum of their gradients, for which a backend may take buffers
    gathered.clear()
    del texts, ids, chunk
    grad_y = y.new_empty(capacity, d, dtype=acc)
    with _contact(group, "summing of the texts' gradients"):
        _reduce_scatter(grad_y, grads, group=group)
    return grad_y[: rows[rank]]
