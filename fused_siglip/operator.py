"""The loss as torch operators, so that torch.compile and torch.export take it as one node."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._functorch.utils import enable_single_level_autograd_function
from torch.fx.node import has_side_effect

from . import transforms
from .compute import image_losses, loss_and_grads
from .function import Outputs, SigLipFunction, below_autograd, is_eager
from .image_losses import ImageLossesFunction
from .kernels import accumulate_dtype
from .rows import RowData
from .settled import Inputs
from .spec import SCHEMA, GradMask, LossSpec

# Operators come in pairs that compute the same. The second exchanges tensors with other ranks, a
# side effect: it is not removed where nobody uses its value.
_ARGUMENTS = (
    "(Tensor x, Tensor y, Tensor logit_scale, Tensor logit_bias, Tensor? image_ids, "
    f"Tensor? text_ids, Tensor? image_weights, Tensor? text_weights, {SCHEMA})"
)


def _bundled(*flat: Any, **named: Any) -> tuple[Inputs, RowData, LossSpec]:
    """An operator's arguments."""
    rows = RowData(*flat[4 : transforms.TENSORS])
    return Inputs(*flat[:4]), rows, LossSpec.from_op(*flat[transforms.TENSORS :], **named)


def _flat(inputs: Inputs, rows: RowData, spec: LossSpec) -> tuple[Any, ...]:
    """The way back."""
    return (*inputs, *rows, *spec.to_op())


class _Operator(NamedTuple):
    """What an operator does: each a function of the bundles."""

    returns: str
    compute: Callable[[Inputs, RowData, LossSpec], Any]  # on a device
    fake: Callable[[Inputs, RowData, LossSpec], Any]  # the outputs' shapes and dtypes
    # at torch's autograd key; the first argument is the rest of the operator
    differentiable: Callable[[Callable[..., Any], Inputs, RowData, LossSpec], Any]


def _fake(inputs: Inputs, rows: RowData, spec: LossSpec) -> Outputs:
    x, y, *_ = inputs
    acc = accumulate_dtype(spec.dtype or x.dtype)
    return (
        x.new_empty((), dtype=acc),
        x.new_empty(3, dtype=acc),
        x.new_empty(x.shape if spec.grads.image else 0, dtype=acc),
        y.new_empty(y.shape if spec.grads.text else 0, dtype=acc),
    )


def _differentiable(
    function: Callable[..., Outputs], inputs: Inputs, rows: RowData, spec: LossSpec
) -> Outputs:
    transforms.refuse_tangents(inputs)
    transforms.register_flops()
    if not (torch.is_grad_enabled() and torch._C._any_requires_grad(*inputs)):
        return below_autograd(function, inputs, rows, spec)
    x, y, scale, bias = inputs
    asked = spec.grads  # by an inner torch.func transform
    grads = GradMask(
        x.requires_grad or asked.image,
        y.requires_grad or asked.text,
        scale.requires_grad or bias.requires_grad or asked.scalars,
    )
    return _apply(
        SigLipFunction, *inputs, rows.image_weights, rows, spec.with_grads(grads), function
    )


def _apply(function: type[torch.autograd.Function], *arguments: Any) -> Any:
    """Without what Function.apply adds for torch.func, which is dealt with by now."""
    apply = super(torch.autograd.Function, function).apply  # type: ignore[misc]
    if not torch._C._are_functorch_transforms_active():
        return apply(*arguments)
    with enable_single_level_autograd_function():
        return apply(*arguments)


def _fake_losses(inputs: Inputs, rows: RowData, spec: LossSpec) -> Tensor:  # (M,)
    acc = accumulate_dtype(spec.dtype or inputs.x.dtype)
    return inputs.x.new_empty(inputs.x.shape[0], dtype=acc)


def _differentiable_losses(
    function: Callable[..., Tensor], inputs: Inputs, rows: RowData, spec: LossSpec
) -> Tensor:  # (M,)
    transforms.refuse_tangents(inputs)
    transforms.register_flops()
    if not (torch.is_grad_enabled() and torch._C._any_requires_grad(*inputs)):
        return below_autograd(function, inputs, rows, spec)
    return _apply(ImageLossesFunction, *inputs, rows, spec, function, _call_gradients)


def _call_gradients(inputs: Inputs, rows: RowData, spec: LossSpec) -> Outputs:
    return call_operator("loss_and_grads", inputs, rows, spec)


_OPERATORS = {
    "loss_and_grads": _Operator(
        "(Tensor loss, Tensor factors, Tensor grad_x, Tensor grad_y)",
        loss_and_grads, _fake, _differentiable,
    ),
    "image_losses": _Operator("Tensor", image_losses, _fake_losses, _differentiable_losses),
}  # fmt: skip


def call_operator(name: str, inputs: Inputs, rows: RowData, spec: LossSpec) -> Any:
    """The operator's outputs. Where torch would go straight to its two kernels, they are called
    here: its way there takes longer than a small batch."""
    if is_eager(*inputs, *rows):
        operator = _OPERATORS[name]
        return operator.differentiable(operator.compute, inputs, rows, spec)
    name = name if spec.group_name is None else f"global_{name}"
    return REGISTERED[name](*_flat(inputs, rows, spec))


_LIBRARY = torch.library.Library("fused_siglip", "FRAGMENT")  # which owns what is registered


def _register(name: str, operator: _Operator) -> torch._ops.OpOverload:
    def kernel(*flat: Any, **named: Any) -> Any:
        return operator.compute(*_bundled(*flat, **named))

    def fake(*flat: Any, **named: Any) -> Any:
        return operator.fake(*_bundled(*flat, **named))

    def below(inputs: Inputs, rows: RowData, spec: LossSpec) -> Any:
        return op(*_flat(inputs, rows, spec))

    def at_autograd(*flat: Any, **named: Any) -> Any:
        return operator.differentiable(below, *_bundled(*flat, **named))

    torch.library.define(f"fused_siglip::{name}", f"{_ARGUMENTS} -> {operator.returns}")
    torch.library.impl(f"fused_siglip::{name}", "default", kernel)
    torch.library.register_fake(f"fused_siglip::{name}", fake)
    op = getattr(torch.ops.fused_siglip, name).default
    _LIBRARY.impl(name, at_autograd, "Autograd")
    transforms.register(op)
    return op


REGISTERED = {
    name: _register(name, operator)
    for kind, operator in _OPERATORS.items()
    for name, operator in ((kind, operator), (f"global_{kind}", operator))
}
for _name, _operator in REGISTERED.items():
    if _name.startswith("global_"):
        has_side_effect(_operator)
