"""The loss of one panel: one process, all pairs alike, a batch that a panel holds.

compute.py and sweep.py prepare for exchanges, weights, selected negatives and many panels. A step
on a small batch takes as long as the host needs for it, and a fifth of that would go into these
preparations (docs/performance-log.md). So here are the same calls of the same panel without them.
"""

from __future__ import annotations

from torch import Tensor

from .kernels import GRAD_SCALE, Pairs, aligned, panel_class
from .planner import plan_panels
from .rows import RowData, is_weighted
from .settled import Settled, known_factor
from .spec import LossSpec
from .sweep import inner_product, plan_request


def single_panel(
    call: Settled, rows: RowData, spec: LossSpec
) -> tuple[Tensor, Tensor, Tensor, Tensor] | None:  # (), (3,), (M, D), (N, D)
    """What fused_siglip.compute.loss_and_grads returns; None where there is more to do."""
    if spec.group_name is not None or rows.image_ids is not None:
        return None
    if spec.negatives.kind is not None or is_weighted(rows, spec):
        return None
    x, y, affine, run = call
    backend, grads = panel_class(run.backend), spec.grads
    if not (aligned(x, backend.align) and aligned(y, backend.align)):
        return None
    plan, m, n = plan_panels(plan_request(x, y, grads, run)), x.shape[0], y.shape[0]
    if not (0 < m <= plan.panel.rows and 0 < n <= plan.panel.cols and plan.panel.dtype == x.dtype):
        return None

    panel = backend(plan.panel, x.device)
    dlogits = panel(x, y, affine, Pairs(None if spec.negative_only else 0), None)
    divisor = m if spec.reduction == "mean" else 1
    factor = known_factor(call, divisor)
    alpha, acc = factor / GRAD_SCALE.get(x.dtype, 1.0), plan.accumulate_dtype

    def gradient(features: Tensor, rhs: Tensor, transposed: bool) -> Tensor:
        grad = features.new_empty(*features.shape, dtype=acc)
        assert dlogits is not None  # a gradient is needed
        panel.add_product(grad, dlogits, rhs, alpha, False, transposed)
        return grad

    grad_x = gradient(x, y, False) if grads.image else x.new_empty(0, dtype=acc)
    grad_y = gradient(y, x, True) if grads.text else x.new_empty(0, dtype=acc)
    if grads.scalars and panel.dscale_from_products:
        operand, product = (x, grad_x) if grads.image else (y, grad_y)
        panel.totals[1] = inner_product(operand, product) / factor
    sums = panel.totals or panel.partials
    return *panel.finish(sums, affine.scale, divisor, factor), grad_x, grad_y
