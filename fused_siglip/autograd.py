"""The sweep as a torch operator, and its derivative."""

from __future__ import annotations

import torch
from torch import Tensor
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd.forward_ad import _set_fwd_grad_enabled
from torch.fx.node import has_side_effect

from . import distributed, transforms
from .engine import Needs, find_thresholds, sweep
from .kernels import RandomPairs, default_backend
from .negatives import hash_bound, image_keys, text_keys

# Whether the running backward keeps its graph: what torch's compiled backward asks before it reuses
# saved memory (donated buffers). Should torch drop it, gradients are copied instead.
_graph_is_kept = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", lambda: True)

# Operators, so that torch.compile and torch.export take the loss as one node. Both compute the
# same. The second exchanges tensors with other ranks, which is a side effect: it is not removed
# where nobody uses its value.
# They take the inputs as the caller has them; ``dtype`` is that of the products' operands (None:
# x's). They return the sum of the loss over all pairs, with a group this rank's divisor of it, and
# what backward multiplies: dX / t, dY / t and (dt, db). What is not needed has no elements.
_SCHEMA = (
    "(Tensor x, Tensor y, Tensor logit_scale, Tensor logit_bias, Tensor? image_ids, "
    "Tensor? text_ids, bool negative_only, bool need_image_grad, bool need_text_grad, "
    "bool need_scalar_grads, int? workspace_bytes, str? backend, str? group_name, str? dist_impl, "
    "str reduction, str? negatives, float keep, SymInt seed, ScalarType? dtype=None) "
    "-> (Tensor loss, Tensor divisor, Tensor grad_x, Tensor grad_y, Tensor scalar_grads)"
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
    dtype=None,
):
    needs = Needs(need_image_grad, need_text_grad, need_scalar_grads)
    dtype = dtype or x.dtype
    acc = torch.promote_types(dtype, torch.float32)
    backend = backend or default_backend(x.device, dtype)
    options = {"workspace_bytes": workspace_bytes, "backend": backend}
    # the dtypes are settled: autocast must not round the products inside once more
    with torch.autocast(x.device.type, enabled=False):
        x, y = x.to(dtype), y.to(dtype)
        logit_scale, logit_bias = logit_scale.to(acc).reshape(()), logit_bias.to(acc).reshape(())
        inputs = (x, y, logit_scale, logit_bias, image_ids, text_ids)
        if group_name is not None:
            sums, grad_x, grad_y, divisor = distributed.global_sweep(
                *inputs,
                negative_only,
                needs,
                group_name,
                dist_impl,
                reduction,
                (negatives, keep, seed),
                **options,
            )
            return _outputs(sums, divisor, grad_x, grad_y, needs)
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
        return _outputs(sums, None, grad_x, grad_y, needs)


def _outputs(
    sums: Tensor,  # (3,)
    divisor: Tensor | None,
    grad_x: Tensor | None,
    grad_y: Tensor | None,
    needs: Needs,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """What the operators return: no output shares memory with another."""
    grads = (grad_x, grad_y, sums[1:].clone() if needs.scalars else None)
    return (
        sums[0].clone(),
        *(sums.new_empty(0) if output is None else output for output in (divisor, *grads)),
    )


def _fake(
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
    *options,
    dtype=None,
):
    dtype = options[5] if len(options) > 5 else dtype
    acc = torch.promote_types(dtype or x.dtype, torch.float32)
    return (
        x.new_empty((), dtype=acc),
        x.new_empty(0 if group_name is None else (), dtype=acc),
        x.new_empty(x.shape if need_image_grad else 0, dtype=acc),
        y.new_empty(y.shape if need_text_grad else 0, dtype=acc),
        x.new_empty(2 if need_scalar_grads else 0, dtype=acc),
    )


class SigLipFunction(torch.autograd.Function):
    """The derivative of an operator, at torch's autograd key.

    The gradients are computed in the forward pass, as further outputs; backward multiplies them by
    the upstream scalar. Whoever differentiates a gradient comes back here with a gradient of such
    an output, whatever path led to it, and is refused.
    """

    @staticmethod
    def forward(x, y, logit_scale, logit_bias, operator, options):
        inputs = (x, y, logit_scale, logit_bias, *options)
        with torch._C._AutoDispatchBelowAutograd():
            if not torch._C._are_functorch_transforms_active():
                return operator(*inputs)
            # With gradients enabled: an outer torch.func transform differentiates this call, and
            # turns them off where its caller has.
            with torch.enable_grad(), _set_fwd_grad_enabled(True):
                return operator(*inputs)

    @staticmethod
    def setup_context(ctx, inputs, output):
        *tensors, _, options = inputs
        _, divisor, grad_x, grad_y, scalar_grads = output
        ctx.save_for_backward(grad_x, grad_y, scalar_grads, inputs[2])
        ctx.needs = Needs(*options[3:6])
        ctx.like = [(t.shape, t.dtype) for t in tensors]
        ctx.mark_non_differentiable(divisor)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, upstream, _, *of_gradients):  # (), then of the other outputs
        if any(g is not None for g in of_gradients):
            raise RuntimeError(transforms.NO_SECOND_DERIVATIVE)
        if upstream is None:
            return (None,) * 6
        grad_x, grad_y, scalar_grads, logit_scale = ctx.saved_tensors
        factor = upstream * logit_scale.to(upstream.dtype).reshape(())
        (_, x_dtype), (_, y_dtype), *scalars_like = ctx.like
        grads = [None] * 4
        if ctx.needs.image:
            grads[0] = _multiply(ctx, 0, grad_x, factor, x_dtype)
        if ctx.needs.text:
            grads[1] = _multiply(ctx, 1, grad_y, factor, y_dtype)
        if ctx.needs.scalars:
            totals = scalar_grads.unbind()
            for k, (total, (shape, dtype)) in enumerate(zip(totals, scalars_like, strict=True)):
                grads[2 + k] = (upstream * total).reshape(shape).to(dtype)
        return (*grads, None, None)


