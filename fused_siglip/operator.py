"""The loss as two torch operators, so that torch.compile and torch.export take it as one node."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._functorch.utils import enable_single_level_autograd_function
from torch.fx.node import has_side_effect

from . import transforms
from .compute import loss_and_grads
from .function import Outputs, SigLipFunction, below_autograd, is_eager
from .kernels import Affine, Ids, Pairs
from .spec import SCHEMA, GradMask, LossSpec

# Both operators compute the same. The second exchanges tensors with other ranks, which is a side
# effect: it is not removed where nobody uses its value. They take the inputs as the caller has
# them, and return the outputs of compute.loss_and_grads: a gradient that is not needed has no
# elements.
_SCHEMA = (
    "(Tensor x, Tensor y, Tensor logit_scale, Tensor logit_bias, Tensor? image_ids, "
    f"Tensor? text_ids, {SCHEMA}) "
    "-> (Tensor loss, Tensor factors, Tensor grad_x, Tensor grad_y)"
)


def _compute(
    x: Tensor,
    y: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor,
    ids: Ids | None,
    spec: LossSpec,
) -> Outputs:
    """What the operators do on a device."""
    pairs = Pairs(None if spec.negative_only or ids is not None else 0, ids)
    affine = Affine(logit_scale, logit_bias)
    loss, factors, grad_x, grad_y = loss_and_grads(x, y, affine, pairs, spec)
    if grad_x is None:
        grad_x = loss.new_empty(0)
    if grad_y is None:
        grad_y = loss.new_empty(0)
    return loss, factors, grad_x, grad_y


def _ids(image_ids: Tensor | None, text_ids: Tensor | None) -> Ids | None:
    return None if image_ids is None or text_ids is None else Ids(image_ids, text_ids)


def _kernel(
    x: Tensor,
    y: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor,
    image_ids: Tensor | None,
    text_ids: Tensor | None,
    *flat: Any,
    **named: Any,
) -> Outputs:
    ids = _ids(image_ids, text_ids)
    return _compute(x, y, logit_scale, logit_bias, ids, LossSpec.from_op(*flat, **named))


def _fake(
    x: Tensor,
    y: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor,
    image_ids: Tensor | None,
    text_ids: Tensor | None,
    *flat: Any,
    **named: Any,
) -> Outputs:
    """The outputs' shapes and dtypes, without values."""
    spec = LossSpec.from_op(*flat, **named)
    acc = torch.promote_types(spec.dtype or x.dtype, torch.float32)
    return (
        x.new_empty((), dtype=acc),
        x.new_empty(3, dtype=acc),
        x.new_empty(x.shape if spec.grads.image else 0, dtype=acc),
        y.new_empty(y.shape if spec.grads.text else 0, dtype=acc),
    )


def _differentiable(
    function: Callable[..., Outputs],
    x: Tensor,
    y: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor,
    ids: Ids | None,
    spec: LossSpec,
) -> Outputs:
    """What an operator does at torch's autograd key; ``function`` is the rest of it."""
    tensors = x, y, logit_scale, logit_bias
    transforms.refuse_tangents(tensors)
    transforms.register_flops()
    if not (torch.is_grad_enabled() and torch._C._any_requires_grad(*tensors)):
        return below_autograd(function, *tensors, ids, spec)
    image, text, scale, bias = (t.requires_grad for t in tensors)
    asked = spec.grads  # by an inner torch.func transform
    grads = GradMask(image or asked.image, text or asked.text, scale or bias or asked.scalars)
    with enable_single_level_autograd_function():
        # without what Function adds for torch.func, which is dealt with by now
        return super(torch.autograd.Function, SigLipFunction).apply(
            *tensors, ids, spec._replace(grads=grads), function
        )


def call_operator(
    x: Tensor,
    y: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor,
    ids: Ids | None,
    spec: LossSpec,
) -> Outputs:
    """The operator's outputs. Where torch would go straight to its two kernels, they are called
    here: its way there takes longer than a small batch."""
    tensors = x, y, logit_scale, logit_bias
    if is_eager(*tensors, *(ids or ())):
        return _differentiable(_compute, *tensors, ids, spec)
    op = LOSS_AND_GRADS if spec.group_name is None else GLOBAL_LOSS_AND_GRADS
    return op(*tensors, *(ids or (None, None)), *spec.to_op())


_LIBRARY = torch.library.Library("fused_siglip", "FRAGMENT")  # which owns what is registered


def _register(name: str) -> torch._ops.OpOverload:
    torch.library.define(f"fused_siglip::{name}", _SCHEMA)
    torch.library.impl(f"fused_siglip::{name}", "default", _kernel)
    torch.library.register_fake(f"fused_siglip::{name}", _fake)
    op = getattr(torch.ops.fused_siglip, name).default

    def below(
        x: Tensor,
        y: Tensor,
        logit_scale: Tensor,
        logit_bias: Tensor,
        ids: Ids | None,
        spec: LossSpec,
    ) -> Outputs:
        return op(x, y, logit_scale, logit_bias, *(ids or (None, None)), *spec.to_op())

    def at_autograd(
        x: Tensor,
        y: Tensor,
        logit_scale: Tensor,
        logit_bias: Tensor,
        image_ids: Tensor | None,
        text_ids: Tensor | None,
        *flat: Any,
        **named: Any,
    ) -> Outputs:
        ids = _ids(image_ids, text_ids)
        return _differentiable(
            below, x, y, logit_scale, logit_bias, ids, LossSpec.from_op(*flat, **named)
        )

    _LIBRARY.impl(name, at_autograd, "Autograd")
    transforms.register(op)
    return op


LOSS_AND_GRADS = _register("loss_and_grads")
GLOBAL_LOSS_AND_GRADS = _register("global_loss_and_grads")
has_side_effect(GLOBAL_LOSS_AND_GRADS)
