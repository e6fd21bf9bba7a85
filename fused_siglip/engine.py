"""The sweep over panels: the loss and every gradient that is needed, in one pass."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .kernels import GRAD_SCALE, Positives, aligned, multiplies_half_into_fp32, panel_class
from .plan import PanelPlan, plan_panels


@dataclass(frozen=True)
class Needs:
    """Which gradients are computed. One that nobody needs costs nothing."""

    image: bool  # dX: 2*M*N*D FLOPs
    text: bool  # dY: 2*M*N*D FLOPs
    scalars: bool  # dt and db


def sweep(
    x: Tensor,  # (M, D) image features
    y: Tensor,  # (N, D) text features
    logit_scale: Tensor,  # () accumulation dtype
    logit_bias: Tensor,  # () likewise
    image_ids: Tensor | None,  # (M,) int64
    text_ids: Tensor | None,  # (N,) int64
    diagonal: int | None,
    grad_x: Tensor | None,  # (M, D) accumulation dtype
    grad_y: Tensor | None,  # (N, D) likewise
    *,
    scalar_grads: bool,
    workspace_bytes: int | None,
    backend: str,
    add_to_grad_x: bool = False,
) -> Tensor:  # (3,)
    """Sum the loss over all pairs, and its derivatives in s = X Y^T, t and b.

    With g = dL/dz, writes g Y (which is dL/dX / t) to ``grad_x``, or adds it to what is there, and
    writes g^T X (dL/dY / t) to ``grad_y``; None where nobody needs it. Returns the sums of
    softplus(u), g*s = dL/dt and g = dL/db, the last two 0 without ``scalar_grads``. Everything
    accumulates in fp32 (float64 for float64 features). The factor t is left to the caller, who has
    an upstream scalar to multiply by anyway.

    Without ids, pair (i, i + diagonal) is positive; None: no pair is.
    Panels are visited and summed in a fixed order: the same inputs give the same bits.
    """
    m, d = x.shape
    n = y.shape[0]
    panel_type = panel_class(backend)
    copies = image_ids is not None or not (
        aligned(x, panel_type.align) and aligned(y, panel_type.align)
    )
    plan = plan_panels(
        m,
        n,
        d,
        x.dtype,
        x.device.type,
        backend,
        need_image_grad=grad_x is not None,
        need_text_grad=grad_y is not None,
        need_scalar_grads=scalar_grads,
        copies_operands=copies,
        multiprocessors=_multiprocessors(x.device),
        workspace_bytes=workspace_bytes,
    )
    if m == 0 or n == 0:
        if grad_x is not None and not add_to_grad_x:
            grad_x.zero_()
        if grad_y is not None:
            grad_y.zero_()
        return torch.zeros(3, dtype=plan.accumulate_dtype, device=x.device)

    write_g = grad_x is not None or grad_y is not None
    panel = panel_type(plan.rows, plan.cols, plan.operand_dtype, x.device, write_g, scalar_grads)
    row_starts, col_starts = range(0, m, plan.rows), range(0, n, plan.cols)
    sums = torch.zeros(
        len(row_starts), len(col_starts), 3, dtype=plan.accumulate_dtype, device=x.device
    )
    alpha = 1.0 / GRAD_SCALE.get(plan.operand_dtype, 1.0)

    for a, i in enumerate(row_starts):
        rows = slice(i, min(i + plan.rows, m))
        x_rows, x_ids = _operand(x, image_ids, rows, plan, copies)
        for b, j in enumerate(col_starts):
            cols = slice(j, min(j + plan.cols, n))
            y_cols, y_ids = _operand(y, text_ids, cols, plan, copies)
            in_panel = None if diagonal is None else diagonal + i - j
            positives = Positives(in_panel, x_ids, y_ids)
            g = panel(x_rows, y_cols, logit_scale, logit_bias, positives, sums[a, b])
            if grad_x is not None:
                _add_product(
                    grad_x[rows], g, y_cols[:, :d], alpha, fresh=j == 0 and not add_to_grad_x
                )
            if grad_y is not None:
                _add_product(grad_y[cols], g.T, x_rows[:, :d], alpha, fresh=i == 0)
    return sums.sum((0, 1))


def _multiprocessors(device: torch.device) -> int | None:
    if device.type != "cuda":
        return None
    return torch.cuda.get_device_properties(device).multi_processor_count  # cached by torch


def _operand(
    features: Tensor, ids: Tensor | None, part: slice, plan: PanelPlan, copies: bool
) -> tuple[Tensor, Tensor | None]:
    """A panel's rows (or columns) as they enter the products, and their ids.

    A copy has zeros beyond D, where the backend wants more features, and in padded rows: these may
    hold anything, and 0 * NaN would reach the gradients.
    """
    features = features[part]
    ids = None if ids is None else ids[part]
    if not copies:
        return features.to(plan.operand_dtype), ids
    m, d = features.shape
    copy = features.new_empty(m, plan.operand_dim, dtype=plan.operand_dtype)
    copy[:, :d] = features
    copy[:, d:] = 0
    if ids is not None:
        copy.masked_fill_(ids[:, None] < 0, 0)
    return copy, ids


def _add_product(out: Tensor, a: Tensor, b: Tensor, alpha: float, fresh: bool) -> None:
    """out = alpha * a @ b, added to what is there unless ``fresh``; accumulated in out's dtype."""
    beta = 0 if fresh else 1
    if a.dtype != out.dtype and multiplies_half_into_fp32(out.device.type):
        torch.addmm(out, a, b, out_dtype=out.dtype, beta=beta, alpha=alpha, out=out)
    else:
        torch.addmm(out, a.to(out.dtype), b.to(out.dtype), beta=beta, alpha=alpha, out=out)
