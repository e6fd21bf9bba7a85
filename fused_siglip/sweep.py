"""The sweep over panels: the loss and every gradient that is needed, in one pass."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .kernels import (
    GRAD_SCALE,
    Pairs,
    Panel,
    RandomMask,
    ScoreThreshold,
    aligned,
    aligned_ids,
    panel_class,
)
from .negatives import ROWS_AT_ONCE, score_normalizer, search_thresholds, text_center_radius
from .planner import PanelPlan, plan_panels

_PRODUCTS_AT_ONCE = 1 << 17  # in the cache of a core, with both operands


class Needs(NamedTuple):
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
    factor: float = 1.0,
    kept: RandomMask | ScoreThreshold | None = None,
) -> Tensor:  # (3 or 1, k)
    """Sum the loss over all pairs, and its derivatives in s = X Y^T, t and b.

    With g = dL/dz, writes g Y (which is dL/dX / t) times ``factor`` to ``grad_x``, or adds it to
    what is there, and writes g^T X (dL/dY / t) times ``factor`` to ``grad_y``; None where nobody
    needs it. Returns the sums of
    softplus(u) and, with ``scalar_grads``, of g*s = dL/dt and g = dL/db, each in parts that are
    still to be added up: see :meth:`fused_siglip.kernels.Panel.finish`. Everything accumulates in
    fp32 (float64 for float64 features). The factor t is left to the caller, who has an upstream
    scalar to multiply by anyway.

    Without ids, pair (i, i + diagonal) is positive; None: no pair is. ``kept`` says, for all M
    images (and N texts), which negatives take part; None: all.
    Panels are visited and summed in a fixed order: the same inputs give the same bits.
    """
    needs = Needs(grad_x is not None, grad_y is not None, scalar_grads)
    panels = _Panels(
        x, y, image_ids, text_ids, diagonal, needs, kept is not None, workspace_bytes, backend
    )
    plan = panels.plan
    rows_of_sums = 3 if scalar_grads else 1
    if x.shape[0] == 0 or y.shape[0] == 0:
        if grad_x is not None and not add_to_grad_x:
            grad_x.zero_()
        if grad_y is not None:
            grad_y.zero_()
        return torch.zeros(rows_of_sums, 1, dtype=plan.accumulate_dtype, device=x.device)

    panel = panels.workspace()
    sums = None  # of a single panel: they need no adding up
    if len(panels) > 1:
        sums = torch.empty(len(panels), rows_of_sums, dtype=plan.accumulate_dtype, device=x.device)
    alpha = factor / GRAD_SCALE.get(plan.operand_dtype, 1.0)
    d = None if plan.operand_dim == x.shape[1] else x.shape[1]
    from_products = scalar_grads and panel.gs_from_products
    from_text = from_products and grad_y is not None and (grad_x is None or add_to_grad_x)
    gs_sum = 0.0
    for k, (rows, cols, x_rows, y_cols, positives) in enumerate(panels):
        part = None if sums is None else sums[k]
        in_panel = None if kept is None else kept.block(rows, cols)
        g = panel(x_rows, y_cols, logit_scale, logit_bias, positives, part, in_panel)
        if from_products and add_to_grad_x and not from_text and cols.start == 0:
            gs_sum -= _inner_product(x_rows, grad_x[rows])
        if grad_x is not None:
            fresh = cols.start == 0 and not add_to_grad_x
            other = y_cols if d is None else y_cols[:, :d]
            panel.add_product(_block(grad_x, rows), g, other, alpha, fresh, transposed=False)
        if grad_y is not None:
            fresh = rows.start == 0
            other = x_rows if d is None else x_rows[:, :d]
            panel.add_product(_block(grad_y, cols), g, other, alpha, fresh, transposed=True)
        # sum g*s = <X, g Y> = <Y, g^T X>, of rows or columns that are complete
        if from_text:
            if rows.stop == x.shape[0]:
                gs_sum += _inner_product(y_cols, grad_y[cols])
        elif from_products and cols.stop == y.shape[0]:
            gs_sum += _inner_product(x_rows, grad_x[rows])
    if from_products:
        if sums is None:
            panel.totals[1] = gs_sum / factor
        else:
            sums[0, 1] = gs_sum / factor
    return panel.partials if sums is None else sums.T


def count_negatives(
    x: Tensor,  # (M, D)
    y: Tensor,  # (N, D)
    image_ids: Tensor | None,  # (M,) int64
    text_ids: Tensor | None,  # (N,) int64
    diagonal: int | None,
    centres: Tensor,  # (M,) of ScoreThreshold
    factors: Tensor,  # (M,) likewise
    known: Tensor | None,  # (M,) int32
    step: int,
    *,
    workspace_bytes: int | None,
    backend: str,
) -> Tensor:  # (M, 2**bits) int32
    """Every image's negatives in a histogram: see :meth:`fused_siglip.kernels.Panel.count`.

    A light sweep: one product, nothing is written but the counts.
    """
    bits = panel_class(backend).count_bits[step]
    counts = x.new_zeros(len(x), 2**bits, dtype=torch.int32)
    needs = Needs(image=False, text=False, scalars=False)
    panels = _Panels(x, y, image_ids, text_ids, diagonal, needs, True, workspace_bytes, backend)
    if x.shape[0] == 0 or y.shape[0] == 0:
        return counts
    panel = panels.workspace()
    for rows, _, x_rows, y_cols, positives in panels:
        chosen = None if known is None else known[rows]
        units = centres[rows], factors[rows]
        panel.count(x_rows, y_cols, positives, *units, chosen, step, counts[rows])
    return counts


def find_thresholds(
    x: Tensor,  # (M, D)
    y: Tensor,  # (N, D)
    logit_scale: Tensor,  # ()
    image_ids: Tensor | None,  # (M,)
    text_ids: Tensor | None,  # (N,)
    diagonal: int | None,
    kind: str,
    keep: float,
    *,
    workspace_bytes: int | None,
    backend: str,
) -> ScoreThreshold:
    """Each image's threshold for the hardest or easiest share of its negatives, in a few sweeps."""
    text_range = text_center_radius(y, text_ids, logit_scale.dtype)
    centres, factors = score_normalizer(x, text_range, logit_scale, kind)
    least = torch.empty_like(factors)
    steps = panel_class(backend).count_bits
    for start in range(0, x.shape[0], ROWS_AT_ONCE):
        rows = slice(start, start + ROWS_AT_ONCE)

        def count(known: Tensor | None, step: int, rows: slice = rows) -> Tensor:
            return count_negatives(
                x[rows],
                y,
                None if image_ids is None else image_ids[rows],
                text_ids,
                None if diagonal is None else diagonal + rows.start,
                centres[rows],
                factors[rows],
                known,
                step,
                workspace_bytes=workspace_bytes,
                backend=backend,
            )

        least[rows] = search_thresholds(keep, least.dtype, steps, count)
    return ScoreThreshold(centres, factors, least)


