"""The autograd Function around the sweep, and the sweep as a torch operator."""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor

from . import distributed
from .engine import Needs, find_thresholds, sweep
from .kernels import RandomPairs, default_backend, panel_class
from .negatives import hash_bound, image_keys, text_keys

# Whether the running backward keeps its graph: what torch's compiled backward asks before it reuses
# saved memory (donated buffers). Should torch drop it, gradients are copied instead.
_graph_is_kept = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", lambda: True)

# An operator, so that torch.compile takes the sweep as one node instead of breaking its graph.
# Returns the loss and its factors, both as Panel.finish() makes them, and the two gradients of
# sweep(). What is not needed has no elements.
torch.library.define(
    "fused_siglip::sweep",
    "(Tensor x, Tensor y, Tensor logit_scale, Tensor logit_bias, Tensor? image_ids, "
    "Tensor? text_ids, bool negative_only, bool need_image_grad, bool need_text_grad, "
    "bool need_scalar_grads, int? workspace_bytes, str? backend, str? group_name, str? dist_impl, "
    "str reduction, str? negatives, float keep, SymInt seed) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
)


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
    acc = logit_scale.dtype
    backend = backend or default_backend(x.device, x.dtype)
    inputs = (x, y, logit_scale, logit_bias, image_ids, text_ids)
    # the dtypes are settled: autocast must not round the products inside once more
    settled = contextlib.nullcontext()
    if torch.is_autocast_enabled(x.device.type):
        settled = torch.autocast(x.device.type, enabled=False)
    factor = 1.0
    with settled:
        if group_name is not None:
            sums, grad_x, grad_y, divisor = distributed.global_sweep(
                *inputs,
                negative_only,
                needs,
                group_name,
                dist_impl,
                reduction,
                (negatives, keep, seed),
                workspace_bytes=workspace_bytes,
                backend=backend,
            )
        else:
            if reduction == "sum":
                divisor = 1
            elif image_ids is None:
                divisor = max(x.shape[0], 1)
            else:
                divisor = (image_ids >= 0).sum().clamp(min=1)
            if logit_scale.is_cpu and backend == "torch":
                factor = _known_factor(logit_scale, divisor)
            sums, grad_x, grad_y = _local_sweep(
                *inputs,
                negative_only,
                needs,
                (negatives, keep, seed),
                workspace_bytes,
                backend,
                factor,
            )
        loss, factors = panel_class(backend).finish(sums, logit_scale, divisor, factor)
    return (
        loss,
        factors,
        x.new_empty(0, dtype=acc) if grad_x is None else grad_x,
        x.new_empty(0, dtype=acc) if grad_y is None else grad_y,
    )


torch.library.impl("fused_siglip::sweep", "default", _sweep)


def _local_sweep(
    x: Tensor,  # (M, D)
    y: Tensor,  # (N, D)
    logit_scale: Tensor,  # ()
    logit_bias: Tensor,  # ()
    image_ids: Tensor | None,  # (M,)
    text_ids: Tensor | None,  # (N,)
    negative_only: bool,
    needs: Needs,
    negatives: tuple[str | None, float, int],  # kind, share, seed
    workspace_bytes: int | None,
    backend: str,
    factor: float,
) -> tuple[Tensor, Tensor | None, Tensor | None]:  # (3 or 1, k), (M, D), (N, D)
    """The sums and gradients of one process: see :func:`fused_siglip.engine.sweep`."""
    acc = logit_scale.dtype
    grad_x = torch.empty(x.shape, dtype=acc, device=x.device) if needs.image else None
    grad_y = torch.empty(y.shape, dtype=acc, device=y.device) if needs.text else None
    diagonal = None if negative_only or image_ids is not None else 0
    inputs = (x, y, logit_scale, logit_bias, image_ids, text_ids, diagonal)
    options = {"workspace_bytes": workspace_bytes, "backend": backend}
    kind, keep, seed = negatives
    kept = None
    if kind == "random":
        kept = RandomPairs(
            image_keys(seed, 0, len(x), x.device),
            text_keys(seed, 0, len(y), y.device),
            hash_bound(keep),
        )
    elif kind is not None:
        kept = find_thresholds(
            x, y, logit_scale, image_ids, text_ids, diagonal, kind, keep, **options
        )
    sums = sweep(
        *inputs, grad_x, grad_y, scalar_grads=needs.scalars, factor=factor, kept=kept, **options
    )
    return sums, grad_x, grad_y


