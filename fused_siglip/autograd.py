"""The autograd Function around the sweep, and the sweep as a torch operator."""

from __future__ import annotations

import torch
from torch import Tensor

from . import distributed
from .engine import Needs, find_thresholds, sweep
from .kernels import RandomPairs, default_backend
from .negatives import hash_bound, image_keys, text_keys

# Whether the running backward keeps its graph: what torch's compiled backward asks before it reuses
# saved memory (donated buffers). Should torch drop it, gradients are copied instead.
_graph_is_kept = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", lambda: True)

# An operator, so that torch.compile takes the sweep as one node instead of breaking its graph.
# Besides the sums and the two gradients of sweep() it returns, with a group, this rank's divisor of
# the sum. What is not needed has no elements.
torch.library.define(
    "fused_siglip::sweep",
    "(Tensor x, Tensor y, Tensor logit_scale, Tensor logit_bias, Tensor? image_ids, "
    "Tensor? text_ids, bool negative_only, bool need_image_grad, bool need_text_grad, "
    "bool need_scalar_grads, int? workspace_bytes, str? backend, str? group_name, str? dist_impl, "
    "str reduction, str? negatives, float keep, SymInt seed) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
)


@torch.library.impl("fused_siglip::sweep", "default")
def _sweep(
    x,
    y,
    logit_scale,
    logit_bias,
    image_ids,
    text_ids,
    negative_only,
    need_image_grad,
    need_text_grad,
    need_scalar_grads,
    workspace_bytes,
    backend,
    group_name,
    dist_impl,
    reduction,
    negatives,
    keep,
    seed,
):
    needs = Needs(need_image_grad, need_text_grad, need_scalar_grads)
    backend = backend or default_backend(x.device, x.dtype)
    options = {"workspace_bytes": workspace_bytes, "backend": backend}
    inputs = (x, y, logit_scale, logit_bias, image_ids, text_ids)
    # the dtypes are settled: autocast must not round the products inside once more
    with torch.autocast(x.device.type, enabled=False):
        if group_name is not None:
            return distributed.global_sweep(
                *inputs,
                negative_only,
                needs,
                group_name,
                dist_impl,
                reduction,
                (negatives, keep, seed),
                **options,
            )
        acc = logit_scale.dtype
        grad_x = x.new_empty(x.shape, dtype=acc) if needs.image else None
        grad_y = y.new_empty(y.shape, dtype=acc) if needs.text else None
        diagonal = None if negative_only or image_ids is not None else 0
        kept = None
        if negatives == "random":
            kept = RandomPairs(
                image_keys(seed, 0, len(x), x.device),
                text_keys(seed, 0, len(y), y.device),
                hash_bound(keep),
            )
        elif negatives is not None:
            kept = find_thresholds(
                x, y, logit_scale, image_ids, text_ids, diagonal, negatives, keep, **options
            )
        sums = sweep(
            *inputs, diagonal, grad_x, grad_y, scalar_grads=needs.scalars, kept=kept, **options
        )
        nothing = [x.new_empty(0, dtype=acc) for _ in range(3)]
        return (
            sums,
            nothing[0] if grad_x is None else grad_x,
            nothing[1] if grad_y is None else grad_y,
            nothing[2],
        )


@torch.library.register_fake("fused_siglip::sweep")
def _(
    x,
    y,
    logit_scale,
    logit_bias,
    image_ids,
    text_ids,
    negative_only,
    need_image_grad,
    need_text_grad,
    need_scalar_grads,
    workspace_bytes,
    backend,
    group_name,
    dist_impl,
    reduction,
    negatives,
    keep,
    seed,
):
    acc = logit_scale.dtype
    return (
        x.new_empty(3, dtype=acc),
        x.new_empty(x.shape if need_image_grad else 0, dtype=acc),
        y.new_empty(y.shape if need_text_grad else 0, dtype=acc),
        x.new_empty(0 if group_name is None else (), dtype=acc),
    )


class SigLipFunction(torch.autograd.Function):
    """Sum of the loss over all pairs, and with a group its divisor on this rank (else empty).

    The gradients are computed with it, in the forward pass; backward multiplies them by the
    upstream scalar.
    """

    @staticmethod
    def forward(
        ctx,
        x: Tensor,  # (M, D)
        y: Tensor,  # (N, D)
        logit_scale: Tensor,  # one element
        logit_bias: Tensor,  # one element
        image_ids: Tensor | None,  # (M,)
        text_ids: Tensor | None,  # (N,)
        negative_only: bool,
        dtype: torch.dtype,  # of the products' operands: x's and y's own, or autocast's
        needs: Needs,
        workspace_bytes: int | None,
        backend: str | None,
        group_name: str | None,
        dist_impl: str | None,
        reduction: str,
        negatives: str | None,
        keep: float,
        seed: int,
    ) -> tuple[Tensor, Tensor]:  # (), () or (0,)
        acc = torch.promote_types(dtype, torch.float32)
        sums, grad_x, grad_y, divisor = torch.ops.fused_siglip.sweep(
            x.to(dtype),
            y.to(dtype),
            logit_scale.to(acc).reshape(()),
            logit_bias.to(acc).reshape(()),
            image_ids,
            text_ids,
            negative_only,
            needs.image,
            needs.text,
            needs.scalars,
            workspace_bytes,
            backend,
            group_name,
            dist_impl,
            reduction,
            negatives,
            keep,
            seed,
        )
        ctx.save_for_backward(sums, grad_x, grad_y, logit_scale)
        ctx.needs = needs
        ctx.like = [(t.shape, t.dtype) for t in (x, y, logit_scale, logit_bias)]
        ctx.mark_non_differentiable(divisor)
        return sums[0], divisor

    @staticmethod
    def backward(ctx, upstream: Tensor, _):  # ()
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
        return (*grads, *[None] * 13)


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
    if dtype == saved.dtype or torch.compiler.is_compiling():
        return saved.mul(factor).to(dtype)
    # straight into half precision: on a GPU without a temporary as large as the gradient in fp32
    return torch.mul(saved, factor, out=saved.new_empty(saved.shape, dtype=dtype))
