"""The losses of images as a torch.autograd.Function: gradients come with the upstream vector."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .function import Outputs, below_autograd, is_eager
from .kernels import accumulate_dtype
from .rows import RowData
from .settled import Inputs
from .spec import GradMask, LossSpec


class ImageLossesFunction(torch.autograd.Function):
    """One product forward. Backward is a sweep for the loss and its gradients, in which the
    upstream vector multiplies the images' weights: sum_i u_i L_i has the gradients that are asked.

    ``function`` computes the losses from the tensors, the rows' data and the spec;
    ``gradients`` the outputs of ``loss_and_grads``.
    """

    @staticmethod
    def forward(  # noqa: PLR0913, apply takes no bundles of tensors
        ctx: Any,
        x: Tensor,
        y: Tensor,
        logit_scale: Tensor,
        logit_bias: Tensor,
        rows: RowData,
        spec: LossSpec,
        function: Callable[..., Tensor],
        gradients: Callable[..., Outputs],
    ) -> Tensor:  # (M,)
        inputs = Inputs(x, y, logit_scale, logit_bias)
        ctx.save_for_backward(*inputs, *rows)
        ctx.spec, ctx.gradients = spec, gradients
        ctx.set_materialize_grads(False)
        if torch._C._are_functorch_transforms_active():
            with torch.enable_grad():  # see SigLipFunction
                return below_autograd(function, inputs, rows, spec)
        return below_autograd(function, inputs, rows, spec)

    @staticmethod
    def backward(
        ctx: Any,
        upstream: Tensor | None,  # (M,)
    ) -> tuple[Tensor | None, ...]:
        if upstream is None:
            return (None,) * 8
        saved = ctx.saved_tensors  # once: a checkpoint computes them again for every look
        inputs, rows = Inputs(*saved[:4]), RowData(*saved[4:])
        x_needed, y_needed, *scalars_needed = ctx.needs_input_grad[:4]
        spec = ctx.spec.with_grads(GradMask(x_needed, y_needed, any(scalars_needed)))
        acc = accumulate_dtype(spec.dtype or inputs.x.dtype)
        weights = upstream.to(acc)
        if rows.image_weights is not None:
            weights = weights * rows.image_weights.to(acc)
        outputs = ctx.gradients(inputs, rows._replace(image_weights=weights), spec)
        _, factors, grad_x, grad_y = outputs
        *scalar_grads, factor = factors.unbind()
        grads = [
            _multiplied(grad_x, factor) if x_needed else None,
            _multiplied(grad_y, factor) if y_needed else None,
        ]
        grads += [g if n else None for g, n in zip(scalar_grads, scalars_needed, strict=True)]
        shaped = (
            g if g is None else g.reshape(t.shape).to(t.dtype)
            for g, t in zip(grads, inputs, strict=True)
        )
        return (*shaped, None, None, None, None)


def _multiplied(grad: Tensor, factor: Tensor) -> Tensor:
    """grad * factor, in the gradient's own memory where nothing else holds it."""
    if torch.is_grad_enabled() or not is_eager(grad, factor):
        return grad * factor
    # on a CPU the factor may be in the products already: see known_factor in settled.py
    return grad if grad.is_cpu and factor.item() == 1 else grad.mul_(factor)
