"""The sweep as a torch operator, and its derivative."""

from __future__ import annotations

import contextlib
import functools
import operator
from collections.abc import Callable

import torch
from torch import Tensor
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd.forward_ad import _set_fwd_grad_enabled
from torch.fx.node import has_side_effect

from . import transforms
from .distributed import exchange
from .kernels import RandomMask, default_backend, panel_class
from .negatives import hash_cutoff, image_keys, text_keys
from .sweep import Needs, find_thresholds, sweep

# Whether the running backward keeps its graph: what torch's compiled backward asks before it reuses
# saved memory (donated buffers). Should torch drop it, gradients are copied instead.
_graph_is_kept = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", lambda: True)

# Operators, so that torch.compile and torch.export take the loss as one node. Both compute the
# same. The second exchanges tensors with other ranks, which is a side effect: it is not removed
# where nobody uses its value.
# They take the inputs as the caller has them; ``dtype`` is that of the products' operands (None:
# x's). They return the loss, and what backward multiplies by the upstream scalar: the factors of
# Panel.finish(), and the two gradients of sweep(). A gradient that is not needed has no elements.
_SCHEMA = (
    "(Tensor x, Tensor y, Tensor logit_scale, Tensor logit_bias, Tensor? image_ids, "
    "Tensor? text_ids, bool negative_only, bool need_image_grad, bool need_text_grad, "
    "bool need_scalar_grads, int? workspace_bytes, str? backend, str? group_name, str? dist_impl, "
    "str reduction, str? negatives, float keep, SymInt seed, ScalarType? dtype=None) "
    "-> (Tensor loss, Tensor factors, Tensor grad_x, Tensor grad_y)"
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
    # the dtypes are settled: autocast must not round the products inside once more
    settled = contextlib.nullcontext()
    if torch.is_autocast_enabled(x.device.type):
        settled = torch.autocast(x.device.type, enabled=False)
    factor = 1.0
    with settled:
        # every torch call less counts where the batch is small
        x = x if x.dtype == dtype else x.to(dtype)
        y = y if y.dtype == dtype else y.to(dtype)
        logit_scale, logit_bias = _scalar(logit_scale, acc), _scalar(logit_bias, acc)
        inputs = (x, y, logit_scale, logit_bias, image_ids, text_ids)
        if group_name is not None:
            sums, grad_x, grad_y, divisor = exchange.global_sweep(
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


def _scalar(value: Tensor, dtype: torch.dtype) -> Tensor:  # ()
    if value.dim() == 0 and value.dtype == dtype:
        return value
    return value.to(dtype).reshape(())


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
    """The sums and gradients of one process: see :func:`fused_siglip.sweep.sweep`."""
    acc = logit_scale.dtype
    grad_x = torch.empty(x.shape, dtype=acc, device=x.device) if needs.image else None
    grad_y = torch.empty(y.shape, dtype=acc, device=y.device) if needs.text else None
    diagonal = None if negative_only or image_ids is not None else 0
    inputs = (x, y, logit_scale, logit_bias, image_ids, text_ids, diagonal)
    options = {"workspace_bytes": workspace_bytes, "backend": backend}
    kind, keep, seed = negatives
    kept = None
    if kind == "random":
        kept = RandomMask(
            image_keys(seed, 0, len(x), x.device),
            text_keys(seed, 0, len(y), y.device),
            hash_cutoff(keep),
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
    *options,
    dtype=None,
):
    dtype = options[8] if len(options) > 8 else dtype
    acc = torch.promote_types(dtype or x.dtype, torch.float32)
    return (
        x.new_empty((), dtype=acc),
        x.new_empty(3, dtype=acc),
        x.new_empty(x.shape if need_image_grad else 0, dtype=acc),
        y.new_empty(y.shape if need_text_grad else 0, dtype=acc),
    )


class SigLipFunction(torch.autograd.Function):
    """The derivative of an operator, at torch's autograd key.

    The gradients are computed in the forward pass, as further outputs; backward multiplies them by
    the upstream scalar. Whoever differentiates a gradient comes back here with a gradient of such
    an output, whatever path led to it, and is refused.
    """

    @staticmethod
    def forward(ctx, x, y, logit_scale, logit_bias, function, options):
        tensors = (x, y, logit_scale, logit_bias)
        if torch._C._are_functorch_transforms_active():
            # With gradients enabled: an outer torch.func transform differentiates this call, and
            # turns them off where its caller has.
            with torch.enable_grad(), _set_fwd_grad_enabled(True):
                outputs = _below_autograd(function, (*tensors, *options))
        else:
            outputs = _below_autograd(function, (*tensors, *options))
        # logit_scale only so that a change of it since is noticed
        ctx.save_for_backward(*outputs[1:], logit_scale)
        ctx.needs = Needs(*options[3:6])
        # where _sweep may know the factor, and have it in the products already
        ctx.factor_may_be_one = x.is_cpu and options[7] != "triton" and options[8] is None
        ctx.like = [(t.shape, t.dtype) for t in tensors]
        ctx.set_materialize_grads(False)
        return outputs

    @staticmethod
    def backward(ctx, upstream, *of_gradients):  # (), then of the other outputs
        if any(g is not None for g in of_gradients):
            raise RuntimeError(transforms.NO_SECOND_DERIVATIVE)
        if upstream is None:
            return (None,) * 6
        factors, grad_x, grad_y, _ = ctx.saved_tensors
        *scalar_grads, factor = (upstream * factors).unbind()
        (_, x_dtype), (_, y_dtype), *scalars_like = ctx.like
        slots = (None,) * 4
        if not torch.is_grad_enabled() and _is_eager(upstream, factors):
            slots = ctx._raw_saved_tensors
            if ctx.factor_may_be_one and factor.item() == 1:
                factor = None
        grads = [None] * 4
        if ctx.needs.image:
            grads[0] = _multiply(grad_x, factor, x_dtype, slots[1])
        if ctx.needs.text:
            grads[1] = _multiply(grad_y, factor, y_dtype, slots[2])
        if ctx.needs.scalars:
            grads[2:] = [
                g if g.shape == shape and g.dtype == dtype else g.reshape(shape).to(dtype)
                for g, (shape, dtype) in zip(scalar_grads, scalars_like, strict=True)
            ]
        return (*grads, None, None)


def _multiply(saved: Tensor, factor: Tensor | None, dtype: torch.dtype, slot) -> Tensor:
    """saved * factor in ``dtype``, in the saved tensor's own memory when nothing can read it again.

    None stands for a factor of 1. ``slot`` is where the tensor was saved, None where torch traces
    or batches (and plans memory itself): then it stays as it is. So it does with retain_graph or
    create_graph, and where a hook packed it.
    """
    if slot is None:
        return saved.mul(factor).to(dtype)
    if dtype != saved.dtype:
        if factor is None:
            return saved.to(dtype)
        # straight into half precision: on a GPU without a temporary as large as the fp32 gradient
        return torch.mul(saved, factor, out=saved.new_empty(saved.shape, dtype=dtype))
    if _graph_is_kept() or _is_hooked(slot):
        return saved.clone() if factor is None else saved.mul(factor)
    saved = saved.detach()
    return saved if factor is None else saved.mul_(factor)


def _is_hooked(slot) -> bool:
    """Whether a hook packed a saved tensor, and may hold it: then torch takes no second hook."""
    try:
        slot.register_hooks(_same, _same)
    except RuntimeError:
        return True
    return False


def _same(tensor: Tensor) -> Tensor:
    return tensor


# The dispatch keys of a plain tensor on a CPU or a GPU where no mode or transform is active.
_PLAIN = functools.reduce(
    operator.or_,
    (
        torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, name)).raw_repr()
        for name in (
            *("CPU", "AutogradCPU", "AutocastCPU", "CUDA", "AutogradCUDA", "AutocastCUDA"),
            *("ADInplaceOrView", "BackendSelect"),
        )
    ),
)


