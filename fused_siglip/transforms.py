"""What torch's transforms do with the operators: batches, tangents, counts of FLOPs."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .distributed.collectives import resolve_group
from .spec import LossSpec

TENSORS = 8  # the operators' first arguments: features, scale, bias, ids, weights

_INSTEAD = "use fused_siglip.testing.eager_siglip_loss there, which autograd differentiates"

NO_SECOND_DERIVATIVE = (
    "siglip_loss does not support double backward: its gradients are computed with the loss and "
    f"cannot be differentiated again: {_INSTEAD}"
)
NO_FORWARD_MODE = (
    "siglip_loss does not support forward-mode differentiation (torch.func.jvp, jacfwd, hessian, "
    "linearize, torch.autograd.forward_ad): use backward, torch.func.grad, vjp or jacrev for first "
    f"derivatives; for others {_INSTEAD}"
)
NO_VMAP_OF_A_GROUP = (
    "siglip_loss does not support torch.vmap in a process group, where every call is an exchange "
    "between the ranks: call it in a loop, or without group and dist_impl"
)

NO_EMPTY_VMAP = (
    "siglip_loss does not support torch.vmap over a dimension of size 0: expected one element or "
    "more (a batch of features without rows is fine)"
)


def refuse_tangents(tensors: tuple[Tensor, ...]) -> None:
    """Raise where forward-mode differentiation is to pass through one of the tensors."""
    if forward_ad._current_level < 0 or not torch._C._is_fwd_grad_enabled():
        return
    if any(forward_ad.unpack_dual(t).tangent is not None for t in tensors):
        raise RuntimeError(NO_FORWARD_MODE)


def register(operator: torch._ops.OpOverload) -> None:
    """Teach torch.vmap the operator: one call for every element of the batch."""

    def vmap(
        info: Any, in_dims: tuple[int | None, ...], *args: Any
    ) -> tuple[Tensor | tuple[Tensor, ...], int | tuple[int, ...]]:
        if LossSpec.from_op(*args[TENSORS:]).group_name is not None:
            raise RuntimeError(NO_VMAP_OF_A_GROUP)
        if info.batch_size == 0:
            raise RuntimeError(NO_EMPTY_VMAP)
        calls = [
            operator(*(_element(a, d, k) for a, d in zip(args, in_dims, strict=True)))
            for k in range(info.batch_size)
        ]
        if isinstance(calls[0], Tensor):
            return torch.stack(calls), 0
        stacked = tuple(torch.stack(values) for values in zip(*calls, strict=True))
        return stacked, (0,) * len(stacked)

    torch.library.register_vmap(operator, vmap)


def _element(argument: Any, dim: int | None, index: int) -> Any:
    return argument if dim is None else argument.select(dim, index)


def register_flops() -> None:
    """Tell torch's FlopCounterMode the operators' formula.

    Its module imports triton and takes a sixth of a second: it is not imported for this. Where a
    user has, the formula is given to it, and to the counters that run already.
    """
    module = sys.modules.get("torch.utils.flop_counter")
    if module is None:
        return
    operators = [
        getattr(torch.ops.fused_siglip, name)
        for kind in ("loss_and_grads", "image_losses")
        for name in (kind, f"global_{kind}")
    ]
    if operators[0] in getattr(module, "flop_registry", ()):
        return
    module.register_flop_formula(operators)(_flops)
    for mode in torch.utils._python_dispatch._get_current_dispatch_mode_stack():
        counter = getattr(mode, "counter", None)
        if isinstance(counter, module.FlopCounterMode):
            counter.flop_registry |= {op: module.flop_registry[op] for op in operators}


def _flops(
    x_shape: torch.Size, y_shape: torch.Size, *args: Any, out_shape: object = None, **kwargs: Any
) -> int:
    """2 M N D for the similarities, for each tower's gradient, and for each search of thresholds.

    A search takes two products, as the torch backend makes it (the Triton backend takes three).
    In a group N is this rank's number of texts times the number of ranks.
    """
    spec = LossSpec.from_op(*args[TENSORS - 2 :], **kwargs)
    texts = y_shape[0]
    if spec.group_name is not None:
        texts *= resolve_group(spec.group_name).size()
    products = 1 + spec.grads.image + spec.grads.text
    if spec.negatives.by_score:
        products += 2
    return 2 * products * x_shape[0] * texts * x_shape[1]
