"""Ranks and statistics as torch operators, so that torch.compile takes each as one node.

They have no derivative: their callers detach what they pass. Both may exchange tensors with other
ranks, which is a side effect: a call is not removed where nobody uses its value.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.fx.node import has_side_effect

from .function import is_eager
from .kernels import accumulate_dtype
from .moments import logit_moments
from .ranks import ranks_of_positives
from .rows import RowData
from .settled import Inputs, without_autocast
from .spec import ALL_ALIKE, ALL_NEGATIVES, NO_GRADS, LossSpec


def _spec(
    function: str,
    group_name: str | None,
    dtype: torch.dtype,
    dist_impl: str | None = None,
    workspace_bytes: int | None = None,
    backend: str | None = None,
) -> LossSpec:
    """A loss without gradients, which asks for what these functions need of an exchange."""
    return LossSpec(
        grads=NO_GRADS, negative_only=False, negatives=ALL_NEGATIVES, positives=ALL_ALIKE,
        label_smoothing=0.0, reduction="mean", backend=backend, workspace_bytes=workspace_bytes,
        group_name=group_name, dist_impl=dist_impl, dtype=dtype, function=function,
    )  # fmt: skip


def _ranks(
    x: Tensor,  # (M, D)
    y: Tensor,  # (N, D)
    image_ids: Tensor | None,
    text_ids: Tensor | None,
    *options: Any,
) -> tuple[Tensor, Tensor]:  # (M,), (N,)
    with torch.no_grad(), without_autocast(x.device.type):
        spec = _spec("retrieval_ranks", *options)
        return ranks_of_positives(x, y, RowData(image_ids, text_ids), spec)


def _fake_ranks(x: Tensor, y: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    image_ranks, text_ranks = (rows.new_empty(rows.shape[0], dtype=torch.int64) for rows in (x, y))
    return image_ranks, text_ranks


def _statistics(
    x: Tensor,  # (M, D)
    y: Tensor,  # (N, D)
    logit_scale: Tensor,
    logit_bias: Tensor,
    image_ids: Tensor | None,
    text_ids: Tensor | None,
    group_name: str | None,
    dtype: torch.dtype,
) -> Tensor:  # (4,)
    with torch.no_grad(), without_autocast(x.device.type):
        inputs = Inputs(x, y, logit_scale, logit_bias)
        spec = _spec("logit_statistics", group_name, dtype)
        return logit_moments(inputs, RowData(image_ids, text_ids), spec)


def _fake_statistics(x: Tensor, *rest: Any) -> Tensor:
    return x.new_empty(4, dtype=accumulate_dtype(rest[-1]))


def _register(
    name: str, schema: str, function: Callable[..., Any], fake: Callable[..., Any]
) -> torch._ops.OpOverload:
    torch.library.define(f"fused_siglip::{name}", schema)
    torch.library.impl(f"fused_siglip::{name}", "default", function)
    torch.library.register_fake(f"fused_siglip::{name}", fake)
    op = getattr(torch.ops.fused_siglip, name).default
    has_side_effect(op)
    return op


def call(op: torch._ops.OpOverload, *arguments: Any) -> Any:
    """An operator's outputs; as for the loss, a function is called where torch would go there."""
    if is_eager(*(a for a in arguments if isinstance(a, Tensor))):
        return _FUNCTIONS[op](*arguments)
    return op(*arguments)


RETRIEVAL_RANKS = _register(
    "retrieval_ranks",
    "(Tensor x, Tensor y, Tensor? image_ids, Tensor? text_ids, str? group_name, ScalarType dtype, "
    "str? dist_impl, int? workspace_bytes, str? backend) "
    "-> (Tensor image_ranks, Tensor text_ranks)",
    _ranks,
    _fake_ranks,
)
LOGIT_STATISTICS = _register(
    "logit_statistics",
    "(Tensor x, Tensor y, Tensor logit_scale, Tensor logit_bias, Tensor? image_ids, "
    "Tensor? text_ids, str? group_name, ScalarType dtype) -> Tensor",
    _statistics,
    _fake_statistics,
)
_FUNCTIONS: dict[object, Callable[..., Any]] = {
    RETRIEVAL_RANKS: _ranks,
    LOGIT_STATISTICS: _statistics,
}
