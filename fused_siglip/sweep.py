"""The sweep over panels: the loss and every gradient that is needed, in one pass."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .kernels import (
    GRAD_SCALE,
    Affine,
    Ids,
    Pairs,
    Panel,
    RandomMask,
    ScoreNormalizer,
    ScoreThreshold,
    aligned,
    aligned_vector,
    panel_class,
)
from .kernels.interface import ceil_div
from .kernels.registry import gpu
from .planner import PlanRequest, plan_panels
from .spec import NO_GRADS, Execution, GradMask

_PRODUCTS_AT_ONCE = 1 << 17  # in the cache of a core, with both operands


class GradBuffers(NamedTuple):
    """Where a sweep puts its gradients. What is None, nobody needs."""

    x: Tensor | None  # (M, D) accumulation dtype
    y: Tensor | None  # (N, D) likewise
    scalars: bool  # whether the sums of dlogits * s and dlogits are needed
    accumulate_x: bool = False  # the gradient is added to what x holds
    factor: float = 1.0  # multiplies the gradients of features, not the sums
    # Of pairs with weights: (M,) accumulation dtype, added to; and whether the sum is wanted.
    image_losses: Tensor | None = None
    loss: bool = True

    @property
    def mask(self) -> GradMask:
        return GradMask(self.x is not None, self.y is not None, self.scalars)

    def zero(self) -> None:
        """What a sweep over no pairs writes."""
        if self.x is not None and not self.accumulate_x:
            self.x.zero_()
        if self.y is not None:
            self.y.zero_()


def sweep(
    x: Tensor,  # (M, D) image features
    y: Tensor,  # (N, D) text features
    affine: Affine,
    pairs: Pairs,
    out: GradBuffers,
    run: Execution,
    selection: RandomMask | ScoreThreshold | None = None,  # None: all negatives take part
) -> Tensor:  # (3 or 1, k)
    """Sum the loss over all pairs, and its derivatives in s = X Y^T, scale and bias.

    Writes dlogits Y (which is dL/dX / t) times ``out.factor`` to ``out.x``, or adds it to what is
    there, and writes dlogits^T X (dL/dY / t) times the factor to ``out.y``. Returns the sums of
    softplus(u) and, with ``out.scalars``, of dlogits * s = dL/dt and dlogits = dL/db, each in parts
    that must still be added up: see :meth:`fused_siglip.kernels.Panel.finish`. Everything
    accumulates in float32 (float64 for float64 features). The factor t is left to the caller, who
    has an upstream scalar to multiply by anyway.

    Panels are visited and summed in a fixed order: the same inputs give the same bits.
    """
    wants_losses = out.image_losses is not None
    grid = _PanelGrid(x, y, pairs, out.mask, selection is not None, run, wants_losses)
    plan = grid.plan
    rows_of_sums = 3 if out.scalars else 1
    if x.shape[0] == 0 or y.shape[0] == 0:
        out.zero()
        return torch.zeros(rows_of_sums, 1, dtype=plan.accumulate_dtype, device=x.device)

    panel = grid.make_panel(out.loss)
    sums = None  # of a single panel: they need no adding up
    if len(grid) > 1:
        sums = torch.empty(len(grid), rows_of_sums, dtype=plan.accumulate_dtype, device=x.device)
    alpha = out.factor / GRAD_SCALE.get(plan.panel.dtype, 1.0)
    dscale = _ScaleGradient(x, y, out) if out.scalars and panel.dscale_from_products else None
    for k, block in enumerate(grid):
        part = None if sums is None else sums[k]
        selected = None if selection is None else selection.block(block.rows, block.cols)
        losses = None if out.image_losses is None else out.image_losses[block.rows]
        dlogits = panel(block.x, block.y, affine, block.pairs, part, selected, losses)
        if dlogits is None:
            continue
        if dscale is not None:
            dscale.before_products(block)
        _add_products(panel, block, dlogits, out, alpha)
        if dscale is not None:
            dscale.after_products(block)
    if dscale is not None:
        if sums is None:
            panel.totals[1] = dscale.total / out.factor
        else:
            sums[0, 1] = dscale.total / out.factor
    return panel.partials if sums is None else sums.T


def _add_products(
    panel: Panel,
    block: _Block,
    dlogits: Tensor,  # (m, n)
    out: GradBuffers,
    alpha: float,
) -> None:
    """What a panel contributes to the gradients of the features."""
    if out.x is not None:
        grad = _rows(out.x, block.rows)
        accumulate = block.cols.start > 0 or out.accumulate_x
        rhs = _without_padding(block.y, grad)
        panel.add_product(grad, dlogits, rhs, alpha, accumulate, False)
    if out.y is not None:
        grad = _rows(out.y, block.cols)
        rhs = _without_padding(block.x, grad)
        panel.add_product(grad, dlogits, rhs, alpha, block.rows.start > 0, True)


def count_negatives(
    x: Tensor,  # (M, D)
    y: Tensor,  # (N, D)
    pairs: Pairs,
    normalizer: ScoreNormalizer,
    prefix: Tensor | None,  # (M,) int32
    step: int,
    counts: Tensor,  # (M, 2**bits) int32, added to
    run: Execution,
) -> None:
    """Every image's negatives in a histogram: see :meth:`fused_siglip.kernels.Panel.count`.

    A light sweep: one product, nothing is written but the counts.
    """
    grid = _PanelGrid(x, y, pairs, NO_GRADS, True, run)
    if x.shape[0] == 0 or y.shape[0] == 0:
        return
    panel = grid.make_panel()
    for block in grid:
        in_block = None if prefix is None else prefix[block.rows]
        panel.count(
            block.x, block.y, block.pairs, normalizer.block(block.rows), in_block, step,
            counts[block.rows],
        )  # fmt: skip


class _Block(NamedTuple):
    """One panel of a sweep."""

    rows: slice
    cols: slice
    x: Tensor  # (m, operand_dim) as it enters the products
    y: Tensor  # (n, operand_dim) likewise
    pairs: Pairs


class _PanelGrid:
    """The panels of a sweep, row by row."""

    def __init__(
        self,
        x: Tensor,
        y: Tensor,
        pairs: Pairs,
        grads: GradMask,
        filters_negatives: bool,
        run: Execution,
        image_losses: bool = False,
    ):
        self.panel_class = panel_class(run.backend)
        align = self.panel_class.align
        self.x, self.y = x, y
        ids, weights = pairs.ids, pairs.weights
        if ids is not None:
            ids = Ids(aligned_vector(ids.images, align), aligned_vector(ids.texts, align))
        if weights is not None:
            weights = weights.aligned(align)
        self.pairs = Pairs(pairs.diagonal, ids, weights)
        self.copies = ids is not None or not (aligned(x, align) and aligned(y, align))
        self.plan = plan_panels(
            plan_request(x, y, grads, run)._replace(
                filters_negatives=filters_negatives, weighted=weights is not None,
                image_losses=image_losses, copies_operands=self.copies,
            )
        )  # fmt: skip

    def make_panel(self, losses: bool = True) -> Panel:
        """The memory and the functions of one panel, for all of them in turn."""
        spec = self.plan.panel if losses else self.plan.panel._replace(losses=False)
        return self.panel_class(spec, self.x.device)

    def __len__(self) -> int:
        m, n = self.x.shape[0], self.y.shape[0]
        panel = self.plan.panel
        return ceil_div(m, panel.rows) * ceil_div(n, panel.cols)

    def __iter__(self) -> Iterator[_Block]:
        m, n, plan = self.x.shape[0], self.y.shape[0], self.plan.panel
        image_ids, text_ids = self.pairs.ids or (None, None)
        for i in range(0, m, plan.rows):
            rows = slice(i, min(i + plan.rows, m))
            x = self._operand(self.x, image_ids, rows)
            for j in range(0, n, plan.cols):
                cols = slice(j, min(j + plan.cols, n))
                y = self._operand(self.y, text_ids, cols)
                yield _Block(rows, cols, x, y, self.pairs.block(rows, cols))

    def _operand(self, features: Tensor, ids: Tensor | None, rows: slice) -> Tensor:
        """Some rows as they enter the products.

        A copy has zeros beyond D, where the backend wants more features, and in padded rows: these
        may hold anything, and 0 * NaN would reach the gradients.
        """
        features, dtype = _rows(features, rows), self.plan.panel.dtype
        if not self.copies:
            if features.dtype != dtype:
                features = features.to(dtype)
            return features
        m, d = features.shape
        copy = features.new_empty(m, self.plan.operand_dim, dtype=dtype)
        copy[:, :d] = features
        copy[:, d:] = 0
        if ids is not None:
            copy.masked_fill_(ids[rows, None] < 0, 0)
        return copy


class _ScaleGradient:
    """The sum of dlogits * s from the products: <X, dlogits Y> or <Y, dlogits^T X>.

    On a CPU that is a pass over the features instead of one over the pairs. It is taken of rows, or
    columns, once their product is complete.
    """

    def __init__(self, x: Tensor, y: Tensor, out: GradBuffers):
        self.x, self.y, self.accumulate_x = x, y, out.accumulate_x
        # The sum comes from one of the gradients: from one without the part of an earlier sweep, if
        # there is one.
        from_text = out.y is not None and (out.x is None or out.accumulate_x)
        self.grad_x = None if from_text else out.x
        self.grad_y = out.y if from_text else None
        self.total = 0.0

    def before_products(self, block: _Block) -> None:
        """What earlier sweeps have added to the gradient is not this sweep's."""
        if self.accumulate_x and self.grad_x is not None and block.cols.start == 0:
            self.total -= inner_product(block.x, self.grad_x[block.rows])

    def after_products(self, block: _Block) -> None:
        if self.grad_y is not None and block.rows.stop == self.x.shape[0]:
            self.total += inner_product(block.y, self.grad_y[block.cols])
        if self.grad_x is not None and block.cols.stop == self.y.shape[0]:
            self.total += inner_product(block.x, self.grad_x[block.rows])