def _known_factor(logit_scale: Tensor, divisor: float | Tensor) -> float:
    """t / R, to go into the products where the host need not wait for it: then a backward from the
    loss itself has nothing to multiply. 1 where products may over- or underflow."""
    factor = logit_scale.item() / float(divisor)
    return factor if 1e-9 < abs(factor) < 1e9 else 1.0


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
        x.new_empty((), dtype=acc),
        x.new_empty(3, dtype=acc),
        x.new_empty(x.shape if need_image_grad else 0, dtype=acc),
        y.new_empty(y.shape if need_text_grad else 0, dtype=acc),
    )


class SigLipFunction(torch.autograd.Function):
    """The loss. Its gradients are computed with it, in the forward pass; backward multiplies them
    by the upstream scalar.
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
    ) -> Tensor:  # ()
        acc = torch.promote_types(dtype, torch.float32)
        loss, factors, grad_x, grad_y = torch.ops.fused_siglip.sweep.default(
            x if x.dtype == dtype else x.to(dtype),
            y if y.dtype == dtype else y.to(dtype),
            _scalar(logit_scale, acc),
            _scalar(logit_bias, acc),
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
        ctx.save_for_backward(factors, grad_x, grad_y, logit_scale)
        ctx.needs = needs
        ctx.like = [(t.shape, t.dtype) for t in (x, y, logit_scale, logit_bias)]
        return loss

    @staticmethod
    def backward(ctx, upstream: Tensor):  # ()
        # logit_scale only so that a change of it since is noticed
        factors, grad_x, grad_y, _ = ctx.saved_tensors
        *scalar_grads, factor = (upstream * factors).unbind()
        (_, x_dtype), (_, y_dtype), *scalars_like = ctx.like
        compiling = torch.compiler.is_compiling()
        # Memory of a saved gradient is taken for the result where nothing can read it again: when
        # this very backward frees the graph. With retain_graph or create_graph, and in
        # torch.compile (which plans memory itself), it stays as it is.
        last = not compiling and not _graph_is_kept()
        if last and factor.is_cpu and factor.item() == 1:
            factor = None
        grads = [
            _multiply(grad_x, factor, x_dtype, last) if ctx.needs.image else None,
            _multiply(grad_y, factor, y_dtype, last) if ctx.needs.text else None,
        ]
        for grad, (shape, dtype) in zip(scalar_grads, scalars_like, strict=True):
            if not ctx.needs.scalars:
                grad = None
            elif grad.shape != shape or grad.dtype != dtype:
                grad = grad.reshape(shape).to(dtype)
            grads.append(grad)
        if torch.is_grad_enabled() and not compiling:  # create_graph=True
            trap = torch.empty(0, requires_grad=True)
            grads = [g if g is None else _NoDoubleBackward.apply(g, trap) for g in grads]
        return (*grads, *[None] * 13)


def _scalar(value: Tensor, dtype: torch.dtype) -> Tensor:  # ()
    if value.dim() == 0 and value.dtype == dtype:
        return value  # every torch call less counts where the batch is small
    return value.to(dtype).reshape(())


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


def _multiply(saved: Tensor, factor: Tensor | None, dtype: torch.dtype, last: bool) -> Tensor:
    """saved * factor in ``dtype``; None: a factor of 1. ``last``: saved may be changed."""
    if factor is None:
        return saved.to(dtype)
    if dtype == saved.dtype and last:
        return saved.mul_(factor)
    if dtype == saved.dtype or torch.compiler.is_compiling():
        return saved.mul(factor).to(dtype)
    # straight into half precision: on a GPU without a temporary as large as the gradient in fp32
    return torch.mul(saved, factor, out=saved.new_empty(saved.shape, dtype=dtype))
