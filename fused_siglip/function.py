"""The loss as a torch.autograd.Function: gradients come with the loss, backward scales them."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.autograd.forward_ad import _set_fwd_grad_enabled

from . import transforms
from .rows import RowData
from .settled import Inputs
from .spec import LossSpec

# The loss, its factors, and the gradients of the features: see loss_and_grads in compute.py.
Outputs = tuple[Tensor, Tensor, Tensor, Tensor]
_Out = TypeVar("_Out")

# Whether the running backward keeps its graph: what torch's compiled backward asks before it reuses
# saved memory (donated buffers). Should torch drop it, gradients are copied instead.
_graph_is_kept = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", lambda: True)


class SigLipFunction(torch.autograd.Function):
    """The derivative of an operator, at torch's autograd key.

    ``function`` computes the operator's outputs from the tensors, the rows' data and the spec.
    ``image_weights`` are among the rows' data too: as an input they have no gradient, but whoever
    differentiates a gradient in them comes here as well.

    The gradients are computed in the forward pass, as further outputs; backward multiplies them by
    the upstream scalar. Whoever differentiates a gradient comes back here with a gradient of such
    an output, whatever path led to it, and is refused.
    """

    @staticmethod
    def forward(  # noqa: PLR0913, apply takes no bundles of tensors
        ctx: Any,
        x: Tensor,
        y: Tensor,
        logit_scale: Tensor,
        logit_bias: Tensor,
        image_weights: Tensor | None,
        rows: RowData,
        spec: LossSpec,
        function: Callable[..., Outputs],
    ) -> Outputs:
        inputs = Inputs(x, y, logit_scale, logit_bias)
        if torch._C._are_functorch_transforms_active():
            # With gradients enabled: an outer torch.func transform differentiates this call, and
            # turns them off where its caller has.
            with torch.enable_grad(), _set_fwd_grad_enabled(True):
                outputs = below_autograd(function, inputs, rows, spec)
        else:
            outputs = below_autograd(function, inputs, rows, spec)
        # logit_scale only so that a change of it since is noticed
        ctx.save_for_backward(*outputs[1:], logit_scale)
        ctx.grads = spec.grads
        # the products may have the factor already: see known_factor in settled.py
        ctx.factor_may_be_one = x.is_cpu and spec.backend != "triton" and spec.group_name is None
        ctx.dtypes = x.dtype, y.dtype
        ctx.scalars_like = (
            (logit_scale.shape, logit_scale.dtype), (logit_bias.shape, logit_bias.dtype),
        )  # fmt: skip
        ctx.set_materialize_grads(False)
        return outputs

    @staticmethod
    def backward(
        ctx: Any,
        upstream: Tensor | None,  # ()
        of_factors: Tensor | None,
        of_grad_x: Tensor | None,
        of_grad_y: Tensor | None,
    ) -> tuple[Tensor | None, ...]:
        if not (of_factors is None and of_grad_x is None and of_grad_y is None):
            raise RuntimeError(transforms.NO_SECOND_DERIVATIVE)
        if upstream is None:
            return (None,) * 8
        factors, grad_x, grad_y, _ = ctx.saved_tensors
        *scalar_grads, factor = (upstream * factors).unbind()
        x_dtype, y_dtype = ctx.dtypes
        slots = (None,) * 4
        if not torch.is_grad_enabled() and is_eager(upstream, factors):
            slots = ctx._raw_saved_tensors
            if ctx.factor_may_be_one and factor.item() == 1:
                factor = None
        grads: list[Tensor | None] = [None] * 4
        if ctx.grads.image:
            grads[0] = _multiply(grad_x, factor, x_dtype, slots[1])
        if ctx.grads.text:
            grads[1] = _multiply(grad_y, factor, y_dtype, slots[2])
        if ctx.grads.scalars:
            grads[2:] = [
                g if g.shape == shape and g.dtype == dtype else g.reshape(shape).to(dtype)
                for g, (shape, dtype) in zip(scalar_grads, ctx.scalars_like, strict=True)
            ]
        return (*grads, None, None, None, None)


def _multiply(saved: Tensor, factor: Tensor | None, dtype: torch.dtype, slot: Any) -> Tensor:
    """saved * factor in ``dtype``, in the saved tensor's own memory when nothing can read it again.

    A factor of None stands for 1. ``slot`` is where the tensor was saved, and None where torch
    traces or batches and plans memory itself. The saved tensor is left as it is in that case, with
    retain_graph or create_graph, and where a hook packed it.
    """
    if slot is None:
        return (saved if factor is None else saved.mul(factor)).to(dtype)
    if dtype != saved.dtype:
        if factor is None:
            return saved.to(dtype)
        # straight into half precision: on a GPU without a temporary as large as the fp32 gradient
        return torch.mul(saved, factor, out=saved.new_empty(saved.shape, dtype=dtype))
    if _graph_is_kept() or _is_hooked(slot):
        return saved.clone() if factor is None else saved.mul(factor)
    saved = saved.detach()
    return saved if factor is None else saved.mul_(factor)


def _is_hooked(slot: Any) -> bool:
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


def is_eager(*tensors: Tensor | None) -> bool:
    """Whether torch runs what it is told, and neither compiles, traces, batches nor counts it."""
    if torch.compiler.is_compiling():
        return False
    keys = torch._C._dispatch_tls_local_include_set().raw_repr()
    for tensor in tensors:
        if tensor is not None:
            keys |= torch._C._dispatch_keys(tensor).raw_repr()
    return keys | _PLAIN == _PLAIN


def below_autograd(function: Callable[..., _Out], *inputs: Any) -> _Out:
    """Call what an operator does below torch's autograd key."""
    with torch._C._AutoDispatchBelowAutograd():
        return function(*inputs)