def _rows(tensor: Tensor, rows: slice) -> Tensor:
    """Some rows; the tensor itself where that is all of them."""
    return tensor if rows.stop - rows.start == tensor.shape[0] else tensor[rows]


def _without_padding(operand: Tensor, grad: Tensor) -> Tensor:
    """An operand without the zeros beyond D that a panel may want."""
    d = grad.shape[1]
    return operand if operand.shape[1] == d else operand[:, :d]


def inner_product(features: Tensor, grad: Tensor) -> float:  # (m, D or more), (m, D), on a CPU
    """Summed pairwise, as torch.dot does not; a few rows at a time, which stay in the cache."""
    m, d = grad.shape
    rows = _PRODUCTS_AT_ONCE // max(d, 1) + 1
    if m <= rows:
        return (features[:, :d] * grad).sum().item()
    starts = range(0, m, rows)
    return sum((features[i : i + rows, :d] * grad[i : i + rows]).sum().item() for i in starts)


def plan_request(x: Tensor, y: Tensor, grads: GradMask, run: Execution) -> PlanRequest:
    """What to plan panels for, but for weights, selections, losses of images and copies."""
    return PlanRequest(
        x.shape[0], y.shape[0], x.shape[1], x.dtype, x.device.type, run.backend, grads,
        multiprocessors=gpu(x.device).multiprocessors if x.is_cuda else None,
        workspace_bytes=run.workspace_bytes,
    )  # fmt: skip
