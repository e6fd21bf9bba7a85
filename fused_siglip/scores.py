"""Public functions for evaluation and logging: ranks of retrieval, and statistics of the logits."""

from __future__ import annotations

from typing import NamedTuple

import torch.distributed as dist
from torch import Tensor

from . import scalars, validation
from .distributed import agreement
from .score_operators import LOGIT_STATISTICS, RETRIEVAL_RANKS, call

_ALTERNATIVES = "or image_ids and text_ids"


def retrieval_ranks(
    image_features: Tensor,  # (M, D)
    text_features: Tensor,  # (N, D)
    *,
    image_ids: Tensor | None = None,  # (M,)
    text_ids: Tensor | None = None,  # (N,)
    group: dist.ProcessGroup | str | None = None,
    dist_impl: str | None = None,
    workspace_bytes: int | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:  # (M,), (N,)
    """Rank of every image's best positive text among its negatives, and of every text's best image.

    A rank is one plus the number of negatives that are at least as similar as the best positive: 1
    is best, and features that are all alike have the worst rank. One sweep over bounded panels
    finds both directions' ranks. docs/retrieval.md gets R@K, the median rank and MRR of them.

    Args:
        image_features: (M, D), float32, bfloat16, float16, or float64 (torch backend). Any strides.
            Inner products are compared: those of L2-normalized features are cosines.
        text_features: (N, D), of the same dtype and device, or cast by autocast.
        image_ids: (M,) integers. With ids, every pair with ``image_ids[i] == text_ids[j]`` is
            positive, and M may differ from N; without, pair (i, i) is. A row with a negative id is
            padding: it takes no part, whatever its features hold.
        text_ids: (N,) integers. Give both kinds of ids or neither.
        group: the process group whose global batch the ranks are of: every rank calls with its own
            rows and gets theirs.
        dist_impl: "ring", "gather" or None, as for :func:`fused_siglip.siglip_loss`.
        workspace_bytes: upper bound of the panel workspace (in a group the smallest that a rank
            gives); None lets the planner choose.
        backend: "torch", "triton" or None, as for :func:`fused_siglip.siglip_loss`.

    Returns:
        int64 ranks of the images and of the texts, without gradient. A row that has no rank gets 0:
        padding, and a row without any positive in the global batch. Positives are compared with
        negatives in the bits of the same product, so that a duplicate of the positive is a tie. A
        NaN in the best positive or in a negative counts against the rank. The diagonal takes one
        product, ids take two.

    Raises:
        TypeError, ValueError: bad arguments, or a workspace too small for one tile, as for
            :func:`fused_siglip.siglip_loss`; in a group on every rank.
        RuntimeError: when a rank of the group is lost.
    """
    group = validation.check_group(group, dist_impl, agreement.DIST_IMPLS)
    try:
        dtype = validation.check_features(image_features, text_features)
        validation.check_pairing(
            image_features, text_features, image_ids, text_ids, alternatives=_ALTERNATIVES
        )
        device = image_features.device
        validation.check_options("mean", workspace_bytes, backend, device, dtype)
    except (TypeError, ValueError):
        _report(group, image_features)
        raise
    return call(
        RETRIEVAL_RANKS, image_features.detach(), text_features.detach(), _int64(image_ids),
        _int64(text_ids),
        None if group is None else group.group_name, dtype, dist_impl, workspace_bytes, backend,
    )  # fmt: skip


class LogitStatistics(NamedTuple):
    """Mean and standard deviation of logits; () each, float32 (float64 for float64 features).

    The standard deviation is that of a population: the root of the mean squared deviation.
    """

    positive_mean: Tensor
    positive_std: Tensor
    mean: Tensor
    std: Tensor


def logit_statistics(
    image_features: Tensor,  # (M, D)
    text_features: Tensor,  # (N, D)
    logit_scale: float | Tensor,
    logit_bias: float | Tensor | None = None,
    *,
    image_ids: Tensor | None = None,  # (M,)
    text_ids: Tensor | None = None,  # (N,)
    group: dist.ProcessGroup | str | None = None,
) -> LogitStatistics:
    """Mean and standard deviation of the positives' logits and of all logits, in closed form.

    The logits are those of :func:`fused_siglip.siglip_loss`. They are never computed: sums and
    covariances of the features give the statistics in O((M + N) D^2), so that every step of a
    training can log them.

    Args:
        image_features: (M, D), float32, bfloat16, float16 or float64. Any strides.
        text_features: (N, D), of the same dtype and device, or cast by autocast.
        logit_scale: t, already exponentiated: a number or a tensor of one element, () or (1,).
        logit_bias: b, a number or a tensor of one element; None means 0.
        image_ids: (M,) integers, which say what is positive and what is padding, as for the loss.
        text_ids: (N,) integers. Give both kinds of ids or neither.
        group: the process group whose global batch the statistics are of. Every rank calls with its
            own rows and gets the same numbers, in its own t and b. With ids the texts travel to all
            ranks, as for the loss; without, only sums do.

    Returns:
        The four statistics, without gradient. Padding takes no part in either of them. Those of no
        pairs are NaN: of the positives where there is none, of all logits where a side is empty.
        float32 products are computed as torch's own (``torch.set_float32_matmul_precision``). With
        ids the host waits for a GPU, which has to say how many rows share an id; without ids it
        does not, in one process or in a group whose headers travel on the CPU.

    Raises:
        TypeError, ValueError: bad arguments, as for :func:`fused_siglip.siglip_loss`; in a group on
            every rank.
        RuntimeError: when a rank of the group is lost.
    """
    group = validation.check_group(group, None, agreement.DIST_IMPLS)
    try:
        dtype = validation.check_features(image_features, text_features)
        device = image_features.device
        validation.check_scalar("logit_scale", logit_scale, device, dtype)
        if logit_bias is None:
            logit_bias = 0.0
        validation.check_scalar("logit_bias", logit_bias, device, dtype)
        validation.check_pairing(
            image_features, text_features, image_ids, text_ids, alternatives=_ALTERNATIVES
        )
    except (TypeError, ValueError):
        _report(group, image_features)
        raise
    statistics = call(
        LOGIT_STATISTICS, image_features.detach(), text_features.detach(),
        *(scalars.as_tensor(v, dtype, device).detach() for v in (logit_scale, logit_bias)),
        _int64(image_ids), _int64(text_ids),
        None if group is None else group.group_name, dtype,
    )  # fmt: skip
    return LogitStatistics(*statistics.unbind())


def _report(group: dist.ProcessGroup | None, image_features: object) -> None:
    """Tell the other ranks that this one is about to raise."""
    if group is not None:
        device = image_features.device if isinstance(image_features, Tensor) else None
        agreement.report_bad_arguments(group, device)


def _int64(ids: Tensor | None) -> Tensor | None:
    return None if ids is None else ids.long()
