"""The loss as two torch operators, so that torch.compile and torch.export take it as one node."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._functorch.utils import enable_single_level_autograd_function
from torch.fx.node import has_side_effect

from . import transforms
from .compute import loss_and_grads
from .function import Outputs, SigLipFunction, below_autograd, is_eager
from .kernels import Affine, Ids, Pairs, accumulate_dtype
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


class Inputs(NamedTuple):
    """What is differentiated, as the caller has it."""

    x: Tensor  # (M, D)
    y: Tensor  # (N, D)
    logit_scale: Tensor  # () or (1,)
    logit_bias: Tensor  # likewise


def _bundled(*flat: Any, **named: Any) -> tuple[Inputs, Ids | None, LossSpec]:
    """An operator's arguments."""
    image_ids, text_ids = flat[4:6]
    ids = None if image_ids is None else Ids(image_ids, text_ids)
    return Inputs(*flat[:4]), ids, LossSpec.from_op(*flat[6:], **named)


def _flat(inputs: Inputs, ids: Ids | None, spec: LossSpec) -> tuple[Any, ...]:
    """The way back."""
    return (*inputs, *(ids or (None, None)), *spec.to_op())


def _compute(inputs: Inputs, ids: Ids | None, spec: LossSpec) -> Outputs:
    """What the operators do on a device."""
    x, y, logit_scale, logit_bias = inputs
    pairs = Pairs(None if spec.negative_only or ids is not None else 0, ids)
    affine = Affine(logit_scale, logit_bias)
    loss, factors, grad_x, grad_y = loss_and_grads(x, y, affine, pairs, spec)
    if grad_x is None:
        grad_x = loss.new_empty(0)
    if grad_y is None:
        grad_y = loss.new_empty(0)
    return loss, factors, grad_x, grad_y


def _fake(inputs: Inputs, ids: Ids | None, spec: LossSpec) -> Outputs:
    """The outputs' shapes and dtypes, without values."""
    x, y, *_ = inputs
    acc = accumulate_dtype(spec.dtype or x.dtype)
    return (
        x.new_empty((), dtype=acc),
        x.new_empty(3, dtype=acc),
        x.new_empty(x.shape if spec.grads.image else 0, dtype=acc),
        y.new_empty(y.shape if spec.grads.text else 0, dtype=acc),
    )


def _differentiable(
    function: Callable[[Inputs, Ids | None, LossSpec], Outputs],
    inputs: Inputs,
    ids: Ids | None,
    spec: LossSpec,
) -> Outputs:
    """What an operator does at torch's autograd key; ``function`` is the rest of it."""
    transforms.refuse_tangents(inputs)
    transforms.register_flops()
    if not (torch.is_grad_enabled() and torch._C._any_requires_grad(*inputs)):
        return below_autograd(function, inputs, ids, spec)
    image, text, scale, bias = (t.requires_grad for t in inputs)
    asked = spec.grads  # by an inner torch.func transform
    grads = GradMask(image or asked.image, text or asked.text, scale or bias or asked.scalars)
    with enable_single_level_autograd_function():
        # without what Function adds for torch.func, which is dealt with by now
        return super(torch.autograd.Function, SigLipFunction).apply(
            *inputs, ids, spec.with_grads(grads), function
        )


def call_operator(inputs: Inputs, ids: Ids | None, spec: LossSpec) -> Outputs:
    """The operator's outputs. Where torch would go straight to its two kernels, they are called
    here: its way there takes longer than a small batch."""
    if is_eager(*inputs, *(ids or ())):
        return _differentiable(_compute, inputs, ids, spec)
    op = LOSS_AND_GRADS if spec.group_name is None else GLOBAL_LOSS_AND_GRADS
    return op(*_flat(inputs, ids, spec))


_LIBRARY = torch.library.Library("fused_siglip", "FRAGMENT")  # which owns what is registered


def _register(name: str) -> torch._ops.OpOverload:
    def kernel(*flat: Any, **named: Any) -> Outputs:
        return _compute(*_bundled(*flat, **named))

    def fake(*flat: Any, **named: Any) -> Outputs:
        return _fake(*_bundled(*flat, **named))

    def below(inputs: Inputs, ids: Ids | None, spec: LossSpec) -> Outputs:
        return op(*_flat(inputs, ids, spec))

    def at_autograd(*flat: Any, **named: Any) -> Outputs:
        return _differentiable(below, *_bundled(*flat, **named))

    torch.library.define(f"fused_siglip::{name}", _SCHEMA)
    torch.library.impl(f"fused_siglip::{name}", "default", kernel)
    torch.library.register_fake(f"fused_siglip::{name}", fake)
    op = getattr(torch.ops.fused_siglip, name).default
    _LIBRARY.impl(name, at_autograd, "Autograd")
    transforms.register(op)
    return op


LOSS_AND_GRADS = _register("loss_and_grads")
GLOBAL_LOSS_AND_GRADS = _register("global_loss_and_grads")
has_side_effect(GLOBAL_LOSS_AND_GRADS)