def _multiply(ctx, index: int, saved: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """saved * factor in ``dtype``, in the saved tensor's own memory when nothing can read it again.

    That is so when this very backward frees the graph. With retain_graph or create_graph, where a
    hook packed the saved tensor, and where torch traces or batches (and plans memory itself), the
    saved tensor stays as it is.
    """
    if torch.is_grad_enabled() or not _is_eager(saved, factor):
        return saved.mul(factor).to(dtype)
    if dtype != saved.dtype:
        # straight into half precision: on a GPU without a temporary as large as the fp32 gradient
        return torch.mul(saved, factor, out=saved.new_empty(saved.shape, dtype=dtype))
    if _graph_is_kept() or _is_hooked(ctx, index):
        return saved.mul(factor)
    return saved.detach().mul_(factor)


def _is_eager(saved: Tensor, factor: Tensor) -> bool:
    """Whether torch runs what it is told, and neither traces, batches nor counts it."""
    return not (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._functorch.is_functorch_wrapped_tensor(saved)
        # is_grads_batched=True comes by torch's older vmap, which shows in a tensor's keys alone
        or torch._C._dispatch_keys(saved).raw_repr() != torch._C._dispatch_keys(factor).raw_repr()
    )


def _is_hooked(ctx, index: int) -> bool:
    """Whether a hook packed a saved tensor, and may hold it: then torch takes no second hook."""
    try:
        ctx._raw_saved_tensors[index].register_hooks(_same, _same)
    except RuntimeError:
        return True
    return False


def _same(tensor: Tensor) -> Tensor:
    return tensor


def _differentiable(operator: torch._ops.OpOverload):
    """The operator's kernel at torch's autograd key, which every path to it passes."""

    def kernel(x, y, logit_scale, logit_bias, *options):
        tensors = (x, y, logit_scale, logit_bias)
        transforms.refuse_tangents(tensors)
        transforms.register_flops()
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*tensors):
            image, text, *scalars = (t.requires_grad for t in tensors)
            # beside those that an inner torch.func transform has asked for
            needs = (a or b for a, b in zip(options[3:6], (image, text, any(scalars)), strict=True))
            options = (*options[:3], *needs, *options[6:])
            with enable_single_level_autograd_function():
                # without what Function adds for torch.func, which is dealt with by now
                return super(torch.autograd.Function, SigLipFunction).apply(
                    *tensors, operator, options
                )
        with torch._C._AutoDispatchBelowAutograd():
            return operator(*tensors, *options)

    return kernel


_LIBRARY = torch.library.Library("fused_siglip", "FRAGMENT")  # which owns what is registered
for _name in ("sweep", "global_sweep"):
    torch.library.define(f"fused_siglip::{_name}", _SCHEMA)
    torch.library.impl(f"fused_siglip::{_name}", "default", _sweep)
    torch.library.register_fake(f"fused_siglip::{_name}", _fake)
    _operator = getattr(torch.ops.fused_siglip, _name).default
    _LIBRARY.impl(_name, _differentiable(_operator), "Autograd")
    transforms.register(_operator)
has_side_effect(torch.ops.fused_siglip.global_sweep.default)