class _Panels:
    """The panels of a sweep, row by row: slices of images and texts, operands, positives."""

    def __init__(
        self,
        x: Tensor,
        y: Tensor,
        image_ids: Tensor | None,
        text_ids: Tensor | None,
        diagonal: int | None,
        needs: Needs,
        filters_negatives: bool,
        workspace_bytes: int | None,
        backend: str,
    ):
        self.panel_class = panel_class(backend)
        align = self.panel_class.align
        self.x, self.y = x, y
        self.image_ids, self.text_ids = aligned_ids(image_ids, align), aligned_ids(text_ids, align)
        self.diagonal, self.needs, self.filters_negatives = diagonal, needs, filters_negatives
        self.copies = image_ids is not None or not (aligned(x, align) and aligned(y, align))
        self.plan = plan_panels(
            x.shape[0],
            y.shape[0],
            x.shape[1],
            x.dtype,
            x.device.type,
            backend,
            need_image_grad=needs.image,
            need_text_grad=needs.text,
            need_scalar_grads=needs.scalars,
            filters_negatives=filters_negatives,
            copies_operands=self.copies,
            multiprocessors=_multiprocessors(x.device),
            workspace_bytes=workspace_bytes,
        )

    def workspace(self) -> Panel:
        plan, needs = self.plan, self.needs
        panel = self.panel_class(
            plan.rows,
            plan.cols,
            plan.operand_dtype,
            self.x.device,
            needs.image or needs.text,
            needs.scalars,
            self.filters_negatives,
        )
        if panel.gs_from_products and self.y.shape[0] <= self.x.shape[1]:
            panel.gs_from_products = False  # a pass over the pairs is the shorter one
        return panel

    def __len__(self) -> int:
        m, n = self.x.shape[0], self.y.shape[0]
        return -(-m // self.plan.rows) * -(-n // self.plan.cols)

    def __iter__(self) -> Iterator[tuple[slice, slice, Tensor, Tensor, Pairs]]:
        m, n, plan = self.x.shape[0], self.y.shape[0], self.plan
        for i in range(0, m, plan.rows):
            rows = slice(i, min(i + plan.rows, m))
            x_rows, x_ids = _operand(self.x, self.image_ids, rows, plan, self.copies)
            for j in range(0, n, plan.cols):
                cols = slice(j, min(j + plan.cols, n))
                y_cols, y_ids = _operand(self.y, self.text_ids, cols, plan, self.copies)
                in_panel = None if self.diagonal is None else self.diagonal + i - j
                yield rows, cols, x_rows, y_cols, Pairs(in_panel, x_ids, y_ids)


def _block(tensor: Tensor, part: slice) -> Tensor:
    """Some rows; the tensor itself where that is all of them."""
    return tensor if part.stop - part.start == tensor.shape[0] else tensor[part]


def _inner_product(features: Tensor, grad: Tensor) -> float:  # (m, D or more), (m, D), on a CPU
    """Summed pairwise, as torch.dot does not; a few rows at a time, which stay in the cache."""
    m, d = grad.shape
    rows = _PRODUCTS_AT_ONCE // max(d, 1) + 1
    if m <= rows:
        return (features[:, :d] * grad).sum().item()
    starts = range(0, m, rows)
    return sum((features[i : i + rows, :d] * grad[i : i + rows]).sum().item() for i in starts)


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
    features = _block(features, part)
    ids = None if ids is None else _block(ids, part)
    if not copies:
        if features.dtype != plan.operand_dtype:
            features = features.to(plan.operand_dtype)
        return features, ids
    m, d = features.shape
    copy = features.new_empty(m, plan.operand_dim, dtype=plan.operand_dtype)
    copy[:, :d] = features
    copy[:, d:] = 0
    if ids is not None:
        copy.masked_fill_(ids[:, None] < 0, 0)
    return copy, ids
