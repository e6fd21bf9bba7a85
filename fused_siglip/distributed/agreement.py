"""What ranks tell each other before the first large exchange, and what they must agree on."""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ..kernels import BACKENDS, Affine
from ..negatives import KINDS
from ..positives import POSITIVE_KINDS
from ..rows import RowData, all_ones
from ..spec import FUNCTIONS, Execution, LossSpec
from ..validation import FEATURE_DTYPES, REDUCTIONS
from . import collectives
from .collectives import comm_errors

# What each name runs. open_clip's four give the same numbers by other exchanges: those that pass
# features on from neighbor to neighbor mean the ring, those that collect them mean gather.
DIST_IMPLS = {
    "ring": "ring",
    "gather": "gather",
    "bidir": "ring",
    "shift": "ring",
    "reduce": "gather",
}


class CallHeader(NamedTuple):
    """One rank's call in whole numbers."""

    valid: int  # 0: this rank's arguments were refused, and it has raised
    function: int  # index into FUNCTIONS
    dim: int
    dtype: int  # index into FEATURE_DTYPES
    has_ids: int
    negative_only: int
    dist_impl: int  # index into DIST_IMPLS, -1 for None
    reduction: int  # index into REDUCTIONS
    rows: int  # texts on this rank
    images: int  # images on this rank
    real_images: int  # without padding; 0 where the host does not know
    real_texts: int  # likewise
    need_text_grad: int
    holds_text_grad: int  # whether this rank's workspace_bytes hold a tile with that gradient too
    negatives: int  # index into KINDS, -1 for None
    amount: int  # bits of the float
    seed: int
    image_weights: int  # whether they were given
    text_weights: int
    all_ones: int  # whether they say nothing, as far as this rank knows
    positives: int  # index into POSITIVE_KINDS, -1 for None
    pair: int  # bits of the float, like the next ones
    per_image: int
    per_text: int
    aligned: int  # -1 for None
    label_smoothing: int
    counting: int  # index into BACKENDS where ranks must have the same: how often texts go round
    # where thresholds are searched, and the bits of what ranks are counted by
    workspace_bytes: int  # 0 for None
    device: int  # index into _DEVICES, -1 for another
    logit_scale: int  # bits of the float, like logit_bias: see _scalar_bits
    logit_bias: int


# The fields all ranks must agree on, in the words of the public function.
_AGREED = {"function": "the function", "dim": "D", "dtype": "dtype",
           "has_ids": "ids", "negative_only": "negative_only",
           "dist_impl": "dist_impl", "reduction": "reduction", "negatives": "negatives",
           "amount": "keep of negatives", "seed": "seed of negatives",
           "image_weights": "image_weights", "text_weights": "text_weights",
           "positives": "positives", "pair": "pair of positives",
           "per_image": "per_image of positives", "per_text": "per_text of positives",
           "aligned": "aligned of positives", "label_smoothing": "label_smoothing",
           "counting": "backend", "device": "device",
           "logit_scale": "logit_scale", "logit_bias": "logit_bias"}  # fmt: skip

_DEVICES = ("cpu", "cuda", "xpu", "hpu", "mps")


def _bits(value: float) -> int:
    return struct.unpack("q", struct.pack("d", value))[0]


def _float(bits: int) -> float:
    return struct.unpack("d", struct.pack("q", bits))[0]


# What a field's number stands for, where it is not that number.
FORMATTERS: dict[str, Callable[[int], object]] = {
    "function": lambda v: FUNCTIONS[v],
    "dtype": lambda v: FEATURE_DTYPES[v],
    "negative_only": bool,
    "reduction": lambda v: REDUCTIONS[v],
    "has_ids": lambda v: "given" if v else "missing",
    "image_weights": lambda v: "given" if v else "missing",
    "text_weights": lambda v: "given" if v else "missing",
    "positives": lambda v: None if v < 0 else list(POSITIVE_KINDS.values())[v].__name__,
    "aligned": lambda v: None if v < 0 else _float(v),
    "dist_impl": lambda v: None if v < 0 else list(DIST_IMPLS)[v],
    "negatives": lambda v: None if v < 0 else list(KINDS.values())[v].__name__,
    **dict.fromkeys(("amount", "pair", "per_image", "per_text", "label_smoothing"), _float),
    "counting": lambda v: list(BACKENDS)[v],
    "device": lambda v: "another" if v < 0 else _DEVICES[v],
    "logit_scale": _float,
    "logit_bias": _float,
}


class RealRows(NamedTuple):
    """How many rows of a rank are no padding; tensors where the host would have to wait."""

    images: int | Tensor
    texts: int | Tensor


