"""The public function: what goes in, what is checked, what comes back."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from . import scalars, validation
from .distributed import agreement
from .negatives import Negatives, choice_of
from .operator import call_operator
from .positives import Positives, choice_of_positives
from .rows import RowData
from .settled import Inputs
from .spec import NO_GRADS, LossSpec


def siglip_loss(  # noqa: PLR0913, the package's one call
    image_features: Tensor,  # (M, D)
    text_features: Tensor,  # (N, D)
    logit_scale: float | Tensor,
    logit_bias: float | Tensor | None = None,
    *,
    image_ids: Tensor | None = None,  # (M,)
    text_ids: Tensor | None = None,  # (N,)
    negative_only: bool = False,
    negatives: Negatives | None = None,
    image_weights: Tensor | None = None,  # (M,)
    text_weights: Tensor | None = None,  # (N,)
    positives: Positives | None = None,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
    group: dist.ProcessGroup | str | None = None,
    dist_impl: str | None = None,
    workspace_bytes: int | None = None,
    backend: str | None = None,
) -> Tensor:  # (), or (M,)
    """Sigmoid contrastive loss of image and text features, without the matrix of logits.

        L = -1/R * sum over i, j of log sigmoid(l_ij * (t * <x_i, y_j> + b))

    with l_ij = 1 for a positive pair and -1 for a negative one, summed over texts and averaged over
    images (algorithm 1 of https://arxiv.org/abs/2303.15343). One sweep over bounded panels of the
    pair matrix computes the loss and every gradient that is needed; backward only multiplies by the
    upstream gradient.

    Pairs may count differently, and have other targets than 1 and 0 (docs/weights.md):

        L = 1/R * sum over i, j of v_ij * (softplus(z_ij) - y_ij * z_ij),  z_ij = t * <x_i, y_j> + b

    with v_ij = image_weights[i] * text_weights[j], times the weight of a positive pair, and y_ij
    its target.

    Args:
        image_features: (M, D), L2-normalized, which is not checked; float32, bfloat16, float16, or
            float64 (torch backend). Any strides.
        text_features: (N, D), of the same dtype and device. Under autocast both are cast as
            ``torch.matmul`` casts its operands, so float32 and bfloat16 may meet there.
        logit_scale: t, already exponentiated: a number or a tensor of one element, () or (1,).
        logit_bias: b, a number or a tensor of one element; None means 0.
        image_ids: (M,) integers. With ids, every pair with ``image_ids[i] == text_ids[j]`` is
            positive, and M may differ from N; without, pair (i, i) is, and M must equal N. A row
            with a negative id is padding: it takes no part, whatever its features hold.
        text_ids: (N,) integers. Give both kinds of ids or neither.
        negative_only: no pair is positive, as in a block of another device's texts.
        negatives: which negative pairs take part: None for all, ``Random(keep, seed)``,
            ``Hardest(keep)`` or ``Easiest(keep)`` for a share of them, or ``Below(margin)`` for
            those that are not far more similar than the image's positive. Positive pairs always
            take part. The divisor stays M: what is left out counts as loss 0. Hardest and Easiest
            take the share of every image's negatives and need further sweeps of one product each.
            The choice itself has no gradient.
        image_weights: (M,) floating, finite and at least 0: all pairs of image i count
            image_weights[i]. None means 1. They have no gradient, and the divisor stays M, as with
            the weights of ``torch.nn.BCEWithLogitsLoss``. On a GPU their values are not looked at.
        text_weights: (N,), likewise of texts. In a group all ranks give them, or none does.
        positives: how much a positive pair counts, ``PositiveWeight(...)``, or which target it has,
            ``PositiveTarget(...)``: also by how many positives its image and text have in the
            global batch. None means 1.
        label_smoothing: e, 0 to 1: targets are (1 - e) * y + e / N, where N is the number of texts
            in the global batch, without padding.
        reduction: "mean" divides by M, the number of images (without padding); "sum" does not.
            "none" returns the loss of each image, summed over texts: one product forward, and
            three in backward, which takes any upstream vector (8*M*N*D FLOPs in all).
        group: the process group whose global batch the loss is of. "world" means all ranks: the
            default group, looked up now, or this process where there is none. None means this
            process's own batch. Every rank calls with its own rows (their number may differ, also
            0), and the mean of the returned losses over the ranks is the loss of the global batch,
            so that DDP's averaging gives exact gradients. The upstream gradient must be the same on
            every rank, and so must t and b (docs/distributed.md). With "none" each rank gets the
            losses of its own images, for an upstream vector of its own; backward is an exchange
            too, and every rank must call it.
        dist_impl: "ring" (texts and their gradients travel; memory does not grow with the number of
            ranks), "gather" (texts are collected; this has the fewest launches), or None, which
            gathers while that stays small and uses the ring otherwise. open_clip's "bidir", "shift"
            and "reduce" are accepted and give the same numbers. Given without ``group``, it means
            the default group.
        workspace_bytes: upper bound of the panel workspace; None lets the planner choose.
        backend: "torch" (any device), "triton" (CUDA, ROCm), or None, which takes triton on a GPU
            where it can run (not in float64, not below compute capability 8.0) and torch otherwise.

    Returns:
        A float32 scalar (float64 for float64 features), 0 for an empty batch; with "none" (M,), 0
        for padding. Logits and sums are float32 (float64) throughout; float32 products are computed
        as torch's own (``torch.set_float32_matmul_precision``, ``torch.backends``). Gradients
        arrive in the dtype and shape of their inputs, accumulated in float32 (float64). NaN and Inf
        pass through as in torch. First derivatives are exact under torch.func.grad, vjp, jacrev and
        vmap, in torch.compile and after torch.export (docs/transforms.md).

    Raises:
        TypeError: an argument of the wrong type or dtype, a DTensor, or features of two dtypes
            outside autocast.
        ValueError: shapes, devices or sizes that do not fit each other, an unknown option, a
            workspace too small for one tile, or a backend that cannot run here.
            On every rank, also when the arguments of another rank are refused or do not agree.
        RuntimeError: on second derivatives, forward-mode differentiation (torch.func.jvp, jacfwd,
            hessian, dual tensors) and torch.vmap with ``group``, which are not supported; when a
            rank of the group is lost (gloo. With NCCL a wait returns at once and its watchdog ends
            the process at the group's timeout: docs/distributed.md has what helps).
    """
    group = validation.check_group(group, dist_impl, agreement.DIST_IMPLS)
    try:
        dtype = validation.check_features(image_features, text_features)
        device = image_features.device
        validation.check_scalar("logit_scale", logit_scale, device, dtype)
        if logit_bias is None:
            logit_bias = 0.0
        validation.check_scalar("logit_bias", logit_bias, device, dtype)
        validation.check_pairing(image_features, text_features, image_ids, text_ids, negative_only)
        validation.check_negatives(negatives, negative_only)
        validation.check_row_weights("image_weights", image_weights, image_features)
        validation.check_row_weights("text_weights", text_weights, text_features)
        validation.check_positives(positives)
        validation.check_aligned(positives, image_features, text_features)
        validation.check_label_smoothing(label_smoothing)
        validation.check_options(reduction, workspace_bytes, backend, device, dtype)
    except (TypeError, ValueError):
        if group is not None:
            device = image_features.device if isinstance(image_features, Tensor) else None
            agreement.report_bad_arguments(group, device)
        raise

    scale = scalars.as_tensor(logit_scale, dtype, device)
    bias = scalars.as_tensor(logit_bias, dtype, device)
    if image_ids is not None and text_ids is not None:
        image_ids, text_ids = image_ids.long(), text_ids.long()
        if negative_only:
            image_ids, text_ids = _never_equal(image_ids, text_ids)
    rows = RowData(image_ids, text_ids, _detached(image_weights), _detached(text_weights))
    spec = LossSpec(
        grads=NO_GRADS,  # operator.py fills in what requires grad
        negative_only=negative_only,
        negatives=choice_of(negatives),
        positives=choice_of_positives(positives),
        label_smoothing=float(label_smoothing),
        reduction=reduction,
        backend=backend,
        workspace_bytes=workspace_bytes,
        group_name=None if group is None else group.group_name,
        dist_impl=dist_impl,
        dtype=dtype,
    )
    inputs = Inputs(image_features, text_features, scale, bias)
    if reduction == "none":
        return call_operator("image_losses", inputs, rows, spec)
    loss, *_ = call_operator("loss_and_grads", inputs, rows, spec)
    return loss


def _detached(weights: Tensor | None) -> Tensor | None:
    return weights.detach() if weights is not None and weights.requires_grad else weights


def _never_equal(image_ids: Tensor, text_ids: Tensor) -> tuple[Tensor, Tensor]:
    """Ids that keep the padding and make no pair positive."""
    return (image_ids.clamp(-1, 0), torch.where(text_ids < 0, -1, 1))