def _is_eager(*tensors: Tensor) -> bool:
    """Whether torch runs what it is told, and neither compiles, traces, batches nor counts it."""
    if torch.compiler.is_compiling():
        return False
    keys = torch._C._dispatch_tls_local_include_set().raw_repr()
    for tensor in tensors:
        keys |= torch._C._dispatch_keys(tensor).raw_repr()
    return keys | _PLAIN == _PLAIN


def _below_autograd(function: Callable, inputs: tuple):
    """What the operator does below torch's autograd key."""
    with torch._C._AutoDispatchBelowAutograd():
        return function(*inputs)


def _differentiable(function: Callable, *inputs):
    """What the operator does at torch's autograd key; ``function`` is the rest of it."""
    tensors, options = inputs[:4], inputs[4:]
    transforms.refuse_tangents(tensors)
    transforms.register_flops()
    if not (torch.is_grad_enabled() and torch._C._any_requires_grad(*tensors)):
        return _below_autograd(function, inputs)
    image, text, scale, bias = (t.requires_grad for t in tensors)
    for_image, for_text, for_scalars = options[3:6]  # an inner torch.func transform has asked
    options = (
        *options[:3],
        image or for_image,
        text or for_text,
        scale or bias or for_scalars,
        *options[6:],
    )
    with enable_single_level_autograd_function():
        # without what Function adds for torch.func, which is dealt with by now
        return super(torch.autograd.Function, SigLipFunction).apply(*tensors, function, options)


def call_operator(op: torch._ops.OpOverload, *inputs):
    """The operator's outputs. Where torch would go straight to its two kernels, they are called
    here: its way there takes longer than a small batch."""
    if _is_eager(*(t for t in inputs[:6] if t is not None)):
        return _differentiable(_sweep, *inputs)
    return op(*inputs)


_LIBRARY = torch.library.Library("fused_siglip", "FRAGMENT")  # which owns what is registered


def _register(name: str) -> torch._ops.OpOverload:
    torch.library.define(f"fused_siglip::{name}", _SCHEMA)
    torch.library.impl(f"fused_siglip::{name}", "default", _sweep)
    torch.library.register_fake(f"fused_siglip::{name}", _fake)
    op = getattr(torch.ops.fused_siglip, name).default
    _LIBRARY.impl(name, functools.partial(_differentiable, op), "Autograd")
    transforms.register(op)
    return op


SWEEP, GLOBAL_SWEEP = _register("sweep"), _register("global_sweep")
has_side_effect(GLOBAL_SWEEP)
