"""The autograd Function around the sweep, and the sweep as a torch operator."""

from __future__ import annotations

import torch
from torch import Tensor

from .engine import Needs, sweep


# An operator, so that torch.compile takes the sweep as one node instead of breaking its graph.
@torch.library.custom_op("fused_siglip::sweep", mutates_args=())
def sweep_op(
    x: Tensor,
    y: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor,
    image_ids: Tensor | None,
    text_ids: Tensor | None,
    diagonal: bool,
    need_image_grad: bool,
    need_text_grad: bool,
    need_scalar_grads: bool,
    workspace_bytes: int | None,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    # the dtypes are settled: autocast must not round the products inside once more
    with torch.autocast(x.device.type, enabled=False):
        return sweep(
            x,
            y,
            logit_scale,
            logit_bias,
            image_ids,
            text_ids,
            diagonal,
            Needs(need_image_grad, need_text_grad, need_scalar_grads),
            workspace_bytes,
            backend,
        )


@sweep_op.register_fake
def _(
    x,
    y,
    logit_scale,
    logit_bias,
    image_ids,
    text_ids,
    diagonal,
    need_image_grad,
    need_text_grad,
    need_scalar_grads,
    workspace_bytes,
    backend,
):
    acc = torch.promote_types(x.dtype, torch.float32)
    return (
        x.new_empty(3, dtype=acc),
        x.new_empty(x.shape if need_image_grad else 0, dtype=acc),
        y.new_empty(y.shape if need_text_grad else 0, dtype=acc),
    )


class SigLipFunction(torch.autograd.Function):
    """Sum of the loss over all pairs. The gradients are computed with it, in the forward pass;
    backward multiplies them by the upstream scalar."""

    @staticmethod
    def forward(
        ctx,
        x: Tensor,  # (M, D)
        y: Tensor,  # (N, D)
        logit_scale: Tensor,  # one element
        logit_bias: Tensor,  # one element
        image_ids: Tensor | None,  # (M,)
        text_ids: Tensor | None,  # (N,)
        diagonal: bool,
        dtype: torch.dtype,  # of the products' operands: x's and y's own, or autocast's
        needs: Needs,
        workspace_bytes: int | None,
        backend: str,
    ) -> Tensor:  # ()
        acc = torch.promote_types(dtype, torch.float32)
        sums, grad_x, grad_y = sweep_op(
            x.to(dtype),
            y.to(dtype),
            logit_scale.to(acc).reshape(()),
            logit_bias.to(acc).reshape(()),
            image_ids,
            text_ids,
            diagonal,
            needs.image,
            needs.text,
            needs.scalars,
            workspace_bytes,
            backend,
        )
        ctx.save_for_backward(sums, grad_x, grad_y, logit_scale)
        ctx.needs = needs
        ctx.like = [(t.shape, t.dtype) for t in (x, y, logit_scale, logit_bias)]
        return sums[0]

    @staticmethod
    def backward(ctx, upstream: Tensor):  # ()
        sums, grad_x, grad_y, logit_scale = ctx.saved_tensors
        factor = upstream * logit_scale.to(sums.dtype).reshape(())
        (_, x_dtype), (_, y_dtype), *scalars_like = ctx.like
        grads = [
            _multiply(grad_x, factor, x_dtype) if ctx.needs.image else None,
            _multiply(grad_y, factor, y_dtype) if ctx.needs.text else None,
        ]
        for total, (shape, dtype) in zip(sums[1:].unbind(), scalars_like, strict=True):
            grads.append((upstream * total).reshape(shape).to(dtype) if ctx.needs.scalars else None)
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # create_graph=True
            trap = torch.empty(0, requires_grad=True)
            grads = [g if g is None else _NoDoubleBackward.apply(g, trap) for g in grads]
        return (*grads, *[None] * 7)


class _NoDoubleBackward(torch.autograd.Function):
    """A gradient that raises when it is differentiated, instead of passing for a constant."""

    @staticmethod
    def forward(ctx, grad: Tensor, trap: Tensor) -> Tensor:
        return grad.view_as(grad)

    @staticmethod
    def backward(ctx, _):
        raise RuntimeError(
            "siglip_loss does not support double backward: its gradients are computed with the "
            "loss and cannot be differentiated again"
        )


def _multiply(saved: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """saved * factor in ``dtype``, in the saved tensor's own memory when nothing can read it again.

    That is so when this very backward frees the graph. With retain_graph or create_graph, and in
    torch.compile (which plans memory itself), the saved tensor stays as it is.
    """
    if dtype == saved.dtype and not torch.compiler.is_compiling() and not _graph_is_kept():
        return saved.mul_(factor)
    return saved.mul(factor).to(dtype)


def _graph_is_kept() -> bool:
    # what torch's compiled backward asks before it reuses saved memory (donated buffers)
    return torch._C._autograd._get_current_graph_task_keep_graph()