def header_of(
    inputs: tuple[Tensor, Tensor, Affine],  # (M, D), (N, D)
    rows: RowData,
    spec: LossSpec,
    run: Execution,
    real: RealRows,
    holds_text_grad: bool,
) -> CallHeader:
    """What this rank tells the others of its call."""
    x, y, affine = inputs
    kind, amount, seed = spec.negatives
    compares = spec.negatives.by_score or spec.function == "retrieval_ranks"
    dist_impl = -1 if spec.dist_impl is None else list(DIST_IMPLS).index(spec.dist_impl)
    of_positives, *shares, aligned = spec.positives
    return CallHeader(
        valid=1,
        function=FUNCTIONS.index(spec.function),
        dim=x.shape[1],
        dtype=FEATURE_DTYPES.index(x.dtype),
        has_ids=rows.ids is not None,
        negative_only=spec.negative_only,
        dist_impl=dist_impl,
        reduction=REDUCTIONS.index(spec.reduction),
        rows=y.shape[0],
        images=x.shape[0],
        real_images=0 if isinstance(real.images, Tensor) else real.images,
        real_texts=0 if isinstance(real.texts, Tensor) else real.texts,
        need_text_grad=spec.grads.text,
        holds_text_grad=holds_text_grad,
        negatives=-1 if kind is None else list(KINDS).index(kind),
        amount=_bits(amount),
        seed=seed,
        image_weights=rows.image_weights is not None,
        text_weights=rows.text_weights is not None,
        all_ones=all_ones(rows),
        positives=-1 if of_positives is None else list(POSITIVE_KINDS).index(of_positives),
        **{k: _bits(v) for k, v in zip(("pair", "per_image", "per_text"), shares, strict=True)},
        aligned=-1 if aligned is None else _bits(aligned),
        label_smoothing=_bits(spec.label_smoothing),
        counting=list(BACKENDS).index(run.backend) if compares else 0,
        workspace_bytes=run.workspace_bytes or 0,
        device=_DEVICES.index(x.device.type) if x.device.type in _DEVICES else -1,
        logit_scale=_scalar_bits(affine.scale),
        logit_bias=_scalar_bits(affine.bias),
    )


def _scalar_bits(value: Tensor) -> int:
    """What TORCH_DISTRIBUTED_DEBUG lets ranks compare t and b by; 0 without, since a GPU would be
    waited for."""
    if dist.get_debug_level() == dist.DebugLevel.OFF:
        return 0
    return _bits(value.item())


def check_ranks_agree(
    header: CallHeader, group: dist.ProcessGroup, device: torch.device
) -> list[CallHeader]:
    """Exchange headers and compare them: all of them, or the same ValueError on every rank."""
    everyone = _exchange(header, group, device)
    refused = [rank for rank, h in enumerate(everyone) if not h.valid]
    if refused:
        raise ValueError(
            f"{FUNCTIONS[header.function]} was called with bad arguments on rank {refused[0]} of "
            "the group, which has the details: expected a good call on every rank"
        )
    names = _AGREED | ({"amount": "margin of negatives"} if _is_below(header) else {})
    for field, name in names.items():
        values = [getattr(h, field) for h in everyone]
        if len(set(values)) > 1:
            said = FORMATTERS.get(field, str)
            other = next(rank for rank, v in enumerate(values) if v != values[0])
            raise ValueError(
                f"ranks disagree on {name}: {said(values[0])} on rank 0 and {said(values[other])} "
                f"on rank {other} of the group: expected the same on every rank"
            )
    if any(h.need_text_grad for h in everyone):
        short = [rank for rank, h in enumerate(everyone) if not h.holds_text_grad]
        if short:
            raise ValueError(
                f"workspace_bytes of rank {short[0]} of the group cannot hold one tile with the "
                "gradient of the texts, which another rank needs: expected more, or None"
            )
    return everyone


def _is_below(header: CallHeader) -> bool:
    return header.negatives == list(KINDS).index("below")


def report_bad_arguments(group: dist.ProcessGroup, device: torch.device | None = None) -> None:
    """Tell the others that this rank is about to raise, so that they raise too and do not wait."""
    _exchange(CallHeader(*[0] * len(CallHeader._fields)), group, device)


def check_device(group: dist.ProcessGroup, device: torch.device) -> None:
    """Refuse features where the group has no transport, before torch does in its own words."""
    config = dist.get_backend_config(group)
    if device.type not in [pair.split(":")[0] for pair in config.split(",")]:
        report_bad_arguments(group)
        raise ValueError(
            f"image_features is on {device} and group has the backends {config}: expected features "
            "on a device of the group"
        )


def _exchange(
    header: CallHeader, group: dist.ProcessGroup, device: torch.device | None
) -> list[CallHeader]:
    """Every rank's header."""
    device = _header_device(group, device)
    mine = torch.tensor(header, dtype=torch.int64, device=device)
    world_size = dist.get_world_size(group)
    headers = mine.new_empty(world_size * len(header))
    with comm_errors(group, "exchange of sizes"):
        if device.type == "cpu":  # to everybody at once: gloo's all-gather goes round by rank
            dist.all_to_all_single(headers, mine.repeat(world_size), group=group)
        else:
            collectives.all_gather(headers, mine, group=group)
    return [CallHeader(*row) for row in headers.view(-1, len(header)).tolist()]


def _header_device(group: dist.ProcessGroup, device: torch.device | None) -> torch.device:
    """Where headers travel: on the CPU where the group can, so that no GPU waits for them.

    Otherwise on the features' device, which need not be the current one. device: None if unknown.
    """
    kinds = [pair.split(":")[0] for pair in dist.get_backend_config(group).split(",")]
    if "cpu" in kinds:  # such as "cpu:gloo,cuda:nccl"
        return torch.device("cpu")
    return device if device is not None and device.type in kinds else torch.device(kinds[0])
